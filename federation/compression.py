"""Whether what is pushed is compressed, and how hard: only while the line is what everything waits for, and
only if that makes the whole faster. A state machine without I/O: it is told what was written, how long that
waited and what compressing cost, and says the level to use now.

**What is measured.** Each period: the share of their time in which the streams waited for the line to take
what they wrote (rather than read, compressed or had nothing to send), and how many bytes of data sets and of
the wire went. Of the compressor: bytes a second of one core, and what it made of them; while nothing is
compressed a probe, a piece of what is being sent, says that now and then.

**On** when the line was waited for most of a period, carries no more than a core compresses with ease, and
compressing would carry at least a fifth more: the lesser of what the line carries of compressed data and of
what the compressor makes. That is tried, and kept only if data sets do get faster: what waits may have been
the hub, which takes no more of them for being sent compressed. A trial that failed is not repeated at once,
twice as late each time.

**Off** when the line is waited for no more: it became faster than the compressor, or nothing much is sent.

**Level**: the highest whose compressor makes four times what the line takes, so that the machine of a
modality is not kept busy for it.
"""

from __future__ import annotations

from dataclasses import dataclass

PERIOD_S = 1.0
WAIT_SHARE_ON = 0.5
WAIT_SHARE_OFF = 0.15
GAIN_MIN = 1.2
FAST_BYTES_PER_S = 150e6  # beyond 1 Gbit/s what is waited for is the hub: a trial cost a tenth of the rate
TRIAL_GAIN_MIN = 1.05
TRIAL_PERIODS = 4
SETTLE_PERIODS = 1     # of a trial: what was written before it is still in the line's buffers
QUIET_PERIODS = 2
PROBE_S = 20.0
REST_FIRST_S = 15.0
REST_CAP_S = 600.0
HEADROOM = 4.0
LEVELS = (1, 3, 6)
_COST = {1: 1.0, 3: 1.7, 6: 5.0}  # of a level beside the first, until it was measured
_WEIGHT = 0.3


@dataclass(slots=True)
class _Period:
    begun_s: float
    data: int = 0
    wire: int = 0
    waited_s: float = 0.0
    worked_s: float = 0.0


class Compression:
    """See the module's docstring. `level` is 0 when nothing is to be compressed."""

    def __init__(self) -> None:
        self.level = 0
        self.wait_share = 0.0
        self.wire_per_s = 0.0
        self._period: _Period | None = None
        self._last_s = 0.0
        self._speed: dict[int, float] = {}  # bytes a second of one core, by level
        self._left = 0.0  # of each byte, after compressing; 0 is not known yet
        self._probed_s: float | None = None
        self._before = 0.0   # data a second before the trial
        self._trial = 0      # periods of it that are left
        self._trial_data = 0.0
        self._quiet = 0
        self._rest_until_s = 0.0
        self._failed = 0

    def wants_probe(self, now_s: float) -> bool:
        """Whether a piece of what is sent should be compressed to see what comes of it."""
        if self.level or now_s < self._rest_until_s:
            return False
        period = self._period
        waits = period is not None and period.waited_s > max(period.worked_s, PERIOD_S / 10)
        if not waits and self.wait_share < WAIT_SHARE_ON:
            return False
        return self._probed_s is None or now_s - self._probed_s >= PROBE_S

    def compressed(self, level: int, data: int, made: int, took_s: float, now_s: float) -> None:
        """Compressing `data` bytes to `made` took so long."""
        if data <= 0:
            return
        self._probed_s = now_s
        speed, left = data / max(took_s, 1e-6), made / data
        known = self._speed.get(level)
        self._speed[level] = speed if known is None else known + _WEIGHT * (speed - known)
        self._left = left if not self._left else self._left + _WEIGHT * (left - self._left)

    def wrote(self, data: int, wire: int, waited_s: float, worked_s: float, now_s: float) -> None:
        """A message went: bytes of data sets, on the wire, how long the line kept it waiting, and how long it
        took to make. What a stream waits for verdicts when it may have no more on its way is waiting too."""
        period, last_s, self._last_s = self._period, self._last_s, now_s
        if period is None or now_s - waited_s - worked_s - last_s > PERIOD_S:  # nothing was sent meanwhile
            period = self._period = _Period(now_s - waited_s - worked_s)
        period.data += data
        period.wire += wire
        period.waited_s += waited_s
        period.worked_s += worked_s
        if now_s - period.begun_s >= PERIOD_S:
            self._period = None
            self._judge(period, now_s)

    def _judge(self, period: _Period, now_s: float) -> None:
        took_s = now_s - period.begun_s
        self.wait_share = period.waited_s / max(period.waited_s + period.worked_s, 1e-9)
        self.wire_per_s = period.wire / took_s
        data_per_s = period.data / took_s
        if not self.level:
            self._consider(data_per_s, now_s)
        elif self._trial:
            self._try(data_per_s, now_s)
        elif self.wait_share < WAIT_SHARE_OFF:
            self._quiet += 1
            if self._quiet >= QUIET_PERIODS:
                self.level = 0
        else:
            self._quiet = 0
            self.level = self._best()

    def _consider(self, data_per_s: float, now_s: float) -> None:
        if self.wait_share < WAIT_SHARE_ON or not self._left or now_s < self._rest_until_s:
            return
        if self.wire_per_s > FAST_BYTES_PER_S:
            return
        level = self._best()
        carried = min(self.wire_per_s / self._left, self._speed_of(level))
        if carried >= GAIN_MIN * self.wire_per_s:
            self.level, self._before = level, data_per_s
            self._trial, self._trial_data, self._quiet = TRIAL_PERIODS, 0.0, 0

    def _try(self, data_per_s: float, now_s: float) -> None:
        self._trial -= 1
        if self._trial < TRIAL_PERIODS - SETTLE_PERIODS:
            self._trial_data += data_per_s
        if self._trial:
            return
        if self._trial_data / (TRIAL_PERIODS - SETTLE_PERIODS) >= TRIAL_GAIN_MIN * self._before:
            self._failed = 0
            return
        self.level = 0
        self._rest_until_s = now_s + min(REST_FIRST_S * 2.0**self._failed, REST_CAP_S)
        self._failed = min(self._failed + 1, 16)

    def _best(self) -> int:
        """The highest level that leaves the machine its time, at the rate that the line takes now."""
        needed = HEADROOM * self.wire_per_s / min(self._left or 1.0, 1.0)
        return max((level for level in LEVELS if self._speed_of(level) >= needed), default=LEVELS[0])

    def _speed_of(self, level: int) -> float:
        if level in self._speed:
            return self._speed[level]
        measured, speed = next(iter(self._speed.items()), (LEVELS[0], 0.0))
        return speed * _COST[measured] / _COST[level]
