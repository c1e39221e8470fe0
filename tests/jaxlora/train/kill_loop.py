"""Kills training processes at random moments, and shows that nothing is lost: every checkpoint that exists is that of an unbroken run.

python -m tests.jaxlora.train.kill_loop [--kills 200] [--minutes 10] [--seed 0]
"""

import argparse
import dataclasses
import multiprocessing
import os
import pathlib
import random
import tempfile
import time
from typing import Any

import numpy as np

from jaxlora import FastLanguageModel, SFTConfig, SFTTrainer
from jaxlora.train import checkpoint
from tests.jaxlora.api.conftest import text_row, write_folder

STEPS = 6
ARGUMENTS = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "save_steps": 1}


def trainer_of(folder, output_dir, **changes):
    """Seven rows in steps of four, with dropout: epochs end inside the run, and every draw matters."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=True, use_gradient_checkpointing=False)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1)
    arguments = SFTConfig(**{**ARGUMENTS, "output_dir": str(output_dir), **changes})
    return SFTTrainer(model, arguments, [text_row(i) for i in range(7)], tokenizer=tokenizer)


def arrays(output_dir, step=STEPS):
    """Everything that a checkpoint holds: (trainable and optimizer state by path, the losses, the data position)."""
    path = output_dir / f"checkpoint-{step}"
    with checkpoint.ocp.StandardCheckpointer() as reader:
        stored = reader.restore((path / checkpoint.ARRAYS).absolute())
    record = checkpoint.read_record(path)
    return {name: np.asarray(array) for name, array in stored.items()}, record["losses"], record["data"]


def assert_same_run(output_dir, other, step=STEPS):
    ours, losses, position = arrays(output_dir, step)
    theirs, their_losses, their_position = arrays(other, step)
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert (losses, position) == (their_losses, their_position)


@dataclasses.dataclass
class Counts:
    """What a loop did: kills, those of them in a save (a temporary folder was left), checkpoints compared, runs that came to their end."""

    kills: int = 0
    in_a_save: int = 0
    compared: int = 0
    finished: int = 0


def kill_loop(folder, parent, straight, *, kills, seed=0, seconds=float("inf"), finish=True) -> Counts:
    """Starts, kills and resumes runs until that many kills, or seconds, are over; then lets the last one come to its end.

    Raises:
      AssertionError: a checkpoint that does not load, or that is not the one of the unbroken run in ``straight``, to the bit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.jaxlora.train.kill_loop"])
    draw, counts, seen, until = random.Random(seed), Counts(), set(), time.monotonic() + seconds
    output = parent / "run-0"
    while True:
        last = counts.kills >= kills or time.monotonic() > until
        if last and not finish:
            return counts
        resumed = bool(checkpoint.find_all(output))
        ready, child = context.Pipe(duplex=False)
        process = context.Process(target=_live, args=(str(folder), str(output), child))
        process.start()
        child.close()
        ready.recv()
        if not last:
            _wait_for_new(output, draw.choice((0, 1, 1, 2, 3)), process)
        # A save of this model takes about a quarter of a second.
        process.join(None if last else draw.uniform(0, 0.5))
        killed = process.is_alive()
        process.kill()
        process.join()
        assert killed or process.exitcode == 0, f"a run in {output} ended with {process.exitcode}"
        counts.kills += killed
        counts.in_a_save += killed and any(output.glob("checkpoint-*.tmp-*"))
        for path in checkpoint.find_all(output):
            if path not in seen:
                assert_same_run(output, straight, int(path.name.removeprefix("checkpoint-")))
                seen.add(path)
                counts.compared += 1
        if not killed:
            assert f"checkpoint-{STEPS}" in {path.name for path in seen if path.parent == output}
            assert not (resumed and list(output.glob("*.tmp-*"))), "resuming sweeps away what a killed save left"
            counts.finished += 1
            output = parent / f"run-{counts.finished}"
            if last:
                return counts


def _wait_for_new(output: pathlib.Path, count: int, process: Any) -> None:
    """Until that many folders, temporary ones too, were begun in ``output``: moments are drawn from steps and saves alike."""
    before = set(os.listdir(output)) if output.is_dir() else set()
    begun = set()
    while len(begun) < count and process.is_alive():
        begun |= {name.partition(".tmp-")[0] for name in (os.listdir(output) if output.is_dir() else ()) if name not in before}
        time.sleep(0.005)


def _live(folder: str, output: str, ready: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    trainer = trainer_of(folder, output)
    ready.send(None)
    trainer.train(resume_from_checkpoint=bool(checkpoint.find_all(pathlib.Path(output))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxlora-kills-") as parent:
        place = pathlib.Path(parent)
        (place / "llama").mkdir()
        folder = write_folder(place / "llama", "llama")
        trainer_of(folder, place / "straight").train()
        counts = kill_loop(folder, place, place / "straight", kills=args.kills, seed=args.seed, seconds=60 * args.minutes)
    print(counts)


if __name__ == "__main__":
    main()
