"""WADO-RS over a real archive (dicom-rules W1 to W11, OH10, OH11): stored bytes, transfer syntaxes,
metadata, frames, bulk data, pictures."""

from __future__ import annotations

import email
import gzip
import hashlib
import struct
import tracemalloc
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pydicom
import pytest
from pydicom.data import get_testdata_file
from starlette.testclient import TestClient

from archive.archive import Archive
from archive.ledger import Ledger
from archive.model import Fact, FactKind
from archive.space.eviction import EvictionRequest
from portal.settings import DicomWebSettings, PortalSettings
from tests.datasets import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    NATIVE,
    RLE,
    Instance,
    instance_from_file,
    make_instance,
    make_study,
)
from tests.portal.portals import AppMaker, ArchiveSource, provenance, signed_in, take_in

ROOT = "/dicom-web"
JSON = {"Accept": "application/dicom+json"}
DICOM = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
OHIF = {"Accept": "multipart/related; type=application/octet-stream; transfer-syntax=*"}


def path_of(instance: Instance) -> str:
    return f"/studies/{instance.study_uid}/series/{instance.series_uid}/instances/{instance.sop_instance_uid}"


def kinds_of(response: Any) -> list[str]:
    """The content types of the parts, by another reader than ours."""
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + response.content)
    assert message.is_multipart(), response.content[:200]
    return [str(part["Content-Type"]) for part in message.walk() if not part.is_multipart()]


def exact_parts(response: Any) -> list[tuple[str, bytes]]:
    """The parts cut at the boundary: the email package turns line ends of binary content."""
    mark = response.headers["content-type"].rpartition("boundary=")[2].encode()
    pieces = response.content.split(b"--" + mark)
    assert pieces[0] == b"" and pieces[-1] == b"--\r\n"
    found = []
    for piece in pieces[1:-1]:
        head, _, content = piece.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().strip().split("\r\n"))
        found.append((headers["Content-Type"], content.removesuffix(b"\r\n")))
    return found


def test_pieces_agree_with_another_reader(client: TestClient, archive: Archive) -> None:
    study = make_study(2)
    take_in(archive, study)
    response = client.get(f"{ROOT}/studies/{study[0].study_uid}", headers=DICOM)
    assert kinds_of(response) == [kind for kind, _ in exact_parts(response)]


@pytest.fixture
def client(make_app: AppMaker, archive: Archive) -> TestClient:
    return signed_in(make_app(ArchiveSource(archive)), "doc")


def dataset_bytes(part10: bytes) -> bytes:
    """What follows group 2 (PS3.10 7.1)."""
    assert part10[128:132] == b"DICM"
    (length,) = struct.unpack("<I", part10[140:144])
    return part10[144 + length :]


@pytest.mark.parametrize("syntax", [*NATIVE, RLE])
def test_the_stored_bytes_come_back_as_they_came(client: TestClient, archive: Archive, syntax: str) -> None:
    study = make_study(3, series=2, transfer_syntax=syntax)
    take_in(archive, study)
    first = study[0]
    for url, count in (
        (f"/studies/{first.study_uid}", 3),
        (f"/studies/{first.study_uid}/series/{first.series_uid}", 2),
        (path_of(first), 1),
    ):
        response = client.get(ROOT + url, headers=DICOM)
        assert response.status_code == 200
        parts = exact_parts(response)
        assert len(parts) == count
        assert {kind for kind, _ in parts} == {f"application/dicom; transfer-syntax={syntax}"}
        digests = {hashlib.sha256(dataset_bytes(content)).digest() for _, content in parts}
        assert digests <= {i.digest for i in study} and len(digests) == count
    bare = client.get(ROOT + path_of(first), headers={"Accept": "application/dicom; transfer-syntax=*"})
    assert bare.headers["content-type"] == f"application/dicom; transfer-syntax={syntax}"
    assert dataset_bytes(bare.content) == first.dataset
    assert int(bare.headers["content-length"]) == len(bare.content)


