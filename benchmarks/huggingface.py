"""What `relattn.huggingface.convert` gains: time and memory of Hugging Face models before and after.

Each model has random weights and the sizes of a released one, `--layers` layers of it, one sequence without padding. For every length
of audio (frames computed from the model's stride; text models have tokens instead) these are measured: the first layer's attention module,
projections included; the whole encoder; of two models also the attention alone ("core"), its projections taken out. Peak memory beyond
inputs and weights is that of a process's first call, each side in a process of its own; in another process both sides, which share their
weights, take turns, and their outputs are compared. Running out of memory, a crash or a timeout is a result too. Interrupted, the same
command goes on where it was. Writes results.json and report.md to --out; `--readme docs/models.md` also writes that file's part between
`<!-- conversion -->` and `<!-- /conversion -->`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import TensorStep, interleave, peak_memory
from benchmarks.processes import Watch, attempt, is_out_of_memory, limit_memory
from benchmarks.report import judged
from benchmarks.runs import FINAL, GOES_ON, allowed_memory, begin, chosen_device, integers, names, positive
from examples.chorales.storage import atomic_write, read_json, write_json, write_part
from examples.chorales.terminal import exit_code

SIDES = ("before", "after")
PARTS = ("core", "attention", "encoder")
_PROJECTIONS = ("linear_q", "linear_k", "linear_v", "linear_out")  # square, so that the core goes without
PASSES = ("forward", "train")
AUDIO = (10, 30, 300)  # seconds
TOKENS = {10: 128, 30: 512, 300: 2048}  # of a text model, in the place of so many seconds
_NOISE = 0.98  # of the speed before: where attention is a small part of a short encoder, runs differ by a percent
_ERROR = {"float32": 1e-3, "bfloat16": 0.1}  # of the output, relative to its largest value, that counts as rounding


def _wav2vec2_bert(layers: int) -> nn.Module:
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    return Wav2Vec2BertModel(Wav2Vec2BertConfig(num_hidden_layers=layers))


def _seamless(version: str) -> Callable[[int], nn.Module]:
    def build(layers: int) -> nn.Module:
        import importlib

        import transformers

        name = f"seamless_m4t{'_v2' if version else ''}"
        modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        config = getattr(transformers, f"SeamlessM4T{version}Config")(speech_encoder_layers=layers, add_adapter=False)
        return getattr(modeling, f"SeamlessM4T{version}SpeechEncoder")(config)

    return build


def _wav2vec2_conformer(layers: int) -> nn.Module:
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

    sizes: dict[str, Any] = dict(hidden_size=1024, num_attention_heads=16, intermediate_size=4096)
    sizes |= dict(hidden_act="swish", feat_extract_norm="layer")
    return Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(num_hidden_layers=layers, conv_bias=True, **sizes))


def _parakeet(layers: int) -> nn.Module:
    from transformers import ParakeetEncoder, ParakeetEncoderConfig

    return ParakeetEncoder(ParakeetEncoderConfig(num_hidden_layers=layers))


def _nemotron(layers: int) -> nn.Module:
    from transformers import NemotronAsrStreamingEncoder, NemotronAsrStreamingEncoderConfig

    return NemotronAsrStreamingEncoder(NemotronAsrStreamingEncoderConfig(num_hidden_layers=layers))


def _fastspeech2(layers: int) -> nn.Module:
    from transformers import FastSpeech2ConformerConfig
    from transformers.models.fastspeech2_conformer.modeling_fastspeech2_conformer import FastSpeech2ConformerEncoder

    config = FastSpeech2ConformerConfig(decoder_layers=layers)
    model: Any = FastSpeech2ConformerEncoder(config, config.decoder_config)
    for layer in model.conformer_layers:
        nn.init.xavier_uniform_(layer.self_attn.pos_bias_u)
        nn.init.xavier_uniform_(layer.self_attn.pos_bias_v)
    return model


def _speecht5(layers: int) -> nn.Module:
    from transformers import SpeechT5Config
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5EncoderWithSpeechPrenet

    return SpeechT5EncoderWithSpeechPrenet(SpeechT5Config(encoder_layers=layers))


def _xlnet(layers: int) -> nn.Module:
    from transformers import XLNetConfig, XLNetModel

    return XLNetModel(XLNetConfig(n_layer=layers, d_model=768, n_head=12, d_inner=3072, use_mems_eval=False))


def _vits(layers: int) -> nn.Module:
    from transformers import VitsConfig
    from transformers.models.vits.modeling_vits import VitsTextEncoder

    settings: dict[str, Any] = dict(num_hidden_layers=layers, attn_implementation="eager")
    return VitsTextEncoder(VitsConfig(**settings))


def _deberta(version: str) -> Callable[[int], nn.Module]:
    def build(layers: int) -> nn.Module:
        import transformers

        sizes: dict[str, Any] = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
        sizes |= dict(vocab_size=1000, num_hidden_layers=layers)
        sizes |= dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
        if version:
            sizes |= dict(position_buckets=256, share_att_key=True, norm_rel_ebd="layer_norm")
        return getattr(transformers, f"Deberta{version}Model")(getattr(transformers, f"Deberta{version}Config")(**sizes))

    return build


def _t5(layers: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(num_layers=layers, d_model=768, num_heads=12, d_ff=3072, vocab_size=1000))


def _mpnet(layers: int) -> nn.Module:
    from transformers import MPNetConfig, MPNetModel

    return MPNetModel(MPNetConfig(num_hidden_layers=layers, vocab_size=1000, max_position_embeddings=10000))


def _wavlm(layers: int) -> nn.Module:
    from transformers import WavLMConfig, WavLMModel

    sizes: dict[str, Any] = dict(hidden_size=1024, num_attention_heads=16, intermediate_size=4096, feat_extract_norm="layer")
    return WavLMModel(WavLMConfig(num_hidden_layers=layers, conv_bias=True, do_stable_layer_norm=True, **sizes))


def _features(name: str, rate: float, size: int) -> Callable[[float], dict[str, Tensor]]:
    return lambda seconds: {name: torch.randn(1, round(rate * seconds), size)}


def _samples(seconds: float) -> dict[str, Tensor]:
    return {"input_values": 0.1 * torch.randn(1, round(16000 * seconds))}


def _text(seconds: float) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 900, (1, TOKENS.get(round(seconds), max(8, round(12.8 * seconds)))))}


def _long_text(seconds: float) -> dict[str, Tensor]:
    """Four times as many tokens."""
    return {"input_ids": torch.randint(3, 900, (1, 4 * _text(seconds)["input_ids"].shape[1]))}


def _characters(seconds: float) -> dict[str, Tensor]:
    """About 15 characters of text a second, a blank between any two."""
    length = round(30 * seconds)
    return {"input_ids": torch.randint(1, 37, (1, length)), "padding_mask": torch.ones(1, length, 1)}


class Model(NamedTuple):
    label: str
    build: Callable[[int], nn.Module]  # with so many layers
    inputs: Callable[[float], dict[str, Tensor]]  # for so many seconds of audio
    attention: str  # the class of its attention
    core: bool = False  # is measured without its projections too


MODELS = {
    "w2v-bert": Model("w2v-BERT 2.0", _wav2vec2_bert, _features("input_features", 50, 160), "Wav2Vec2BertSelfAttention", core=True),
    "seamless-v2": Model("SeamlessM4T v2", _seamless("v2"), _features("input_features", 50, 160), "SeamlessM4Tv2ConformerSelfAttention"),
    "seamless": Model("SeamlessM4T", _seamless(""), _features("input_features", 50, 160), "SeamlessM4TConformerSelfAttention"),
    "wav2vec2-conformer": Model("Wav2Vec2-Conformer", _wav2vec2_conformer, _samples, "Wav2Vec2ConformerSelfAttention", core=True),
    "parakeet": Model("Parakeet", _parakeet, _features("input_features", 100, 80), "ParakeetEncoderAttention"),
    "nemotron": Model("Nemotron ASR streaming", _nemotron, _features("input_features", 100, 80), "NemotronAsrStreamingEncoderAttention"),
    "fastspeech2": Model(
        "FastSpeech2-Conformer", _fastspeech2, _features("input_tensor", 22050 / 256, 384), "FastSpeech2ConformerAttention"
    ),
    "speecht5": Model("SpeechT5", _speecht5, _samples, "SpeechT5Attention"),
    "vits": Model("VITS, text", _vits, _characters, "VitsAttention"),
    "xlnet": Model("XLNet, text", _xlnet, _text, "XLNetRelativeAttention"),
    "deberta": Model("DeBERTa, text", _deberta(""), _text, "DisentangledSelfAttention"),
    "deberta-v3": Model("DeBERTa v3, text", _deberta("V2"), _text, "DisentangledSelfAttention"),
    "t5": Model("T5, text", _t5, _long_text, "T5Attention"),
    "mpnet": Model("MPNet, text", _mpnet, _text, "MPNetSelfAttention"),
    "wavlm": Model("WavLM", _wavlm, _samples, "WavLMAttention"),
}


# ---- one case, in a process of its own ----


class _Found(Exception):
    """Carries a call out of a forward pass."""


class Subject:
    """Both sides of a model at one length: the same weights, the second converted."""

    def __init__(self, name: str, seconds: float, part: str, passed: str, layers: int, device: str, dtype: str) -> None:
        from relattn.huggingface import convert

        torch.manual_seed(0)
        self.spec, self.part, self.passed = MODELS[name], part, passed
        # In evaluation mode also with gradients: what dropout draws is not compared.
        before = self.spec.build(layers).to(device, getattr(torch, dtype)).eval().requires_grad_(passed == "train")
        if part == "core":
            for module in before.modules():
                if type(module).__name__ == self.spec.attention:
                    for projection in _PROJECTIONS:
                        setattr(module, projection, nn.Identity())
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*before.parameters(), *before.buffers())}
        self.models = {"before": before, "after": convert(copy.deepcopy(before, shared))}
        self.device, self.dtype = device, getattr(torch, dtype)
        self.inputs = self._inputs(seconds)

    def _inputs(self, seconds: float) -> dict[str, Tensor]:
        inputs = self.spec.inputs(seconds)
        return {key: value.to(self.device, self.dtype if value.is_floating_point() else None) for key, value in inputs.items()}

    def step(self, side: str, seconds: float | None = None) -> TensorStep:
        """A call of the side's part; with gradients of its parameters in the pass "train"."""
        model = self.models[side]
        inputs = self.inputs if seconds is None else self._inputs(seconds)
        call, parameters = ((lambda: model(**inputs)[0]), model) if self.part == "encoder" else self._attention_call(model, inputs)
        if self.passed == "forward":

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (call(),)

            return forward
        wanted = [parameter for parameter in parameters.parameters() if parameter.requires_grad]

        def train() -> tuple[Tensor, ...]:
            output = call()
            gradients = torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
            return (output.detach(), *(gradient for gradient in gradients if gradient is not None))

        return train

    def _attention_call(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Callable[[], Tensor], nn.Module]:
        """The first attention module, called as the model calls it."""
        module = next(module for module in model.modules() if type(module).__name__ == self.spec.attention)

        def stop(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            raise _Found(args, kwargs)

        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                model(**inputs)
        except _Found as found:
            args, kwargs = found.args
        finally:
            handle.remove()
        return (lambda: module(*args, **kwargs)[0]), module

    def count_frames(self, side: str, step: TensorStep) -> tuple[tuple[Tensor, ...], int]:
        """What a call of the side's `step` returns, and the queries of a layer in it."""
        module = next(module for module in self.models[side].modules() if type(module).__name__ == self.spec.attention)
        counts: list[int] = []
        axis = 0 if self.spec.attention.startswith("XLNet") else 1
        handle = module.register_forward_hook(lambda _module, _args, output: counts.append(output[0].shape[axis]))
        try:
            return step(), counts[0]
        finally:
            handle.remove()


def memory(subject: Mapping[str, Any], side: str, memory_limit: int | None = None) -> dict[str, Any]:
    """Bytes at the peak of the first call beyond inputs and weights, results included, and bytes of the results."""
    if memory_limit and subject["device"] == "cpu":
        limit_memory(memory_limit)
    try:
        both = Subject(**subject)
        both.step(side, 1.0)()  # what any first use loads and starts
        step = both.step(side)
        start = time.perf_counter()
        peak, returned = peak_memory(step, subject["device"])
        return {"status": "ok", "peak_bytes": peak, "returned_bytes": returned, "first_ms": 1e3 * (time.perf_counter() - start)}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "out of memory", "detail": str(error).splitlines()[0][:200]}


