"""`miss send`: pushes files to a node, or to any other application entity, by C-STORE."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archive.errors import InvalidInput, Unavailable
from miss.console import err, out, size
from miss.peers import parse_peer, require_ae_title

if TYPE_CHECKING:
    pass

CALLING_AE = "MISS-SEND"


def send(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", exists=True, show_default=False,
                                                help="Files and folders; folders with all below them.")],
    to: Annotated[str, typer.Option("--to", metavar="AE@HOST:PORT", show_default=False,
                                    help="Who is to get them.")],
    calling: Annotated[str, typer.Option(help="The AE title to call as; the peer knows it.")] = CALLING_AE,
    associations: Annotated[int, typer.Option(help="How many associations at once.", min=1, max=64)] = 1,
) -> None:
    """Sends DICOM files as they are, in the transfer syntax that they have.

    What is no DICOM file is skipped and counted. Exit code 1 when an instance was not taken.

    \b
    Examples:
      miss send /media/cd --to SM-RADIOLOGY@127.0.0.1:11112
      miss send study1/ study2/image.dcm --to ORTHANC@10.2.4.20:4242 --calling CT1 --associations 4
    """
    from miss.files import find
    from miss.progress import failures, sending_bar
    from node.dimse.sending import send_files

    peer = parse_peer(to)
    with err.status("looking for files ..."):
        found = find(paths)
    if not found.files:
        _say(found.skipped, "skipped")
        raise InvalidInput("there is nothing to send")
    with sending_bar(len(found.files), f"to {to}") as show:
        report = send_files(peer, require_ae_title(calling), found.files, show, associations=associations)
    found.skipped.update(reason for _, reason in report.skipped)
    _say(found.skipped, "skipped")
    _say(failures(report), "failed")
    out.print(f"sent {report.sent} ({size(report.bytes)}), failed {len(report.failed)}, "
              f"skipped {found.skipped.total()}", markup=False)
    if report.failed:
        raise Unavailable(f"{len(report.failed)} of {len(found.files)} instances were not taken")


def _say(reasons: Counter[str], what: str) -> None:
    for reason, count in reasons.most_common():
        err.print(f"{what} {count}: {reason}", style="yellow", markup=False)
