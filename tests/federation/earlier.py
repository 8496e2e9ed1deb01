"""The release that landed last, run as a process of its own beside this one: its source is taken out of the
history, and runs with this environment's libraries. It is told what to do by lines of JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The release before this one. When a version lands, this is the next one's.
EARLIER = "463e56711c6af34419c4de7d0edb6d014b36d3b4"

HUB = """
import json, sys
from pathlib import Path
from archive.model import Level, Query
from federation.hub import Hub
from tests.federation.regions import make_region
from tests.federation.wards import EVA, Regional, hub_settings
from tests.waiting import wait_for

region = make_region(Path(sys.argv[1]))
hub = Hub(hub_settings(region))
hub.start()
ward = region.add_ward("San Martino", "Radiology", "SM")
identity = region.node(ward, hub.address)
print(json.dumps({"address": hub.address, "identity": str(identity.folder)}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "search":
        with Regional(region, hub) as source:
            answer = source.search(EVA, Query(Level.STUDY))
            answered = {"instances": sum(match.instance_count for match in answer.matches),
                        "pending": sum(1 for match in answer.matches if match.pending_at),
                        "states": [one.state.value for one in answer.coverage]}
    elif asked["do"] == "read":
        with Regional(region, hub) as source:
            answered = {"instances": len(source.instances(EVA, asked["study"]))}
    elif asked["do"] == "report":
        state = region.ledger.ward_states()[ward.id]
        answered = {"attached": state.attached, "pending": state.pending}
    else:
        answered = {}
    print(json.dumps(answered), flush=True)
hub.stop()
"""

NODE = """
import json, sys
from pathlib import Path
from archive.model import Ward
from certs.identity import Identity
from tests.datasets import make_instance
from tests.federation.wards import Node

ward = Ward("san-martino/radiology", "San Martino", "Radiology", "SM")
node = Node(ward, Identity.load(Path(sys.argv[1])), Path(sys.argv[2]))
print("{}", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    answered = {}
    if asked["do"] == "take":
        node.take(make_instance(number=number, study_uid=asked["study"], rows=asked.get("rows", 16),
                                columns=asked.get("rows", 16)) for number in range(*asked["numbers"]))
    elif asked["do"] == "start":
        node.leave()
        node.start(hold=asked["hold"])
    elif asked["do"] == "stand":
        status = node.uplink.status()
        answered = {"attached": status.attached, "reason": status.reason, "pending": node.pending}
    print(json.dumps(answered), flush=True)
node.stop()
"""


class Earlier:
    """A process of the earlier release that does what `script` says."""

    def __init__(self, source: Path, script: str, *arguments: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=source, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.begun = self._answer()

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the earlier release ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Earlier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()


def extract(folder: Path) -> Path:
    """The earlier release's source; skips the test where the history lacks it."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "archive", "--format=tar", EARLIER], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no git to take the earlier release from")
    if found.returncode:
        pytest.skip(f"this history lacks the earlier release {EARLIER[:7]}")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder
