"""A token bucket: so much per minute, with bursts of a minute's worth. No clock of its own."""

from __future__ import annotations

_ROUNDING = 1e-9  # of a bucket: who waited as long as was said is not told to wait for a sum's last bit


class Bucket:
    """Filled evenly, `per_minute` in 60 s, and never above that. What is taken may leave it in debt."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._time = now  # seconds, of the level

    def level(self, now: float) -> float:
        """What is in it; negative in debt. A clock that went back changes nothing."""
        passed = max(0.0, now - self._time)
        return min(self.per_minute, self._level + passed * self.per_minute / 60)

    def take(self, amount: float, now: float) -> None:
        """Take so much, whether it is there or not."""
        self._level = self.level(now) - amount
        self._time = max(self._time, now)

    def wait_s(self, wanted: float, now: float) -> float:
        """Seconds until `wanted` (at most `per_minute`) will be in it; 0 where it is."""
        missing = wanted - self.level(now)
        return missing * 60 / self.per_minute if missing > _ROUNDING * self.per_minute else 0.0
