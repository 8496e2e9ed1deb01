"""`miss send`: pushes files to a node, or to any other application entity, by C-STORE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archive.errors import InvalidInput, Unavailable
from miss.console import err, out, size


def send(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", exists=True, show_default=False,
                                                help="Files and folders; folders with all below them.")],
    to: Annotated[str, typer.Option("--to", metavar="AE@HOST:PORT", show_default=False,
                                    help="Who is to get them.")],
    calling: Annotated[str, typer.Option(help="The AE title to call as; the peer knows it.")] = "MISS-SEND",
) -> None:
    """Sends DICOM files as they are, in the transfer syntax that they have, over one association.

    What is no DICOM file is skipped and counted. Exit code 1 when an instance was not taken.

    \b
    Examples:
      miss send /media/cd --to SM-RADIOLOGY@127.0.0.1:11112
      miss send study1/ study2/image.dcm --to ORTHANC@10.2.4.20:4242 --calling CT1
    """
    from miss.files import find
    from miss.progress import sending_bar
    from miss.sending import Account, parse_peer, send_all

    peer = parse_peer(to)
    found = find(paths)
    for reason, count in found.skipped.most_common():
        err.print(f"skipped {count}: {reason}", style="yellow", markup=False)
    if not found.files:
        raise InvalidInput("there is nothing to send")
    contexts = list(dict.fromkeys((file.sop_class_uid, file.transfer_syntax_uid) for file in found.files))
    account = Account()
    with sending_bar(len(found.files), f"to {to}") as show:
        send_all(peer, found.files, contexts, calling_ae=calling, progress=show, account=account)
    out.print(f"sent {account.sent} ({size(account.bytes)}), failed {account.failed}, "
              f"skipped {found.skipped.total()}", markup=False)
    for reason, count in (account.failures + account.warnings).most_common():
        err.print(f"{count} x {reason}", style="yellow", markup=False)
    if account.failed:
        raise Unavailable(f"{account.failed} of {len(found.files)} instances were not taken")
