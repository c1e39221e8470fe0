"""A run that is stopped, killed or resumed gives the bits of one that was not."""

import os
import signal

import jax
import numpy as np
import pytest

from jaxlora import FastLanguageModel
from jaxlora.train import loop
from tests.jaxlora.api.conftest import write_folder
from tests.jaxlora.train.kill_loop import STEPS, assert_same_run, kill_loop, trainer_of

STOP = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("straight")
    trainer = trainer_of(folder, output_dir)
    trainer.train()
    return trainer, output_dir


def test_resuming_gives_the_bits_of_a_run_that_never_stopped(folder, straight, tmp_path):
    trainer = trainer_of(folder, tmp_path)
    result = trainer.train(resume_from_checkpoint=str(straight[1] / f"checkpoint-{STOP}"))
    assert_same_run(tmp_path, straight[1])
    assert result.global_step == STEPS
    assert [entry["step"] for entry in trainer.state.log_history] == list(range(1, STEPS + 1))
    assert all(map(np.array_equal, jax.tree.leaves(trainer.model.trainable), jax.tree.leaves(straight[0].model.trainable)))


def test_resuming_a_finished_run_trains_nothing_and_says_so(folder, straight, capsys):
    trainer = trainer_of(folder, straight[1])
    result = trainer.train(resume_from_checkpoint=True)
    assert f"the checkpoint is of step {STEPS} and the run has {STEPS}: nothing is left to train" in capsys.readouterr().out
    assert (result.global_step, result.metrics["train_steps"]) == (STEPS, 0)
    assert all(map(np.array_equal, jax.tree.leaves(trainer.model.trainable), jax.tree.leaves(straight[0].model.trainable)))


@pytest.mark.gpu
def test_on_a_gpu_resuming_gives_the_same_bits_where_determinism_is_asked_for(folder, tmp_path, capsys):
    trainer_of(folder, tmp_path / "straight", full_determinism=True).train()
    assert "deterministic True" in capsys.readouterr().out
    resumed = trainer_of(folder, tmp_path / "resumed", full_determinism=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{STOP}"))
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")


def test_a_checkpoint_holds_an_adapter_that_loads(straight):
    model, tokenizer = FastLanguageModel.from_pretrained(str(straight[1] / f"checkpoint-{STEPS}"))
    ids = tokenizer("the total is", return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(model(input_ids=ids).logits, straight[0].model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"learning_rate": 0.5}, "learning_rate: 0.01 then, 0.5 now"),
        ({"gradient_accumulation_steps": 1, "seed": 1}, "(?s)gradient_accumulation_steps: 2 then, 1 now.*seed: 3407 then, 1 now"),
    ],
)
def test_resuming_with_other_settings_lists_the_differences(folder, straight, tmp_path, changes, difference):
    trainer = trainer_of(folder, tmp_path, **changes)
    with pytest.raises(ValueError, match=difference):
        trainer.train(resume_from_checkpoint=str(straight[1] / f"checkpoint-{STOP}"))


def test_a_run_that_is_killed_at_any_moment_loses_nothing(folder, straight, tmp_path):
    counts = kill_loop(folder, tmp_path, straight[1], kills=3)
    assert counts.kills == 3 and counts.compared >= STEPS and counts.finished >= 1


def test_a_run_that_is_terminated_ends_with_the_bits_of_one_that_was_not(folder, straight, tmp_path, monkeypatch):
    with pytest.raises(loop.Interrupted, match="stopped by SIGTERM after step") as stopped:
        terminated(trainer_of(folder, tmp_path), monkeypatch).train()
    monkeypatch.undo()
    assert stopped.value.signum == signal.SIGTERM and f"{tmp_path}/checkpoint-" in str(stopped.value)
    trainer_of(folder, tmp_path).train(resume_from_checkpoint=True)
    assert_same_run(tmp_path, straight[1])


def terminated(trainer, monkeypatch):
    """The trainer, to which SIGTERM is sent when it reads its first rows."""
    read = type(trainer.train_source).inputs

    def inputs(source, rows):
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(type(source), "inputs", read)
        return read(source, rows)

    monkeypatch.setattr(type(trainer.train_source), "inputs", inputs)
    return trainer
