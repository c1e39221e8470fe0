"""The training loop: batches in, steps, meters, a progress bar; saving, evaluation and previews come in as callbacks."""

import concurrent.futures
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

from jaxlora.data.batches import Batch, labelled_tokens, saw_images
from jaxlora.select import classify, expand
from jaxlora.train.meters import Throughput, peak_gib, shows_bars
from jaxlora.train.step import Step

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5


class NonFiniteError(RuntimeError):
    """Loss or gradient was not finite for several steps in a row; nothing of those steps was applied or saved."""


class Interrupted(RuntimeError):
    """A signal asked to stop; the state was saved first. ``signum`` says which."""

    def __init__(self, signum: int, step: int, checkpoint: Any):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; its checkpoint is complete: {checkpoint}")
        self.signum = signum


@dataclasses.dataclass(kw_only=True)
class LoopState:
    """What a step changes. ``step`` counts finished optimizer steps, ``losses`` are theirs; ``first_step_s`` includes compiling.

    ``skipped`` counts those that were not finite: the optimizer, and with it the learning rate, stands still in them.
    """

    trainable: Any
    opt_state: Any
    step: int = 0
    skipped: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    first_step_s: float = 0.0
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how often. ``save_steps``, ``eval_steps``: every so many steps and after the last, None: never.

    ``patience``: non-finite steps in a row that are endured. ``progress``: a bar or, where the output is no terminal, log entries as
    lines, at most one in five seconds but for the first and the last. ``unused`` says of a Linear that nothing uses what it computes.
    """

    total_steps: int
    steps_per_epoch: int | None = None
    logging_steps: int = 1
    save_steps: int | None = None
    eval_steps: int | None = None
    patience: int = 3
    progress: bool = True
    unused: Callable[[str], bool] = lambda path: False


@dataclasses.dataclass
class Control:
    """What follows a step, under the names that transformers' callbacks know; they may change it."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_log: bool = False
    should_evaluate: bool = False
    should_save: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Callbacks:
    """``rate(n)`` is the learning rate after n applied steps (None: unknown), ``epoch(step)`` for the log.

    ``save(state)`` returns where the checkpoint is, ``evaluate(state)`` metrics. ``notify(event, state, control, **more)`` is told of
    transformers' events, and may change the control.
    """

    rate: Callable[[int], float | None]
    epoch: Callable[[int], float]
    save: Callable[[LoopState], Any]
    evaluate: Callable[[LoopState], Mapping[str, float]] | None = None
    notify: Callable[..., None] | None = None


def run(step: Step, state: LoopState, frozen: Any, batches: Iterator[Batch], config: LoopConfig, callbacks: Callbacks) -> None:
    """Runs ``state`` up to ``config.total_steps``, or until a callback stops it, in place.

    The metrics of a step are read while the next one runs. After the first step the gradients of all adapters are checked: one that
    every labelled token bypasses is an error, not a curve.

    Raises:
      NonFiniteError: after ``patience`` non-finite steps in a row.
      Interrupted: SIGTERM or SIGINT, once the state is saved.
      ValueError: a batch without a single labelled token, or adapters that cannot learn.
    """
    with _signals() as caught, _Meters(state, config, callbacks) as meters:
        after = _After(state, config, callbacks, meters, caught)
        after.tell("on_train_begin")
        while state.step < config.total_steps and not after.control.should_training_stop:
            after.begin_step()
            batch = next(batches)
            if not labelled_tokens(batch):
                raise ValueError(f"step {state.step + 1} has no labelled token: every label is -100 (masked, or cut off)")
            state.trainable, state.opt_state, metrics = step(
                state.trainable, state.opt_state, frozen, jax.device_put(batch), jnp.int32(state.step)
            )
            meters.read()
            state.step += 1
            meters.expect(state.step, metrics, batch)
            after.end_step()
        meters.read()
        after.tell("on_train_end")


