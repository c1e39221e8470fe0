"""Loads a real geometry to 4 bits and trains it through the public API; prints one RESULT line and appends it to a CSV.

    python benchmarks/spine.py FOLDER --remat True --csv benchmarks/results/spine.csv

One process a configuration, since the allocator's peak is the process's. A row is 2048 tokens, every token a label; a vision-language
model gets one 896 x 896 image a row (1,024 image tokens), trained on the text after it.
"""

import argparse
import csv
import datetime
import importlib.metadata
import json
import pathlib
import time

import jax
import numpy as np

from jaxlora import FastVisionModel, SFTConfig, SFTTrainer

GB = 1e9


class RandomRows:
    """A collator of random tokens: what it returns has Hugging Face's names."""

    def __init__(self, model, sequence: int, image: bool):
        self.sequence, self.image = sequence, image
        self.vocab = model.config.get_text_config().vocab_size
        self.rng = np.random.default_rng(0)
        self.pixels = self.rng.normal(size=(4096, 1176)).astype(np.float32) if image else None
        self.ids = model.config.image_token_id if image else None

    def measure(self, row, *, where=""):
        return (self.sequence, 4096, 1) if self.image else (self.sequence, 0, 0)

    def __call__(self, rows):
        ids = self.rng.integers(0, min(self.vocab, 128000), (len(rows), self.sequence))
        labels = ids.copy()
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}
        if self.image:
            ids[ids >= 151640] = 0
            ids[:, 3], ids[:, 4:1028], ids[:, 1028] = self.ids - 3, self.ids, self.ids - 2
            labels[:, :1029] = -100
            inputs |= {"pixel_values": np.concatenate([self.pixels] * len(rows)), "image_grid_thw": np.array([[1, 64, 64]] * len(rows))}
        return inputs


def stats() -> dict:
    return jax.devices()[0].memory_stats() or {"bytes_in_use": 0, "peak_bytes_in_use": 0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--remat", default="True")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--csv")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    started = time.perf_counter()
    model, _ = FastVisionModel.from_pretrained(args.folder, load_in_4bit=True, max_seq_length=args.sequence)
    load_s, loaded, load_peak = time.perf_counter() - started, stats()["bytes_in_use"], stats()["peak_bytes_in_use"]
    image = "vision_config" in model.loaded.raw_config
    remat = {"True": True, "False": False}.get(args.remat, args.remat)
    model = FastVisionModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing=remat)
    config = SFTConfig(
        per_device_train_batch_size=args.rows, gradient_accumulation_steps=1, max_steps=args.steps, learning_rate=1e-4, save_strategy="no",
        output_dir="/tmp/spine",
    )  # fmt: skip
    trainer = SFTTrainer(model, config, list(range(args.rows * args.steps)), data_collator=RandomRows(model, args.sequence, image))
    output = trainer.train()
    history = trainer.state.log_history
    rates = [entry["tokens_per_s"] for entry in history[4:] if "tokens_per_s" in entry]
    tokens_per_s = rates[-1]
    row = {
        "model": pathlib.Path(args.folder).name, "bits": 4, "remat": args.remat, "rows": args.rows, "sequence": args.sequence,
        "load_s": round(load_s, 1), "loaded_gb": round(loaded / GB, 2), "load_peak_gb": round(load_peak / GB, 2),
        "first_step_s": round(output.metrics["first_step_s"], 1), "step_s": round(args.rows * args.sequence / tokens_per_s, 4),
        "tok_s": round(tokens_per_s), "peak_gb": round(stats()["peak_bytes_in_use"] / GB, 2), "loss": round(history[-1]["loss"], 4),
        "device": jax.devices()[0].device_kind, "date": datetime.date.today().isoformat(), "commit": args.commit,
        "jax": importlib.metadata.version("jax"),
    }  # fmt: skip
    print("RESULT", json.dumps(row), flush=True)
    if args.csv:
        path = pathlib.Path(args.csv)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