@pytest.mark.parametrize("syntax", [*NATIVE, RLE])
def test_explicit_little_endian_is_the_default(client: TestClient, archive: Archive, syntax: str) -> None:
    instance = make_instance(transfer_syntax=syntax, RedPaletteColorLookupTableData=b"\1\2\3\4")
    take_in(archive, [instance])
    for accept in ("application/dicom", f"application/dicom; transfer-syntax={EXPLICIT}"):
        response = client.get(ROOT + path_of(instance), headers={"Accept": accept})
        assert response.headers["content-type"] == f"application/dicom; transfer-syntax={EXPLICIT}"
        told = pydicom.dcmread(BytesIO(response.content))
        assert told.file_meta.TransferSyntaxUID == EXPLICIT
        stored = instance.read()
        assert (told.pixel_array == stored.pixel_array).all()
        assert told.PatientName == stored.PatientName and told.StudyInstanceUID == instance.study_uid


def test_what_can_not_be_given_is_406(client: TestClient, archive: Archive) -> None:
    undecodable = make_instance(transfer_syntax="1.2.840.10008.1.2.4.80", encapsulated=[b"no jpeg-ls"])
    native = make_instance()
    take_in(archive, [undecodable, native])
    for instance, accept in (
        (undecodable, f"application/dicom; transfer-syntax={EXPLICIT}"),
        (undecodable, "application/dicom; transfer-syntax=1.2.840.10008.1.2.4.70"),
        (native, "application/dicom; transfer-syntax=1.2.840.10008.1.2"),
        (native, "text/html"),
        (native, "image/jpeg"),
    ):
        response = client.get(ROOT + path_of(instance), headers={"Accept": accept})
        assert response.status_code == 406, accept
        assert "transfer-syntax=*" in response.json()["detail"]
    study = client.get(f"{ROOT}/studies/{native.study_uid}", headers={"Accept": "application/dicom"})
    assert study.status_code == 406  # a bare answer holds one instance
    kept = client.get(ROOT + path_of(undecodable), headers={"Accept": "application/dicom"})
    assert kept.status_code in (200, 406)


def test_some_of_a_study_is_206(client: TestClient, archive: Archive) -> None:
    native = make_instance()
    rle = make_instance(transfer_syntax=RLE, study_uid=native.study_uid)
    take_in(archive, [native, rle])
    accept = {"Accept": f'multipart/related; type="application/dicom"; transfer-syntax={RLE}'}
    response = client.get(f"{ROOT}/studies/{native.study_uid}", headers=accept)
    assert response.status_code == 206 and len(exact_parts(response)) == 1


def test_what_is_not_there_and_what_is_hidden_are_one_answer(
    make_app: AppMaker, archive: Archive, ledger: Ledger
) -> None:
    hidden = make_instance()
    take_in(archive, [hidden], provenance("gaslini/paediatrics", "GASLINI"))
    client = signed_in(make_app(ArchiveSource(archive)), "tech")
    path, nowhere = path_of(hidden), "/studies/1.2.3/series/1.2.4/instances/1.2.5"
    for suffix, accept in (
        ("", DICOM), ("/metadata", JSON), ("/frames/1", OHIF), ("/rendered", {"Accept": "image/png"}),
        ("/thumbnail", {"Accept": "image/png"}), ("/bulk/7FE00010", OHIF),
    ):  # fmt: skip
        seen = client.get(ROOT + path + suffix, headers=accept)
        absent = client.get(ROOT + nowhere + suffix, headers=accept)
        assert seen.status_code == absent.status_code == 404
        assert seen.content == absent.content and seen.headers.keys() == absent.headers.keys()
    guesses = [row for row in ledger.audit_rows() if row.outcome == "not found"]
    assert len(guesses) == 12 and sum(hidden.study_uid in row.subject for row in guesses) == 6
    assert client.get(f"{ROOT}/studies/1.02.3", headers=DICOM).status_code == 400


