"""transformers' TrainerCallbacks, told of this library's loop. Neither they nor their state need torch."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerState

from jaxlora.api.config import SFTConfig
from jaxlora.api.model import Model
from jaxlora.train import loop

log = logging.getLogger(__name__)

# A step is one compiled program, evaluation keeps no predictions: these never happen.
NEVER = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_prediction_step", "on_predict", "on_push_begin")
FLAGS = tuple(vars(loop.Control()))


class Callbacks:
    """A trainer's callbacks in order, and the state that they see (transformers' own class).

    The model has its parameters back while they are called: a preview is ``model.generate`` in ``on_evaluate`` or ``on_step_end``.

    Raises:
      TypeError: not a TrainerCallback, nor a class of them.
    """

    def __init__(self, callbacks: Iterable[Any], args: SFTConfig, model: Model, processing_class: Any):
        self.args, self.model, self.processing_class = args, model, processing_class
        self.state = TrainerState()
        self.callbacks: list[TrainerCallback] = []
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Any) -> None:
        """Appends a callback, or an instance of a class of them."""
        made = callback() if isinstance(callback, type) else callback
        if not isinstance(made, TrainerCallback):
            raise TypeError(f"a callback is a transformers.TrainerCallback, got {type(made).__name__}")
        unheard = [name for name in NEVER if getattr(type(made), name) is not getattr(TrainerCallback, name)]
        if unheard:
            log.warning("%s: %s never happen in jaxlora", type(made).__name__, ", ".join(unheard))
        self.callbacks.append(made)

    @property
    def wanted(self) -> bool:
        """Whether anyone listens to the run."""
        return bool(self.callbacks) or self.args.metric_for_best_model is not None

    @property
    def best(self) -> tuple[float | None, int | None]:
        """The best value of ``metric_for_best_model`` and its step; a checkpoint keeps them."""
        return self.state.best_metric, self.state.best_global_step

    @best.setter
    def best(self, found: Sequence[Any]) -> None:
        self.state.best_metric, self.state.best_global_step = found

    def begin(self, total_steps: int, run: loop.LoopState) -> None:
        """A new run: what was the best of another one is forgotten."""
        args = self.args
        self.state = TrainerState(max_steps=total_steps, logging_steps=args.logging_steps, save_steps=args.save_steps)
        self.state.eval_steps = args.eval_steps or args.logging_steps
        self.follow(run, 0.0)

    def follow(self, run: loop.LoopState, epoch: float) -> None:
        """Brings the state up to a step."""
        self.state.global_step, self.state.log_history, self.state.epoch = run.step, run.log_history, epoch

    def notify(self, event: str, control: loop.Control, **more: Any) -> None:
        """Calls every callback in order; the flags that one returns are those that the next one sees.

        Raises:
          NotImplementedError: a callback asks to end the epoch.
        """
        for callback in self.callbacks:
            method = getattr(callback, event)
            returned = method(self.args, self.state, control, model=self.model, processing_class=self.processing_class, **more)
            if returned is not None and returned is not control:
                for flag in FLAGS:
                    setattr(control, flag, getattr(returned, flag))
        if control.should_epoch_stop:
            raise NotImplementedError("should_epoch_stop: the rows of a step follow from its number; should_training_stop ends the run")
        if event == "on_evaluate":
            self._keep_best(more["metrics"])

    def _keep_best(self, metrics: Mapping[str, float]) -> None:
        name, state = self.args.metric_for_best_model, self.state
        if name is None:
            return
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key not in metrics:
            raise ValueError(f"metric_for_best_model={name!r}, but an evaluation gives {sorted(metrics)}")
        value, best = metrics[key], state.best_metric
        if best is None or (value > best if self.args.greater_is_better else value < best):
            state.best_metric, state.best_global_step = value, state.global_step
