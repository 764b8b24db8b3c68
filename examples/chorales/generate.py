"""Music from a trained decoder: MIDI, sound, a piano roll, and a check against copying the training set.

Without options the committed checkpoint sings a chorale. --prime continues a piece of the data (test:3) or a MIDI file.
Writes --out DIR/sample-<n>.mid, .wav, .png and generated.json, which records how the samples were drawn.
"""

import argparse
import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .command import prepare_process, quiet_transformers, require_packages
from .storage import atomic_write, read_json, write_json
from .terminal import exit_code, printable

if TYPE_CHECKING:
    from .decoder.languages import Language
    from .decoder.model import MusicTransformer
    from .decoder.passages import Music

CHECKPOINT = Path(__file__).with_name("checkpoint") / "relative"
SAMPLES = Path(__file__).with_name("samples")  # those of both committed checkpoints


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chorales.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", type=Path, default=CHECKPOINT, help="a model/ folder of train_decoder")
    add("--out", metavar="DIR", type=Path, default=Path("runs/generated"), help="default: runs/generated")
    add("--samples", type=int, default=1, help="how many (default 1)")
    add("--tokens", type=int, help="at most so many, the prime's included; default: twice the training length")
    add("--min-tokens", type=int, default=0, help="the piece may not end before (default 0)")
    add("--prime", metavar="PIECE", help="begin with a piece of the data (test:3, valid:0) or a MIDI file")
    add("--prime-tokens", type=int, default=128, help="so much of it; 16 per beat of a chorale (default 128)")
    add("--temperature", type=float, default=1.0, help="default 1")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0: from all (default)")
    add("--top-p", type=float, default=0.98, help="draw from the likeliest tokens of this total (default 0.98)")
    add("--beams", type=int, default=1, help="more than 1: beam search instead of sampling")
    add("--seed", type=int, default=0, help="default 0")
    add("--bpm", type=float, default=80, help="beats per minute of chorales (default 80)")
    add("--soundfont", metavar="FILE", help=".sf2 for fluidsynth; default: the system's, else pretty_midi's")
    add("--data", metavar="FILE", help="classic chorales, for --prime and the check (default: music21's corpus)")
    add("--midi", metavar="DIR", help="the MIDI folder a MIDI model was trained on, for --prime and the check")
    add("--no-check", action="store_true", help="do not compare with the training set")
    add("--benchmark", action="store_true", help="also time decoding with the cache against recomputation")
    options = parser.parse_args(arguments)
    for name, least in (("samples", 1), ("prime_tokens", 1), ("beams", 1), ("top_k", 0), ("min_tokens", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(options, name)}")
    if not options.temperature > 0:
        parser.error(f"--temperature: expected more than 0, got {options.temperature}")
    if options.beams > 1:
        drawing = ("samples", "temperature", "top_k", "top_p", "seed")
        given = [f"--{name.replace('_', '-')}" for name in drawing if getattr(options, name) != parser.get_default(name)]
        if given:
            parser.error(f"{given[0]}: of sampling; --beams {options.beams} draws nothing, and finds one piece")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p: expected more than 0 and at most 1, got {options.top_p}")
    if not 20 <= options.bpm <= 400:
        parser.error(f"--bpm: expected 20 to 400, got {options.bpm:g}")
    return options


def load_model(folder: Path) -> "tuple[MusicTransformer, Language]":
    """A trained model in float32 and eval mode, and its language.

    Raises:
        FileNotFoundError: there is no model in `folder`.
        ValueError: it is of another kind.
    """
    import torch

    from .decoder.languages import load_language
    from .decoder.model import MusicTransformer, MusicTransformerConfig

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--checkpoint {folder}: no config.json there; train_decoder writes <out>/<positions>/model"
        )
    kind = read_json(folder / "config.json").get("model_type")
    if kind != MusicTransformerConfig.model_type:
        raise ValueError(
            f"--checkpoint {folder}: expected a {MusicTransformerConfig.model_type}, got model_type {kind!r}"
        )
    quiet_transformers()
    model = MusicTransformer.from_pretrained(folder, dtype=torch.float32).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), load_language(model.config.language, folder)


class Data:
    """The music a model was trained on, loaded when it is first needed."""

    def __init__(self, language: "Language", options: argparse.Namespace):
        self.language, self.options = language, options
        self._music: Music | None = None

    def music(self) -> "Music":
        """Raises FileNotFoundError, ModuleNotFoundError or ValueError where it cannot be had."""
        from .decoder.passages import load_music

        if self._music is None:
            if self.language.name == "midi" and self.options.midi is None:
                raise ValueError("--midi: expected the folder of MIDI files that the model was trained on, got nothing")
            if self.language.name == "chorale" and self.options.midi is not None:
                raise ValueError(f"--midi {self.options.midi}: the model writes chorales; give --data or nothing")
            self._music = load_music(self.options.data, self.options.midi)
        return self._music