def test_metadata_at_three_levels(client: TestClient, archive: Archive) -> None:
    study = make_study(3, series=2, patient_name="Müller^Jörg")
    take_in(archive, study)
    first = study[0]
    for url, count in (
        (f"/studies/{first.study_uid}", 3),
        (f"/studies/{first.study_uid}/series/{first.series_uid}", 2),
        (path_of(first), 1),
    ):
        response = client.get(f"{ROOT}{url}/metadata", headers=JSON)
        assert response.headers["content-type"] == "application/dicom+json"
        assert response.headers["content-encoding"] == "gzip"
        found = response.json()
        assert len(found) == count
    (told,) = found
    assert told["00100010"]["Value"][0]["Alphabetic"] == "Müller^Jörg"
    assert told["00100021"]["Value"] == ["SANMARTINO"]  # the issuer in force, though the data set has none
    uri = told["7FE00010"]["BulkDataURI"]
    assert uri.startswith(f"http://127.0.0.1{ROOT}{path_of(first)}/bulk/")
    bulk = client.get(uri, headers={"Accept": 'multipart/related; type="application/octet-stream"'})
    ((kind, content),) = exact_parts(bulk)
    assert kind == "application/octet-stream" and content == first.read().PixelData
    alone = client.get(uri, headers={"Accept": "application/octet-stream"})
    assert alone.content == content
    assert client.get(uri.replace("7FE00010", "7FE00011"), headers=OHIF).status_code == 404
    assert client.get(uri.replace("7FE00010", "..%2f..%2fx"), headers=OHIF).status_code == 404


