"""One measurement of a node on fresh data: start, load, let it finish, check, stop. A figure counts only when
everything that was acknowledged is in the index."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from archive.errors import Corrupt, NotFound
from miss.load import usage
from miss.load.instances import Numbered
from miss.load.sender import Plan, Tally, send
from miss.load.temporary_node import Place, TemporaryNode

INSTANCES_MAX = 10_000_000
SAMPLE_MAX = 8             # instances of a run whose bytes are read again
SAMPLE_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class Measurement:
    """What came of one load. `busy` is the share of all cores that anybody used; `problem` is empty when the
    answers were true."""

    corpus: str
    instance_bytes: int
    associations: int
    instances: int
    rate: float
    bytes_rate: float
    p50_s: float
    p95_s: float
    cpu_per_1000_s: float
    busy: float
    problem: str


def measure_node(folder: Path, corpus: Numbered, associations: int, seconds: float) -> Measurement:
    """Load a node in `folder`, which is left as the node left it."""
    with TemporaryNode(folder) as node:
        pids = usage.tree(node.child.pid)
        cpu, machine = usage.cpu_s(pids), usage.machine()
        tally = send(node.place.target, corpus, Plan(associations, seconds, INSTANCES_MAX))
        after = usage.machine()
        problem = check(node.place, corpus, tally)
        cpu = usage.cpu_s(usage.tree(node.child.pid)) - cpu
    busy = (after.busy_s - machine.busy_s) / max(after.total_s - machine.total_s, 0.01)
    return Measurement(
        corpus.name, corpus.instance(0).size, associations, tally.stored, tally.rate, tally.bytes_rate,
        tally.latency_s(0.5), tally.latency_s(0.95), 1000 * cpu / max(tally.stored, 1), busy, problem)


def check(place: Place, corpus: Numbered, tally: Tally) -> str:
    """What is wrong with the answers; empty when nothing is. Every 0000 is in the index, every other answer
    is named, and the bytes of a few are what was sent."""
    if tally.failures:
        return f"answered other than 0000: {statuses(tally.failures)}"
    if not tally.stored:
        return "nothing was stored"
    held = place.totals()
    if held.instances != tally.stored or held.conflicts:
        return f"{tally.stored} were acknowledged, and {held.instances} are in the index"
    return _check_bytes(place, corpus)


def statuses(failures: Counter[int]) -> str:
    return ", ".join(f"{count} x {'no answer' if status < 0 else f'{status:04X}'}"
                     for status, count in failures.most_common())


def _check_bytes(place: Place, corpus: Numbered) -> str:
    archive = place.open_archive()
    try:
        for number in range(SAMPLE_MAX):
            sent = corpus.instance(number)
            if sent.size > SAMPLE_BYTES_MAX:
                break
            stored = archive.instances(sent.study_uid, sop_instance_uid=sent.sop_instance_uid)
            if not stored:
                continue  # of an association that got less far
            digest = hashlib.sha256()
            for chunk in archive.dataset_chunks(stored[0].location):
                digest.update(chunk)
            if digest.digest() != hashlib.sha256(b"".join(sent.chunks())).digest():
                return "the bytes of an instance are not what was sent"
    except (Corrupt, NotFound) as error:
        return f"an instance can't be read: {error}"
    finally:
        archive.close()
    return ""
