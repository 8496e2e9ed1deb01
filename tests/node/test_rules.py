"""Routing rules as a file has them: what is taken, what is refused and where it stands, what it does in
words; and that the examples of docs/routing.md are what the page says."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archive.errors import SettingsError
from archive.hours import Hours
from archive.ledger import Destination, RouteKind
from node.routing import rulefile
from node.routing.rulefile import parse_rules, read_rules
from node.routing.rules import SOURCES, When

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "routing.md").read_text()
RULE = '[[rule]]\nname = "r"\nto = "ONCO"\n'


def test_the_examples_of_the_page_are_rules_and_say_what_they_do() -> None:
    example, *others = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert all(parse_rules(other) for other in others if "[[rule]]" in other)
    rules = {rule.name: rule for rule in parse_rules(example)}
    assert [str(rule) for rule in rules.values()] == [
        "each instance where Modality is CT and StudyDescription is *RT*PLAN* or *planning*, and not "
        "PatientID is TEST* is sent to ONCO; tried for 7 days, to be committed there",
        "a study, when it is complete, is sent to TEACHING and RESEARCH; with low priority, between "
        "22:00-06:00, tried for 30 days",
        "each instance where device is CT* and SeriesDescription is *stroke* and received in 18:00-08:00 is "
        "sent to STROKE; with high priority, tried for 7 days",
        "a study, when it is complete, is announced to RIS; tried for 7 days",
        "each instance where BodyPartExamined is KNEE and sop_class is MRImageStorage or "
        "1.2.840.10008.5.1.4.1.1.1 is sent to ward galliera/orthopaedics; after 300 s, tried for 7 days",
    ]
    assert rules["tell the RIS"].to == (Destination(RouteKind.NOTICE, "RIS"),)
    assert rules["everything to the teaching archive, at night"].when is When.STUDY_COMPLETE


def test_every_key_and_source_is_on_the_page() -> None:
    for word in (*rulefile._KEYS, *SOURCES, "received"):
        assert f"`{word}`" in PAGE, word
    assert f"{rulefile.RULES_MAX} rules" in PAGE
    assert f"{rulefile.DESTINATIONS_MAX} destinations and {rulefile.CONDITIONS_MAX} conditions" in PAGE


@pytest.mark.parametrize(("text", "words"), [
    ("[[rule]\n", "not TOML"),
    ("a = " + "[" * 5000 + "]" * 5000, "nested"),
    ('rules = 1\n', "'rules': a file of rules holds [[rule]] and nothing else"),
    ('[rule]\nname = "r"\n', "in two brackets"),
    ('[[rule]]\nto = "ONCO"\n', "line 1, rule 1: name: a rule needs a name"),
    ('[[rule]]\nname = "r"\n', "line 1, rule 1 'r': to: a rule needs a destination"),
    (RULE + RULE, "line 5, rule 2 'r': name: another rule has this name"),
    (RULE + "comit = true\n", "line 4, rule 1 'r': comit: no such key; did you mean 'commit'?"),
    (RULE + "commit = 1\n", "line 4, rule 1 'r': commit: true or false is needed"),
    (RULE + 'when = "sometimes"\n', "line 4, rule 1 'r': when: one of stored, study complete is needed"),
    (RULE + 'priority = "urgent"\n', "priority: one of high, normal, low is needed"),
    (RULE + "delay_s = -1\n", "delay_s: a number from 0 to"),
    (RULE + "retry_days = inf\n", "retry_days: a number from 0 to 365 is needed"),
    (RULE + "delay_s = nan\n", "delay_s: a number from 0 to"),
    (RULE + 'hours = "22-6"\n', "hours: a window of hours is HH:MM-HH:MM"),
    (RULE + 'hours = "06:00-06:00"\n', "never open"),
    (RULE.replace("ONCO", "A" * 17), "line 3, rule 1 'r': to: 'AAAAAAAAAAAAAAAAA' is no AE title"),
    (RULE.replace("ONCO", ""), "line 3, rule 1 'r': to: an empty text stands for nothing"),
    (RULE + 'ward = "Galliera"\n', "line 4, rule 1 'r': ward: 'Galliera' is no ward: write hospital/ward"),
    (RULE + 'notify = "RIS"\n', 'notify: a notice is of a study: it needs when = "study complete"'),
    ('[[rule]]\nname = "r"\nward = "a/b"\ncommit = true\n', "commit: only a device can be asked to commit"),
    (RULE + "match = 1\n", "line 4, rule 1 'r': match: a table is needed"),
    (RULE + '[rule.match]\nModality = "*"\n', "line 5, rule 1 'r': match.Modality: '*' is met by everything"),
    (RULE + '[rule.not]\nModality = true\n', "line 5, rule 1 'r': not.Modality: a text, or a list of texts"),
    (RULE + '[rule.match]\nModality = []\n', "match.Modality: a value is needed"),
    (RULE + '[rule.match]\nStudyDate = "2026"\n', "match.StudyDate: StudyDate: a date is YYYYMMDD"),
    (RULE + '[rule.match]\nStudyDate = "2026*"\n', "match.StudyDate: StudyDate: a date is YYYYMMDD"),
    (RULE + '[rule.match]\nRows = "x"\n', "match.Rows: Rows: not an integer"),
    (RULE + '[rule.match]\nWindowWidth = "1"\n', "match.WindowWidth: is not indexed here"),
    (RULE + '[rule.match]\nNumberOfStudyRelatedSeries = "1"\n', "is not indexed here"),
    (RULE + '[rule.match]\nsop_class = "CTImageStorag"\n', "did you mean 'CTImageStorage'?"),
    (RULE + '[rule.match]\nreceived = "noon"\n', "match.received: a window of hours"),
    (RULE + "to2 = " + repr(["A"] * 2) + "\n", "to2: no such key"),
    (f'[[rule]]\nname = "r"\nto = {[f"A{n}" for n in range(17)]!r}\n', "more than 16 destinations"),
    ("".join(RULE.replace('"r"', f'"r{n}"') for n in range(201)), "more than 200 rules"),
    (RULE + f"[rule.match]\nModality = {['CT'] * 1001!r}\n", "more than 1000 values"),
])  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_rules(text)
    assert words in str(caught.value)


def test_all_mistakes_of_a_file_are_said_at_once_and_named_by_it(tmp_path: Path) -> None:
    file = tmp_path / "routes.toml"
    file.write_text('[[rule]]\nname = "a"\n[[rule]]\nname = "b"\nto = "X"\nhours = "no"\n' + RULE)
    with pytest.raises(SettingsError) as caught:
        read_rules(file)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{file}: line 1, rule 1 'a': to:")
    assert second.startswith(f"{file}: line 6, rule 2 'b': hours:")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        read_rules(file)
    file.write_bytes(b"#" * (rulefile.FILE_BYTES_MAX + 1))
    with pytest.raises(SettingsError, match="larger than"):
        read_rules(file)
    with pytest.raises(SettingsError, match="No such file"):
        read_rules(tmp_path / "none.toml")


@given(st.text(max_size=200))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    for given_text in (text, RULE + text, RULE + "[rule.match]\nPatientName = '''" + text):
        with suppress(SettingsError):
            parse_rules(given_text)


def test_paths_into_sequences_quoted_or_not() -> None:
    path = "RequestAttributesSequence.RequestedProcedureID"
    quoted, = parse_rules(RULE + f'[rule.match]\n"{path}" = "P1"\n')
    plain, = parse_rules(RULE + f'[rule.match]\n{path} = "P1"\n')
    assert quoted == plain and path in str(plain)


@pytest.mark.parametrize(("hours", "at", "is_open", "opens"), [
    ("08:00-18:00", "2026-11-22T08:00", True, "2026-11-22T08:00"),
    ("08:00-18:00", "2026-11-22T17:59", True, "2026-11-22T17:59"),
    ("08:00-18:00", "2026-11-22T18:00", False, "2026-11-23T08:00"),
    ("08:00-18:00", "2026-11-22T02:30", False, "2026-11-22T08:00"),
    ("22:00-06:00", "2026-11-22T23:00", True, "2026-11-22T23:00"),
    ("22:00-06:00", "2026-11-22T05:59", True, "2026-11-22T05:59"),
    ("22:00-06:00", "2026-11-22T06:00", False, "2026-11-22T22:00"),
    ("20:00-24:00", "2026-11-22T23:59", True, "2026-11-22T23:59"),
    ("20:00-24:00", "2026-11-23T00:00", False, "2026-11-23T20:00"),
    ("00:00-24:00", "2026-11-23T00:00", True, "2026-11-23T00:00"),
])  # fmt: skip
def test_windows_of_hours(hours: str, at: str, is_open: bool, opens: str) -> None:
    def us(text: str) -> int:
        return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1e6)

    window = Hours.parse(hours, UTC)
    assert window.holds(us(at)) is is_open
    assert window.opens_us(us(at)) == us(opens)
