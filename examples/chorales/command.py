"""What the commands do around their work: packages, threads, the folder of a run."""

import os
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from .storage import read_json, write_json

_TOKENS_PER_THREAD = 2048


def require_packages(purpose: str, extra: str, *names: str, instead: str = "") -> None:
    """Raise ModuleNotFoundError with the `extra` that brings them where packages are missing.

    Args:
        purpose: the sentence's beginning, such as "the comparison needs".
        instead: what else would help.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        hint = f"; {instead}" if instead else ""
        raise ModuleNotFoundError(f'{purpose} {", ".join(missing)}: pip install "relattn[{extra}]"{hint}')


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def training_threads(batch_tokens: int) -> int:
    """Threads for a training whose batches have so many tokens, over all processes.

    One per 2048 tokens, as far as there are cores: below that a second one gains less than a fifth on idle cores, and
    on busy ones it halves the speed, as threads wait for each other.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(available_cores(), batch_tokens // _TOKENS_PER_THREAD) // processes)


def prepare_process(threads: int | None = None) -> None:
    """Choose threads (None: as many as torch takes) before torch is loaded. What the user has set stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub


def quiet_transformers() -> None:
    """Keep to errors, and to our own progress bars: those for saving a small model only break ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def prepare_folder(out: Path, config: dict, arms: Sequence[str], overwrite: bool) -> None:
    """Write config.json, or check that the one from an earlier run agrees.

    Args:
        arms: subfolders of a run, which `overwrite` deletes with the run's files; anything else in `out` stays.

    Raises:
        ValueError: the folder holds a run with another configuration.
    """
    path = out / "config.json"
    if overwrite:
        for name in ("config.json", "results.json", "loss.png"):
            (out / name).unlink(missing_ok=True)
        for arm in arms:
            shutil.rmtree(out / arm, ignore_errors=True)
    # A run that was refused before any training has left nothing but its configuration.
    if path.is_file() and any((out / name).exists() for name in ("results.json", *arms)):
        earlier = read_json(path)
        changed = [f"{k} {earlier.get(k)!r} -> {config.get(k)!r}" for k in config if earlier.get(k) != config.get(k)]
        if changed:
            raise ValueError(
                f"--out {out}: holds a run with other settings ({'; '.join(changed)}); choose another folder, "
                "or --overwrite to delete it"
            )
    else:
        write_json(path, config)


def finished_results(out: Path, arms: Iterable[str]) -> dict[str, dict]:
    """What the arms' result.json say, of those of the folder's run that have ended, by this command or an earlier one."""
    return {arm: read_json(out / arm / "result.json") for arm in arms if (out / arm / "result.json").is_file()}
