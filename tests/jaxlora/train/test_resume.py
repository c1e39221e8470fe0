"""A run that is stopped, killed or resumed gives the bits of one that was not."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxlora import FastLanguageModel, SFTConfig, SFTTrainer
from jaxlora.train import checkpoint, loop
from tests.jaxlora.api.conftest import text_row, write_folder

STEPS, STOP = 6, 3
# What a subprocess runs: this file as a script.
ARGUMENTS = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "save_steps": 1}


def trainer_of(folder, output_dir, **changes):
    """Seven rows in steps of four, with dropout: epochs end inside the run, and every draw matters."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=True, use_gradient_checkpointing=False)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1, use_gradient_checkpointing=False)
    arguments = SFTConfig(**{**ARGUMENTS, "output_dir": str(output_dir), **changes})
    return SFTTrainer(model, arguments, [text_row(i) for i in range(7)], tokenizer=tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("straight")
    trainer = trainer_of(folder, output_dir)
    trainer.train()
    return trainer, output_dir


def arrays(output_dir, step=STEPS):
    """Everything that a checkpoint holds: (trainable and optimizer state by path, the losses, the data position)."""
    path = output_dir / f"checkpoint-{step}"
    with checkpoint.ocp.StandardCheckpointer() as reader:
        stored = reader.restore((path / checkpoint.ARRAYS).absolute())
    record = checkpoint.read_record(path)
    return {name: np.asarray(array) for name, array in stored.items()}, record["losses"], record["data"]


def assert_same_run(output_dir, other):
    ours, losses, position = arrays(output_dir)
    theirs, their_losses, their_position = arrays(other)
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert (losses, position) == (their_losses, their_position)


def test_resuming_gives_the_bits_of_a_run_that_never_stopped(folder, straight, tmp_path):
    trainer = trainer_of(folder, tmp_path)
    result = trainer.train(resume_from_checkpoint=str(straight[1] / f"checkpoint-{STOP}"))
    assert_same_run(tmp_path, straight[1])
    assert result.global_step == STEPS
    assert [entry["step"] for entry in trainer.state.log_history] == list(range(1, STEPS + 1))
    assert all(map(np.array_equal, jax.tree.leaves(trainer.model.trainable), jax.tree.leaves(straight[0].model.trainable)))


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


def start(folder, output_dir):
    command = [sys.executable, __file__, str(folder), str(output_dir)]
    root = pathlib.Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(output_dir, process, step):
    deadline = time.monotonic() + 120
    while not (output_dir / f"checkpoint-{step}").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_that_is_killed_and_then_terminated_ends_with_the_bits_of_one_that_was_not(folder, straight, tmp_path, monkeypatch):
    process = start(folder, tmp_path)
    wait_for(tmp_path, process, 1)
    # Somewhere inside the next step or the next save.
    time.sleep(0.05)
    process.kill()
    process.communicate()
    reached = [int(path.name.removeprefix("checkpoint-")) for path in checkpoint.find_all(tmp_path)]
    assert reached == list(range(1, len(reached) + 1))
    with pytest.raises(loop.Interrupted, match="stopped by SIGTERM after step") as stopped:
        terminated(trainer_of(folder, tmp_path), monkeypatch).train(resume_from_checkpoint=True)
    monkeypatch.undo()
    assert stopped.value.signum == signal.SIGTERM
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


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[2])
    trainer_of(sys.argv[1], target).train(resume_from_checkpoint=bool(checkpoint.find_all(target)))
