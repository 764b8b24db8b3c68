"""What a comparison depends on, and the presets."""

from dataclasses import dataclass

from ..settings import TrainingSettings


@dataclass(frozen=True)
class Settings(TrainingSettings):
    """Settings of one comparison, the same for every arm. Two runs with equal settings and data give equal results.

    train_windows, valid_windows and test_windows limit the windows used of a split (None: all); max_relative_position
    None means window - 1, the largest that leaves no row unused; transpose is the largest transposition in training, in
    semitones; easy_epochs, the first passes in which the masking "voices" hides few notes; half, that models are saved (and
    tested) in half precision.
    """

    window: int
    stride: int
    masking: str = "step"
    epochs: float = 1.0
    batch: int = 16
    accumulation: int = 1
    learning_rate: float = 5e-4
    warmup: int = 100
    weight_decay: float = 0.01
    evaluations: int = 10
    train_windows: int | None = None
    valid_windows: int | None = None
    test_windows: int | None = None
    max_relative_position: int | None = None
    layers: int = 2
    dropout: float = 0.1
    transpose: int = 0
    easy_epochs: int = 0
    half: bool = False
    seed: int = 0

    def __post_init__(self):
        self.check_at_least(1, "window", "stride", "batch", "accumulation", "evaluations", "layers")
        if self.window < 2:
            raise ValueError("window: expected at least 2 tokens, got 1")
        self.check_positive("epochs", "learning_rate")
        self.check_at_least(0, "transpose", "easy_epochs")
        limits = ("train_windows", "valid_windows", "test_windows")
        self.check_at_least(1, *(name for name in limits if getattr(self, name) is not None))
        self.check_dropout(self.dropout)
        if self.max_relative_position is None:
            object.__setattr__(self, "max_relative_position", self.window - 1)


PRESETS = {
    # A few minutes on two cores. An odd stride lets windows start in any voice, so that absolute positions do not
    # tell the voice.
    "quick": Settings(window=64, stride=31, epochs=2, batch=16, learning_rate=2e-3, evaluations=5, valid_windows=600),
    # The seed notebook's schedule.
    "seed": Settings(window=16, stride=1, masking="time", epochs=10, batch=8, accumulation=4, evaluations=10),
    # The model of examples.chorales.harmonize, with --arms both: 35 minutes of an idle core. Windows of two bars start at
    # quarters, so that absolute positions tell voices and beats, as they do where it is used.
    "harmonize": Settings(
        window=128,
        stride=64,
        masking="voices",
        epochs=40,
        batch=8,
        learning_rate=2e-3,
        warmup=400,
        evaluations=20,
        valid_windows=300,
        layers=4,
        dropout=0,
        transpose=6,
        easy_epochs=1,
        half=True,
    ),
    # Proves that everything runs, in half a minute.
    "tiny": Settings(
        window=32,
        stride=31,
        epochs=4,
        learning_rate=2e-3,
        warmup=20,
        evaluations=4,
        train_windows=800,
        valid_windows=200,
        test_windows=400,
    ),
}
