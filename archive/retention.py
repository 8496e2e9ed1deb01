"""How long what is stored has to be kept, and what becomes of what was removed: the settings of both, and the
one function that says until when an instance is inside its retention. It deletes nothing."""

from __future__ import annotations

import calendar
from dataclasses import dataclass
from datetime import UTC, datetime

from archive.errors import SettingsError
from archive.model import Attributes, Fields
from archive.settings import setting

_DAY_US = 86_400 * 1_000_000
_YEAR_US = int(365.25 * _DAY_US)


@dataclass(frozen=True)
class RetentionSettings:
    """How long images are kept: until then nothing is purged, and nobody removes in order to delete."""

    years: float = setting(
        10.0, "So long from the study's date; from its reception where that is missing.", "years",
        minimum=0.0, maximum=1000.0)
    by_modality: tuple[str, ...] = setting(
        (), 'Modalities with a time of their own: "MG=15", in years.')

    def check(self) -> None:
        """Raises SettingsError when a modality's time is none."""
        self._years_of("")

    def until_us(self, attributes: Attributes | None, received_at_us: int) -> int:
        """When the retention of an instance ends; what can't be read counts from its reception, by the
        longest time."""
        if attributes is None:
            return received_at_us + int(max([self.years, *self._own().values()]) * _YEAR_US)
        return self.ends_us({**attributes.study, **attributes.series}, received_at_us)

    def ends_us(self, fields: Fields, received_at_us: int) -> int:
        """The same by what the index says of it."""
        years = self._years_of(fields.get("Modality", ""))
        begins = _day_us(fields.get("StudyDate", ""))
        return (received_at_us if begins is None else begins) + int(years * _YEAR_US)

    def _years_of(self, modality: str) -> float:
        return self._own().get(modality, self.years)

    def _own(self) -> dict[str, float]:
        own: dict[str, float] = {}
        for text in self.by_modality:
            modality, equals, years = text.partition("=")
            try:
                own[modality.strip()] = float(years)
            except ValueError:
                equals = ""
            if not equals or not modality.strip() or not 0 <= own.get(modality.strip(), -1.0) <= 1000:
                raise SettingsError('retention.by_modality: write MODALITY=YEARS, for example "MG=15"')
        return own


@dataclass(frozen=True)
class RemovalSettings:
    """What was removed or rejected."""

    undo_days: float = setting(
        30.0, "A removal can be undone so long; then it is purged, unless retention keeps it.", "days",
        minimum=0.0, maximum=36_500.0)
    purges: bool = setting(
        True, "Purge by itself what was removed longer ago than that; without it only `miss remove purge` "
        "does.")
    rejection_notes: bool = setting(
        True, "Obey rejection notes (IHE IOCM): key object selections with the titles 113001, 113037, "
        "113038, 113039.")
    no_notes_from: tuple[str, ...] = setting(
        (), "Devices whose rejection notes are stored and not obeyed, by their names.")
    shows_quality_rejected: bool = setting(
        False, "Go on showing what was rejected for quality reasons (113001).")


def _day_us(date: str) -> int | None:
    """The beginning of a DICOM date, in UTC."""
    try:
        day = datetime.strptime(date.replace(".", ""), "%Y%m%d").replace(tzinfo=UTC)
    except ValueError:
        return None
    return calendar.timegm(day.timetuple()) * 1_000_000
