"""What the study varies: factors, schedules, and the presets as ordered lists of cells."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..compare.settings import PRESETS as COMPARE_PRESETS
from ..compare.settings import Settings

POSITIONS = ("none", "absolute", "relative", "both")
SKEWS = ("correct", "published")
TABLES = ("small", "normal")
MASKING = ("time", "step", "token", "span")
PHASES = ("any", "steps", "beats")


@dataclass(frozen=True)
class Schedule:
    """How long and how a cell is trained; everything of `Settings` that is no factor.

    tokens: training budget, padding not counted; None where `epochs` counts passes over the windows instead.
    batch_tokens: tokens per micro-batch, padding counted. valid_tokens limits the tokens that choose the best weights
    (None: all). dense: a window starts at every token, as in the notebook, not four times per window length.
    extrapolate: (trained window, longer window that it is also tested on). accumulation is always 1; it stays because
    the committed cells' configurations name it.
    """

    tokens: int | None
    batch_tokens: int
    learning_rate: float
    epochs: float | None = None
    accumulation: int = 1
    warmup: int = 100
    weight_decay: float = 0.01
    evaluations: int = 5
    valid_tokens: int | None = 50_000
    train_windows: int | None = None
    dense: bool = False
    extrapolate: tuple[int, int] | None = None

    def passes(self, real_tokens: float) -> float:
        """Passes over windows that hold so many tokens in all."""
        if self.tokens is not None:
            return self.tokens / real_tokens
        assert self.epochs is not None  # one of the two is given
        return self.epochs

    def as_settings(self, cell: "Cell", real_tokens: int) -> Settings:
        """The settings of a cell whose training windows hold `real_tokens` tokens in all."""
        return Settings(
            window=cell.window,
            stride=cell.stride,
            masking=cell.masking,
            epochs=self.passes(real_tokens),
            batch=max(1, self.batch_tokens // cell.window),
            accumulation=self.accumulation,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            evaluations=self.evaluations,
            train_windows=self.train_windows,
            valid_windows=None if self.valid_tokens is None else max(1, self.valid_tokens // cell.window),
            seed=cell.seed,
        )


_SEED = COMPARE_PRESETS["seed"]
SCHEDULES = {
    # The notebook's own: 10 epochs of windows that start at every token, 32 of them per step. It took those as 4
    # micro-batches of 8; one batch has the same gradient where windows mask equally many tokens, and is 1.3x as fast.
    "notebook": Schedule(
        tokens=None,
        epochs=_SEED.epochs,
        batch_tokens=_SEED.batch * _SEED.accumulation * _SEED.window,
        learning_rate=_SEED.learning_rate,
        warmup=_SEED.warmup,
        weight_decay=_SEED.weight_decay,
        evaluations=_SEED.evaluations,
        valid_tokens=None,
        dense=True,
    ),
    # The same number of tokens for every cell of the grid. Arms of a setting also share the number of updates, windows
    # do not: batches count padding, which long windows have more of (1,970 updates at window 16, 2,650 at 512).
    "short": Schedule(tokens=2_000_000, batch_tokens=1024, learning_rate=2e-3, extrapolate=(128, 512)),
    # Does more training change the order?
    "long": Schedule(tokens=8_000_000, batch_tokens=1024, learning_rate=2e-3, extrapolate=(128, 512)),
    # Proves that everything runs.
    "tiny": Schedule(
        tokens=20_000,
        batch_tokens=512,
        learning_rate=2e-3,
        warmup=5,
        evaluations=2,
        valid_tokens=2_000,
        extrapolate=(16, 32),
    ),
}

# Learning rates of an arm's own (rates.py): a trial at a third of a budget for each of these, and what runs at the chosen
# one. A schedule at another rate than its usual one is named after both, as short@4e-3.
RATES = {"1e-3": 1e-3, "2e-3": 2e-3, "4e-3": 4e-3}
TRIALS = {"short": "trial", "curve": "curve-trial"}  # of a budget: the schedule that tries a rate for it
_SHORT = SCHEDULES["short"]
_AT_RATES = {
    "trial": dataclasses.replace(_SHORT, tokens=2_000_000 // 3, extrapolate=None),
    "short": _SHORT,
    # Eight times the budget, looked at often: a curve of the loss against the tokens seen.
    "curve-trial": dataclasses.replace(_SHORT, tokens=16_000_000 // 3, evaluations=11, extrapolate=None),
    "curve": dataclasses.replace(_SHORT, tokens=16_000_000, evaluations=32, extrapolate=None),
}


def at_rate(schedule: str, rate: str) -> str:
    """The name of one of these schedules at one of RATES."""
    return schedule if schedule in SCHEDULES and SCHEDULES[schedule].learning_rate == RATES[rate] else f"{schedule}@{rate}"


for _name, _schedule in _AT_RATES.items():
    for _rate in RATES:
        SCHEDULES.setdefault(at_rate(_name, _rate), dataclasses.replace(_schedule, learning_rate=RATES[_rate]))


@dataclass(frozen=True)
class Cell:
    """One training run. `skew` and `tables` are None where there are no relative positions.

    positions: what the model knows of places. skew: "published" is the notebook's. tables: start N(0, 0.02) ("small")
    or N(0, 1) ("normal", the notebook's). masking: a name in masking.GROUPINGS. phase: windows start at any token, at any
    time step (four tokens), which lets absolute positions tell the voice, or at beats (16 tokens), which lets them tell
    the place in the beat as well. voice: every token's voice is given to the model. window: tokens.
    """

    positions: str
    window: int
    masking: str
    phase: str
    seed: int
    skew: str | None = None
    tables: str | None = None
    voice: bool = False
    schedule: str = "short"

    def __post_init__(self):
        relative = self.positions in ("relative", "both")
        for name, value, accepted in (
            ("positions", self.positions, POSITIONS),
            ("skew", self.skew, SKEWS if relative else (None,)),
            ("tables", self.tables, TABLES if relative else (None,)),
            ("masking", self.masking, MASKING),
            ("phase", self.phase, PHASES),
            ("schedule", self.schedule, tuple(SCHEDULES)),
        ):
            if value not in accepted:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, accepted))}, got {value!r}")
        if self.window < 8 or self.window % 4:
            raise ValueError(f"window: expected a multiple of 4, at least 8 tokens, got {self.window}")
        if self.phase == "beats" and self.window < 64:
            raise ValueError(f"window: expected at least 64 tokens, so that four may start at beats, got {self.window}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")

    @property
    def arm(self) -> str:
        """Positions, skew and tables in one word; the right skew and small tables go without saying."""
        odd = [value for value, usual in ((self.skew, "correct"), (self.tables, "small")) if value not in (None, usual)]
        return ".".join([self.positions, *odd])

    @property
    def group(self) -> str:
        """The name without the seed: cells of one group are repetitions."""
        parts = [f"w{self.window:03d}", self.masking, self.phase, *(["voice"] if self.voice else []), self.arm]
        return "-".join([*parts, *([self.schedule] if self.schedule != "short" else [])])

    @property
    def name(self) -> str:
        return f"{self.group}-s{self.seed}"

    @property
    def settings(self) -> Schedule:
        return SCHEDULES[self.schedule]

    @property
    def stride(self) -> int:
        """Tokens between the starts of training windows."""
        if self.settings.dense:
            return 4 if self.phase == "steps" else 1
        return self._stride(self.window // 4)

    def test_stride(self, window: int) -> int:
        """Tokens between the starts of validation and test windows of a length: every token is in about two windows."""
        if self.settings.dense:
            return self.stride
        return self._stride(window // 2)

    def _stride(self, most: int) -> int:
        """About `most` tokens: one less, as windows are even; an odd number of steps; or a number of beats."""
        strides = {"any": max(3, most - 1), "steps": max(4, (most - 4) // 8 * 8 + 4), "beats": most // 16 * 16}
        return strides[self.phase]

    @property
    def longer_window(self) -> int | None:
        """The longer windows that the cell is also tested on, if it is."""
        trained, longer = self.settings.extrapolate or (None, None)
        return longer if self.window == trained and self.masking == "step" else None

    def configuration(self) -> dict:
        """Everything that decides the cell's result but the data: two cells with equal configurations are the same."""
        cell = dataclasses.asdict(self)
        schedule = {"name": self.schedule, **dataclasses.asdict(self.settings), "stride": self.stride}
        return cell | {"schedule": schedule}


ABSOLUTE = dict(positions="absolute")
NONE = dict(positions="none")
RELATIVE = dict(positions="relative", skew="correct", tables="small")
BOTH = dict(positions="both", skew="correct", tables="small")
AS_PUBLISHED = dict(positions="relative", skew="published", tables="normal")
MAIN = (ABSOLUTE, RELATIVE, BOTH)


def _grid() -> list[tuple[float, dict]]:
    """(priority, factors) of every group of the committed grid; lower priorities run first."""
    groups: list[tuple[float, dict]] = []

    def add(priority: float, arms, **factors) -> None:
        groups.extend((priority, arm | factors) for arm in arms)

    notebook = dict(window=16, masking="time", phase="any")
    longer = dict(window=128, masking="step", phase="any")
    # 1. The published comparison and its repairs, one by one and together; the published skew where absolute positions
    #    are not dropped.
    skew_alone = RELATIVE | dict(tables="normal")
    tables_alone = RELATIVE | dict(skew="published")
    published_both = AS_PUBLISHED | dict(positions="both")
    add(1, [ABSOLUTE, AS_PUBLISHED, RELATIVE, NONE, BOTH, skew_alone, tables_alone, published_both], **notebook)
    # 2. A longer window.
    add(2, [*MAIN, NONE, AS_PUBLISHED], **longer)
    # 3. Four times the budget: does a short training distort the comparison?
    add(3, MAIN, **longer, schedule="long")
    # 4. Every window.
    for window in (16, 512, 64, 256):
        add(4, MAIN, window=window, masking="step", phase="any")
    # 5. Windows in step with the voices, with the beats too, and the voice told to every arm.
    for phase in ("beats", "steps"):
        add(5, MAIN, **longer | dict(phase=phase))
    add(5, MAIN, **longer, voice=True)
    # 7. Masks.
    for masking in ("time", "token", "span"):
        add(7, [ABSOLUTE, RELATIVE], **longer | dict(masking=masking))
    return groups


class Choice(NamedTuple):
    """What gets a learning rate of its own: an arm at a budget (a schedule) and a window."""

    schedule: str
    window: int
    positions: str

    def cell(self, schedule: str, rate: str, seed: int = 0) -> Cell:
        """Its cell of this schedule at one of RATES."""
        arm: dict = next(arm for arm in MAIN if arm["positions"] == self.positions)
        schedule = at_rate(schedule, rate)
        return Cell(window=self.window, masking="step", phase="any", seed=seed, schedule=schedule, **arm)

    def trials(self) -> dict[str, Cell]:
        """rate -> the cell that tells how good it is."""
        return {rate: self.cell(TRIALS[self.schedule], rate) for rate in RATES}


CURVE_WINDOW = 512  # where absolute positions have hardly begun at the usual budget
CHOICES = (
    *(Choice("short", window, arm["positions"]) for window in (128, 512) for arm in MAIN),
    *(Choice("curve", CURVE_WINDOW, arm["positions"]) for arm in (ABSOLUTE, RELATIVE)),
)


def _rate_cells(seeds: int, chosen: Mapping[Choice, str]) -> list[Cell]:
    """For each budget the trials, and then the cells at those rates that are chosen."""
    cells = []
    for schedule in TRIALS:
        choices = [choice for choice in CHOICES if choice.schedule == schedule]
        cells += [cell for choice in choices for cell in choice.trials().values()]
        known = [choice for choice in choices if choice in chosen]
        cells += [choice.cell(schedule, chosen[choice], seed) for seed in range(seeds) for choice in known]
    return cells


# A seed comes this many priorities after the one before: the first groups get all their repetitions before the last
# get any.
_SEED_STEP = 2.5


PRESETS = ("grid", "seed", "rates", "tiny")


def preset_cells(preset: str, seeds: int = 3, chosen: Mapping[Choice, str] | None = None) -> list[Cell]:
    """The cells of a preset in the order in which they run: the most telling first.

    chosen: the learning rates that preset "rates" has come to so far (rates.py); what waits for one is left out.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    if preset == "rates":
        return _rate_cells(seeds, chosen or {})
    notebook = dict(window=16, masking="time", phase="any", schedule="notebook")
    tiny = dict(window=16, masking="step", phase="any", schedule="tiny")
    groups: dict[str, list[tuple[float, dict]]] = {
        "grid": _grid(),
        "seed": [(1, arm | notebook) for arm in (ABSOLUTE, AS_PUBLISHED, RELATIVE, BOTH)],
        "tiny": [(1, arm | tiny) for arm in (ABSOLUTE, RELATIVE, AS_PUBLISHED, NONE)],
    }
    ordered = []
    for priority, group in groups[preset]:
        ordered += [(priority + _SEED_STEP * seed, Cell(seed=seed, **group)) for seed in range(seeds)]
    return [cell for _, cell in sorted(ordered, key=lambda pair: pair[0])]


def expected_seconds(cell: Cell, measured: dict[str, float]) -> float:
    """Seconds of one core for a cell: what a finished one of its group took, else by a rough tokens per second."""
    if cell.group in measured:
        return measured[cell.group]
    schedule = cell.settings
    real_tokens = 221_000 * cell.window / cell.stride
    tokens = schedule.passes(real_tokens) * real_tokens
    per_second = 22_000 / (1 + cell.window / 600) / (2 if schedule.batch_tokens < 512 else 1)
    return tokens / per_second + (0 if schedule.tokens == 20_000 else 15)
