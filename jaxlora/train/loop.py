"""The training loop: batches in, steps, meters, a progress bar; saving, evaluation and previews come in as callbacks."""

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from jaxlora.data.batches import Batch, labelled_tokens
from jaxlora.select import classify, expand
from jaxlora.train.meters import Throughput, peak_gib
from jaxlora.train.step import Step

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Loss or gradient was not finite for several steps in a row; nothing of those steps was applied or saved."""


class Interrupted(RuntimeError):
    """A signal asked to stop; the state was saved first. ``signum`` says which."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; the checkpoint of that step is complete")
        self.signum = signum


@dataclasses.dataclass(kw_only=True)
class LoopState:
    """What a step changes. ``step`` counts finished optimizer steps, ``losses`` are theirs; ``first_step_s`` includes compiling."""

    trainable: Any
    opt_state: Any
    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    first_step_s: float = 0.0
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how often. ``save_steps`` and ``eval_steps`` None: never; ``patience``: non-finite steps in a row that are endured."""

    total_steps: int
    logging_steps: int = 1
    save_steps: int | None = None
    eval_steps: int | None = None
    patience: int = 3
    progress: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Callbacks:
    """``rate(step)`` is the learning rate; ``save(state)``; ``evaluate(state)`` returns metrics; ``epoch(step)`` for the log."""

    rate: Callable[[int], float]
    epoch: Callable[[int], float]
    save: Callable[[LoopState], None]
    evaluate: Callable[[LoopState], Mapping[str, float]] | None = None


def run(step: Step, state: LoopState, frozen: Any, batches: Iterator[Batch], config: LoopConfig, callbacks: Callbacks) -> None:
    """Runs ``state`` up to ``config.total_steps``, in place.

    The metrics of a step are read while the next one runs. After the first step the gradients of all adapters are checked: one that
    every labelled token bypasses is an error, not a curve.

    Raises:
      NonFiniteError: after ``patience`` non-finite steps in a row.
      Interrupted: SIGTERM or SIGINT, once the state is saved.
      ValueError: a batch without a single labelled token, or adapters that cannot learn.
    """
    meters = _Meters(config, callbacks)
    with _signals() as caught, _bar(config) as bar:
        task = bar.add_task("training", total=config.total_steps, completed=state.step, stats="compiling the step…")
        pending: tuple[int, Any, Batch] | None = None
        while state.step < config.total_steps:
            batch = next(batches)
            if not labelled_tokens(batch):
                raise ValueError(f"step {state.step + 1} has no labelled token: every label is -100 (masked, or cut off)")
            state.trainable, state.opt_state, metrics = step(
                state.trainable, state.opt_state, frozen, jax.device_put(batch), jnp.int32(state.step)
            )
            state.step += 1
            if pending is not None:
                bar.update(task, completed=pending[0], stats=meters.finish(state, *pending))
            pending = (state.step, metrics, batch)
            due_save = config.save_steps and state.step % config.save_steps == 0
            due_eval = config.eval_steps and callbacks.evaluate and state.step % config.eval_steps == 0
            if due_save or due_eval or caught or state.step == config.total_steps:
                bar.update(task, completed=state.step, stats=meters.finish(state, *pending))
                pending = None
            if due_eval and callbacks.evaluate:
                state.log_history.append({**callbacks.evaluate(state), "step": state.step, "epoch": callbacks.epoch(state.step)})
            if due_save or caught:
                callbacks.save(state)
            if caught:
                raise Interrupted(caught[0], state.step)


class _Meters:
    def __init__(self, config: LoopConfig, callbacks: Callbacks):
        self.config, self.callbacks = config, callbacks
        self.throughput, self.bad, self.checked, self.window = Throughput(), 0, False, []
        self.started, self.tail = time.perf_counter(), ""

    def finish(self, state: LoopState, number: int, metrics: Any, batch: Batch) -> str:
        """Reads a finished step's metrics; returns the text for the bar."""
        metrics = jax.device_get(metrics)
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        self._check_finite(number, metrics, loss, grad_norm)
        if not self.checked and metrics["finite"]:
            check_gradients(metrics["norms"], saw_images=batch.patches is not None and bool((batch.vision_index >= 0).any()))
            self.checked = True
            state.first_step_s = time.perf_counter() - self.started
        state.losses.append(loss)
        self.window.append(loss)
        self.throughput.add(int(np.asarray(batch.segment_lengths).sum()))
        rate = self.callbacks.rate(number - 1)
        text = f"loss {loss:.4f}  lr {rate:.2e}  |g| {grad_norm:.3g}"
        if number % self.config.logging_steps == 0 or number == self.config.total_steps:
            tokens_per_s, peak = self.throughput.read(), peak_gib()
            entry = {"loss": float(np.mean(self.window)), "grad_norm": grad_norm, "learning_rate": rate}
            entry |= {"epoch": self.callbacks.epoch(number), "step": number, "tokens": int(metrics["tokens"])}
            entry |= {} if tokens_per_s is None else {"tokens_per_s": tokens_per_s}
            entry |= {} if peak is None else {"peak_gib": peak}
            state.log_history.append(entry)
            self.window = []
            self.tail = "".join([f"  {tokens_per_s:,.0f} tok/s" if tokens_per_s else "", f"  peak {peak:.2f} GiB" if peak else ""])
        return text + self.tail

    def _check_finite(self, number: int, metrics: Any, loss: float, grad_norm: float) -> None:
        self.bad = 0 if metrics["finite"] else self.bad + 1
        if not self.bad:
            return
        log.warning("step %d is not finite (loss %s, gradient norm %s): skipped, %d in a row", number, loss, grad_norm, self.bad)
        if self.bad >= self.config.patience:
            layers = [path for path, norms in metrics["norms"].items() if not np.isfinite(norms).all()]
            where = f"gradients that are not finite: {', '.join(layers[:5])}" if layers else "no single gradient leaf stands out"
            raise NonFiniteError(f"{self.bad} steps in a row were not finite, the last is {number} (loss {loss}); {where}")


