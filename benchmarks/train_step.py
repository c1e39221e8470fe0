"""Times one training step of a real geometry: ``python -m benchmarks.train_step llama-3.1-8b --remat dots``.

Prints one RESULT line. Every text token is a label, LoRA is on all projections (both towers of a vision-language model), the optimizer
step is included, and every step is waited for before the next one starts, as in the rivals' scripts; ``ahead_ms`` is a step that is
dispatched while the one before runs, as the trainer does. One process a configuration: the peak is the process's. ``--abstract`` only
lowers the step, without weights, on any machine.
"""

import argparse
import math
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import results, workload
from benchmarks.geometries import GEOMETRIES, text_layers, with_layers
from benchmarks.random_weights import random_model
from jaxlora.adapt import LoRAConfig, attach, partition, select_from
from jaxlora.data.batches import Batch, make_batch
from jaxlora.data.inputs import ModelValues
from jaxlora.data.ladder import Shape
from jaxlora.load import multiply_in_float8
from jaxlora.models import registry
from jaxlora.nn.stack import layers_alike
from jaxlora.select import by_flags
from jaxlora.train.auto import needed_gib
from jaxlora.train.meters import GIB
from jaxlora.train.optim import OptimConfig, optimizer
from jaxlora.train.remat import execution
from jaxlora.train.step import make_step, merge_trees

GB = 1e9
# As in the rivals' scripts: a constant rate, no decay, no clipping.
OPTIMIZER = OptimConfig(learning_rate=1e-4, lr_scheduler_type="constant", max_grad_norm=0.0)


def batch_of(config: Mapping[str, Any], values: ModelValues, rows: int, sequence: int) -> Batch:
    """The workload of every benchmark, laid out for a step."""
    image = workload.make_image(config, rows)
    shape = Shape(sequence) if image is None else Shape(sequence, rows * image.patches, image.patches)
    return make_batch([workload.make_inputs(config, rows, sequence)], values, shape, rows=rows, images=rows)


def make_trees(config: Mapping[str, Any], args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(graphdef, trainable, frozen) with random weights and fresh adapters."""
    model, _, _ = random_model(config, args.weights, max_seq_length=args.sequence)
    if args.compute == "float8":
        multiply_in_float8(model)
    attach(model, select_from(model, by_flags), LoRAConfig(r=args.rank, lora_alpha=args.rank))
    return partition(model)


def abstract_trees(config: Mapping[str, Any], args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The same with shapes instead of arrays: nothing is computed."""
    graphdefs = []

    def trees() -> tuple[Any, Any]:
        graphdef, trainable, frozen = make_trees(config, args)
        graphdefs.append(graphdef)
        return trainable, frozen

    trainable, frozen = jax.eval_shape(trees)
    return graphdefs[0], trainable, frozen


def reserve(trees: Any) -> None:
    """Has the allocator take one region for all arrays of ``trees``.

    Its regions are powers of two; an array that nearly fills what is left of one is given all of it, and counts as that much larger.
    """
    jnp.zeros(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(trees)), jnp.uint8).block_until_ready().delete()


def step_of(parts: tuple[Any, Any, Any], args: argparse.Namespace) -> tuple[jax.stages.Wrapped, optax.GradientTransformation]:
    """The jitted step of (graphdef, trainable, frozen), and its optimizer."""
    graphdef, *trees = parts
    remat = {"True": True, "False": False}.get(args.remat, args.remat)
    optim = optimizer(OPTIMIZER)
    options = {name: int(value) if value.isdigit() else value for name, value in (pair.split("=", 1) for pair in args.execution)}
    alike = layers_alike(nnx.merge(graphdef, merge_trees(*trees)))
    return make_step(graphdef, optim, execution(remat, **options), alike=alike), optim


def lower_abstract(
    config: Mapping[str, Any], args: argparse.Namespace, placement: jax.sharding.Sharding | None = None
) -> tuple[jax.stages.Lowered, float, float]:
    """The step of a model that is not there, lowered (for the device of ``placement``); with the seconds of tracing and of lowering."""
    graphdef, trainable, frozen = abstract_trees(config, args)
    step, optim = step_of((graphdef, trainable, frozen), args)
    state = jax.eval_shape(optim.init, trainable)
    batch = batch_of(config, registry.get(config["model_type"]).values(config), args.rows, args.sequence)
    given = (trainable, state, frozen, batch, jax.ShapeDtypeStruct((), jnp.int32))
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement), given)
    started = time.perf_counter()
    traced = step.trace(*given)
    trace_s = time.perf_counter() - started
    lowered = traced.lower(lowering_platforms=None if placement is None else ("cuda",))
    return lowered, trace_s, time.perf_counter() - started - trace_s


def timed_steps(compiled: Any, trees: Sequence[Any], count: int) -> tuple[tuple[Any, Any], list[float], list[float]]:
    """((trainable, state), seconds, losses) of ``count`` steps."""
    trainable, state, frozen, batch = trees
    seconds, losses = [], []
    # On the device beforehand, as the batch is.
    numbers = jax.block_until_ready([jnp.int32(i) for i in range(count)])
    for number in numbers:
        started = time.perf_counter()
        trainable, state, metrics = jax.block_until_ready(compiled(trainable, state, frozen, batch, number))
        seconds.append(time.perf_counter() - started)
        losses.append(round(float(metrics["loss"]), 4))
        # What a step returns is then where it was before: XLA records again whatever writes to another place.
        del metrics
    return (trainable, state), seconds, losses


