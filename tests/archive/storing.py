"""A process that stores instances into an archive and says on its standard output which were acknowledged,
until it is killed. Run as `python -m tests.archive.storing STATE SEED`."""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path

from archive.archive import Archive
from tests.archive.archives import send, settings_for
from tests.datasets import make_instance

THREADS = 3


def main() -> None:
    state, seed = Path(sys.argv[1]), int(sys.argv[2])
    archive = Archive.open(settings_for(state, pack_bytes_max=2 << 20), outbox=True)
    os.write(1, b"open\n")

    def run(thread: int) -> None:
        chance = random.Random(seed * 100 + thread)
        number = 0
        while True:
            number += 1
            uid = f"1.2.3.{seed}.{thread}.{number}"
            padding = 2 << 20 if chance.random() < 0.03 else chance.randrange(0, 20_000, 2)
            instance = make_instance(sop_uid=uid, padding=padding, number=number)
            ticket = send(archive, instance, piece_bytes=64 << 10)
            ticket.wait_durable()
            line = f"{uid} {instance.study_uid} {ticket.digest.hex()}\n"
            os.write(1, line.encode())  # one write: whole or not at all

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
