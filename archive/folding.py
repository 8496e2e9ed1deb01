"""The forms in which values are compared, in the index and in a query alike.

Names: without case and without accents (PS3.4 C.2.2.2.1 allows both for PN). A stored name becomes its
component groups (alphabetic, ideographic, phonetic; PS3.5 6.2.1), of every value, folded and set between `=`:
`=rossi^maria=`. A pattern is folded the same way. Dates and times from before DICOM 3.0 lose their dots and
colons (PS3.5 6.2), integer strings their leading zeros; a date and time (DT) with an offset becomes UTC.
Every other VR compares as it stands.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import lru_cache

SEPARATOR = "="

# Letters that have no decomposition in Unicode, as people type them on another keyboard.
_LETTERS = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ð": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th", "ŋ": "n"}
)
_MARKS = dict.fromkeys(range(0x0300, 0x0370))  # combining marks of alphabets; kana and others keep theirs


@lru_cache(maxsize=4096)
def fold(text: str) -> str:
    """`text` without case, accents and outer spaces."""
    if text.isascii():
        return text.strip().lower()
    plain = unicodedata.normalize("NFKD", text.casefold()).translate(_MARKS).translate(_LETTERS)
    # Compatibility forms may fold once more (a full-width letter); NFC puts Hangul and kana together again.
    return unicodedata.normalize("NFC", plain.casefold()).strip()


def fold_group(group: str) -> str:
    """One component group, folded, without empty components at its end."""
    return fold(group).rstrip("^ ")


def folded_name(value: str) -> str:
    """A stored value (several names are joined by a backslash) in the form that patterns are compared
    with."""
    groups = [fold_group(group) for name in value.split("\\") for group in name.split(SEPARATOR)]
    kept = [group for group in groups if group]
    return SEPARATOR + SEPARATOR.join(kept) + SEPARATOR if kept else ""


def clean_date(value: str) -> str:
    """YYYY.MM.DD, the form of ACR-NEMA, as YYYYMMDD."""
    return value.replace(".", "") if len(value) == 10 and value[4] == value[7] == "." else value


def clean_time(value: str) -> str:
    """HH:MM:SS as HHMMSS."""
    return value.replace(":", "")


def clean_integer(value: str) -> str:
    """An integer string as Python writes the number, so that 007 is found as 7; anything else as it is."""
    try:
        return str(int(value)) if len(value) <= 16 else value
    except ValueError:
        return value


def first_moment(time: str) -> str:
    """The shortest text of the moment at which a time begins: no stored text of it, or of a later one, is
    less."""
    if "." in time:
        time = time.rstrip("0").rstrip(".")
    while len(time) in (4, 6) and time.endswith("00"):
        time = time[:-2]
    return time


_WITH_OFFSET = re.compile(r"(\d{10})(\d\d)?(\d\d)?(\.\d+)?([+-])(\d\d)(\d\d)", re.ASCII)


def clean_datetime(value: str) -> str:
    """YYYYMMDDHHMMSS.FFFFFF&ZZXX without its offset, in UTC where it has one and names an hour. An hour
    becomes minutes where the offset has some."""
    found = _WITH_OFFSET.fullmatch(value.strip())
    if found is None:
        return re.sub(r"[+-]\d{4}$", "", value.strip())
    hour, minutes, seconds, fraction, sign, hours_off, minutes_off = found.groups()
    try:
        local = datetime.strptime(hour + (minutes or "00"), "%Y%m%d%H%M")
        moment = local - int(sign + "1") * timedelta(hours=int(hours_off), minutes=int(minutes_off))
    except (ValueError, OverflowError):
        return value
    whole = minutes is None and int(minutes_off) == 0
    instant = f"{moment.year:04}{moment:%m%d%H}" + ("" if whole else f"{moment:%M}")
    return instant + (seconds or "") + (fraction or "")


CLEANERS: Mapping[str, Callable[[str], str]] = {
    "DA": clean_date, "TM": clean_time, "DT": clean_datetime, "IS": clean_integer,
}  # fmt: skip


def comparable(vr: str, value: str) -> str:
    """A value of this VR in the form that predicates compare; a person's name is folded by who compares."""
    clean = CLEANERS.get(vr)
    return clean(value) if clean is not None else value
