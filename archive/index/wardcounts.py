"""How many instances of a series each ward has, its own and the copies that it holds; studies and series
list wards.

A scoped answer (`archive/model.py` Scope) counts from here. Rows are changed in memory and written by the
batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from archive.index.rows import Row, joined, split
from archive.index.schema import series_ward
from archive.index.statements import insert_all, update_some

SERIES_KEY = ("study_instance_uid", "series_instance_uid")
SeriesKey = tuple[str, str]
WardKey = tuple[str, str, str]


@dataclass(slots=True)
class WardCount:
    row: Row
    new: bool
    listed: set[str] = field(default_factory=set)  # the classes that were counted, none when nothing was


def count_in_ward(
    wards: dict[WardKey, WardCount], study_row: Row, series_row: Row, ward: str, sop_class: str
) -> None:
    """One more instance of a series at a ward; the study and the series list the ward and the class."""
    key = (series_row["study_instance_uid"], series_row["series_instance_uid"], ward)
    known = wards.get(key)
    if known is None:
        known = wards[key] = WardCount({
            "study_instance_uid": key[0], "series_instance_uid": key[1], "ward": ward,
            "sop_classes": "", "instance_count": 0,
        }, new=True)  # fmt: skip
    known.row["instance_count"] += 1
    if sop_class in known.listed:
        return  # with its ward, all but the first of a series in a batch
    known.listed.add(sop_class)
    for row in (known.row, series_row, study_row):
        if sop_class not in row["sop_classes"] or sop_class not in split(row["sop_classes"]):
            row["sop_classes"] = joined({*split(row["sop_classes"]), sop_class})
    for row in (series_row, study_row):
        if ward != row["wards"] and ward not in split(row["wards"]):
            row["wards"] = joined({*split(row["wards"]), ward})


def write_wards(connection: Connection, wards: dict[WardKey, WardCount]) -> None:
    new = [known.row for known in wards.values() if known.new]
    changed = [known.row for known in wards.values() if known.listed and not known.new]
    if new:
        insert_all(connection, series_ward, new)
    if changed:
        update_some(
            connection, series_ward, (*SERIES_KEY, "ward"), ("instance_count", "sop_classes"), changed
        )


def holding_row(row: Mapping[str, Any], ward: str) -> Row:
    return {
        "study_instance_uid": row["study_instance_uid"], "series_instance_uid": row["series_instance_uid"],
        "sop_instance_uid": row["sop_instance_uid"], "ward": ward,
    }  # fmt: skip
