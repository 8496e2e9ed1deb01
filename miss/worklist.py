"""`miss worklist`: the scheduled steps that a node's modalities ask for, and what they report to have done.
Writes the node's ledger, which the node reads at every query: nothing needs a restart."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archive.errors import InvalidInput, MissError, NotFound
from archive.model import is_uid
from miss.configuration import State
from miss.console import err, out, table, when
from miss.ledgers import open_ledger, require_node
from miss.peers import require_ae_title

if TYPE_CHECKING:
    from archive.ledger import Ledger, ScheduledStep

app = typer.Typer(help="The modality worklist of a node, and the performed steps; changes count at once.",
                  no_args_is_help=True)

COMMAND = "command"
ID_LENGTH_MAX = 16  # SH
_FORMS = {"AE": "up to 16 characters", "CS": "up to 16 capital letters, digits, spaces and underscores",
          "DA": "a day, written YYYYMMDD", "DS": "a number", "LO": "up to 64 characters",
          "LT": "up to 10,240 characters", "PN": "a name of up to 64 characters",
          "SH": "up to 16 characters", "TM": "a time of day, written HHMM or HHMMSS", "UI": "a UID"}
SEXES = ("M", "F", "O")
PRIORITIES = ("STAT", "HIGH", "ROUTINE", "MEDIUM", "LOW")
_AS_JSON = "As DICOM JSON, for scripts."

Step = Annotated[str, typer.Argument(metavar="STEP", show_default=False,
                                     help="The step's key, as `miss worklist ls` shows it; its beginning "
                                          "is enough.")]


@app.command()
def add(
    patient_name: Annotated[str, typer.Option(help="Family^Given.", show_default=False)],
    patient_id: Annotated[str, typer.Option(help="The Patient ID.", show_default=False)],
    modality: Annotated[str, typer.Option(help="CT, MR, US, ...", show_default=False)],
    issuer: Annotated[str, typer.Option(help="The issuer of the Patient ID.")] = "",
    birth_date: Annotated[str, typer.Option(help="YYYYMMDD.")] = "",
    sex: Annotated[str, typer.Option(help=f"{', '.join(SEXES)}.")] = "",
    weight: Annotated[str, typer.Option(help="In kg.")] = "",
    station: Annotated[list[str] | None, typer.Option(
        metavar="AE-TITLE", help="A station that may perform it; repeatable. None: any.",
        show_default=False)] = None,
    date: Annotated[str, typer.Option(help="When it begins, YYYYMMDD; today.", show_default=False)] = "",
    time: Annotated[str, typer.Option(help="HHMM or HHMMSS; now.", show_default=False)] = "",
    description: Annotated[str, typer.Option(help="What is to be done.")] = "",
    physician: Annotated[str, typer.Option(help="Who is to perform it.")] = "",
    referring: Annotated[str, typer.Option(help="The referring physician.")] = "",
    location: Annotated[str, typer.Option(help="Where.")] = "",
    accession: Annotated[str, typer.Option(help="The accession number; else a new one.",
                                           show_default=False)] = "",
    procedure_id: Annotated[str, typer.Option(help="The Requested Procedure ID; else a new one.",
                                              show_default=False)] = "",
    step_id: Annotated[str, typer.Option(help="The Scheduled Procedure Step ID; else a new one.",
                                         show_default=False)] = "",
    study_uid: Annotated[str, typer.Option(help="The Study Instance UID; else a new one.",
                                           show_default=False)] = "",
    priority: Annotated[str, typer.Option(help=f"{', '.join(PRIORITIES)}.")] = "",
    comments: Annotated[str, typer.Option(help="Of the requested procedure.")] = "",
    state: State = Path("."),
) -> None:
    """Schedules a step, or changes the one of the same accession number, procedure and step. Prints its key
    and its Study Instance UID.

    \b
    Example:
      miss worklist add --patient-name 'Rossi^Maria' --patient-id 123 --modality CT --station CT1 \\
        --description 'CT head' --state /srv/miss
    """
    from pydicom.uid import generate_uid

    from archive.ledger.worklist import steps_of

    require_node(state)
    now = datetime.now()
    study_uid = study_uid or str(generate_uid(None))
    if not is_uid(study_uid):
        raise InvalidInput("--study-uid is no UID")
    for option, text in (("--patient-name", patient_name), ("--patient-id", patient_id),
                         ("--modality", modality)):
        if not text.strip():
            raise InvalidInput(f"{option} has no value")
    for option, text, words in (("--sex", sex, SEXES), ("--priority", priority, PRIORITIES)):
        if text and text not in words:
            raise InvalidInput(f"{option} is one of {', '.join(words)}")
    scheduled = _attributes([
        ("--modality", "00080060", "CS", modality),
        ("--station", "00400001", "AE", "\\".join(map(require_ae_title, station or ()))),
        ("--date", "00400002", "DA", date or f"{now:%Y%m%d}"),
        ("--time", "00400003", "TM", time or f"{now:%H%M}"),
        ("--physician", "00400006", "PN", physician), ("--description", "00400007", "LO", description),
        ("--step-id", "00400009", "SH", step_id or _new_id("S")), ("--location", "00400011", "SH", location),
    ])
    attributes = _attributes([
        ("--accession", "00080050", "SH", accession or _new_id("A")),
        ("--referring", "00080090", "PN", referring), ("--patient-name", "00100010", "PN", patient_name),
        ("--patient-id", "00100020", "LO", patient_id), ("--issuer", "00100021", "LO", issuer),
        ("--birth-date", "00100030", "DA", birth_date), ("--sex", "00100040", "CS", sex),
        ("--weight", "00101030", "DS", weight), ("--study-uid", "0020000D", "UI", study_uid),
        ("--description", "00321060", "LO", description),
        ("--procedure-id", "00401001", "SH", procedure_id or _new_id("R")),
        ("--priority", "00401003", "SH", priority), ("--comments", "00401400", "LT", comments),
    ])
    attributes["00400100"] = {"vr": "SQ", "Value": [scheduled]}
    step, = steps_of(attributes, COMMAND)
    with open_ledger(state) as ledger:
        ledger.schedule([step])
    out.print(f"{step.id} {study_uid}", markup=False, highlight=False, soft_wrap=True)


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", show_default=False,
                                                help="Worklist files: Part 10, or data sets alone.")],
    state: State = Path("."),
) -> None:
    """Schedules what worklist files hold, once; a folder that is followed is a setting (worklist.folder).

    \b
    Example:
      miss worklist import /srv/ris/*.wl --state /srv/miss
    """
    from archive.dataset.jsonsets import from_file
    from archive.ledger.worklist import steps_of
    from node.worklistfolder import FILE_BYTES_MAX

    require_node(state)
    failed = 0
    with open_ledger(state) as ledger:
        for file in files:
            try:
                with file.open("rb") as opened:
                    steps = steps_of(from_file(opened.read(FILE_BYTES_MAX + 1)), COMMAND)
                ledger.schedule(steps)
                err.print(f"{file}: {len(steps)} steps", markup=False, soft_wrap=True)
            except (MissError, OSError) as error:
                failed += 1
                what = error.strerror if isinstance(error, OSError) else error
                err.print(f"{file}: {what}", style="red", markup=False, soft_wrap=True)
    if failed:
        raise InvalidInput(f"{failed} of {len(files)} files were not taken")


@app.command("ls")
def ls(
    date: Annotated[str, typer.Option(help="Only steps that begin on this day, YYYYMMDD.",
                                      show_default=False)] = "",
    station: Annotated[str, typer.Option(metavar="AE-TITLE", help="Only steps for this station.",
                                         show_default=False)] = "",
    limit: Annotated[int, typer.Option("-n", "--limit", help="How many.", min=1, max=100_000)] = 100,
    state: State = Path("."),
) -> None:
    """Lists scheduled steps, by date and time.

    \b
    Example:
      miss worklist ls --date 20261122 --state /srv/miss
    """
    from itertools import islice

    from archive.dataset.jsonsets import text_of
    from archive.ledger import StepSearch

    require_node(state)
    if date:
        _checked("--date", "DA", date)
    search = StepSearch([station] if station else None, date, date)
    grid = table("step", "begins", "modality", "station", "patient", "accession", "status", "from")
    with open_ledger(state) as ledger:
        for step in islice(ledger.scheduled_steps(search), limit):
            name = text_of(json.loads(step.dataset), "00100010")
            grid.add_row(step.id[:8], f"{step.start_date} {step.start_time[:4]}", step.modality,
                         ", ".join(step.stations) or "any", f"{step.patient_id} {name}",
                         step.accession_number, step.status, step.origin)
    out.print(grid)


@app.command()
def show(step: Step, as_json: Annotated[bool, typer.Option("--json", help=_AS_JSON)] = False,
         state: State = Path(".")) -> None:
    """Shows all that is known of one scheduled step.

    \b
    Example:
      miss worklist show 3fa81c02 --state /srv/miss
    """
    require_node(state)
    with open_ledger(state) as ledger:
        _show(_found(ledger, step).attributes, as_json)


@app.command()
def rm(step: Step, state: State = Path(".")) -> None:
    """Takes a step off the worklist. One of a followed folder comes again when its file changes.

    \b
    Example:
      miss worklist rm 3fa81c02 --state /srv/miss
    """
    require_node(state)
    with open_ledger(state) as ledger:
        found = _found(ledger, step)
        ledger.unschedule([found.id])
    err.print(f"step {found.id} is off the worklist", style="green", markup=False)


@app.command()
def performed(
    uid: Annotated[str, typer.Argument(metavar="[UID]", help="One step, shown whole.",
                                       show_default=False)] = "",
    open_only: Annotated[bool, typer.Option("--in-progress", help="Only steps in progress.")] = False,
    limit: Annotated[int, typer.Option("-n", "--limit", help="How many, newest first.", min=1,
                                       max=100_000)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help=_AS_JSON)] = False,
    state: State = Path("."),
) -> None:
    """Lists what modalities report to have performed (MPPS), or shows one step.

    \b
    Examples:
      miss worklist performed --in-progress --state /srv/miss
      miss worklist performed 1.2.840.113619.2.1.7 --state /srv/miss
    """
    from archive.ledger.performed import IN_PROGRESS

    require_node(state)
    with open_ledger(state) as ledger:
        if uid:
            one = ledger.performed(uid)
            if one is None:
                raise NotFound("there is no performed step with this UID; `miss worklist performed` lists "
                               "them")
            _show(one.attributes, as_json)
            return
        steps = ledger.performed_steps(limit, (IN_PROGRESS,) if open_only else None)
    if as_json:
        out.print_json(json.dumps([{"uid": step.uid, "device": step.device} | step.attributes
                                   for step in steps]))
        return
    grid = table("since", "device", "modality", "patient", "state", ">instances", "UID")
    for step in steps:
        grid.add_row(when(step.created_us), step.device, step.modality, step.patient_id, step.state,
                     str(len(step.instances)), step.uid)
    out.print(grid)


def _found(ledger: Ledger, beginning: str) -> ScheduledStep:
    """The one step whose key begins so."""
    steps = ledger.scheduled_like(beginning)
    if not steps:
        raise NotFound("there is no such step; `miss worklist ls` lists them")
    if len(steps) > 1:
        raise InvalidInput("more than one step has a key that begins so")
    return steps[0]


def _show(attributes: dict[str, Any], as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps(attributes))
        return
    from archive.dataset.encoding import EXPLICIT_LITTLE
    from archive.dataset.jsonwriting import encoded
    from node.dimse.identifiers import read_identifier

    shown = read_identifier(encoded(attributes, EXPLICIT_LITTLE), EXPLICIT_LITTLE)
    out.print(str(shown), markup=False, highlight=False, soft_wrap=True)


def _attributes(given: Sequence[tuple[str, str, str, str]]) -> dict[str, Any]:
    """Elements of option, tag, VR and text; those without text are left out."""
    from archive.dataset.jsonsets import put

    attributes: dict[str, Any] = {}
    for option, tag, vr, text in given:
        if text:
            put(attributes, tag, vr, _checked(option, vr, text))
    return attributes


def _checked(option: str, vr: str, text: str) -> str:
    """A text that its VR allows (PS3.5 6.2): a modality is handed what is typed here as it stands."""
    import pydicom.config
    from pydicom.valuerep import validate_value

    if not text.isprintable() or ("\\" in text and vr not in ("AE", "LT")):
        raise InvalidInput(f"{option} is one value, without control characters")
    try:
        if vr == "DA" and not text.isdigit():  # a range is for queries
            raise ValueError
        for part in text.split("\\") if vr == "AE" else [text]:
            validate_value(vr, part, pydicom.config.RAISE)
    except ValueError:
        raise InvalidInput(f"{option} is {_FORMS[vr]} (VR {vr}, PS3.5 6.2)") from None
    return text


def _new_id(letter: str) -> str:
    """An identifier that no other command makes: 60 bits of chance."""
    return letter + secrets.token_hex(8)[:ID_LENGTH_MAX - 1].upper()
