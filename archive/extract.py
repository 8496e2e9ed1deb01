"""Instances out of packs as Part 10 files, with no index and beside the process that writes. Every file is
checked against its digest before it has its name; names are made here from UIDs that are UIDs, and no file
is ever overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from archive.dataset.header import scan
from archive.errors import Corrupt, Evicted, InvalidInput, MissError, NotFound, OutOfResources
from archive.model import InstanceHead, is_uid
from archive.packs.logfiles import NO_SPACE
from archive.packs.packs import Packs
from archive.packs.storage import Storage
from archive.packs.survey import Finding, Listed, State, Survey, salvage

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which instances: of these UIDs, of one study, of some packs; everything that is not said is any."""

    uids: frozenset[str] = frozenset()
    study_uid: str = ""
    packs: tuple[int, ...] = ()


@dataclass(slots=True)
class Extracted:
    """What came of it. `there` counts files that were there already with the same bytes, `evicted` what the
    region alone has, `failures` names what could not be read, with its place."""

    files: int = 0
    bytes: int = 0
    there: int = 0
    evicted: int = 0
    failures: list[str] = field(default_factory=list)


def extract(survey: Survey, wanted: Wanted, folder: Path) -> Extracted:
    """Write what is wanted into `folder`. Raises OutOfResources when its disk is full."""
    done = Extracted()
    target = _Target(folder, done)
    numbers = wanted.packs or tuple(survey.number_of(name) for name in survey.names)
    for number in numbers:
        with contextlib.suppress(FileNotFoundError):  # let go meanwhile: what counted of it is elsewhere
            for item in survey.records(number):
                if isinstance(item, Finding):
                    done.failures.append(f"{item.pack} from {item.offset} to {item.end}: {item.words}")
                elif _is_wanted(survey.packs, item, wanted, done):
                    target.put(survey.packs, item)
    return done


def extract_aside(storage: Storage, name: str, folder: Path) -> Extracted:
    """The whole objects of a file that was set aside."""
    done = Extracted()
    target = _Target(folder, done)
    for item in salvage(storage, name):
        if isinstance(item, Finding):
            done.failures.append(f"{item.pack} from {item.offset} to {item.end}: {item.words}")
        else:
            head = item.record_header.head
            target.write(head, item.digest, item.chunks(), aside=True)
    return done


def _is_wanted(packs: Packs, item: Listed, wanted: Wanted, done: Extracted) -> bool:
    uid = item.record.head.sop_instance_uid
    if item.state is State.MOVED or (wanted.uids and uid not in wanted.uids):
        return False
    if item.state is State.EVICTED:
        done.evicted += 0 if wanted.study_uid else 1  # its study can't be read here any more
        return False
    if not wanted.study_uid:
        return True
    try:
        with packs.dataset(item.record.location) as dataset:
            found = scan(dataset, item.record.head.transfer_syntax_uid)
        return found.study_uid == wanted.study_uid
    except MissError as error:
        done.failures.append(f"{item.pack} at {item.offset}, {uid}: {error}")
        return False


class _Target:
    """The folder that files are written to."""

    def __init__(self, folder: Path, done: Extracted) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise InvalidInput(f"{folder} is not a folder")
        self._folder = folder
        self._done = done

    def put(self, packs: Packs, item: Listed) -> None:
        record = item.record
        try:
            packs.verify(record.head, record.digest, record.location)
            with packs.open_payload(record.location) as payload:
                chunks = iter(lambda: payload.read(_PIECE_BYTES), b"")
                self.write(record.head, record.digest, chunks, aside=item.state is State.CONFLICT)
        except Evicted:
            self._done.evicted += 1
        except (Corrupt, NotFound) as error:
            uid = record.head.sop_instance_uid
            self._done.failures.append(f"{item.pack} at {item.offset}, {uid}: {error}")

    def write(self, head: InstanceHead, digest: bytes, chunks: Iterable[bytes], *, aside: bool) -> None:
        """`aside`: another content of that UID may count, so the name says which this is."""
        if not is_uid(head.sop_instance_uid):
            self._done.failures.append("a record names no UID")
            return
        own = f"{head.sop_instance_uid}.{digest.hex()[:16]}.dcm"
        names = [own] if aside else [f"{head.sop_instance_uid}.dcm", own]
        made = self._folder / f".{os.getpid()}.part"
        running, size = hashlib.sha256(), 0
        try:
            with made.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    running.update(chunk)
                    size += len(chunk)
            self._name(made, names, running.digest(), size)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise OutOfResources(f"no room left in {self._folder}") from error
            raise InvalidInput(f"{self._folder} can't be written (errno {error.errno})") from error
        finally:
            made.unlink(missing_ok=True)

    def _name(self, made: Path, names: list[str], digest: bytes, size: int) -> None:
        for name in names:
            path = self._folder / name
            try:
                path.open("xb").close()  # the name is ours, or there is a file already, whoever made it
            except FileExistsError:
                if _digest_of(path) == digest:
                    self._done.there += 1
                    return
                continue
            made.replace(path)
            self._done.files += 1
            self._done.bytes += size
            return
        self._done.failures.append(f"{names[-1]} is there already, with other bytes")


def _digest_of(path: Path) -> bytes:
    running = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(_PIECE_BYTES), b""):
            running.update(piece)
    return running.digest()

