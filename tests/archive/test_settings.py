"""Settings: file < environment < flags, and nothing unknown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archive.errors import SettingsError
from archive.settings import describe, load, render_toml, setting


@dataclass(frozen=True)
class Wire:
    host: str = setting("127.0.0.1", "Where to listen.")
    port: int = setting(11112, "The port.", minimum=0, maximum=65535)
    idle_s: float = setting(30.0, "How long a peer may be silent.", "s", minimum=0.1)
    accept: list[str] = setting(["CT", "MR"], "What is taken.")
    mode: str = setting("plain", "How.", choices=("plain", "tls"))


@dataclass(frozen=True)
class Limits:
    wire: Wire = field(default_factory=lambda: Wire(port=4242))
    bytes_max: int = 5


@dataclass(frozen=True)
class Process:
    state: Path = setting(help="The folder of everything.")
    cache: Path = setting(Path("cache"), "Where copies go.")
    key: Path | None = setting(None, "A key.")
    password: str = setting("", "Of the database.", secret=True)
    strict: bool = setting(False, "Refuse more.")
    wire: Wire = field(default_factory=Wire)
    limits: Limits = field(default_factory=Limits)


def write(folder: Path, text: str) -> Path:
    path = folder / "miss.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_stand_and_an_owner_may_change_those_of_a_section(tmp_path: Path) -> None:
    settings = load(Process, write(tmp_path, 'state = "/srv/miss"'))
    assert settings.wire == Wire()
    assert settings.limits.wire.port == 4242
    assert settings.state == Path("/srv/miss")
    assert settings.key is None


def test_file_is_below_environment_is_below_flags(tmp_path: Path) -> None:
    path = write(tmp_path, 'state = "s"\n[wire]\nport = 1\nhost = "file"\nmode = "tls"\n')
    environment = {"MISS_WIRE_PORT": "2", "MISS_WIRE_HOST": "environment", "HOME": "/root"}
    settings = load(Process, path, environment, {"wire.port": 3, "wire.mode": None})
    assert (settings.wire.port, settings.wire.host, settings.wire.mode) == (3, "environment", "tls")


def test_relative_paths_are_relative_to_the_file_they_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    settings = load(Process, write(tmp_path, 'state = "data"'), {"MISS_KEY": "k.pem"})
    assert settings.state == tmp_path / "data"
    assert settings.cache == tmp_path / "cache"
    assert settings.key == here / "k.pem"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stat = 1", "'stat'"),
        ("[wire]\nprot = 1", "'wire.prot'"),
        ("[limits.wire]\nhots = ''", "'limits.wire.hots'"),
        ("[wires]\nport = 1", "'wires'"),
        ("wire = 3", "'wire'"),
        ("[wire]\nport = '11112'\n", "wire.port"),
        ("[wire]\nport = 'x'\n", "wire.port"),
        ("[wire]\nport = true\n", "wire.port"),
        ("[wire]\nport = 70000\n", "wire.port"),
        ("[wire]\nidle_s = 0\n", "wire.idle_s"),
        ("[wire]\nidle_s = nan\n", "wire.idle_s"),
        ("[wire]\naccept = [1]\n", "wire.accept"),
        ("[wire]\naccept = 'CT'\n", "wire.accept"),
        ("[wire]\nmode = 'x'\n", "wire.mode"),
        ("strict = 1\n", "strict"),
        ("password = 5\n", "password"),
        ("cache = '~/x'\n", "cache"),
        ("state = '/x'\nstate = '/y'", "not TOML"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text if text.startswith("state") else f"state = '/x'\n{text}")
    with pytest.raises(SettingsError) as caught:
        load(Process, path)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_wrong_outside_the_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "state = '/x'")
    with pytest.raises(SettingsError, match="MISS_WIRE_PROT"):
        load(Process, path, {"MISS_WIRE_PROT": "1"})
    with pytest.raises(SettingsError, match="MISS_STRICT"):
        load(Process, path, {"MISS_STRICT": "maybe"})
    with pytest.raises(SettingsError, match="wire.prot"):
        load(Process, path, flags={"wire.prot": 1})
    with pytest.raises(SettingsError, match="state is not set"):
        load(Process)
    with pytest.raises(SettingsError, match=r"none\.toml"):
        load(Process, tmp_path / "none.toml")


def test_the_environment_knows_every_type(tmp_path: Path) -> None:
    environment = {
        "MISS_STATE": "/x", "MISS_STRICT": "yes", "MISS_WIRE_IDLE_S": "2.5", "MISS_WIRE_ACCEPT": "CT, US",
        "MISS_LIMITS_BYTES_MAX": "7",
    }  # fmt: skip
    settings = load(Process, None, environment)
    assert settings.strict is True
    assert settings.wire.idle_s == 2.5
    assert settings.wire.accept == ["CT", "US"]
    assert settings.limits.bytes_max == 7


def test_a_dataclass_may_refuse_and_the_file_is_named(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Picky:
        low: int = 1
        high: int = 2

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("low is above high")

    path = write(tmp_path, "low = 3")
    with pytest.raises(SettingsError, match=r"miss\.toml.*low is above high"):
        load(Picky, path)


def test_every_setting_is_described() -> None:
    docs = {doc.key: doc for doc in describe(Process)}
    assert set(docs) == {
        "state", "cache", "key", "password", "strict", "limits.bytes_max",
        *(f"{section}.{name}" for section in ("wire", "limits.wire")
          for name in ("host", "port", "idle_s", "accept", "mode")),
    }  # fmt: skip
    assert docs["state"].required and not docs["cache"].required
    assert docs["wire.idle_s"].unit == "s"
    assert docs["wire.accept"].default == '["CT", "MR"]'
    assert docs["wire.port"].environment == "MISS_WIRE_PORT"


def test_secrets_can_be_left_out() -> None:
    shown = render_toml(Process(state=Path("/x"), password="hunter2"), secrets=False)
    assert "hunter2" not in shown
    assert "password is set" in shown


@given(
    password=st.text(st.characters(codec="utf-8")),
    accept=st.lists(st.text(st.characters(codec="utf-8"))),
    idle_s=st.floats(min_value=0.1, max_value=1e12),
    port=st.integers(0, 65535),
    strict=st.booleans(),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    password: str,
    accept: list[str],
    idle_s: float,
    port: int,
    strict: bool,
) -> None:
    wire = Wire(port=port, idle_s=idle_s, accept=accept)
    settings = Process(Path("/x"), Path("/c"), None, password, strict, wire, Limits(wire, 9))
    path = write(tmp_path_factory.getbasetemp(), render_toml(settings))
    assert load(Process, path) == settings
