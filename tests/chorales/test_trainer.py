"""The Trainer's parts that every training here shares."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import json
from types import SimpleNamespace

import pytest

from tests.chorales.helpers import read, require

require("transformers", "accelerate", "tqdm")

from examples.chorales.compare.masking import MaskingCollator
from examples.chorales.compare.model import build_model
from examples.chorales.compare.settings import PRESETS
from examples.chorales.compare.training import cut_windows
from examples.chorales.trainer import ChoraleTrainer, EpochSetter, adopt_checkpoint, training_arguments


def test_masks_follow_the_epoch_also_when_continuing_within_one():
    windows = SimpleNamespace(set_epoch=lambda epoch: seen.append(epoch))
    seen = []
    for epoch in (None, 0, 0.67, 1.0, 2 - 1e-12, 2.9):
        EpochSetter(windows).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    assert seen == [0, 0, 0, 1, 2, 2]


def test_moved_run_still_finds_its_best_checkpoint(tmp_path):
    newest = tmp_path / "checkpoint-20"
    newest.mkdir()
    state = {"best_model_checkpoint": "elsewhere/checkpoint-10", "global_step": 20}
    (newest / "trainer_state.json").write_text(json.dumps(state))
    adopt_checkpoint(newest)
    expected = {"best_model_checkpoint": str(tmp_path / "checkpoint-10"), "global_step": 20}
    assert read(newest / "trainer_state.json") == expected


def test_batch_must_split_over_the_processes(tmp_path):
    with pytest.raises(ValueError, match="batch: expected a multiple of the 3 processes, got 16"):
        training_arguments(PRESETS["tiny"], tmp_path, 100, processes=3, workers=0)


def test_workers_are_spawned(chorales, tmp_path):
    """Forked from a process with gloo's threads, a worker once inherited a held lock: both waited for it for ever."""
    settings = PRESETS["tiny"]
    windows, size = cut_windows(chorales, settings), len(chorales.vocabulary)
    trainer = ChoraleTrainer(
        model=build_model("absolute", size, settings.window, settings.max_relative_position, 0),
        args=training_arguments(settings, tmp_path, len(windows["train"]), 1, 1),
        train_dataset=windows["train"],
        data_collator=MaskingCollator(windows["train"], settings.masking, size, 0),
        eval_dataset=windows["valid"],
        evaluation={},
    )
    loader = trainer.get_train_dataloader()
    assert loader.base_dataloader.multiprocessing_context.get_start_method() == "spawn"
    assert next(iter(loader))["input_ids"].shape == (settings.batch, settings.window)
