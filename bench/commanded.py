"""A node as `miss node run` runs it, that also opens associations of its own when it is told to:

    python -m bench.commanded NODE.TOML

Each line on stdin is JSON, [AE title, host, port]; the node's own process associates, echoes, releases, and
says on stdout how long that took. The end of stdin ends the node.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from miss import configuration
from miss.console import set_up_logging
from miss.load.sender import CALLING_AE
from node.dimse.requestor import Peer, echo
from node.service import Node


def obey() -> None:
    for line in sys.stdin:
        ae_title, host, port = json.loads(line)
        start = time.perf_counter()
        try:
            answer: dict[str, object] = {"status": echo(Peer(host, port, ae_title), CALLING_AE)}
        except Exception as error:  # whatever it is: somebody waits for an answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({**answer, "seconds": time.perf_counter() - start}), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    set_up_logging("WARNING")
    node = Node(configuration.node(Path(sys.argv[1])))
    threading.Thread(target=obey, name="commands", daemon=True).start()
    node.run()


if __name__ == "__main__":
    main()
