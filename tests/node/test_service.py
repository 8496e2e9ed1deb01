"""The node as a process: it starts only when it is enrolled, stores while no hub answers, stops in order, and
a kill costs nothing that was acknowledged."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from archive.archive import Archive
from archive.errors import SettingsError
from archive.settings import describe, load, render_toml
from federation.settings import UplinkSettings
from federation.window import RegionWindow
from node.destinations import Destinations
from node.dimse.errors import AssociationEnded
from node.dimse.payloads import Payloads
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor, echo
from node.service import Node, load_identity
from node.settings import NodeSettings
from tests.datasets import CT, EXPLICIT, make_instance
from tests.federation.regions import make_region
from tests.node.processes import Process, enrolled
from tests.node.storing import store


@pytest.fixture
def settings(tmp_path: Path) -> NodeSettings:
    """An enrolled node's settings, with a device CT1; no hub listens where it dials."""
    region = make_region(tmp_path / "region")
    made = enrolled(region, tmp_path, "127.0.0.1:1")
    region.ledger.close()
    return made


def test_a_node_stores_while_no_hub_answers(settings: NodeSettings) -> None:
    instance = make_instance()
    with Node(settings) as node:
        assert node.ready.is_set()
        peer = Peer("127.0.0.1", node.dicom_port, "MISS")
        assert echo(peer, "CT1") == 0
        with Requestor.connect(peer, "CT1", [ProposedContext(1, CT, (EXPLICIT,))]) as requestor:
            assert store(requestor, instance) == 0
        assert node.identity.ward == "san-martino/radiology"
        node.archive.wait_indexed()
        stored, = node.archive.instances(instance.study_uid)
        assert stored.head.provenance.issuer == "SANMARTINO"
        assert node.archive.index.pending_summary().count == 1
        assert node.uplink is not None and not node.uplink.status().attached
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", node.dicom_port), 1)
    node.stop()  # again: nothing


def test_a_fetch_under_way_holds_up_no_stop(settings: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window's channel is closed, which ends fetches, before whoever waits for them is closed."""
    closed, made = threading.Event(), list[Payloads]()
    close = RegionWindow.close

    class Watched(Payloads):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    def closing(self: RegionWindow) -> None:
        closed.set()
        close(self)

    monkeypatch.setattr("node.composition.Payloads", Watched)
    monkeypatch.setattr(RegionWindow, "close", closing)
    with Node(settings):
        fetch = made[0].fetching.submit(closed.wait, 10)
    assert fetch.result(0), "it was waited for while the channel was open"


def test_parts_are_made_once(settings: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Destinations] = []

    class Counted(Destinations):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("node.composition.Destinations", Counted)
    with Node(settings):
        assert len(made) == 1


def test_a_second_start_finds_everything(settings: NodeSettings) -> None:
    instance = make_instance()
    for count in range(2):
        with Node(settings) as node:
            assert len(node.archive.instances(instance.study_uid)) == count
            peer = Peer("127.0.0.1", node.dicom_port, "MISS")
            with Requestor.connect(peer, "CT1", [ProposedContext(1, CT, (EXPLICIT,))]) as requestor:
                assert store(requestor, instance) == 0


def test_not_enrolled(settings: NodeSettings, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="miss node enrol"):
        Node(replace(settings, identity=tmp_path / "nothing")).start()


def test_a_portals_identity_is_no_nodes(settings: NodeSettings, tmp_path: Path) -> None:
    region = make_region(tmp_path / "other")
    portal = region.portal()
    region.ledger.close()
    with pytest.raises(SettingsError, match="not the identity of a node"):
        load_identity(replace(settings, identity=portal.folder))


def test_a_taken_port_is_named(settings: NodeSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        busy = replace(settings, dimse=replace(settings.dimse, port=port))
        with pytest.raises(SettingsError, match=f"dimse.port: 127.0.0.1:{port}"):
            Node(busy).start()
    with Node(settings):  # what was opened before the port was found taken is closed again
        pass


@pytest.mark.parametrize("title", ["", " MISS", "A" * 17, "A\\B", "MÜSS", "A\tB"])
def test_ae_titles_that_are_none(settings: NodeSettings, title: str) -> None:
    with pytest.raises(SettingsError, match="dimse.ae_title"):
        Node(replace(settings, dimse=replace(settings.dimse, ae_title=title))).start()


def test_every_setting_is_documented_and_read_back(settings: NodeSettings, tmp_path: Path) -> None:
    for doc in describe(NodeSettings):
        assert doc.help.endswith("."), doc.key
    file = tmp_path / "node.toml"
    file.write_text(render_toml(settings))
    assert load(NodeSettings, file) == settings
    file.write_text("state = '.'\n[dimse]\nprot = 104\n")
    with pytest.raises(SettingsError, match="dimse.prot"):
        load(NodeSettings, file)


def test_relative_folders_are_the_files_own(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("")
    loaded = load(NodeSettings, file)
    assert (loaded.state, loaded.identity) == (tmp_path, tmp_path / "identity")
    assert loaded.ledger_url.endswith(f"{tmp_path}/ledger.db")


def test_descriptors_suffice_for_the_associations(settings: NodeSettings) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[0]), before[1]))
        with Node(settings):
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft >= min(settings.dimse.associations_max, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_sigterm_stops_in_order(settings: NodeSettings) -> None:
    with Process(settings) as running:
        with Requestor.connect(running.peer, "CT1", [ProposedContext(1, CT, (EXPLICIT,))]) as requestor:
            assert store(requestor, make_instance()) == 0
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0, running.text()
        assert "Traceback" not in running.text()


@pytest.mark.parametrize("seed", range(3))
def test_kill_costs_nothing_that_was_acknowledged(settings: NodeSettings, seed: int) -> None:
    """kill -9 at a random point of 4 associations: every 0000 is there afterwards, once, octet for octet."""
    chance = random.Random(seed)
    instances = [make_instance(number=n, padding=chance.choice((0, 3000, 200_000))) for n in range(160)]
    acknowledged: list[int] = []
    enough = chance.randint(10, 120)
    reached = threading.Event()

    def send(peer: Peer, numbers: range) -> None:
        try:
            with Requestor.connect(peer, "CT1", [ProposedContext(1, CT, (EXPLICIT,))]) as requestor:
                for number in numbers:
                    if store(requestor, instances[number]) == 0:
                        acknowledged.append(number)
                    if len(acknowledged) >= enough:
                        reached.set()
        except AssociationEnded:
            pass

    with Process(settings) as running:
        threads = [threading.Thread(target=send, args=(running.peer, range(n, 160, 4))) for n in range(4)]
        for thread in threads:
            thread.start()
        assert reached.wait(60)
        os.kill(running.process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
    with Archive.open(settings.archive_settings(), outbox=True) as archive:
        for number in acknowledged:
            wanted = instances[number]
            stored, = archive.instances(wanted.study_uid, sop_instance_uid=wanted.sop_instance_uid)
            assert b"".join(archive.dataset_chunks(stored.location)) == wanted.dataset
        totals = archive.index.totals()
        assert totals.conflicts == 0 and len(acknowledged) <= totals.instances <= 160


def test_uplink_settings_are_a_section(settings: NodeSettings) -> None:
    with Node(replace(settings, uplink=UplinkSettings(enabled=False))) as node:
        assert node.uplink is None
