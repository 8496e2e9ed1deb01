"""`miss send`: pushes files to a node, or to any other application entity, by C-STORE."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from archive.errors import InvalidInput, Unavailable
from miss.console import err, out, size
from miss.peers import parse_peer, require_ae_title

CALLING_AE = "MISS-SEND"
ENDED_SHOWN_MAX = 10


def send(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", exists=True, show_default=False,
                                                help="Files and folders; folders with all below them.")],
    to: Annotated[str, typer.Option("--to", metavar="AE@HOST:PORT", show_default=False,
                                    help="Who is to get them.")],
    calling: Annotated[str, typer.Option(help="The AE title to call as; the peer knows it.")] = CALLING_AE,
    associations: Annotated[int, typer.Option(help="How many associations at once.", min=1, max=64)] = 1,
    window: Annotated[int, typer.Option(
        help="Instances under way at once on each association, where the peer grants it.", min=1,
        max=64)] = 1,
    tls: Annotated[bool, typer.Option("--tls", help="Over TLS.")] = False,
    trust: Annotated[Path | None, typer.Option(
        metavar="FILE", help="The authorities of the peer's certificate, in PEM; else the system's.",
        show_default=False)] = None,
    certificate: Annotated[Path | None, typer.Option(
        metavar="FILE", help="The own certificate with its chain, in PEM.", show_default=False)] = None,
    key: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Its key, in PEM.", show_default=False)] = None,
    server_name: Annotated[str | None, typer.Option(
        help="The name in the peer's certificate, when it is not the host of --to; \"\" takes any.",
        show_default=False)] = None,
) -> None:
    """Sends DICOM files as they are, in the transfer syntax that they have.

    What is no DICOM file is skipped and counted. Each file is sent once: when an association ends early,
    what it had not answered counts as failed, and the rest goes on over another. Exit code 1 when an
    instance was not taken.

    \b
    Examples:
      miss send /media/cd --to SM-RADIOLOGY@127.0.0.1:11112
      miss send study1/ study2/image.dcm --to ORTHANC@10.2.4.20:4242 --calling CT1 --associations 4
      miss send study1/ --to MISS@miss.ward.example:2762 --calling CT1 --tls --trust ct1/trust.pem \\
        --certificate ct1/certificate.pem --key ct1/key.pem
    """
    from miss.files import find
    from miss.progress import failures, sending_bar
    from node.dimse.sending import send_files
    from node.dimse.tls import Dialling

    peer = parse_peer(to)
    if tls:
        peer = replace(peer, tls=Dialling.by(trust=trust, certificate=certificate, key=key,
                                             server_name=server_name))
    elif trust or certificate or key or server_name is not None:
        raise InvalidInput("--trust, --certificate, --key and --server-name are of TLS: give --tls too")
    with err.status("looking for files ..."):
        found = find(paths)
    if not found.files:
        _say(found.skipped, "skipped")
        raise InvalidInput("there is nothing to send")
    with sending_bar(len(found.files), f"to {to}") as show:
        report = send_files(peer, require_ae_title(calling), found.files, show, associations=associations,
                            window=window)
    found.skipped.update(reason for _, reason in report.skipped)
    _say(found.skipped, "skipped")
    _say(failures(report), "failed")
    for ended in report.ended[:ENDED_SHOWN_MAX]:
        err.print(f"an association ended early, {ended}", style="yellow", markup=False)
    out.print(f"sent {report.sent} ({size(report.bytes)}), failed {len(report.failed)}, "
              f"skipped {found.skipped.total()}", markup=False)
    if report.failed:
        raise Unavailable(f"{len(report.failed)} of {len(found.files)} instances were not taken")


def _say(reasons: Counter[str], what: str) -> None:
    for reason, count in reasons.most_common():
        err.print(f"{what} {count}: {reason}", style="yellow", markup=False)
