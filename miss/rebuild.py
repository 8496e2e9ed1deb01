"""`miss rebuild`: makes an index anew from packs and facts."""

from __future__ import annotations

from pathlib import Path

from miss import configuration
from miss.configuration import Process, State
from miss.console import err, out


def rebuild(state: State = Path(".")) -> None:
    """Makes the index of a node or of the region anew, from its packs and facts. The process must be stopped.

    The index is derived: it may be deleted and comes back equal, also after evictions. The ledger (users,
    devices, certificates) is never touched.

    \b
    Examples:
      miss rebuild --state /srv/miss
      miss rebuild --state region
    """
    from archive.rebuild import rebuild as make_anew

    hub = state / Process.HUB.file
    if hub.exists():
        settings, outbox = configuration.hub(hub).archive_settings(), False
    else:
        node = configuration.found(state / Process.NODE.file, Process.NODE)
        settings, outbox = configuration.node(node).archive_settings(), True
    err.print(f"reading the packs in {settings.state} ...", markup=False)
    report = make_anew(settings, outbox=outbox)
    for damage in report.damages:
        err.print(f"damaged: {damage}", style="red", markup=False, soft_wrap=True)
    out.print(f"the index is new: {report.records} records and {report.facts} facts in "
              f"{report.duration_s:.1f} s, {len(report.damages)} damaged", markup=False)