def test_metadata_accepts_and_tags(client: TestClient, archive: Archive) -> None:
    instance = make_instance()
    take_in(archive, [instance])
    url = f"{ROOT}{path_of(instance)}/metadata"
    other = "application/dicom+json, multipart/related; type=application/octet-stream; transfer-syntax=*"
    response = client.get(url, headers={"Accept": other})
    assert response.status_code == 200 and response.json()
    again = client.get(url, headers=JSON | {"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304
    xml = client.get(url, headers={"Accept": 'multipart/related; type="application/dicom+xml"'})
    ((kind, content),) = exact_parts(xml)
    assert kind == "application/dicom+xml" and b'keyword="SOPInstanceUID"' in content
    assert client.get(url, headers={"Accept": "text/html"}).status_code == 406
    plain = client.get(url, headers=JSON | {"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers and plain.json() == response.json()


@pytest.mark.parametrize(
    ("syntax", "media_type"),
    [
        ("1.2.840.10008.1.2.4.50", "image/jpeg"), ("1.2.840.10008.1.2.4.70", "image/jpeg"),
        ("1.2.840.10008.1.2.4.80", "image/jls"), ("1.2.840.10008.1.2.4.90", "image/jp2"),
        ("1.2.840.10008.1.2.4.201", "image/jphc"), ("1.2.840.10008.1.2.5", "image/dicom-rle"),
    ],
)  # fmt: skip
def test_compressed_frames_go_as_they_are(
    client: TestClient, archive: Archive, syntax: str, media_type: str
) -> None:
    sent = [b"\xff\xd8frame number one!", b"\xff\xd8and the second", b"\xff\xd8a third frame."]
    instance = make_instance(transfer_syntax=syntax, encapsulated=sent)
    take_in(archive, [instance])
    for number, frame in enumerate(sent, 1):
        response = client.get(f"{ROOT}{path_of(instance)}/frames/{number}", headers=OHIF)
        ((kind, content),) = exact_parts(response)
        assert kind == f"{media_type}; transfer-syntax={syntax}" and content.rstrip(b"\0") == frame
    listed = exact_parts(client.get(f"{ROOT}{path_of(instance)}/frames/3,1", headers=OHIF))
    assert [content.rstrip(b"\0") for _, content in listed] == [sent[2], sent[0]]
    single = client.get(f"{ROOT}{path_of(instance)}/frames/2", headers={"Accept": media_type})
    assert single.content.rstrip(b"\0") == sent[1] and single.headers["content-type"].startswith(media_type)
    typed = {"Accept": f'multipart/related; type="{media_type}"; transfer-syntax={syntax}'}
    assert client.get(f"{ROOT}{path_of(instance)}/frames/1", headers=typed).status_code == 200


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED])
def test_native_frames_are_little_endian_octets(client: TestClient, archive: Archive, syntax: str) -> None:
    instance = make_instance(transfer_syntax=syntax, frames=3)
    take_in(archive, [instance])
    pixels = instance.read().pixel_array
    for accept in (OHIF, {"Accept": "multipart/related; type=application/octet-stream"}, {"Accept": "*/*"}):
        response = client.get(f"{ROOT}{path_of(instance)}/frames/2", headers=accept)
        content = (
            exact_parts(response)[0][1]
            if "multipart" in response.headers["content-type"]
            else response.content
        )
        assert (numpy.frombuffer(content, "<u2").reshape(16, 16) == pixels[1]).all()


def test_octets_are_decoded_for_those_who_insist(client: TestClient, archive: Archive) -> None:
    instance = make_instance(transfer_syntax=RLE, frames=2)
    take_in(archive, [instance])
    accept = {"Accept": "multipart/related; type=application/octet-stream"}
    ((kind, content),) = exact_parts(client.get(f"{ROOT}{path_of(instance)}/frames/2", headers=accept))
    assert kind == f"application/octet-stream; transfer-syntax={EXPLICIT}"
    assert (numpy.frombuffer(content, "<u2").reshape(16, 16) == instance.read().pixel_array[1]).all()


def test_frames_that_are_not_there(client: TestClient, archive: Archive) -> None:
    instance, text = make_instance(frames=2), make_instance(rows=0)
    take_in(archive, [instance, text])
    path = ROOT + path_of(instance)
    assert client.get(f"{path}/frames/3", headers=OHIF).status_code == 404
    assert client.get(f"{ROOT}{path_of(text)}/frames/1", headers=OHIF).status_code == 404
    for wrong in ("0", "-1", "x", "1,,2", "1.5", ",".join(["1"] * 1_001)):
        assert client.get(f"{path}/frames/{wrong}", headers=OHIF).status_code == 400, wrong
    assert client.get(f"{path}/frames/1,2", headers={"Accept": "application/octet-stream"}).status_code == 406


def png_size(content: bytes) -> tuple[int, int]:
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, bits, colour = struct.unpack(">IIBB", content[16:26])
    position, data = 8, b""
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        if content[position + 4 : position + 8] == b"IDAT":
            data += content[position + 8 : position + 8 + length]
        position += 12 + length
    assert bits == 8 and len(zlib.decompress(data)) == height * (1 + width * (3 if colour == 2 else 1))
    return width, height


@pytest.mark.parametrize(
    "name",
    ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "examples_palette.dcm",
     "examples_rgb_color.dcm", "examples_ybr_color.dcm", "JPEG2000.dcm", "SC_rgb_jpeg_dcmtk.dcm",
     "liver_1frame.dcm"],
)  # fmt: skip
def test_real_images_are_rendered(client: TestClient, archive: Archive, name: str) -> None:
    found = get_testdata_file(name, download=False)
    if found is None:
        pytest.skip(f"pydicom does not bring {name}")
    instance = instance_from_file(Path(str(found)))
    take_in(archive, [instance])
    path = ROOT + path_of(instance)
    for suffix in ("/rendered", "/frames/1/rendered", "/thumbnail", "/frames/1/thumbnail"):
        response = client.get(path + suffix, headers={"Accept": "image/png"})
        if response.status_code == 406:
            pytest.skip(f"no decoder for {name} here")
        width, height = png_size(response.content)
        assert max(width, height) <= 128 or "rendered" in suffix
    jpeg = client.get(f"{path}/rendered?viewport=40,30&quality=50", headers={"Accept": "image/jpeg"})
    assert jpeg.status_code == 200 and jpeg.content[:2] == b"\xff\xd8"
    study = client.get(f"{ROOT}/studies/{instance.study_uid}/thumbnail", headers={"Accept": "image/*"})
    assert study.status_code == 200
    for wrong in ("viewport=0,5", "viewport=a,b", "window=1", "quality=0", "quality=101"):
        assert client.get(f"{path}/rendered?{wrong}", headers={"Accept": "image/png"}).status_code == 400


def test_a_window_is_applied(client: TestClient, archive: Archive) -> None:
    instance = make_instance(WindowCenter="100", WindowWidth="50")
    take_in(archive, [instance])
    url = f"{ROOT}{path_of(instance)}/rendered"
    answers = {
        client.get(url + q, headers={"Accept": "image/png"}).content
        for q in ("", "?window=30000,60000,linear")
    }
    assert len(answers) == 2
    png = {"Accept": "image/png"}
    assert client.get(f"{url}?window=100,50,sigmoid", headers=png).status_code == 400  # not drawn as another
    plain, noted = client.get(url, headers=png), client.get(f"{url}?annotation=patient", headers=png)
    assert "warning" not in plain.headers and "not supported" in noted.headers["warning"]
    assert noted.content == plain.content


def test_storing_is_refused_in_words(client: TestClient) -> None:
    for path in ("/studies", "/studies/1.2.3"):
        response = client.post(ROOT + path, content=b"x", headers={"Origin": "http://127.0.0.1"})
        assert response.status_code == 403 and "C-STORE" in response.json()["detail"]


def test_it_sees_no_images_and_that_is_logged(make_app: AppMaker, archive: Archive, ledger: Ledger) -> None:
    instance = make_instance()
    take_in(archive, [instance])
    client = signed_in(make_app(ArchiveSource(archive)), "it")
    for suffix, accept in (("", DICOM), ("/metadata", JSON), ("/frames/1", OHIF)):
        assert client.get(ROOT + path_of(instance) + suffix, headers=accept).status_code == 403
    assert [row.outcome for row in ledger.audit_rows() if row.who == "it" and row.act != "sign-in"] == [
        "denied"
    ] * 3


def test_looking_is_one_row_until_it_is_another_act(
    make_app: AppMaker, archive: Archive, ledger: Ledger
) -> None:
    instance = make_instance(frames=20)
    take_in(archive, [instance])
    client = signed_in(make_app(ArchiveSource(archive)), "doc")
    for number in range(1, 21):
        client.get(f"{ROOT}{path_of(instance)}/frames/{number}", headers=OHIF)
    client.get(f"{ROOT}{path_of(instance)}", headers=DICOM)
    rows = [row.act for row in ledger.audit_rows() if row.subject]
    assert sorted(rows) == ["retrieve", "view"]
    assert instance.study_uid in ledger.audit_rows(act="view")[0].subject


def test_gzip_is_what_it_says(client: TestClient, archive: Archive) -> None:
    instance = make_instance()
    take_in(archive, [instance])
    with client.stream("GET", f"{ROOT}{path_of(instance)}/metadata", headers=JSON) as response:
        raw = b"".join(response.iter_raw())
    assert gzip.decompress(raw).startswith(b"[{")


def test_broken_pixel_data_leave_as_they_are(client: TestClient, archive: Archive) -> None:
    """An image whose frames no decoder reads: nothing of its study is held back, and nothing is called what
    it is not."""
    broken = make_instance(transfer_syntax=RLE, encapsulated=[b"\1\0\0\0no run lengths"])
    whole = make_instance(transfer_syntax=RLE, study_uid=broken.study_uid)
    take_in(archive, [broken, whole])
    study = client.get(
        f"{ROOT}/studies/{broken.study_uid}",
        headers={"Accept": 'multipart/related; type="application/dicom"'},
    )
    kinds = sorted(kind for kind, _ in exact_parts(study))
    assert kinds == [f"application/dicom; transfer-syntax={syntax}" for syntax in (EXPLICIT, RLE)]
    lenient = client.get(ROOT + path_of(broken), headers={"Accept": "application/dicom"})
    assert lenient.headers["content-type"].endswith(RLE) and dataset_bytes(lenient.content) == broken.dataset
    strict = {"Accept": f"application/dicom; transfer-syntax={EXPLICIT}"}
    assert client.get(ROOT + path_of(broken), headers=strict).status_code == 406
    octets = {"Accept": "multipart/related; type=application/octet-stream"}
    assert client.get(f"{ROOT}{path_of(broken)}/frames/1", headers=octets).status_code == 406
    assert client.get(f"{ROOT}{path_of(broken)}/rendered", headers={"Accept": "image/png"}).status_code == 406


def test_pixel_data_that_break_off_do_not_hide_their_series(client: TestClient, archive: Archive) -> None:
    whole = make_instance()
    other = make_instance(
        study_uid=whole.study_uid, series_uid=whole.series_uid, number=2, transfer_syntax=RLE
    )
    cut = replace(other, dataset=other.dataset[:-200])
    take_in(archive, [whole, cut])
    found = client.get(f"{ROOT}/studies/{whole.study_uid}/metadata", headers=JSON).json()
    assert {i["00080018"]["Value"][0] for i in found} == {whole.sop_instance_uid, cut.sop_instance_uid}
    broken = next(i for i in found if i["00080018"]["Value"][0] == cut.sop_instance_uid)
    assert broken["0020000D"]["Value"] == [whole.study_uid] and broken["00280010"]["Value"] == [16]
    stored = client.get(ROOT + path_of(cut), headers={"Accept": "application/dicom; transfer-syntax=*"})
    assert dataset_bytes(stored.content) == cut.dataset
    assert client.get(f"{ROOT}{path_of(cut)}/frames/1", headers=OHIF).status_code in (404, 422)


def test_a_deflated_bomb_is_not_inflated(make_app: AppMaker, archive: Archive) -> None:
    """Some kilobytes that inflate to 40 MB, under a bound of 1 MB: refused where it would have to be
    inflated, and given back as it is stored."""
    bomb = make_instance(transfer_syntax=DEFLATED, DataSetTrailingPadding=bytes(40_000_000))
    assert len(bomb.dataset) < 100_000
    take_in(archive, [bomb])
    settings = PortalSettings(dicomweb=DicomWebSettings(decoded_bytes_max=1 << 20))
    client = signed_in(make_app(ArchiveSource(archive), settings), "doc")
    tracemalloc.start()
    try:
        for accept, status in (
            ("application/dicom", 200),
            (f"application/dicom; transfer-syntax={EXPLICIT}", 406),
        ):
            response = client.get(ROOT + path_of(bomb), headers={"Accept": accept})
            assert response.status_code == status
            assert status == 406 or dataset_bytes(response.content) == bomb.dataset
        picture = client.get(f"{ROOT}{path_of(bomb)}/rendered", headers={"Accept": "image/png"})
        assert picture.status_code == 406
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_what_was_evicted_is_listed_and_said_to_be_in_the_region(
    client: TestClient, archive: Archive
) -> None:
    """Alone it is a clear problem, in a study it is left out, and its metadata are what the index knows."""
    gone, here = (
        make_instance(study_uid="1.2.7", series_uid="1.2.7.1", padding=50_000, number=n) for n in (1, 2)
    )
    take_in(archive, [gone, here])
    archive.record_facts([Fact(FactKind.RECEIPT, gone.sop_instance_uid, gone.digest, "", 5)])
    report = archive.upkeep.evict(EvictionRequest(6, study_uid="1.2.7")).result(30)
    assert report.instances == 1
    listed = client.get(f"{ROOT}/studies/1.2.7/instances", headers=JSON).json()
    assert len(listed) == 2
    for path in (path_of(gone), f"{path_of(gone)}/frames/1", f"{path_of(gone)}/rendered"):
        accept = OHIF if "frames" in path else {"Accept": "image/png"} if "rendered" in path else DICOM
        problem = client.get(ROOT + path, headers=accept)
        assert problem.status_code == 503, path
        assert "the region has them" in problem.json()["detail"] and "Retry-After" not in problem.headers
    whole = client.get(f"{ROOT}/studies/1.2.7", headers=DICOM)
    assert whole.status_code == 206 and len(exact_parts(whole)) == 1
    metadata = client.get(f"{ROOT}/studies/1.2.7/metadata", headers=JSON).json()
    assert {each["00080018"]["Value"][0] for each in metadata} == {
        gone.sop_instance_uid, here.sop_instance_uid
    }  # fmt: skip
