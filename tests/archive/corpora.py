"""The sets of real and of hostile files that may lie beside the repository; the tests over them are extras,
which skip where the sets are absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2].parent / "shared" / "data"

needs_public = pytest.mark.skipif(not (DATA / "public").is_dir(), reason="the set of real files is absent")
needs_hostile = pytest.mark.skipif(
    not (DATA / "hostile").is_dir(), reason="the set of hostile files is absent"
)

# Called storable by their set, and refused: three have identities that are no UIDs (PS3.5 9.1), and two end
# in the middle of an element that is no pixel data.
REFUSED = {
    "pydicom+pydicom-data/data_store/data/bad_sequence.dcm",
    "fo-dicom+fo-dicom-samples/Desktop/ConsoleTest/test1.dcm",
    "dcm4che+dcm4che/dcm4che-test-data/src/main/resources/3gb-bulk-data-truncated",
    "fo-dicom+fo-dicom/Tests/FO-DICOM.Tests/Test Data/GH179B.dcm",
    "pydicom+pydicom/src/pydicom/data/test_files/rtplan_truncated.dcm",
}


def storable() -> list[tuple[Path, dict[str, Any]]]:
    """The public files that have an identity and a transfer syntax, with what the set says of them."""
    lines = (DATA / "public" / "manifest.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [(DATA / "public" / entry["file"], entry) for entry in entries if entry["storable"]]


def hostile() -> list[tuple[Path, str]]:
    """The hostile files, each with what is expected of an archive that meets it."""
    entries = json.loads((DATA / "hostile" / "manifest.json").read_text())
    return [(DATA / "hostile" / entry["file"], entry["expect"]) for entry in entries]
