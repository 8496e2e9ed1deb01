"""What comparisons of inventories leave: the outcome of the last one, how far a node has seen the region's
stores, and at the region the last outcome of each ward. One small JSON file in the state folder, replaced
whole and synced, so that a command reads it beside the process that runs, or without one. No patient data in
it.
"""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from archive.errors import InvalidInput
from archive.model import START, Position, is_uid

FILE = "reconciliation.json"
ALARMS_MAX = 100  # listed; all are counted
OUTCOME_BYTES_MAX = 32 << 10
STORES_MAX = 16
WORDS_CHARS_MAX = 500
_COUNT_MAX = 1 << 62


@dataclass(frozen=True, slots=True)
class Alarm:
    """What no comparison can mend. `words` say why."""

    sop_instance_uid: str
    digest: str
    words: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a comparison. `here` and `there` count the node's contents and the region's of that ward;
    `pushed` are sent to the region again, `brought` came back from it, `listed` are known again and lie there
    alone; `settled` were no difference when they were looked at again. `failure` says why it did not end."""

    reason: str
    began_us: int
    ended_us: int = 0
    here: int = 0
    there: int = 0
    differing: int = 0
    pushed: int = 0
    brought: int = 0
    listed: int = 0
    settled: int = 0
    alarms: int = 0
    listed_alarms: tuple[Alarm, ...] = ()
    dry_run: bool = False
    failure: str = ""

    def words(self) -> str:
        """In a line, for people."""
        if self.failure:
            return f"it did not end: {self.failure}"
        verb = "would be " if self.dry_run else ""
        if not self.differing and not self.alarms:
            return f"{self.here} here, {self.there} in the region: nothing differs"
        return (f"{self.here} here, {self.there} in the region, {self.differing} differ: "
                f"{self.pushed} {verb}sent again, {self.brought} {verb}brought back, "
                f"{self.listed} {verb}listed as evicted, "
                f"{self.settled} settled by themselves, {self.alarms} need a person")


def outcome_to(outcome: Outcome) -> str:
    return json.dumps(asdict(replace(outcome, listed_alarms=outcome.listed_alarms[:ALARMS_MAX])))


def outcome_from(text: str) -> Outcome:
    """Raises InvalidInput for what is none."""
    if len(text) > OUTCOME_BYTES_MAX:
        raise InvalidInput("an outcome takes at most 32 KiB")
    try:
        body: dict[str, Any] = json.loads(text)
        alarms = tuple(_alarm(**one) for one in body.pop("listed_alarms", ())[:ALARMS_MAX])
        known = {one.name: one.type for one in fields(Outcome)}
        values = {name: _checked(known[name], value) for name, value in body.items() if name in known}
        outcome = Outcome(**values, listed_alarms=alarms)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise InvalidInput("an outcome is not written as outcomes are") from None
    if len(outcome_to(outcome)) > OUTCOME_BYTES_MAX:  # else what is written here could not be read again
        raise InvalidInput("an outcome takes at most 32 KiB")
    return outcome


def _checked(kind: object, value: Any) -> Any:
    """A value as its field has it: it came from another machine, and is shown to people."""
    if kind == "str" and isinstance(value, str):
        return _words(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and type(value) is int and 0 <= value < _COUNT_MAX:
        return value
    raise ValueError("not of its field's kind")


def _alarm(sop_instance_uid: str, digest: str, words: str) -> Alarm:
    if not is_uid(sop_instance_uid) or not re.fullmatch("[0-9a-f]{0,64}", digest, re.ASCII):
        raise ValueError("no alarm about a content")
    return Alarm(sop_instance_uid, digest, _words(words))


def _words(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text[:WORDS_CHARS_MAX])


@dataclass(frozen=True, slots=True)
class Noted:
    """What the file says. `epoch` is the disk of the node that was compared last, `stores` how far each store
    was seen, `compared` the store up to which all was compared; `held` that one stood further back since."""

    epoch: str = ""
    stores: dict[str, Position] = field(default_factory=dict)
    compared: str = ""
    held: bool = False
    last: Outcome | None = None
    wards: dict[str, Outcome] = field(default_factory=dict)


class Notes:
    """The file. Any thread may read and change it."""

    def __init__(self, state: Path) -> None:
        self._path = state / FILE
        self._lock = threading.Lock()
        self._noted = self._read()

    @property
    def now(self) -> Noted:
        return self._noted

    def change(self, **changes: Any) -> None:
        """Durable when this returns; OSError when it is not."""
        with self._lock:
            noted = replace(self._noted, **changes)
            if noted != self._noted:
                self._write(noted)
            self._noted = noted

    def note_ward(self, ward: str, outcome: Outcome) -> None:
        with self._lock:
            noted = replace(self._noted, wards={**self._noted.wards, ward: outcome})
            self._write(noted)
            self._noted = noted

    def _read(self) -> Noted:
        try:
            body = json.loads(self._path.read_text())
            return Noted(
                epoch=body["epoch"],
                stores={name: Position(*place) for name, place in body["stores"].items()},
                compared=body["compared"], held=body["held"],
                last=outcome_from(body["last"]) if body["last"] else None,
                wards={ward: outcome_from(text) for ward, text in body["wards"].items()},
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidInput):
            return Noted()  # none yet, or not ours: everything is compared once more

    def _write(self, noted: Noted) -> None:
        stores = dict(list(noted.stores.items())[-STORES_MAX:])
        body = {
            "epoch": noted.epoch, "compared": noted.compared, "held": noted.held,
            "stores": {name: [place.file, place.offset] for name, place in stores.items()},
            "last": outcome_to(noted.last) if noted.last else "",
            "wards": {ward: outcome_to(outcome) for ward, outcome in noted.wards.items()},
        }  # fmt: skip
        beside = self._path.with_name(f"{FILE}.new")
        with beside.open("w") as file:
            json.dump(body, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def is_back(noted: Noted, store: bytes, position: Position) -> bool:
    """Whether a store stands further back than it was seen: it came from a backup."""
    return noted.stores.get(store.hex(), START) > position
