"""Signing in: sessions, cookies, throttling, CSRF, Basic (checklist 74, 78, 83, 84, 86 to 88, 93)."""

from __future__ import annotations

import time

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from archive.errors import InvalidInput, SettingsError
from archive.ledger import Ledger
from archive.settings import load
from federation.passwords import hash_password
from portal.settings import ListenSettings, PortalSettings, SignInSettings
from tests.portal.portals import (
    PASSWORD,
    USERS,
    AppMaker,
    Clock,
    client_of,
    form_token,
    sign_in,
    signed_in,
)

JSON = {"Accept": "application/dicom+json"}


def every_path(app: Starlette) -> list[str]:
    paths = []
    for route in app.routes:
        assert isinstance(route, Route), "a mount would hide routes from this test"
        path = route.path
        for name in ("study", "series", "instance", "opened"):
            path = path.replace(f"{{{name}}}", "1.2.3")
        path = path.replace("{path:path}", "viewer").replace("{frames}", "1").replace("{name}", "miss.css")
        paths.append(path)
    return paths


def test_every_route_but_the_public_ones_is_closed(make_app: AppMaker) -> None:
    app = make_app()
    client = client_of(app)
    opened = {path for path in every_path(app) if client.get(path, headers=JSON).status_code == 200}
    assert opened == {"/login", "/static/miss.css", "/viewer/app-config.js"}
    for path in set(every_path(app)) - opened - {"/logout"}:
        response = client.get(path, headers=JSON)
        if path.startswith("/dicom-web"):
            assert response.status_code in (401, 405) and "www-authenticate" in response.headers
        else:
            assert response.status_code == 303 and response.headers["location"].startswith("/login"), path
    assert client.get("/no/such/page").status_code == 303
    assert client.get("/viewer/app.bundle.css").status_code in (200, 404, 503)  # code, the same for everybody


def test_the_session_is_new_hidden_and_over_after_logout(make_app: AppMaker, ledger: Ledger) -> None:
    client = client_of(make_app())
    client.cookies.set("miss-session", "chosen-by-somebody-else", domain="127.0.0.1", path="/")
    response = sign_in(client, "doc")
    cookie = response.headers["set-cookie"].lower()
    token = client.cookies["miss-session"]
    assert "httponly" in cookie and "samesite=lax" in cookie and "secure" not in cookie
    assert token != "chosen-by-somebody-else" and len(token) >= 43
    page = client.get("/studies")
    assert page.status_code == 200 and "Dr. Dora" in page.text
    assert sign_in(client, "doc").status_code == 303
    assert client.cookies["miss-session"] != token
    replay = client_of(make_app())
    replay.cookies.set("miss-session", token)
    assert replay.get("/studies").status_code == 303  # the session before the second sign-in is over
    token = client.cookies["miss-session"]
    assert client.post("/logout", data={"csrf": form_token(client.get("/studies").text)}).status_code == 303
    replay.cookies.set("miss-session", token)
    assert replay.get("/studies").status_code == 303
    assert token.encode() not in ledger.user("doc")[1].encode()  # type: ignore[index]
    assert [row.act for row in ledger.audit_rows() if row.who == "doc"].count("sign-in") == 2


def test_over_https_the_cookie_is_bound_to_the_host(make_app: AppMaker) -> None:
    listen = ListenSettings(public_url="https://images.example", trusted_proxies=("127.0.0.1",))
    app = make_app(settings=PortalSettings(listen=listen))
    client = client_of(app, base_url="https://images.example")
    response = sign_in(client, "doc")
    (session,) = [c for c in response.headers.get_list("set-cookie") if c.startswith("__Host-miss-session=")]
    assert "Secure" in session and "Path=/" in session and "Domain" not in session
    assert response.headers["strict-transport-security"]
    assert client.get("/studies").status_code == 200