def steps_ahead(compiled: Any, trees: Sequence[Any], count: int) -> tuple[tuple[Any, Any], float]:
    """((trainable, state), seconds a step) of ``count`` steps, each dispatched while the one before runs."""
    trainable, state, frozen, batch = trees
    numbers = jax.block_until_ready([jnp.int32(i) for i in range(count)])
    started, before = time.perf_counter(), None
    for number in numbers:
        trainable, state, metrics = compiled(trainable, state, frozen, batch, number)
        jax.block_until_ready(before)
        before = metrics
    jax.block_until_ready((trainable, state, before))
    return (trainable, state), (time.perf_counter() - started) / count


def run(config: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Makes the model, compiles and times the step; the RESULT row."""
    started = time.perf_counter()
    reserve(abstract_trees(config, args)[1:])
    graphdef, trainable, frozen = make_trees(config, args)
    step, optim = step_of((graphdef, trainable, frozen), args)
    state = jax.jit(optim.init)(trainable)
    batch = jax.device_put(batch_of(config, registry.get(config["model_type"]).values(config), args.rows, args.sequence))
    jax.block_until_ready((trainable, frozen, state))
    made = time.perf_counter()
    compiled = step.lower(trainable, state, frozen, batch, jnp.int32(0)).compile()
    compile_s = time.perf_counter() - made
    resident = (jax.devices()[0].memory_stats() or {"bytes_in_use": 0})["bytes_in_use"]
    (trainable, state), seconds, losses = timed_steps(compiled, (trainable, state, frozen, batch), args.warmups + args.steps)
    if not all(map(math.isfinite, losses)):
        raise SystemExit(f"the loss is not finite: {losses}; no speed is printed")
    step_s = statistics.median(seconds[args.warmups :])
    (trainable, state), ahead_s = steps_ahead(compiled, (trainable, state, frozen, batch), args.steps)
    memory, stats = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {"peak_bytes_in_use": 0}
    if args.hlo:
        args.hlo.write_text(compiled.as_text())
    if args.trace:
        with jax.profiler.trace(str(args.trace), create_perfetto_trace=True):
            timed_steps(compiled, (trainable, state, frozen, batch), 2)
    return {
        **settings(config, args), "step_ms": round(1e3 * step_s, 1), "tok_s": round(args.rows * args.sequence / step_s),
        "peak_gb": round(stats["peak_bytes_in_use"] / GB, 2), "temp_gb": round(memory.temp_size_in_bytes / GB, 2),
        "host_temp_gb": round(memory.host_temp_size_in_bytes / GB, 2), "compile_s": round(compile_s, 1),
        "make_s": round(made - started, 1), "loss": losses[-1], "needed_gb": round(needed_gib(compiled) * GIB / GB, 2),
        "resident_gb": round(resident / GB, 3), "arguments_gb": round(memory.argument_size_in_bytes / GB, 3),
        "first_step_s": round(compile_s + seconds[0], 1), "losses": losses, "ahead_ms": round(1e3 * ahead_s, 1),
    }  # fmt: skip


def settings(config: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What was run, and where."""
    row = {name: vars(args)[name] for name in ("model", "weights", "compute", "rank", "remat", "rows", "sequence")}
    where = results.provenance(jax.devices()[0].device_kind, ("jax",), args.commit)
    return {**row, "layers": text_layers(config), "execution": args.execution, **where}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("model", choices=GEOMETRIES)
    made.add_argument("--remat", default="True", choices=("False", "True", "unsloth", "attention", "dots"))
    made.add_argument("--weights", default="int4", choices=("int4", "nf4", "bf16"))
    made.add_argument("--compute", default="", choices=("", "float8"), help="what the frozen base multiplies in; the activations' without")
    made.add_argument("--execution", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of Execution, such as attention=xla")
    made.add_argument("--rows", type=int, default=4)
    made.add_argument("--sequence", type=int, default=2048)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--warmups", type=int, default=3)
    made.add_argument("--steps", type=int, default=8)
    made.add_argument("--layers", type=int, help="another number of text layers than the model has")
    made.add_argument("--abstract", action="store_true", help="only lower the step: seconds to trace it, size of the program")
    made.add_argument("--cache", help="folder of the compilation cache; without it nothing is cached")
    made.add_argument("--csv", type=pathlib.Path, help="append the row to this file")
    made.add_argument("--commit", default="", help="what was measured, where git cannot say")
    made.add_argument("--trace", type=pathlib.Path, help="also profile two steps into this folder")
    made.add_argument("--hlo", type=pathlib.Path, help="also write the optimised program to this file")
    return made


def main() -> None:
    args = parser().parse_args()
    config = with_layers(GEOMETRIES[args.model], args.layers)
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
    if args.abstract:
        lowered, trace_s, lower_s = lower_abstract(config, args)
        size = len(lowered.as_text())
        row = {**settings(config, args), "trace_s": round(trace_s, 2), "lower_s": round(lower_s, 2), "program_kb": round(size / 1e3, 1)}
    else:
        row = run(config, args)
    results.print_result(row)
    if args.csv:
        results.append(args.csv, row)


if __name__ == "__main__":
    main()