def check_gradients(norms: Mapping[str, np.ndarray], *, saw_images: bool) -> None:
    """Raises where adapters got no gradient at the first step: a tower that is switched on but that no token reaches.

    With B = 0 only dB is non-zero, so dB is what is asked for. Vision adapters are excused where the batch had no image.

    Raises:
      ValueError: lists the towers and the first such layers.
    """
    dead = []
    for stacked, values in norms.items():
        for path, norm in zip(expand(stacked), np.atleast_1d(values), strict=True):
            tower, _ = classify(path)
            excused = tower in ("vision", "connector") and not saw_images
            if path.endswith("lora_B") and not norm and not excused:
                dead.append(f"{path} ({tower})")
    if dead:
        shown = ", ".join(dead[:4])
        raise ValueError(f"{len(dead)} adapters got a gradient of exactly zero at the first step: {shown}; they would never learn")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT for the loop to act on between steps; a second SIGINT aborts at once."""
    caught: list[int] = []

    def handler(signum: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)
        log.warning("%s: saving after this step, then stopping", signal.Signals(signum).name)

    try:
        previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # only the main thread may set handlers
        previous = {}
    try:
        yield caught
    finally:
        for s, old in previous.items():
            signal.signal(s, old)


class _Stats(ProgressColumn):
    """The text of the meters, which gives way first where the terminal is narrow."""

    def get_table_column(self) -> Column:
        """A column that may shrink, as others may not."""
        return Column(no_wrap=False)

    def render(self, task: Task) -> Text:
        """On one line, with an ellipsis where it is cut."""
        return Text(task.fields["stats"], no_wrap=True, overflow="ellipsis")


def _bar(config: LoopConfig) -> Progress:
    columns = ("{task.description}", BarColumn(bar_width=12), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), _Stats())
    return Progress(*columns, disable=not config.progress)


def mean_loss(losses: list[float]) -> float:
    """The mean of the finite losses of a run; NaN if there is none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return float(np.mean(finite)) if finite else math.nan
