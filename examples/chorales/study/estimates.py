"""Means with 95 % t-intervals over seeds, and differences of two arms paired by seed."""

import math
from dataclasses import dataclass

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; beyond, the last is a little too wide.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip

Values = dict[int, float]  # seed -> value


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` values and half the length of its 95 % interval (None for one value)."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        n = len(values)
        if not n:
            raise ValueError("values: expected at least one, got none")
        mean = sum(values) / n
        if n == 1:
            return cls(mean, None, 1)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
        return cls(mean, _T[min(n - 1, len(_T)) - 1] * deviation / math.sqrt(n), n)

    @classmethod
    def over(cls, values: Values) -> "Estimate":
        """Of the values of all seeds."""
        return cls.of([values[seed] for seed in sorted(values)])

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of zero, else (or for one value) 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1

    def text(self, form: str = ".3f") -> str:
        half = "" if self.half is None else f" ± {self.half:{form.replace('+', '')}}"
        return f"{self.mean:{form}}{half} ({self.n})"

    def verdict(self, form: str = "+.3f") -> str:
        """As `text`, of a difference: it says so where the interval holds 0."""
        return self.text(form) + (", not told apart" if self.half is not None and not self.sign else "")


def difference(one: Values, other: Values) -> Estimate | None:
    """Mean of one - other over the seeds that both have, or None where there is none."""
    shared = sorted(one.keys() & other.keys())
    return Estimate.of([one[seed] - other[seed] for seed in shared]) if shared else None


def estimate(values: Values) -> Estimate | None:
    """Of the values of all seeds, or None where there are none."""
    return Estimate.over(values) if values else None
