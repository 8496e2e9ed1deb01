"""The `miss` command: gathers the groups, one file each, and runs what was typed."""

from __future__ import annotations

import typer

from miss import (
    backups,
    bench,
    ca,
    cache,
    commitments,
    conflicts,
    console,
    correct,
    deliveries,
    demo,
    device,
    hub,
    node,
    outbox,
    packs,
    portal,
    processes,
    rebuild,
    reconcile,
    remove,
    routes,
    send,
    settings,
    status,
    user,
    ward,
    worklist,
)

app = typer.Typer(
    name="miss",
    help="MISS: images of every hospital's wards in one regional archive.\n\n"
         "A ward runs a node (`miss node run`), the region a hub (`miss hub run`) and a portal "
         "(`miss portal run`). To see all of it on this machine: `miss demo`.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("demo")(demo.demo)
app.add_typer(ca.app, name="ca")
app.add_typer(hub.app, name="hub")
app.add_typer(node.app, name="node")
app.add_typer(device.app, name="device")
app.add_typer(portal.app, name="portal")
app.add_typer(user.app, name="user")
app.add_typer(conflicts.app, name="conflicts")
app.add_typer(remove.app, name="remove")
app.add_typer(correct.app, name="correct")
app.add_typer(packs.app, name="packs")
app.add_typer(cache.app, name="cache")
app.add_typer(backups.app, name="region")
app.add_typer(routes.app, name="routes")
app.add_typer(outbox.app, name="backlog")
app.add_typer(deliveries.app, name="deliveries")
app.add_typer(ward.app, name="ward")
app.command("commitments")(commitments.commitments)
app.add_typer(worklist.app, name="worklist")
app.command("send")(send.send)
app.command("reconcile")(reconcile.reconcile)
app.command("scrub")(reconcile.scrub)
app.command("status")(status.status)
app.command("rebuild")(rebuild.rebuild)
app.add_typer(bench.app, name="bench")
app.add_typer(settings.app, name="settings")


def main() -> None:
    processes.stop_with_parent()
    console.run(app)


if __name__ == "__main__":
    main()
