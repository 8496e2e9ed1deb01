"""The pages: what they show, to whom, what they say they cover, and how they fail (checklist 81, 82, 89,
90)."""

from __future__ import annotations

import re
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from archive.archive import Archive
from archive.ledger import CertificateRow, Ledger, WardState
from archive.model import Level, Ward
from federation.coverage import CoverageState
from portal import assets
from portal.settings import PortalSettings
from portal.studies import contains, dicom_date, dicom_time, person_name, read_search
from tests.datasets import make_instance, make_study
from tests.portal.portals import (
    NOW_US,
    WARD,
    AppMaker,
    ArchiveSource,
    Clock,
    EmptySource,
    client_of,
    provenance,
    signed_in,
    take_in,
)
from tests.portal.test_signin import every_path

GASLINI = "gaslini/paediatrics"
HERE = EmptySource().wards[0]
THERE = replace(HERE, ward=GASLINI, hospital="Gaslini", name="Paediatrics")
HOUR_US = 3_600 * 1_000_000


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_a_row_says_who_what_where_and_how_many(make_app: AppMaker, archive: Archive) -> None:
    take_in(archive, make_study(4, series=2))
    take_in(archive, [make_instance(patient_name="Bianchi^Luca")], provenance(GASLINI, "GASLINI"))
    page = signed_in(make_app(ArchiveSource(archive, (HERE, THERE))), "doc").get("/studies").text
    words = text_of(page)
    for expected in (
        "Rossi, Maria", "123 (SANMARTINO)", "123 (GASLINI)", "2026-01-02", "10:15", "Thorax", "Accession A1",
        "San Martino Radiology", "Gaslini Paediatrics", "2 studies, newest first",
        "care relations come later",
    ):  # fmt: skip
        assert expected.lower() in words.lower(), expected
    assert re.search(r'<td class="number">2</td>\s*<td class="number">4</td>', page)
    assert re.search(r'href="/viewer/viewer\?StudyInstanceUIDs=[\d.]+"', page)


def test_nothing_found_says_what_that_covers(make_app: AppMaker) -> None:
    as_of = replace(HERE, state=CoverageState.AS_OF, complete_to_us=NOW_US - HOUR_US)
    away = replace(
        THERE, state=CoverageState.INCOMPLETE, pending=3, reason="3 instances are at the ward, which is away"
    )
    page = signed_in(make_app(EmptySource((as_of, away))), "doc").get("/studies?name=nobody").text
    words = text_of(page)
    assert "None found where this answer looked." in words and "No studies." not in words
    assert "San Martino Radiology as of" in words
    assert "This answer is not complete." in words
    assert "Gaslini Paediatrics incomplete: 3 instances are at the ward" in words


def test_the_search_is_in_the_url_and_finds(make_app: AppMaker, archive: Archive) -> None:
    take_in(
        archive, [make_instance(patient_name="Müller^Jörg^Anton", patient_id="P-77", StudyDate="20260615")]
    )
    take_in(archive, [make_instance(patient_name="Other^One", StudyDescription="Knee", modality="MR")])
    client = signed_in(make_app(ArchiveSource(archive)), "doc")
    for query, found in (
        ("name=muller", True), ("name=M%C3%BCller+J", True), ("name=Anton", True), ("id=p-77", False),
        ("id=P-7", True), ("from=2026-06-01&to=2026-06-30", True), ("from=2026-07-01", False),
        ("to=2026-01-31", False), ("modality=CT", True), ("modality=MR", False), ("accession=A1", True),
        ("description=hora", True), ("name=M*er", True), ("from=nonsense", True),
    ):  # fmt: skip
        response = client.get(f"/studies?{query}")
        assert ("Müller, Jörg, Anton" in response.text) is found, query
    form = client.get('/studies?name=a"b&page=0').text
    assert 'name="name" value="a&#34;b"' in form
    fragment = client.get("/studies?name=x&id=&page=", headers={"HX-Request": "true"})
    assert fragment.headers["hx-replace-url"] == "/studies?name=x"


def test_pages_of_results(make_app: AppMaker, archive: Archive) -> None:
    take_in(archive, [make_instance(patient_name=f"N{i:03}", StudyTime=f"{100000 + i}") for i in range(53)])
    client = signed_in(make_app(ArchiveSource(archive)), "doc")
    first = client.get("/studies?name=N").text
    assert first.count(">Open</a>") == 50 and "The newest 50 studies." in first
    link = re.search(r'href="([^"]+)" rel="next"', first)
    assert link is not None
    second = client.get(link.group(1).replace("&amp;", "&")).text
    assert second.count(">Open</a>") == 3 and "3 studies further" in second and 'rel="first"' in second
    assert "No further studies." in client.get("/studies?after=00010101__1").text


