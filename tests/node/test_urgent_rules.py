"""Routing rules that make instances urgent for the region, with destinations and without."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from archive.errors import SettingsError
from archive.ledger import CompleteStudy
from node.routing.following import Following
from node.routing.rulefile import parse_rules
from tests.datasets import make_instance
from tests.node.storing import WARD, Storing, storing

RULES = """
[[rule]]
name = "angiography first"
urgent = true
[rule.match]
Modality = "XA"
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Storing]:
    with storing(tmp_path) as served:
        yield served


@pytest.mark.parametrize(("when", "marked"), [("stored", {"XA"}), ("study complete", {"XA", "CT"})])
def test_what_a_rule_makes_urgent_goes_first(served: Storing, when: str, marked: set[str]) -> None:
    told: list[bool] = []
    following = Following(
        served.archive, served.ledger, WARD, queue_max=10, clock=lambda: time.time_ns() // 1000,
        on_urgent=lambda: told.append(True),
    )  # fmt: skip
    following.use(parse_rules(RULES.replace("urgent", f'when = "{when}"\nurgent')))
    sent = {name: make_instance(modality=name, study_uid="1.2.3") for name in ("CT", "XA")}
    sent["MR"] = make_instance(modality="MR", study_uid="1.2.4")
    for instance in sent.values():
        served.send(instance)
    served.archive.wait_indexed()
    if when == "study complete":
        for study in ("1.2.3", "1.2.4"):
            complete(served, study)
        following.complete()
    else:
        following.step()
    pending = served.archive.index.pending(10)
    names = {instance.sop_instance_uid: name for name, instance in sent.items()}
    assert {names[row.head.sop_instance_uid] for row in pending if row.urgent} == marked
    assert [row.urgent for row in pending] == sorted((row.urgent for row in pending), reverse=True)
    assert told == [True]
    assert served.ledger.routes(10) == []


def complete(served: Storing, study: str) -> None:

    served.ledger.note_complete(CompleteStudy(study, "quiet", time.time_ns() // 1000))


def test_a_rule_says_what_it_does() -> None:
    (rule,) = parse_rules(RULES)
    assert str(rule) == "each instance where Modality is XA goes to the region before everything else"
    with pytest.raises(SettingsError, match="or urgent = true"):
        parse_rules(RULES.replace("true", "false"))
    with pytest.raises(SettingsError, match="true or false"):
        parse_rules(RULES.replace("true", "1"))
