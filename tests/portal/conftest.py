"""A portal over a ledger in a file, with three people who may sign in (`portals.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from archive.archive import Archive, ArchiveSettings
from archive.ledger import Ledger
from federation.source import Source
from portal.app import create_app
from portal.settings import PortalSettings, SignInSettings
from tests.portal.portals import HASH, USERS, AppMaker, Clock, EmptySource


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    for user in USERS:
        ledger.add_user(user, HASH)
    yield ledger
    ledger.close()


@pytest.fixture
def make_app(ledger: Ledger, clock: Clock) -> AppMaker:
    def make(
        source: Source | None = None, settings: PortalSettings | None = None, **options: Any
    ) -> Starlette:
        settings = settings or PortalSettings(sign_in=SignInSettings(basic_auth=True))
        return create_app(settings, source or EmptySource(), ledger, clock=clock, **options)

    return make


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    settings = ArchiveSettings(state=tmp_path / "archive", free_bytes_min=0)
    with Archive.open(settings, outbox=False) as opened:
        yield opened
