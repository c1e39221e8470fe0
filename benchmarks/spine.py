"""Loads a real geometry to 4 bits and trains it through the public API: ``python -m benchmarks.spine FOLDER --remat True``.

FOLDER is one of ``benchmarks.make_checkpoint``. Prints one RESULT line. One process a configuration, since the allocator's peak is the
process's. The rows are those of ``benchmarks.workload``: every text token is a label, and a model that sees gets an image a row.
"""

import argparse
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks import results, workload
from jaxlora import FastVisionModel, SFTConfig, SFTTrainer

GB = 1e9
# The trainer's rate is that of its last 20 steps; in the first ones programs are compiled and recorded.
STEPS = 26


class WorkloadRows:
    """A collator of the one batch of all benchmarks."""

    def __init__(self, config: Mapping[str, Any], rows: int, sequence: int):
        self.sequence, self.image = sequence, workload.make_image(config, rows)
        self.inputs = workload.make_inputs(config, rows, sequence)

    def measure(self, row: Any, *, where: str = "") -> tuple[int, int, int]:
        return (self.sequence, 0, 0) if self.image is None else (self.sequence, self.image.patches, 1)

    def __call__(self, rows: Sequence[Any]) -> workload.Inputs:
        return self.inputs


def stats() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {"bytes_in_use": 0, "peak_bytes_in_use": 0}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Loads and trains; the RESULT row."""
    started = time.perf_counter()
    model, _ = FastVisionModel.from_pretrained(args.folder, load_in_4bit=True, max_seq_length=args.sequence)
    load_s, loaded, load_peak = time.perf_counter() - started, stats()["bytes_in_use"], stats()["peak_bytes_in_use"]
    remat = {"True": True, "False": False}.get(args.remat, args.remat)
    collator = WorkloadRows(model.loaded.raw_config, args.rows, args.sequence)
    model = FastVisionModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing=remat)
    config = SFTConfig(
        per_device_train_batch_size=args.rows, gradient_accumulation_steps=1, max_steps=args.steps, learning_rate=1e-4, save_strategy="no",
        output_dir=args.output,
    )  # fmt: skip
    trainer = SFTTrainer(model, config, list(range(args.rows * args.steps)), data_collator=collator)
    output = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(map(math.isfinite, losses)):
        raise SystemExit(f"the loss is not finite: {losses}; no speed is printed")
    rates = [entry["tokens_per_s"] for entry in trainer.state.log_history if "tokens_per_s" in entry]
    return {
        "model": pathlib.Path(args.folder).name, "bits": 4, "remat": args.remat, "rows": args.rows, "sequence": args.sequence,
        "load_s": round(load_s, 1), "loaded_gb": round(loaded / GB, 2), "load_peak_gb": round(load_peak / GB, 2),
        "first_step_s": round(output.metrics["first_step_s"], 1), "step_s": round(args.rows * args.sequence / rates[-1], 4),
        "tok_s": round(rates[-1]), "peak_gb": round(stats()["peak_bytes_in_use"] / GB, 2), "loss": round(losses[-1], 4),
        **results.provenance(jax.devices()[0].device_kind, ("jax",), args.commit), "losses": [round(loss, 4) for loss in losses],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--remat", default="True")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", default="/tmp/spine", help="the trainer's output_dir")
    parser.add_argument("--csv", type=pathlib.Path)
    parser.add_argument("--commit", default="", help="what was measured, where git cannot say")
    row = run(args := parser.parse_args())
    results.print_result(row)
    if args.csv:
        results.append(args.csv, row)


if __name__ == "__main__":
    main()