@pytest.mark.parametrize(("waits", "alive"), [([1_700] * 3, True), ([1_900], False), ([1_700] * 26, False)])
def test_idle_and_absolute_limits(make_app: AppMaker, clock: Clock, waits: list[int], alive: bool) -> None:
    client = signed_in(make_app(), "doc")
    for seconds in waits:
        clock.pass_s(seconds)
        status = client.get("/wards").status_code
    assert status == (200 if alive else 303)


def test_a_disabled_user_is_out_at_the_next_request(make_app: AppMaker, ledger: Ledger) -> None:
    app = make_app()
    client = signed_in(app, "doc")
    assert client.get("/dicom-web/studies", headers=JSON, auth=("doc", PASSWORD)).status_code == 204
    ledger.disable_user("doc")
    assert client.get("/studies").status_code == 303
    client.cookies.clear()
    assert client.get("/dicom-web/studies", headers=JSON, auth=("doc", PASSWORD)).status_code == 401
    assert "is wrong" in sign_in(client, "doc").text


def test_unknown_and_known_users_look_the_same(make_app: AppMaker) -> None:
    app = make_app()
    client, spent = client_of(app), {}
    pages = {}
    for name in ("doc", "nobody"):
        best = 1e9
        for _ in range(3):
            began = time.perf_counter()
            response = sign_in(client, name, "not the password at all")
            best = min(best, time.perf_counter() - began)
        spent[name] = best
        pages[name] = (response.status_code, response.text.replace(f'value="{name}"', 'value=""'))
    assert pages["doc"] == pages["nobody"] and pages["doc"][0] == 401
    # Without the same work the unknown name would be thirty times faster; this machine may be busy.
    assert max(spent.values()) < 5 * min(spent.values())


def test_guessing_is_slowed_and_the_owner_gets_in(make_app: AppMaker, ledger: Ledger, clock: Clock) -> None:
    app = make_app()
    guesser = client_of(app, "10.0.0.66")
    answers = [sign_in(guesser, "doc", f"guess number {i}").status_code for i in range(20)]
    assert answers[:4] == [401] * 4 and set(answers[4:]) == {429}
    assert sign_in(guesser, "doc").status_code == 429  # the right one, but too soon
    assert signed_in(app, "doc", "10.0.0.7").get("/studies").status_code == 200  # the owner, from elsewhere
    outcomes = [row.outcome for row in ledger.audit_rows() if row.address == "10.0.0.66"]
    assert outcomes.count("refused: wrong name or password") == 4
    assert outcomes.count("refused: too many tries") == 17
    clock.pass_s(3_700)
    assert sign_in(guesser, "doc").status_code == 303


def test_the_wait_doubles(make_app: AppMaker, clock: Clock) -> None:
    guesser = client_of(make_app(), "10.0.0.66")
    waits = []
    for _ in range(9):
        response = sign_in(guesser, "doc", "wrong wrong wrong")
        if response.status_code == 429:
            waits.append(int(response.headers["retry-after"]))
            clock.pass_s(waits[-1] + 5)
            assert sign_in(guesser, "doc", "wrong wrong wrong").status_code == 401
    assert waits == sorted(waits) and waits[-1] >= 4 * waits[0]


def test_other_sites_and_missing_tokens_are_refused(make_app: AppMaker) -> None:
    app = make_app()
    client = signed_in(app, "doc")
    token = form_token(client.get("/studies").text)
    assert client.post("/logout", data={}).status_code == 403
    assert client.post("/logout", data={"csrf": "x" * 32}).status_code == 403
    evil = {"Origin": "https://evil.example"}
    assert client.post("/logout", data={"csrf": token}, headers=evil).status_code == 403
    assert (
        client.post("/logout", data={"csrf": token}, headers={"Sec-Fetch-Site": "cross-site"}).status_code
        == 403
    )
    assert client.post("/dicom-web/studies", headers=evil).status_code == 403
    assert client.get("/studies").status_code == 200
    stranger = client_of(app)
    assert stranger.post("/login", data={"name": "doc", "password": PASSWORD}).status_code == 403
    own = {"Origin": "http://127.0.0.1"}
    assert client.post("/logout", data={"csrf": token}, headers=own).status_code == 303