NASTY = ("<img src=x onerror=alert(1)>", '"><script>alert(1)</script>', "\u202eevil", "a\rb\nc", "{{7*7}}")


@pytest.mark.parametrize("name", NASTY)
def test_names_are_text(make_app: AppMaker, archive: Archive, ledger: Ledger, name: str) -> None:
    take_in(
        archive,
        [make_instance(patient_name=name.replace("\r", " ").replace("\n", " "), StudyDescription="X")],
    )
    client = signed_in(make_app(ArchiveSource(archive)), "doc")
    page = (
        client.get("/studies", params={"name": name, "description": name}).text + client.get("/studies").text
    )
    assert "<script>alert" not in page and "<img" not in page and "49" not in text_of(page)
    assert all("\n" not in row.subject and "\r" not in row.subject for row in ledger.audit_rows())


def test_a_technician_sees_the_own_ward(make_app: AppMaker, archive: Archive) -> None:
    take_in(archive, [make_instance(patient_name="Own^Patient")])
    take_in(archive, [make_instance(patient_name="Foreign^Patient")], provenance(GASLINI, "GASLINI"))
    client = signed_in(make_app(ArchiveSource(archive, (HERE, THERE))), "tech")
    assert "Own, Patient" in client.get("/studies").text
    assert "Foreign" not in client.get("/studies").text
    assert "Gaslini" not in client.get("/wards").text


def test_it_sees_health_and_no_studies(make_app: AppMaker, ledger: Ledger) -> None:
    app = make_app()
    client = signed_in(app, "it")
    denied = client.get("/studies")
    assert denied.status_code == 403 and "no images" in denied.text
    assert client.get("/health").status_code == 200
    assert signed_in(app, "doc").get("/health").status_code == 403
    outcomes = {(row.who, row.act, row.outcome) for row in ledger.audit_rows()}
    assert {("it", "search studies", "denied"), ("it", "see health", "success"),
            ("doc", "see health", "denied")} <= outcomes  # fmt: skip


def test_health_says_what_needs_attention(make_app: AppMaker, ledger: Ledger) -> None:
    day_us = 24 * HOUR_US
    ledger.add_ward(Ward(WARD, "San Martino", "Radiology", "SANMARTINO"))
    ledger.put_ward_state(
        WardState(
            WARD, b"e", pending=42, pending_bytes=1_234_567_890, oldest_pending_us=NOW_US - 2 * HOUR_US,
            seen_us=NOW_US, attached=True, attached_since_us=NOW_US - HOUR_US, version="0.1.0",
            skew_us=90_000_000,
        )
    )  # fmt: skip
    ledger.add_certificate(
        CertificateRow("01", "f1", "s1", "spiffe://r/node/x/y", "node", WARD, 0, NOW_US + 2 * day_us)
    )
    ward = replace(HERE, state=CoverageState.INCOMPLETE, pending=42, reason="42 instances were not asked for")
    words = text_of(signed_in(make_app(EmptySource((ward, THERE))), "it").get("/health").text)
    for expected in (
        "42 (1.2 GB)", "2 h", "2 days", "+90.0 s", "0.1.0", "connected", "the oldest image has waited 2 h",
        "certificate 2 days", "its clock is +90 s off", "Gaslini Paediatrics:",
    ):  # fmt: skip
        assert expected in words, expected
    ledger.revoke_certificate("f1", "lost")
    assert "certificate revoked" in text_of(
        signed_in(make_app(EmptySource((ward,))), "it").get("/health").text
    )


def test_headers_are_on_every_route(make_app: AppMaker) -> None:
    app = make_app()
    client = signed_in(app, "doc")
    for path in [*every_path(app), "/no/such/page", "/dicom-web/no/such"]:
        response = client.get(path, headers={"Accept": "*/*"})
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy or "text/javascript" in response.headers["content-type"], path
        if response.headers.get("content-type", "").startswith("text/html"):
            assert "frame-ancestors 'none'" in policy and "base-uri 'none'" in policy, path
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "same-origin"
        assert response.headers["cross-origin-opener-policy"] == "same-origin"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        cached = response.headers["cache-control"]
        assert "no-store" in cached or path.startswith(("/static/", "/viewer/")), path
        assert "strict-transport-security" not in response.headers


