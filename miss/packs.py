"""`miss packs`: looks at the packs of a node or of the region, beside the process that writes them or without
one and with no index; asks the process for evictions and compactions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archive.errors import InvalidInput, NotFound, SettingsError
from miss.configuration import State
from miss.console import EXIT_ERROR, err, out, size, table, when
from miss.ledgers import require_node

if TYPE_CHECKING:
    from archive.packs.storage import Storage
    from archive.packs.survey import Finding, Listed, PackSummary, Survey

app = typer.Typer(help="The packs in which instances lie: list, verify, extract; give space back.",
                  no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]
RATE_MB_S = 100.0
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@app.command("ls")
def ls(
    pack: Annotated[str, typer.Argument(metavar="[PACK]", show_default=False, help=(
        "A pack's number or name; then its records are listed."))] = "",
    as_json: AsJson = False,
    state: State = Path("."),
) -> None:
    """Lists the packs, or the records of one; also while the process runs, and when the index is gone.

    \b
    Examples:
      miss packs ls --state /srv/miss
      miss packs ls 12 --json --state /srv/miss
    """
    survey, _ = _survey(state)
    if pack:
        _list_records(survey, survey.number_of(pack), as_json)
        return
    summaries = [found for found in map(_summary_of(survey), survey.names) if found is not None]
    missing, (own, own_bytes) = survey.missing(), survey.own_packs()
    if as_json:
        out.print_json(json.dumps({
            "packs": [_summary_json(each) for each in summaries], "missing": [each.pack for each in missing],
            "large_objects": own, "large_bytes": own_bytes}))
        return
    grid = table("pack", ">size", ">on disk", "is", "begun", "records")
    for each in summaries:
        is_ = "going" if each.goes else "sealed" if each.sealed else "open"
        counts = {**{state.value: count for state, count in each.counts.items()}, "damaged": each.damaged}
        words = ", ".join(f"{count} {is_so}" for is_so, count in counts.items() if count)
        grid.add_row(each.name.removeprefix("packs/").removesuffix(".pack"), size(each.bytes),
                     size(each.allocated), is_, when(each.created_us)[:16], words or "none")
    out.print(grid)
    out.print(f"{own} large objects have packs of their own, {size(own_bytes)}", markup=False)
    _tell(missing)


@app.command()
def verify(
    packs: Annotated[list[str] | None, typer.Argument(metavar="[PACK]...", show_default=False, help=(
        "Numbers or names of packs; else all."))] = None,
    rate: Annotated[float, typer.Option(help="At most so many MB/s are read, so that intake is not slowed.",
                                        min=0.1, max=100_000)] = RATE_MB_S,
    as_json: AsJson = False,
    state: State = Path("."),
) -> None:
    """Reads every header, trailer, check and digest again, and says what is damaged, with its place and UID.
    Ends with 1 when something is. What was evicted is no damage, nor is what the process is just writing.

    \b
    Examples:
      miss packs verify --state /srv/miss
      miss packs verify 12 13 --rate 20 --state /srv/miss
    """
    from archive.packs.survey import Finding
    from archive.space.pace import Pace

    survey, _ = _survey(state)
    pace = Pace(rate * 1e6, share=1.0)
    numbers = [survey.number_of(name) for name in (packs or survey.names)]
    findings: list[Finding] = [] if packs else survey.missing()
    counts: dict[str, int] = {}
    for number in numbers:
        for item in _while_there(survey.verify(number, pace.took)):
            if isinstance(item, Finding):
                findings.append(item)
            else:
                counts[item.state.value] = counts.get(item.state.value, 0) + 1
    if as_json:
        out.print_json(json.dumps({"packs": len(numbers), "records": counts,
                                   "damages": [_finding_json(each) for each in findings]}))
    else:
        _tell(findings)
        words = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no records"
        err.print(f"{len(numbers)} packs read: {words}, {len(findings)} damaged",
                  style="red" if findings else "green", markup=False)
    if findings:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def extract(
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", file_okay=False, show_default=False,
                                     help="Where the files go; made when it is not there.")],
    uids: Annotated[list[str] | None, typer.Option("--uid", show_default=False,
                    help="A SOP Instance UID; may be given again.")] = None,
    study: Annotated[str, typer.Option(help="A Study Instance UID.", show_default=False)] = "",
    packs: Annotated[list[str] | None, typer.Option("--pack", show_default=False, help=(
        "A pack's number or name, or a file below set-aside; may be given again."))] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything that is here.")] = False,
    state: State = Path("."),
) -> None:
    """Writes instances as DICOM files (Part 10), with no index and beside the process that runs. Each is
    checked against its digest; no file is ever overwritten.

    \b
    Examples:
      miss packs extract --study 1.2.840.1 --to /tmp/study --state /srv/miss
      miss packs extract --pack set-aside/large-0f3c-1790000000000000000.part --to /tmp/x --state /srv/miss
      miss packs extract --all --to /mnt/rescue --state /srv/miss
    """
    from archive.extract import Wanted, extract, extract_aside
    from archive.model import require_uid

    if not (uids or study or packs or everything):
        raise InvalidInput("say what: --uid, --study, --pack or --all")
    for uid in [*(uids or ()), *([study] if study else ())]:
        require_uid(uid, "what was given")
    survey, storage = _survey(state)
    asides = [name for name in packs or () if name.startswith("set-aside/")]
    if missing := [name for name in asides if name not in storage.list("set-aside")]:
        raise NotFound(f"there is no {missing[0]}; what was set aside lies in set-aside/ of the state folder")
    numbers = tuple(survey.number_of(name) for name in packs or () if name not in asides)
    done = [extract_aside(storage, name, to) for name in asides]
    if numbers or not asides:
        done.append(extract(survey, Wanted(frozenset(uids or ()), study, numbers), to))
    if not (everything or any(each.files or each.there or each.evicted or each.failures for each in done)):
        raise NotFound("nothing that was named is in the packs here, unless its bytes were evicted; "
                       "`miss packs ls PACK` lists the records of a pack")
    failures = [words for each in done for words in each.failures]
    for words in failures:
        err.print(f"not extracted: {words}", style="red", markup=False, soft_wrap=True)
    files, there, gone = (sum(getattr(each, name) for each in done) for name in ("files", "there", "evicted"))
    err.print(f"{files} files written to {to}, {size(sum(each.bytes for each in done))}; {there} were there; "
              f"{gone} were evicted, the region has them", markup=False)
    if failures:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def evict(
    protected_to: Annotated[str, typer.Option(metavar="TIME", show_default=False, help=(
        "Up to when the region's receipts count: what the region has in its backups and second copies. "
        "2026-11-22T18:00, local time, or `now`."))],
    study: Annotated[str, typer.Option(metavar="UID", show_default=False, help="One study.")] = "",
    older_than: Annotated[str, typer.Option(metavar="AGE", show_default=False, help=(
        "What was received longer ago: 30d, 12h."))] = "",
    until_free: Annotated[str, typer.Option(metavar="SIZE", show_default=False, help=(
        "The oldest first, until so much disk is free: 100G."))] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    state: State = Path("."),
) -> None:
    """Gives up the bytes of instances that the region has. They stay listed, and the region serves them; what
    comes again from a device is stored again. Nothing goes without a receipt.

    \b
    Examples:
      miss packs evict --older-than 30d --protected-to 2026-11-21T00:00 --dry-run --state /srv/miss
      miss packs evict --until-free 100G --protected-to now --state /srv/miss
      miss packs evict --study 1.2.840.1 --protected-to now --state /srv/miss
    """
    from archive.model import require_uid
    from archive.space.orders import EVICT
    from miss.ca import duration_s
    from miss.orders import carry_out

    require_node(state)  # the region's bytes are what a node relies on
    detail = {"protected_to_us": str(time_us(protected_to))}
    if study:
        detail["study"] = require_uid(study, "the study")
    if older_than:
        detail["received_before_us"] = str(time.time_ns() // 1000 - int(duration_s(older_than) * 1e6))
    if until_free:
        detail["free_bytes"] = str(bytes_of(until_free))
    if len(detail) != 2:
        raise InvalidInput("say one of --study, --older-than, --until-free")
    if dry_run:
        detail["dry_run"] = "yes"
    out.print(carry_out(state, EVICT, detail), markup=False)


@app.command()
def compact(
    pack: Annotated[str, typer.Argument(metavar="[PACK]", show_default=False, help=(
        "A pack's number; else all of which most is gone."))] = "",
    state: State = Path("."),
) -> None:
    """Writes what counts of mostly evicted packs once more, behind the others, and lets the packs go an hour
    later. Needed where the file system can't punch holes.

    \b
    Examples:
      miss packs compact --state /srv/miss
      miss packs compact 12 --state /srv/miss
    """
    from archive.space.orders import COMPACT
    from miss.orders import carry_out

    survey, _ = _survey(state)
    detail = {"pack": str(survey.number_of(pack))} if pack else {}
    out.print(carry_out(state, COMPACT, detail), markup=False)


def time_us(text: str) -> int:
    """A time as people write it, in microseconds since 1970."""
    if text == "now":
        return time.time_ns() // 1000
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(f"{text} is not a time such as 2026-11-22T18:00, nor `now`") from None
    return int(at.timestamp() * 1e6)


def bytes_of(text: str) -> int:
    """100G as bytes; powers of ten, as disks are sold."""
    number, unit = text[:-1], _UNITS.get(text[-1:].lower())
    try:
        count = float(number if unit else text) * (unit or 1)
        if not 0 < count < 1e18:
            raise ValueError
        return int(count)
    except ValueError:
        raise InvalidInput(f"{text} is not a size such as 100G") from None


def _survey(state: Path) -> tuple[Survey, Storage]:
    """The packs of the folder itself, or of the one that its settings name."""
    from archive.archive import read_acknowledged
    from archive.packs.storage import FileStorage
    from archive.packs.survey import Survey
    from miss.orders import archive_of

    try:
        folder = archive_of(state)[0].state
    except SettingsError:
        folder = state  # a disk out of a machine that is gone: its packs alone
    if not (folder / "packs").is_dir():
        raise InvalidInput(f"{folder} holds no packs: give --state DIR, the folder of the node or the region")
    if folder.resolve() != state.resolve():  # a copied folder whose settings still name the original
        err.print(f"the settings in {state} name {folder}: these are the packs there", style="yellow",
                  markup=False, soft_wrap=True)
    storage = FileStorage(folder)
    return Survey(storage, promised=read_acknowledged(folder)), storage


def _summary_of(survey: Survey) -> Any:
    def summary(name: str) -> PackSummary | None:
        try:
            return survey.summary(survey.number_of(name))
        except FileNotFoundError:
            return None  # let go meanwhile

    return summary


def _while_there(items: Iterator[Listed | Finding]) -> Iterator[Listed | Finding]:
    """A pack may go while it is read: what counted of it is elsewhere by then."""
    try:
        yield from items
    except FileNotFoundError:
        return


def _list_records(survey: Survey, number: int, as_json: bool) -> None:
    from archive.packs.survey import Finding

    grid = table(">sequence", ">offset", "is", "SOP class", "SOP instance", "syntax", ">size", "AE",
                 "received")
    rows = []
    findings = []
    for item in _while_there(survey.records(number)):
        if isinstance(item, Finding):
            findings.append(item)
            continue
        head, record = item.record.head, item.record
        if as_json:
            rows.append({
                "sequence": record.sequence, "offset": item.offset, "is": item.state.value,
                "sop_class_uid": head.sop_class_uid, "sop_instance_uid": head.sop_instance_uid,
                "transfer_syntax_uid": head.transfer_syntax_uid, "bytes": record.location.length,
                "pack": record.location.pack, "calling_ae": head.provenance.calling_ae,
                "device": head.provenance.device, "received_at_us": head.provenance.received_at_us,
                "digest": record.digest.hex(),
            })
        else:
            grid.add_row(str(record.sequence), str(item.offset), item.state.value, head.sop_class_uid,
                         head.sop_instance_uid, head.transfer_syntax_uid, size(record.location.length),
                         head.provenance.calling_ae, when(head.provenance.received_at_us))
    if as_json:
        out.print_json(json.dumps({"records": rows, "damages": [_finding_json(each) for each in findings]}))
        return
    out.print(grid)
    _tell(findings)


def _tell(findings: Iterable[Finding]) -> None:
    for each in findings:
        uid = f", {each.sop_instance_uid}" if each.sop_instance_uid else ""
        err.print(f"damaged: {each.pack} from {each.offset} to {each.end}{uid}: {each.words}", style="red",
                  markup=False, soft_wrap=True)


def _finding_json(each: Finding) -> dict[str, Any]:
    return {"pack": each.pack, "offset": each.offset, "end": each.end,
            "sop_instance_uid": each.sop_instance_uid, "words": each.words}


def _summary_json(each: PackSummary) -> dict[str, Any]:
    return {"name": each.name, "bytes": each.bytes, "allocated": each.allocated, "sealed": each.sealed,
            "going": each.goes, "created_us": each.created_us, "first_sequence": each.first_sequence,
            "last_sequence": each.last_sequence, "damaged": each.damaged,
            **{state.value: count for state, count in each.counts.items()}}
