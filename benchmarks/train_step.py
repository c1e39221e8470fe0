"""Times one training step of a real geometry: ``python -m benchmarks.train_step llama-3.1-8b --remat dots``.

Prints one RESULT line. Every token is a label, LoRA is on all seven projections (both towers of a vision-language model), the optimizer
step is included. As in training, the next step is dispatched before the last one is waited for; the time is the median between ends of
steps. One process a configuration: the peak is the process's.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.geometries import GEOMETRIES
from benchmarks.random_weights import random_model
from jaxlora.adapt import LoRAConfig, attach, partition, select_from
from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.select import by_flags
from jaxlora.train.optim import OptimConfig, optimizer
from jaxlora.train.remat import execution
from jaxlora.train.step import make_step

GB = 1e9
PATCHES = 4096  # one 896 x 896 image of 14-pixel patches


def batch_of(values, raw, rows, sequence):
    """Random tokens; a vision-language model has one image a row and is trained on the text after it."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, min(raw["vocab_size"], 128000), (rows, sequence))
    labels = ids.copy()
    inputs, patches = {"input_ids": ids, "labels": labels}, 0
    if values.vision is not None:
        image, patches = raw["image_token_id"], PATCHES * rows
        ids[:, 3], ids[:, 4:1028], ids[:, 1028] = raw["vision_start_token_id"], image, raw["vision_end_token_id"]
        labels[:, :1029] = -100
        side = int(PATCHES**0.5)
        pixels = rng.normal(size=(patches, values.vision.patch_elements)).astype(np.float32)
        inputs |= {"pixel_values": pixels, "image_grid_thw": np.array([[1, side, side]] * rows)}
    return make_batch([inputs], values, Shape(sequence, patches), rows=rows, images=rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=GEOMETRIES)
    parser.add_argument("--remat", default="True")
    parser.add_argument("--weights", default="int4", choices=("int4", "nf4", "bf16"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--commit", default="")
    parser.add_argument("--trace", type=pathlib.Path, help="also profile two steps into this folder")
    parser.add_argument("--hlo", type=pathlib.Path, help="also write the optimised program to this file")
    args = parser.parse_args()
    raw = GEOMETRIES[args.model] | ({"num_hidden_layers": args.layers} if args.layers else {})
    started = time.perf_counter()
    model, spec, _ = random_model(raw, args.weights, max_seq_length=args.sequence)
    attach(model, select_from(model, by_flags), LoRAConfig(r=args.rank, lora_alpha=args.rank))
    graphdef, trainable, frozen = partition(model)
    del model
    remat = {"True": True, "False": False}.get(args.remat, args.remat)
    optim = optimizer(OptimConfig(learning_rate=1e-4, total_steps=1000, lr_scheduler_type="constant"))
    step = make_step(graphdef, optim, execution(remat))
    state = jax.jit(optim.init)(trainable)
    batch = jax.device_put(batch_of(spec.values(raw), raw, args.rows, args.sequence))
    jax.block_until_ready((frozen, state))
    made = time.perf_counter()
    compiled = step.lower(trainable, state, frozen, batch, jnp.int32(0)).compile()
    compile_s = time.perf_counter() - made
    ends, pending = [], None
    for i in range(args.steps + 4):
        trainable, state, metrics = compiled(trainable, state, frozen, batch, jnp.int32(i))
        if pending is not None:
            loss = float(pending["loss"])
            ends.append(time.perf_counter())
        pending = metrics
    jax.block_until_ready(trainable)
    step_s = statistics.median(b - a for a, b in zip(ends[2:], ends[3:], strict=False))
    memory = compiled.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {"peak_bytes_in_use": 0}
    row = {
        "model": args.model, "weights": args.weights, "rank": args.rank, "remat": args.remat, "rows": args.rows,
        "sequence": args.sequence, "step_ms": round(1e3 * step_s, 1), "tok_s": round(args.rows * args.sequence / step_s),
        "peak_gb": round(stats["peak_bytes_in_use"] / GB, 2), "temp_gb": round(memory.temp_size_in_bytes / GB, 2),
        "host_temp_gb": round(memory.host_temp_size_in_bytes / GB, 2), "compile_s": round(compile_s, 1), "make_s": round(made - started, 1),
        "loss": round(loss, 4), "layers": raw["num_hidden_layers"],
        "device": jax.devices()[0].device_kind, "date": datetime.date.today().isoformat(), "commit": args.commit,
        "jax": importlib.metadata.version("jax"),
    }  # fmt: skip
    print("RESULT", json.dumps(row), flush=True)
    if args.hlo:
        args.hlo.write_text(compiled.as_text())
    if args.trace:
        with jax.profiler.trace(str(args.trace), create_perfetto_trace=True):
            for i in range(2):
                trainable, state, _ = jax.block_until_ready(compiled(trainable, state, frozen, batch, jnp.int32(i)))


if __name__ == "__main__":
    main()
