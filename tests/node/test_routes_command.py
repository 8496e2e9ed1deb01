"""`miss routes` and what `miss status` says of routes, as people type it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from archive.ledger import Destination, Device, Ledger, Routed, RouteKind, RouteState
from archive.settings import render_toml
from federation.settings import UplinkSettings
from node.dimse.pdu import ProposedContext
from node.dimse.requestor import Peer, Requestor
from node.service import Node
from node.settings import DimseSettings, NodeSettings, RoutingSettings
from tests.commands import miss
from tests.datasets import CT, EXPLICIT, make_instance
from tests.federation.regions import make_region
from tests.node.receiving import receiver
from tests.node.routed import QUICK
from tests.node.storing import store
from tests.node.test_availability import ris
from tests.waiting import wait_for

ALL = '[[rule]]\nname = "all"\nto = "ONCO"\n[rule.match]\nModality = "CT"\n'


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[NodeSettings]:
    """An enrolled node with the devices CT1 and, without a port, ONCO."""
    region = make_region(tmp_path / "region")
    identity = region.node(region.add_ward("San Martino", "Radiology", "SANMARTINO"), "127.0.0.1:1")
    region.ledger.close()
    made = NodeSettings(
        state=tmp_path / "node", identity=identity.folder,
        dimse=DimseSettings(host="127.0.0.1", port=0, stop_grace_s=2.0),
        uplink=UplinkSettings(enabled=False), routing=RoutingSettings(**QUICK),  # type: ignore[arg-type]
    )
    made = replace(made, archive=replace(made.archive, free_bytes_min=0))
    made.state.mkdir()
    (made.state / "node.toml").write_text(render_toml(made))
    ledger = Ledger.open(made.ledger_url)
    ledger.add_device(Device("CT1", "127.0.0.1"))
    ledger.add_device(Device("ONCO", "127.0.0.1"))
    ledger.close()
    yield made


def test_check_says_what_rules_do_and_where_they_are_wrong(settings: NodeSettings, tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(ALL)
    done = miss("routes", "check", file, "--state", settings.state)
    assert done.returncode == 0
    assert done.stdout == "all: each instance where Modality is CT is sent to ONCO; tried for 7 days\n"
    assert "nobody said where ONCO listens" in done.stderr
    file.write_text(ALL.replace("Modality", "Modaliti") + "[[rule]]\nname = 'x'\n")
    wrong = miss("routes", "check", file)
    assert wrong.returncode == 2 and not wrong.stdout
    assert f"{file}: line 5, rule 1 'all': match.Modaliti: is no condition; did you mean 'Modality'?" in (
        wrong.stderr)
    assert "line 6, rule 2 'x': to: a rule needs a destination" in wrong.stderr


def test_what_waits_is_seen_tried_again_and_dropped(settings: NodeSettings) -> None:
    """Of a node that ran once: the command carries its orders out itself."""
    with Node(settings):
        pass
    ledger = Ledger.open(settings.ledger_url)
    to = Destination(RouteKind.DEVICE, "ONCO")
    rows = [Routed("all", to, "1.2", "1.2.3", f"1.2.3.{n}", bytes([n]) * 32, 1, 1, 2**60,
                   state=state, comment="A900 data set does not match" if n else "", status=0xA900 * n)
            for n, state in enumerate((RouteState.WAITING, RouteState.SET_ASIDE))]
    ledger.queue_routes(rows)
    ledger.close()
    state = ("--state", settings.state)
    row, = json.loads(miss("routes", "queue", "--set-aside", "--json", *state).stdout)
    assert (row["sop_instance_uid"], row["status"]) == ("1.2.3.1", "A900")
    summary, = json.loads(miss("status", "--json", *state).stdout)["routes"]
    assert (summary["destination"], summary["waiting"], summary["set_aside"]) == ("ONCO", 1, 1)
    assert "what waits by routing rules" in miss("status", *state).stdout
    assert "1 will be tried now" in miss("routes", "retry", "--set-aside", *state).stderr
    assert miss("routes", "drop", *state).returncode == 1
    assert "2 dropped" in miss("routes", "drop", "--to", "ONCO", *state).stderr
    assert "nothing waits" in miss("routes", "queue", *state).stderr


def test_a_node_routes_and_takes_orders(settings: NodeSettings) -> None:
    before, after = make_instance(), make_instance()
    with receiver() as peer:
        ledger = Ledger.open(settings.ledger_url)
        ledger.add_device(Device("ONCO", "127.0.0.1", port=peer.port))
        ledger.close()
        with Node(settings) as node:
            proposed = [ProposedContext(1, CT, (EXPLICIT,))]
            with Requestor.connect(Peer("127.0.0.1", node.dicom_port, "MISS"), "CT1", proposed) as requestor:
                assert store(requestor, before) == 0
            settings.routes_path.write_text(ALL)
            wait_for(lambda: "all" in node.ledger.rule_marks(), "the rule")
            with Requestor.connect(Peer("127.0.0.1", node.dicom_port, "MISS"), "CT1", proposed) as requestor:
                assert store(requestor, after) == 0
            wait_for(lambda: after.sop_instance_uid in peer.received, "what came after the rule")
            assert before.sop_instance_uid not in peer.received
            done = miss("routes", "apply", "all", "--since", "2020-01-01", "--state", settings.state)
            assert done.returncode == 0, done.stderr
            assert "1 queued; 1 were in the queue, or sent, before" in done.stderr
            wait_for(lambda: before.sop_instance_uid in peer.received, "what came before the rule")
        listed = miss("routes", "ls", "--state", settings.state)
        assert "each instance where Modality is CT" in listed.stdout
    assert miss("routes", "apply", "all", "--since", "soon", "--state", settings.state).returncode == 1
    unknown = miss("routes", "apply", "other", "--since", "2020-01-01", "--state", settings.state)
    assert unknown.returncode == 1 and "no rule of this name" in unknown.stderr


def test_a_node_tells_of_a_study_that_is_complete(settings: NodeSettings) -> None:
    """Nothing came for it for a while: the last way by which a study is complete."""
    one = make_instance()
    settings = replace(settings, completion=replace(settings.completion, quiet_s=1.0))
    settings.routes_path.write_text(
        '[[rule]]\nname = "ris"\nwhen = "study complete"\nnotify = "RIS"\nto = "ONCO"\n')
    with ris() as told, receiver() as peer:
        ledger = Ledger.open(settings.ledger_url)
        ledger.add_device(Device("ONCO", "127.0.0.1", port=peer.port))
        ledger.add_device(Device("RIS", "127.0.0.1", port=told.port))
        ledger.close()
        with Node(settings) as node:
            proposed = [ProposedContext(1, CT, (EXPLICIT,))]
            with Requestor.connect(Peer("127.0.0.1", node.dicom_port, "MISS"), "CT1", proposed) as requestor:
                assert store(requestor, one) == 0
            wait_for(lambda: told.told and one.sop_instance_uid in peer.received, "the notice and the study")
            wait_for(lambda: not node.ledger.routes(10), "an empty queue")
    assert [dataset.StudyInstanceUID for _, dataset in told.told] == [one.study_uid]