@pytest.mark.skipif(not assets.is_current(), reason="the assets are not made: python -m portal.assets")
def test_the_viewer_is_served_compressed_and_cached(make_app: AppMaker) -> None:
    client = signed_in(make_app(), "doc")
    page = client.get("/viewer/viewer?StudyInstanceUIDs=1.2")
    assert page.status_code == 200 and "'unsafe-eval'" not in page.headers["content-security-policy"]
    assert page.headers["cache-control"] == "no-cache"
    bundle = re.search(r'src="(/viewer/app\.bundle\.[0-9a-f]+\.js)"', page.text)
    assert bundle is not None
    script = client.get(bundle.group(1))
    assert script.headers["content-encoding"] == "gzip" and "immutable" in script.headers["cache-control"]
    assert "'unsafe-eval'" in script.headers["content-security-policy"]  # for workers
    plain = client.get(bundle.group(1), headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers and plain.content == script.content
    again = client.get(bundle.group(1), headers={"If-None-Match": script.headers["etag"]})
    assert again.status_code == 304
    config = client.get("/viewer/app-config.js")
    assert config.headers["cache-control"] == "no-store" and "/dicom-web/for/" in config.text
    assert client.get("/viewer/").headers["location"] == "/studies"
    for outside in ("/viewer/..%2f..%2fsettings.py", "/viewer/%2e%2e/manifest.json", "/viewer/x.js"):
        assert client.get(outside).status_code == 404
    assert client_of(make_app()).get("/viewer/viewer").status_code == 303


def test_without_assets_the_pages_work_and_say_so(make_app: AppMaker, tmp_path: Path) -> None:
    client = signed_in(make_app(settings=PortalSettings(assets=tmp_path / "none")), "doc")
    assert client.get("/studies").status_code == 200
    viewer = client.get("/viewer/viewer?StudyInstanceUIDs=1.2")
    assert viewer.status_code == 503 and "make setup" in viewer.text


def test_no_audit_no_answer(make_app: AppMaker, ledger: Ledger, tmp_path: Path, archive: Archive) -> None:
    """The audit log can't be written (the database refuses): reads answer 503 and show nothing."""
    instance = make_instance()
    take_in(archive, [instance])
    source = ArchiveSource(archive)
    client = signed_in(make_app(source), "doc")
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
    page = client.get("/studies")
    assert page.status_code == 503 and "Rossi" not in page.text
    found = client.get("/dicom-web/studies", headers={"Accept": "application/dicom+json"})
    assert found.status_code == 503 and found.headers["retry-after"]
    study = client.get(f"/dicom-web/studies/{instance.study_uid}", headers={"Accept": "*/*"})
    assert study.status_code == 503
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("DROP TRIGGER full")
    assert "Rossi" in client.get("/studies").text  # by itself, without a restart


def test_words() -> None:
    assert person_name("Rossi^Maria^^Dr") == "Rossi, Maria, Dr"
    assert (
        person_name("Yamada^Tarou=山田^太郎=やまだ^たろう") == "Yamada, Tarou (山田, 太郎) (やまだ, たろう)"
    )
    assert person_name("") == "" and person_name("^^") == ""
    assert (dicom_date("20260102"), dicom_date("1.1.26"), dicom_date("")) == ("2026-01-02", "1.1.26", "")
    assert (dicom_time("101530.5"), dicom_time("10"), dicom_time("")) == ("10:15", "10", "")
    assert contains("rossi  maria") == "*rossi*maria*" and contains(" ") == "" and contains("a\\b") == "*a?b*"
    search = read_search(
        {"name": " x\x00y\n", "modality": "ct;drop", "after": "20260101_10_x", "from": "2026-13-01"}
    )
    assert (search.name, search.modality, search.after, search.date_from) == ("xy", "", None, "")
    assert search.query().level is Level.STUDY


def test_a_page_that_refreshes_itself_keeps_nobody_signed_in(
    make_app: AppMaker, ledger: Ledger, clock: Clock
) -> None:
    client = signed_in(make_app(), "it")
    assert 'hx-headers=\'{"MISS-Refresh": "1"}\'' in client.get("/health").text
    rows = len(ledger.audit_rows())
    for _ in range(20):
        clock.pass_s(100)
        answer = client.get("/health", headers={"MISS-Refresh": "1", "HX-Request": "true"})
    assert answer.status_code == 401 and answer.headers["hx-redirect"].startswith("/login")
    assert len(ledger.audit_rows()) == rows


def test_health_of_one_node(make_app: AppMaker) -> None:
    alone = replace(HERE, state=CoverageState.ANSWERED, pending=7)
    words = text_of(signed_in(make_app(EmptySource((alone,))), "it").get("/health").text)
    assert "this node" in words and "Nothing needs attention" in words
