"""What a training of the decoder depends on, and the presets."""

from dataclasses import dataclass

from ..settings import TrainingSettings

POSITIONS = ("relative", "absolute", "both")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class DecoderSettings(TrainingSettings):
    """Settings of one training, the same for every kind of positions.

    Sizes are those of `model.MusicTransformerConfig`; window is counted in tokens, four per 16th of a chorale;
    transpose is the largest transposition in training, in semitones.
    """

    layers: int
    width: int
    heads: int
    feed_forward: int
    window: int
    max_relative_position: int
    dropout: float = 0.1
    transpose: int = 6
    epochs: float = 100.0
    batch: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    evaluations: int = 10
    precision: str = "fp32"
    saved_precision: str = "fp32"
    seed: int = 0

    def __post_init__(self):
        self.check_at_least(1, "layers", "width", "heads", "feed_forward", "max_relative_position")
        self.check_at_least(1, "batch", "accumulation", "evaluations")
        if self.window < 8:
            raise ValueError(f"window: expected at least 8 tokens, got {self.window}")
        self.check_positive("epochs", "learning_rate")
        if not 0 <= self.transpose <= 127:
            raise ValueError(f"transpose: expected 0 to 127 semitones, got {self.transpose}")
        self.check_dropout(self.dropout)
        for name in ("precision", "saved_precision"):
            if getattr(self, name) not in PRECISIONS:
                raise ValueError(f"{name}: expected one of {', '.join(PRECISIONS)}, got {getattr(self, name)!r}")


PRESETS = {
    # The committed checkpoints: an hour and a half to two and a quarter of one core for each kind.
    "small": DecoderSettings(
        layers=4, width=128, heads=4, feed_forward=512, window=512, max_relative_position=256,
        epochs=128, batch=4, learning_rate=2e-3, warmup=300, evaluations=32, saved_precision="fp16",
    ),
    # Six layers, for a GPU.
    "paper": DecoderSettings(
        layers=6, width=512, heads=8, feed_forward=1024, window=2048, max_relative_position=1024,
        epochs=300, batch=8, learning_rate=5e-4, warmup=1000, evaluations=30, precision="bf16", dropout=0.2,
    ),
    # Proves that everything runs, in half a minute.
    "tiny": DecoderSettings(
        layers=2, width=32, heads=2, feed_forward=64, window=128, max_relative_position=64,
        epochs=1, batch=16, learning_rate=3e-3, warmup=10, evaluations=3,
    ),
}  # fmt: skip
