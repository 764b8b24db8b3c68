"""What `relattn.toolkits.convert` gains: one attention layer of each speech toolkit before and after, at 10 s, 30 s and 5 min.

The layers are the toolkits' own where they are installed (`make test-toolkits` makes an environment, wenet from a clone
on PYTHONPATH), else the stand-ins of tests/toolkits, which gather instead of shifting and are no measure of a toolkit's
speed: `source` says which. Sizes are those of a released model, frames come of its stride; one sequence without padding,
float32, random weights. Each case is a process of its own, in which both sides take turns; a side that runs out of
`--memory` is left out. Extra memory is a first call's peak beyond inputs, weights and results, in one more process for each side.
`--train` is forward and backward.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import extra_memory, interleave
from benchmarks.processes import Watch, attempt, is_out_of_memory, limit_memory
from relattn.toolkits import convert

_SECONDS = (10, 30, 300)


class Subject(NamedTuple):
    layer: str  # its name in tests.toolkits
    size: int
    heads: int
    rate: float  # frames in a second


SUBJECTS = {
    "NeMo FastConformer": Subject("RelPositionMultiHeadAttention", 512, 8, 12.5),
    "NeMo FastConformer, local [128, 128]": Subject("RelPositionMultiHeadAttentionLongformer", 512, 8, 12.5),
    "ESPnet Conformer": Subject("RelPositionMultiHeadedAttention", 256, 4, 25),
    "ESPnet Conformer, legacy": Subject("LegacyRelPositionMultiHeadedAttention", 256, 4, 25),
    "ESPnet Conformer transducer": Subject("TransducerAttention", 256, 4, 25),
    "wenet Conformer, Shaw": Subject("ShawRelPositionMultiHeadedAttention", 256, 4, 25),
    "wenet FireRed": Subject("FiredRelPositionMultiHeadedAttention", 1280, 20, 25),
    "SpeechBrain Conformer": Subject("RelPosMHAXL", 512, 8, 25),
    "icefall Conformer": Subject("IcefallAttention", 512, 8, 25),
}


def _call(name: str, layer: Any, x: Tensor, size: int) -> Tensor:
    """As its encoder calls it."""
    length = x.shape[1]
    positions = torch.randn(1, 2 * length - 1, size)
    if name == "RelPositionMultiHeadAttention":
        return layer(x, x, x, None, positions)
    if name.endswith("Longformer"):
        return layer(x, x, x, torch.zeros(1, length, dtype=torch.bool), torch.randn(1, 257, size))
    if name.startswith("Legacy"):
        return layer(x, x, x, positions[:, :length], None)
    if name == "RelPositionMultiHeadedAttention":
        return layer(x, x, x, positions, None)
    if name == "TransducerAttention":
        return layer(x, x, x, positions, torch.zeros(1, length, dtype=torch.bool))
    if name == "IcefallAttention":
        x = x.transpose(0, 1)
        return layer(x, x, x, positions, need_weights=False)[0]
    if name == "RelPosMHAXL":
        return layer(x, x, x, positions)[0]
    return layer(x, x, x, pos_emb=positions)[0]


def _layer(subject: Subject) -> tuple[str, nn.Module]:
    from tests.toolkits import real, standins

    installed = real.layers()
    source = installed if hasattr(installed, subject.layer) else standins
    arguments: tuple = (subject.heads, subject.size, 0.0)
    if subject.layer in ("RelPosMHAXL", "IcefallAttention"):
        arguments = (subject.size, subject.heads, 0.0)
    elif subject.layer.startswith("RelPositionMultiHeadAttention"):
        arguments += (None, None, [128, 128]) if subject.layer.endswith("Longformer") else (None, None)
    layer = getattr(source, subject.layer)(*arguments)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.05)
    return "stand-in" if source is standins else "real", layer.eval()


def _steps(name: str, seconds: float, train: bool) -> tuple[str, int, dict[str, Callable[[], Tensor]]]:
    """Where the layer is from, frames, and a call of each side."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    source, layer = _layer(subject)
    x = torch.randn(1, round(subject.rate * seconds), subject.size, requires_grad=train)
    factor = torch.randn(x.shape)

    def step(layer: nn.Module) -> Tensor:
        with torch.set_grad_enabled(train):
            output = _call(subject.layer, layer, x, subject.size)
            if train:
                output.backward(factor if output.shape == factor.shape else factor.transpose(0, 1))
        return output.detach()

    converted = convert(copy.deepcopy(layer))
    return source, x.shape[1], {"after": lambda: step(converted), "before": lambda: step(layer)}


def extra(name: str, seconds: int, train: bool, memory: int, side: str) -> dict[str, Any]:
    """MiB at the peak of a first call beyond inputs, weights and results."""
    limit_memory(memory)
    _steps(name, 1.0, train)[2][side]()  # what any first use loads and starts
    step = _steps(name, seconds, train)[2][side]
    try:
        return {"mib": extra_memory(lambda: (step(),))[0] / 2**20}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"mib": None}


def case(name: str, seconds: int, train: bool, memory: int) -> dict[str, Any]:
    """Medians of both sides in milliseconds, and how far apart their results are."""
    limit_memory(memory)
    source, frames, steps = _steps(name, seconds, train)
    outputs = {}
    for side in list(steps):
        torch.manual_seed(1)
        try:
            outputs[side] = steps[side]()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            del steps[side]
    apart = None
    if len(outputs) == 2:
        before = outputs["before"]
        apart = ((before - outputs["after"]).abs().max() / before.abs().max()).item()
    outputs.clear()
    timed = interleave(steps, 2.0, warm=False)
    return {"source": source, "frames": frames, "apart": apart} | {side: timed[side]["median_ms"] for side in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, nargs="+", default=_SECONDS)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="of the subjects those with such a word")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--memory", type=float, default=10.0, help="GiB of a process (default: 10)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print("| layer | | audio | frames | before, ms | after, ms | | memory before, MiB | after, MiB | | apart | other cores busy |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in SUBJECTS:
        if options.only and not any(word in name for word in options.only):
            continue
        for seconds in options.seconds:
            print(_row(name, seconds, options), flush=True)


def _row(name: str, seconds: int, options: argparse.Namespace) -> str:
    arguments = dict(name=name, seconds=seconds, train=options.train, memory=round(options.memory * 2**30))
    with Watch() as watch:
        found = attempt(case, arguments, 600.0, options.threads)
    if "status" in found:
        return f"| {name} | | {seconds} s | | {found['status']}: {found['detail']} | | | | | | | |"
    peaks = [attempt(extra, arguments | {"side": side}, 600.0, options.threads) for side in ("before", "after")]
    mib = [peak.get("mib", peak.get("status")) for peak in peaks]
    cells = [name, found["source"], f"{seconds} s", str(found["frames"])]
    cells += _compared(found.get("before"), found.get("after")) + _compared(*mib)
    cells += ["" if found["apart"] is None else f"{found['apart']:.0e}", str(watch.seen["other_processes_cores"])]
    return f"| {' | '.join(cells)} |"


def _compared(before: float | str | None, after: float | str | None) -> list[str]:
    """Both, or how they ended, and their ratio."""
    ratio = f"{before / max(after, 0.1):.1f} x" if isinstance(before, float) and isinstance(after, float) else ""
    return [*(f"{value:,.1f}" if isinstance(value, float) else value or "out of memory" for value in (before, after)), ratio]


if __name__ == "__main__":
    main()
