"""Writes the Native DICOM Model (PS3.19 Annex A) from the DICOM JSON Model (PS3.18 Annex F), of which it is
another spelling. It reads no DICOM."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from pydicom.datadict import keyword_for_tag

# What XML 1.0 can't hold, not even escaped (2.2).
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_NAMES = ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


def document(attributes: Mapping[str, Any]) -> bytes:
    """One data set as a document."""
    text = "".join(_dataset(attributes))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f'<NativeDicomModel xml:space="preserve">{text}</NativeDicomModel>'
    ).encode()


def _dataset(attributes: Mapping[str, Any]) -> Iterator[str]:
    for tag, attribute in attributes.items():
        keyword = keyword_for_tag(int(tag, 16)) if len(tag) == 8 else ""
        named = f" keyword={quoteattr(keyword)}" if keyword else ""
        yield f"<DicomAttribute tag={quoteattr(tag.upper())} vr={quoteattr(str(attribute['vr']))}{named}>"
        if "BulkDataURI" in attribute:
            yield f"<BulkData uri={quoteattr(_clean(attribute['BulkDataURI']))}/>"
        elif "InlineBinary" in attribute:
            yield f"<InlineBinary>{_clean(attribute['InlineBinary'])}</InlineBinary>"
        else:
            yield from _values(str(attribute["vr"]), attribute.get("Value", ()))
        yield "</DicomAttribute>"


def _values(vr: str, values: Sequence[Any]) -> Iterator[str]:
    for number, value in enumerate(values, 1):
        if vr == "SQ":
            yield f'<Item number="{number}">{"".join(_dataset(value or {}))}</Item>'
        elif vr == "PN":
            yield f'<PersonName number="{number}">{"".join(_person(value or {}))}</PersonName>'
        elif value is not None:
            yield f'<Value number="{number}">{_clean(value)}</Value>'


def _person(value: Mapping[str, str]) -> Iterator[str]:
    for group in _GROUPS:
        if value.get(group):
            parts = zip(_NAMES, value[group].split("^"), strict=False)
            inner = "".join(f"<{name}>{_clean(part)}</{name}>" for name, part in parts if part)
            yield f"<{group}>{inner}</{group}>"


def _clean(value: object) -> str:
    return escape(_FORBIDDEN.sub("�", str(value)))