class _After:
    """What comes between steps: logging, evaluation, saving, stopping, and the callbacks' say in them."""

    def __init__(self, state: LoopState, config: LoopConfig, callbacks: Callbacks, meters: "_Meters", caught: list[int]):
        self.state, self.config, self.callbacks, self.meters, self.caught = state, config, callbacks, meters, caught
        self.control, self.saved_step, self.checkpoint = Control(), -1, None

    def tell(self, event: str, **more: Any) -> None:
        if self.callbacks.notify is not None:
            self.callbacks.notify(event, self.state, self.control, **more)

    def begin_step(self) -> None:
        self.control = Control()
        if self.config.steps_per_epoch and self.state.step % self.config.steps_per_epoch == 0:
            self.tell("on_epoch_begin")
        self.tell("on_step_begin")

    def end_step(self) -> None:
        number, config = self.state.step, self.config
        last = number == config.total_steps
        self.control.should_log |= last or number % config.logging_steps == 0
        self.control.should_evaluate |= bool(config.eval_steps and (last or number % config.eval_steps == 0))
        self.control.should_save |= bool(config.save_steps and (last or number % config.save_steps == 0))
        self.tell("on_step_end")
        self.act()
        if config.steps_per_epoch and (last or self.control.should_training_stop or number % config.steps_per_epoch == 0):
            self.tell("on_epoch_end")
            self.act()
        if self.caught:
            self.meters.read()
            self.save()
            raise Interrupted(self.caught[0], number, self.checkpoint)

    def act(self) -> None:
        """Does what the control asks for; a run that is stopped is saved, unless nothing ever is."""
        control, state = self.control, self.state
        control.should_evaluate &= self.callbacks.evaluate is not None
        if control.should_evaluate or control.should_save or (control.should_log and self.callbacks.notify is not None):
            self.meters.read()
        if control.should_log:
            control.should_log = False
            if self.meters.log():
                self.tell("on_log", logs=state.log_history[-1])
        if control.should_evaluate and self.callbacks.evaluate is not None:
            control.should_evaluate = False
            metrics = dict(self.callbacks.evaluate(state))
            state.log_history.append({**metrics, "step": state.step, "epoch": self.callbacks.epoch(state.step)})
            self.tell("on_log", logs=state.log_history[-1])
            self.tell("on_evaluate", metrics=metrics)
        if control.should_save or (control.should_training_stop and self.config.save_steps):
            control.should_save = False
            self.save()

    def save(self) -> None:
        """Once a step, whoever asks."""
        if self.saved_step != self.state.step:
            self.checkpoint, self.saved_step = self.callbacks.save(self.state), self.state.step
            self.tell("on_save")


def _finished(metrics: Any) -> tuple[Any, float]:
    """A step's metrics, and when it ended: dispatching the next step may block for as long as a step, so the loop cannot tell."""
    return jax.device_get(metrics), time.perf_counter()