@pytest.mark.parametrize(
    "next_page", ["https://evil.example", "//evil.example", "/\\evil.example", "/a\nb", "x"]
)
def test_sign_in_leads_nowhere_else(make_app: AppMaker, next_page: str) -> None:
    response = sign_in(client_of(make_app()), "doc", next_page=next_page)
    assert response.headers["location"] == "/"


def test_sign_in_leads_back(make_app: AppMaker) -> None:
    client = client_of(make_app())
    login = client.get("/viewer/viewer?StudyInstanceUIDs=1.2").headers["location"]
    assert login == "/login?next=%2Fviewer%2Fviewer%3FStudyInstanceUIDs%3D1.2"
    assert 'value="/viewer/viewer?StudyInstanceUIDs=1.2"' in client.get(login).text
    response = sign_in(client, "doc", next_page="/viewer/viewer?StudyInstanceUIDs=1.2")
    assert response.headers["location"] == "/viewer/viewer?StudyInstanceUIDs=1.2"


def test_basic_is_off_by_default_and_only_for_dicomweb(make_app: AppMaker) -> None:
    off = client_of(make_app(settings=PortalSettings()))
    assert off.get("/dicom-web/studies", headers=JSON, auth=("doc", PASSWORD)).status_code == 401
    on = client_of(make_app(settings=PortalSettings(sign_in=SignInSettings(basic_auth=True))))
    assert on.get("/dicom-web/studies", headers=JSON, auth=("doc", PASSWORD)).status_code == 204
    assert on.get("/dicom-web/studies", headers=JSON, auth=("doc", "wrong")).status_code == 401
    assert on.get("/studies", auth=("doc", PASSWORD)).status_code == 303
    challenge = on.get("/dicom-web/studies", headers=JSON)
    assert challenge.headers["www-authenticate"].startswith("Basic")
    browser = on.get("/dicom-web/studies", headers=JSON | {"Sec-Fetch-Mode": "cors"})
    assert not browser.headers["www-authenticate"].startswith("Basic")
    for broken in ("Basic", "Basic !!!", "Basic YQ==", "Bearer x"):
        assert on.get("/dicom-web/studies", headers=JSON | {"Authorization": broken}).status_code == 401


def test_basic_is_verified_once_a_minute(make_app: AppMaker, ledger: Ledger, clock: Clock) -> None:
    client = client_of(make_app())
    began = time.perf_counter()
    client.get("/dicom-web/studies", headers=JSON, auth=("doc", PASSWORD))
    first = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(10):
        assert client.get("/dicom-web/studies", headers=JSON, auth=("doc", PASSWORD)).status_code == 204
    assert (time.perf_counter() - began) / 10 < first / 2
    ledger.set_password("doc", hash_password("another long phrase"))
    assert client.get("/dicom-web/studies", headers=JSON, auth=("doc", PASSWORD)).status_code == 401


def test_password_rules() -> None:
    for weak in ("short", "passwordpassword", "aaaaaaaaaaaaaaa", "x" * 300, "rossi.maria1"):
        with pytest.raises(InvalidInput):
            hash_password(weak, "rossi.maria")
    assert hash_password("correct horse battery").startswith("$argon2id$")


def test_it_does_not_listen_beyond_loopback_without_tls() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "images.example"):
        with pytest.raises(SettingsError, match="loopback"):
            load(PortalSettings, flags={"listen.host": host})
    behind = {"listen.host": "0.0.0.0", "listen.trusted_proxies": ["10.0.0.1"]}
    with pytest.raises(SettingsError, match="https"):
        load(PortalSettings, flags=behind)
    load(PortalSettings, flags=behind | {"listen.public_url": "https://images.example"})
    with pytest.raises(SettingsError, match="together"):
        load(PortalSettings, flags={"listen.tls_key": "key.pem"})


def test_roles_land_where_they_work(make_app: AppMaker) -> None:
    app = make_app()
    landed = {user.name: signed_in(app, user.name).get("/").headers["location"] for user in USERS}
    assert landed == {"tech": "/studies", "doc": "/studies", "it": "/health"}