def prime_ids(given: str, language, data: Data) -> tuple:
    """Tokens of a prime, without START and END, and its name: `given` is split:index or a MIDI file."""
    from .data.files import SPLITS
    from .decoder.sound import read_chorale

    split, _, index = given.partition(":")
    if split in SPLITS and index.isdecimal():
        pieces = data.music().splits[split]
        if int(index) >= len(pieces):
            raise ValueError(f"--prime {given}: expected {split}:0 to {split}:{len(pieces) - 1}")
        return pieces[int(index)][1:-1], pieces.names[int(index)]
    if not Path(given).is_file():
        raise FileNotFoundError(
            f"--prime {given}: neither a piece of the data (test:0, valid:0, train:0, ...) nor a MIDI file"
        )
    if language.name == "chorale":
        return language.encode(read_chorale(given)), printable(Path(given).name)
    return language.encode(given), printable(Path(given).name)


def decode(
    model,
    prompt,
    options: argparse.Namespace,
    tokens: int,
    samples: int,
    use_cache: bool = True,
    title: str = "composing",
):
    """Token ids (samples, at most `tokens`) that begin with `prompt` (1, n); the same ones for the same seed."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    from .decoder.languages import PAD, START
    from .terminal import progress_bar

    torch.manual_seed(options.seed)
    drawing: dict = {"num_beams": options.beams, "do_sample": options.beams == 1}
    if options.beams == 1:
        drawing |= {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    with progress_bar(total=tokens, initial=prompt.shape[1], desc=title, leave=False) as bar:

        class Show(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                bar.update(input_ids.shape[1] - bar.n)
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        return model.generate(
            prompt.repeat(samples, 1),
            attention_mask=torch.ones_like(prompt).repeat(samples, 1),
            max_length=tokens,
            min_length=min(options.min_tokens, tokens),
            suppress_tokens=[PAD, START],
            use_cache=use_cache,
            stopping_criteria=StoppingCriteriaList([Show()]),
            **drawing,
        )


def write_sample(ids, language, options: argparse.Namespace, name: str, title: str, prime: int, trained: int) -> dict:
    """Files of one sample: its .mid, .wav and .png; returns what to record.

    Args:
        prime, trained: tokens given, and the training length in tokens, START included.
    """
    from .decoder import sound

    path = options.out / name
    if language.name == "chorale":
        midi = sound.chorale_midi(language.decode(ids), options.bpm)
        buffer = io.BytesIO()
        midi.write(buffer)
        content = buffer.getvalue()

        def seconds(count: int) -> float:
            return (count - 1) / language.unit * 60 / options.bpm / sound.STEPS_PER_QUARTER
    else:
        content = language.decode(ids).dumps_midi()
        midi = sound.open_midi(content)

        def seconds(count: int) -> float:
            return language.decode(ids[:count]).to("second").end() if count > 1 else 0.0

    with atomic_write(path.with_suffix(".mid"), "wb") as file:
        file.write(content)
    end_of_training = seconds(trained) if len(ids) > trained else None
    sound.draw_piano_roll(path.with_suffix(".png"), midi, title, prime=seconds(prime), trained=end_of_training)
    played = sound.write_sound(path.with_suffix(".wav"), midi, path.with_suffix(".mid"), options.soundfont)
    return {
        "files": [f"{name}{suffix}" for suffix in (".mid", ".png", ".wav")],
        "seconds": round(midi.get_end_time(), 2),
        "sound": played,
    }


def benchmark(model, prompt, options: argparse.Namespace, tokens: int) -> dict:
    """Seconds to decode one sample of exactly `tokens`, with the cache and by recomputing everything at each token."""
    import torch

    options = argparse.Namespace(**vars(options) | {"min_tokens": tokens})
    decode(model, prompt, options, min(tokens, prompt.shape[1] + 16), 1, title="warming up")
    seconds, ids = {}, {}
    for name, use_cache in (("cache", True), ("recomputation", False)):
        start = time.perf_counter()
        ids[name] = decode(model, prompt, options, tokens, 1, use_cache, title=f"timing {name}")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
    steps = tokens - prompt.shape[1]
    return {
        "tokens": steps,
        **{f"{name}_tokens_per_second": round(steps / value, 1) for name, value in seconds.items()},
        "ratio": round(seconds["recomputation"] / seconds["cache"], 2),
        "same_tokens": bool(torch.equal(ids["cache"], ids["recomputation"])),
    }


def run(options: argparse.Namespace) -> dict:
    """Generate and write; returns the content of generated.json."""
    require_packages("the decoder needs", "music", "transformers")
    require_packages("MIDI files and sound need", "music", "pretty_midi")
    if options.soundfont and not Path(options.soundfont).is_file():
        raise FileNotFoundError(f"--soundfont {options.soundfont}: no such file")
    import torch

    from .decoder.languages import END, PAD, START

    model, language = load_model(options.checkpoint)
    data = Data(language, options)
    trained = model.config.training_length
    tokens = max(2 * trained, options.min_tokens) if options.tokens is None else options.tokens
    if options.min_tokens > tokens:
        raise ValueError(f"--min-tokens: expected at most --tokens {tokens}, got {options.min_tokens}")
    ids, prime_name = [START], None
    if options.prime:
        given, prime_name = prime_ids(options.prime, language, data)
        if options.prime_tokens < language.unit:
            raise ValueError(f"--prime-tokens: expected at least {language.unit}, got {options.prime_tokens}")
        ids += given[: options.prime_tokens // language.unit * language.unit].tolist()
    if tokens < len(ids) + language.unit:
        raise ValueError(
            f"--tokens: expected at least {len(ids) + language.unit}, with the {len(ids)} given, got {tokens}"
        )
    prompt = torch.tensor([ids], device=model.device)
    start = time.perf_counter()
    drawn = decode(model, prompt, options, tokens, options.samples).tolist()
    took = time.perf_counter() - start

    if options.beams > 1:
        how = f"beam search, {options.beams} beams"
    else:
        how = f"temperature {options.temperature:g}, top-p {options.top_p:g}"
        how += f", top-k {options.top_k}" if options.top_k else ""
        how += f", seed {options.seed}"
    samples = []
    for index, row in enumerate(drawn):
        ended = END in row[len(ids) :]
        row = row[: row.index(END, len(ids)) + 1] if ended else [token for token in row if token != PAD]
        title = f"{model.config.positions} positions, {how}"
        title += f", continues {prime_name}" if prime_name else ""
        sample = write_sample(row, language, options, f"sample-{index}", title, len(ids), trained)
        samples.append({"tokens": len(row), "ended": row[-1] == END, **sample, "copying": None, "ids": row})
        length = f"{len(row)} tokens, {sample['seconds']} s of music"
        print(f"{options.out / sample['files'][0]}: {length}; sound by {sample['sound']}", flush=True)
    result = {
        "checkpoint": options.checkpoint.name if options.checkpoint == CHECKPOINT else str(options.checkpoint),
        "positions": model.config.positions,
        "training_length": trained,
        "prime": {"piece": prime_name, "tokens": len(ids) - 1} if prime_name else None,
        "drawing": {"beams": options.beams} if options.beams > 1 else {
            "temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p,
        },
        "seed": options.seed,
        "versions": {"torch": torch.__version__, "transformers": __import__("transformers").__version__},
        "tokens_per_second": round(sum(sample["tokens"] - len(ids) for sample in samples) / took, 1),
        "samples": samples,
    }  # fmt: skip
    if options.benchmark:
        result["cache"] = timing = benchmark(model, prompt, options, tokens)
        print(
            f"decoding {timing['tokens']} tokens: {timing['cache_tokens_per_second']} per second with the cache, "
            f"{timing['recomputation_tokens_per_second']} by recomputation: {timing['ratio']} times as fast; "
            f"same tokens: {'yes' if timing['same_tokens'] else 'no'}"
        )
    write_json(options.out / "generated.json", result)
    if not options.no_check:  # after the music: the first time it takes a while to parse the corpus
        check_copying(samples, len(ids), data)
    if language.name == "chorale":
        result["measures"] = measure(samples, len(ids), language, None if options.no_check else data)
    write_json(options.out / "generated.json", result)
    print(f"Written: {options.out}/generated.json")
    return result


def check_copying(samples: list[dict], prime: int, data: Data) -> None:
    """Compare what was generated, beyond the prime, with the training set; add it to the samples and print it."""
    import numpy as np

    from .decoder.copying import CopyCheck, describe

    try:
        check = CopyCheck(data.music())
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"copy check left out: {error}", file=sys.stderr)
        return
    for index, sample in enumerate(samples):
        report = check(np.array(sample["ids"][prime:]))
        sample["copying"] = report | {"test_pieces": check.of_test_pieces(report["generated"])}
        print(f"sample-{index}: {describe(report, sample['copying']['test_pieces'])}", flush=True)


def measure(samples: list[dict], prime: int, language, data: Data | None) -> dict:
    """Measures of four-part writing of what was generated, beyond the prime, beside those of the committed samples and, where
    the `data` can be had, of Bach's test pieces; prints them."""
    from .decoder import measures
    from .decoder.sound import read_chorale

    columns = {"generated": measures.total(language.decode(sample["ids"][prime:]) for sample in samples)}
    for arm in ("relative", "absolute"):
        committed = sorted(SAMPLES.glob(f"{arm}-*.mid"))
        if committed:
            columns[f"committed, {arm}"] = measures.total(read_chorale(path) for path in committed)
    try:
        if data is not None:
            pieces = data.music().splits["test"]
            columns["Bach, test"] = measures.total(language.decode(pieces[index]) for index in range(len(pieces)))
    except (OSError, ValueError, ModuleNotFoundError):
        pass  # the check for copies has said so
    print(f"\n{measures.describe(columns)}\n")
    return columns


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare_process(threads=1)  # one token at a time is too little work to share
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