class _Meters:
    """Reads the metrics of finished steps, for the bar and the log."""

    def __init__(self, state: LoopState, config: LoopConfig, callbacks: Callbacks):
        self.state, self.config, self.callbacks = state, config, callbacks
        self.pending: tuple[int, concurrent.futures.Future[tuple[Any, float]], Batch] | None = None
        self.waiter = concurrent.futures.ThreadPoolExecutor(1)
        self.throughput, self.bad, self.checked, self.window = Throughput(), 0, False, []
        self.started, self.due, self.last, self.tail = time.perf_counter(), False, {}, ""
        self.printed = -math.inf
        self.bar = _bar(config)
        self.task = self.bar.add_task("training", total=config.total_steps, completed=state.step, stats="compiling the step…")

    def __enter__(self) -> "_Meters":
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()
        self.waiter.shutdown(wait=False, cancel_futures=True)

    def expect(self, number: int, metrics: Any, batch: Batch) -> None:
        """Makes a dispatched step the pending one."""
        self.pending = (number, self.waiter.submit(_finished, metrics), batch)

    def read(self) -> None:
        """Takes the metrics of the pending step in, which waits for it."""
        if self.pending is None:
            return
        (number, finished, batch), self.pending = self.pending, None
        state = self.state
        metrics, at = finished.result()
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        rate = self.callbacks.rate(number - 1 - state.skipped)
        state.skipped += not metrics["finite"]
        self._check_finite(number, metrics, loss, grad_norm)
        if not self.checked and metrics["finite"]:
            check_gradients(metrics["norms"], saw_images=saw_images(batch), unused=self.config.unused)
            self.checked = True
            state.first_step_s = time.perf_counter() - self.started
        state.losses.append(loss)
        self.window.append(loss)
        self.throughput.add(int(np.asarray(batch.segment_lengths).sum()), at)
        self.last = {"grad_norm": grad_norm} | ({} if rate is None else {"learning_rate": rate})
        self.last |= {"epoch": self.callbacks.epoch(number), "step": number, "tokens": int(metrics["tokens"])}
        text = f"loss {loss:.4f}  " + ("" if rate is None else f"lr {rate:.2e}  ") + f"|g| {grad_norm:.3g}"
        if self.due:
            self.log()
        self.bar.update(self.task, completed=number, stats=text + self.tail)

    def log(self) -> bool:
        """An entry for the log: now, or as soon as the pending step is read. Whether it was now."""
        self.due = self.pending is not None
        if self.due or not self.window:
            return False
        tokens_per_s, peak = self.throughput.read(), peak_gib()
        entry: dict[str, Any] = {"loss": float(np.mean(self.window)), **self.last}
        entry |= {} if tokens_per_s is None else {"tokens_per_s": tokens_per_s}
        entry |= {} if peak is None else {"peak_gib": peak}
        self.state.log_history.append(entry)
        self.window = []
        self.tail = "".join([f"  {tokens_per_s:,.0f} tok/s" if tokens_per_s else "", f"  peak {peak:.2f} GiB" if peak else ""])
        if self.config.progress and self.bar.disable and self._line_is_due(entry["step"]):
            rate = f"  lr {entry['learning_rate']:.2e}" if "learning_rate" in entry else ""
            number = f"step {entry['step']}/{self.config.total_steps}"
            print(f"{number}  loss {entry['loss']:.4f}{rate}  |g| {entry['grad_norm']:.3g}{self.tail}", flush=True)
        return True

    def _line_is_due(self, step: int) -> bool:
        now = time.perf_counter()
        due = step == self.config.total_steps or now - self.printed > _SECONDS_BETWEEN_LINES
        self.printed = now if due else self.printed
        return due

    def _check_finite(self, number: int, metrics: Any, loss: float, grad_norm: float) -> None:
        self.bad = 0 if metrics["finite"] else self.bad + 1
        if not self.bad:
            return
        log.warning("step %d is not finite (loss %s, gradient norm %s): skipped, %d in a row", number, loss, grad_norm, self.bad)
        if self.bad >= self.config.patience:
            layers = [path for path, norms in metrics["norms"].items() if not np.isfinite(norms).all()]
            where = f"gradients that are not finite: {', '.join(layers[:5])}" if layers else "no single gradient leaf stands out"
            raise NonFiniteError(f"{self.bad} steps in a row were not finite, the last is {number} (loss {loss}); {where}")


def check_gradients(norms: Mapping[str, np.ndarray], *, saw_images: bool, unused: Callable[[str], bool] = lambda path: False) -> None:
    """Raises where adapters got no gradient at the first step: a tower that is switched on but that no token reaches.

    With B = 0 only dB is non-zero, so dB is what is asked for. Vision adapters are excused where the batch had no image, and those of
    Linears that are ``unused``, which cannot learn in any framework.

    Raises:
      ValueError: lists the towers and the first such layers.
    """
    dead = []
    for stacked, values in norms.items():
        for path, norm in zip(expand(stacked), np.atleast_1d(values), strict=True):
            tower, _ = classify(path)
            excused = unused(path) or (tower in ("vision", "connector") and not saw_images)
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
    return Progress(*columns, disable=not (config.progress and shows_bars()))


def mean_loss(losses: list[float]) -> float:
    """The mean of the finite losses of a run; NaN if there is none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return float(np.mean(finite)) if finite else math.nan
