"""Values in the DICOM JSON model (PS3.18 Annex F.2): from DICOM's string form to JSON's strings, numbers
and names. Its results are always strict JSON: no NaN, no infinity, no number that a JavaScript reader would
round."""

from __future__ import annotations

import math
from typing import Any

# PS3.5 6.2: a backslash is a character of these.
SINGLE_VALUED_VRS = frozenset({"LT", "ST", "UT", "UR"})
INTEGER_VRS = frozenset({"IS", "US", "UL", "SS", "SL", "UV", "SV"})
DECIMAL_VRS = frozenset({"DS", "FL", "FD"})

_EXACT_INTEGER_MAX = 2**53
_NUMBER_CHARS_MAX = 64


def json_element(vr: str, text: str) -> dict[str, Any]:
    """An element from its value's string form."""
    if not text:
        return {"vr": vr}
    parts = [text] if vr in SINGLE_VALUED_VRS else text.split("\\")
    values = [json_value(vr, part) for part in parts]
    if all(value is None for value in values):
        return {"vr": vr}
    return {"vr": vr, "Value": values}


def json_value(vr: str, part: str) -> Any:
    """One value; None (null) when it is empty."""
    if not part:
        return None
    if vr == "PN":
        return _person_name(part)
    if vr in INTEGER_VRS or vr in DECIMAL_VRS:
        number = number_of(vr, part)
        # PS3.18 F.2.3.1 allows IS, DS, SV and UV as strings: what is no number stays what it was.
        return part if number is None and vr in ("IS", "DS", "SV", "UV") else number
    return part


def number_of(vr: str, part: str) -> int | float | None:
    """The number that a string of this VR means, None when it means none that JSON can carry exactly."""
    part = part.strip()
    if not part.isascii() or "_" in part:
        return None  # Python reads more than DICOM allows
    if len(part) > _NUMBER_CHARS_MAX and vr not in DECIMAL_VRS:
        return None
    try:
        if vr in INTEGER_VRS:
            whole = int(part)
            return whole if abs(whole) <= _EXACT_INTEGER_MAX else None
        decimal = float(part)
    except ValueError:
        return None
    return decimal if math.isfinite(decimal) else None


def _person_name(text: str) -> dict[str, str] | None:
    """PS3.18 F.2.2: up to three component groups."""
    groups = zip(("Alphabetic", "Ideographic", "Phonetic"), text.split("="), strict=False)
    return {name: group for name, group in groups if group} or None