def times(subject: Mapping[str, Any], sides: list[str], seconds: float) -> dict[str, Any]:
    """Milliseconds of the sides, which take turns; how far their outputs are apart; the number of frames."""
    both = Subject(**subject)
    steps = {side: both.step(side) for side in sides}
    outputs = {}
    for side, step in steps.items():  # their first calls, too
        (outputs[side], *_), frames = both.count_frames(side, step)
    result: dict[str, Any] = {"frames": frames}
    if len(sides) == 2:
        before, after = (outputs.pop(side) for side in SIDES)
        result["error"] = float(f"{((after - before).abs().max() / before.abs().max()).item():.2e}")
        del before, after
    outputs.clear()
    return result | interleave(steps, seconds * len(sides), device=subject["device"], warm=False)


# ---- all cases ----


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.huggingface", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=tuple(_ERROR), default="float32")
    parser.add_argument("--models", default="all", metavar="all|NAME,...", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--audio", type=integers, default=list(AUDIO), metavar="S,S,...", help="seconds of audio (default: 10,30,300)")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="|".join(PARTS), help="some of them (default: all)")
    parser.add_argument("--pass", dest="passes", default="forward", metavar="forward|train", help="one or both (default: forward)")
    parser.add_argument("--layers", type=positive, default=2, help="of each encoder (default: 2)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/huggingface-<device>-<dtype>")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing per row, at least three rounds (default: 5)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one process (default: 900)")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="CPU: that a call may take (default: 85 %% of what is free)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument("--overwrite", action="store_true", help="measure anew what --out already holds")
    parser.add_argument("--render", action="store_true", help="measure nothing: write the report of what --out holds")
    parser.add_argument("--readme", type=Path, help="the file whose marked part is written anew")
    options = parser.parse_args(arguments)
    options.device = chosen_device(parser, options.device)
    options.models = list(MODELS) if options.models == "all" else names(parser, "--models", options.models, list(MODELS))
    options.parts = names(parser, "--parts", options.parts, list(PARTS))
    options.passes = names(parser, "--pass", options.passes, list(PASSES))
    options.audio = sorted(set(options.audio))
    options.out = options.out or Path("runs") / f"huggingface-{options.device}-{options.dtype}"
    return options


def measure(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Add the rows that `results` lacks, writing after each; short ones first, so that an interrupted run tells something."""
    rows = results["rows"]
    known = {(row["model"], row["audio"], row["part"], row["pass"]) for row in rows}
    for audio in options.audio:
        for model in options.models:
            for part in options.parts:
                for passed in options.passes:
                    if (model, audio, part, passed) in known or (part == "core" and not MODELS[model].core):
                        continue
                    row = {"model": model, "audio": audio, "part": part, "pass": passed}
                    with Watch() as watch:
                        row |= _row(options, rows, row)
                    rows.append(row | watch.seen)
                    write_json(options.out / "results.json", results)
                    print(_line(rows[-1]), flush=True)


def _row(options: argparse.Namespace, rows: list[dict[str, Any]], row: Mapping[str, Any]) -> dict[str, Any]:
    subject = dict(name=row["model"], seconds=row["audio"], part=row["part"], passed=row["pass"], layers=options.layers)
    subject |= dict(device=options.device, dtype=options.dtype)
    found: dict[str, Any] = {}
    for side in SIDES:
        shorter = [
            other[side] for other in rows
            if all(other[key] == row[key] for key in ("model", "part", "pass")) and other["audio"] < row["audio"]
            and other[side]["status"] in FINAL
        ]  # fmt: skip
        if shorter:
            found[side] = {"status": shorter[0]["status"], "detail": "not tried: so it ended at a shorter length"}
            continue
        arguments = dict(subject=subject, side=side, memory_limit=allowed_memory(options.memory_limit))
        found[side] = attempt(memory, arguments, options.timeout, options.threads)
    able = [side for side in SIDES if found[side]["status"] == "ok"]
    if not able:
        return found
    timed = attempt(times, dict(subject=subject, sides=able, seconds=options.seconds), options.timeout, options.threads)
    if "status" in timed:  # together they did not end well
        for side in able:
            found[side] |= timed
        return found
    for side in able:
        found[side] |= timed.pop(side)
    found |= timed
    if not found.get("error", 0.0) <= _ERROR[options.dtype]:  # NaN is wrong too
        found["after"]["status"] = "wrong"
    if len(able) == 2:
        found["faster"] = found["before"]["median_ms"] / found["after"]["median_ms"]
        extra = [max(found[side]["peak_bytes"] - found[side]["returned_bytes"], 2**20) for side in SIDES]
        found["leaner"] = extra[0] / extra[1]
    return found


def _line(row: Mapping[str, Any]) -> str:
    text = f"{row['audio']:>5} s  {MODELS[row['model']].label:24} {row['part']:10} {row['pass']:8} {row.get('frames', ''):>6}  "
    for side in SIDES:
        found = row[side]
        text += f"{side} "
        if "median_ms" in found:
            text += f"{found['median_ms']:10.2f} ms {found['peak_bytes'] / 2**20:9.1f} MiB  "
        else:
            text += found["status"] + "  "
        text += "WRONG  " if found["status"] == "wrong" else ""
    return text + (f"{row['faster']:.2f} x faster, {row['leaner']:.1f} x leaner" if "faster" in row else "")


# ---- report ----


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was set out for the CPU: w2v-BERT's attention at 1500 frames, and no row of 100 frames or more slower than before.

    Of the attention, not of the projections around it, which are the same before and after.
    """
    found = []
    for row in rows:
        if "faster" not in row or row["pass"] != "forward":
            continue
        name = f"{MODELS[row['model']].label}, {row['part']}, {row['frames']} frames"
        if row["model"] == "w2v-bert" and row["part"] == "core" and row["frames"] == 1500:
            found.append({"name": f"{name}: times as fast"} | judged(row["faster"], 6.0))
            found.append({"name": f"{name}: times less extra memory"} | judged(row["leaner"], 20.0))
        if row["frames"] >= 100:
            found.append({"name": f"{name}: not slower"} | judged(row["faster"], _NOISE))
    return found


def table(results: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    rows = results["rows"]
    lines = []
    for passed in PASSES:
        listed = [row for row in rows if row["pass"] == passed]
        if not listed:
            continue
        what = "forward" if passed == "forward" else "forward and backward"
        lines += [f"| {what} | audio | frames | attention layer, ms | | memory, MiB | | whole encoder, ms | | memory, MiB | |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for model, spec in MODELS.items():
            for audio in sorted({row["audio"] for row in listed if row["model"] == model}):
                parts = {row["part"]: row for row in listed if (row["model"], row["audio"]) == (model, audio)}
                frames = next((str(row["frames"]) for row in parts.values() if "frames" in row), "")
                label = "" if "text" in spec.label and model != "vits" else f"{audio} s"
                cells = [cell for part in ("attention", "encoder") for cell in _cells(parts.get(part))]
                lines.append(f"| {spec.label} | {label} | {frames} | {' | '.join(cells)} |")
                if "core" in parts:
                    cells = _cells(parts["core"]) + [""] * 4
                    lines.append(f"| - without projections | {label} | {frames} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any] | None) -> list[str]:
    """Time before and after, how many times as fast; extra memory before and after, how many times less."""
    if row is None:
        return [""] * 4
    cells = []
    for value, gain in (
        (lambda found: found.get("median_ms"), "faster"),
        (lambda found: (found["peak_bytes"] - found["returned_bytes"]) / 2**20 if "peak_bytes" in found else None, "leaner"),
    ):
        numbers = [value(row[side]) for side in SIDES]
        words = [_number(number) if number is not None else row[side]["status"] for number, side in zip(numbers, SIDES, strict=True)]
        cells += [" → ".join(words), f"{row[gain]:.1f} x" if gain in row else ""]
    return cells


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def report(results: Mapping[str, Any]) -> str:
    machine, chosen = results["environment"], results["settings"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine.get('threads')} thread{'s' * (machine.get('threads') != 1)}"
    lines = [
        f"{where}, {chosen['dtype']}, encoders of {chosen['layers']} layers, random weights, one sequence; transformers "
        f"{machine.get('transformers')}, torch {machine['torch']}, relattn {machine['relattn']}, {results['date']}. Medians of both sides "
        "taking turns; memory is the peak beyond inputs, weights and results.",
        "", table(results),
    ]  # fmt: skip
    listed = goals(results["rows"]) if chosen["device"] == "cpu" else []
    missed = [f"{goal['name']}: {goal['figure']:.2f}, goal {goal['goal']}" for goal in listed if not goal["met"]]
    wrong = [row for row in results["rows"] if row["after"]["status"] == "wrong"]
    if listed:
        lines.append(
            f"{len(listed) - len(missed)} of {len(listed)} goals met: w2v-BERT's attention without projections 6 times as fast at 1500 "
            f"frames and 20 times leaner, nothing of 100 frames or more slower than {_NOISE} of the speed before."
            + "".join(f"\n- missed: {name}" for name in missed)
        )  # fmt: skip
    lines += [f"- WRONG: {MODELS[row['model']].label}, {row['audio']} s, {row['part']}, {row['pass']}" for row in wrong]
    return "\n".join(lines).rstrip() + "\n"


def run(options: argparse.Namespace) -> None:
    if options.render:
        results = read_json(options.out / "results.json")
    else:
        listed = ("device", "dtype", "layers", "seconds", "threads")
        results = begin(options, {name: getattr(options, name) for name in listed})
        measure(options, results)
    text = report(results)
    with atomic_write(options.out / "report.md") as file:
        file.write(text)
    if options.readme:
        write_part(options.readme, "conversion", text)
    print(f"\n{text}\nWritten: {options.out}/results.json, report.md")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code(lambda: run(options), GOES_ON)


if __name__ == "__main__":
    sys.exit(main())
