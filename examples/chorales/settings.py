"""What every training here depends on, whatever is trained."""

import dataclasses
import math
from typing import Any


class TrainingSettings:
    """Base of the commands' frozen dataclasses of settings, which declare these fields, each with its own defaults.

    batch is the number of windows per micro-batch over all processes together, and accumulation the number of those per
    optimizer step; evaluations is the number of times the validation loss is taken, and a checkpoint written, at equal
    intervals.
    """

    epochs: float
    batch: int
    accumulation: int
    learning_rate: float
    warmup: int
    weight_decay: float
    evaluations: int
    seed: int

    def check_at_least(self, least: float, *names: str) -> None:
        """Raise ValueError unless every one of these settings is that large."""
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    def check_positive(self, *names: str) -> None:
        """Raise ValueError unless every one of these settings is more than 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")

    def check_dropout(self, dropout: float) -> None:
        """Raise ValueError unless it is a probability below 1."""
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected at least 0 and less than 1, got {dropout}")

    def update_steps(self, windows: int) -> tuple[int, int]:
        """(optimizer steps in all, steps between evaluations) for so many training windows.

        The total is rounded up to a multiple of the interval, so that the last step is evaluated.
        """
        per_epoch = math.ceil(math.ceil(windows / self.batch) / self.accumulation)
        interval = math.ceil(per_epoch * self.epochs / self.evaluations)
        return interval * self.evaluations, interval

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass
