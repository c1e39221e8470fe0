"""SFTTrainer: a model, rows and arguments to a run of the loop, with transformers' names."""

import dataclasses
import functools
import inspect
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from transformers import TrainerState

from jaxlora.api import folders
from jaxlora.api.callbacks import Callbacks
from jaxlora.api.config import SFTConfig
from jaxlora.api.dataset import Batches, CollatedSource, Source, TextSource, encode_rows
from jaxlora.api.model import Model, refuse_unknown
from jaxlora.data.batches import Batch, labelled_tokens
from jaxlora.data.chat import ChatOptions
from jaxlora.errors import raise_all
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import layers_alike
from jaxlora.train import auto, checkpoint, loop
from jaxlora.train.loss import loss_sum
from jaxlora.train.optim import clipped, optimizer, schedule
from jaxlora.train.out_of_memory import explained
from jaxlora.train.remat import execution
from jaxlora.train.step import make_step

log = logging.getLogger(__name__)

_HOLDER = "a running trainer"
IGNORED = ("dataset_num_proc",)
_NO_LOGITS = "an evaluation keeps no logits, only eval_loss; generate and score in a callback's on_evaluate, which is given the model"
# What is refused, and what to do instead.
INSTEAD = {
    "compute_metrics": _NO_LOGITS,
    "preprocess_logits_for_metrics": _NO_LOGITS,
    "peft_config": "call get_peft_model with its values before making the trainer",
    "model_init": "pass the model",
}
# Settings that may differ between a checkpoint and the run that resumes it.
FREE_TO_DIFFER = (
    "output_dir logging_steps save_strategy save_steps save_total_limit eval_strategy eval_steps metric_for_best_model greater_is_better"
).split()


@dataclasses.dataclass(frozen=True)
class TrainOutput:
    """What ``train`` returns: the last step, the mean loss of this run's steps, and figures of it."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class SFTTrainer:
    """Supervised fine-tuning of a model from ``get_peft_model`` (or a full fine-tuning one).

    Text rows (messages, conversations, prompt/completion, instruction/output, a text column) are tokenised at once; with a
    ``data_collator`` that has ``measure`` (UnslothVisionDataCollator), rows stay as they are until their step.

    ``callbacks`` are transformers' TrainerCallbacks. ``optimizers`` is (an optax transformation, the schedule in it or None): it takes
    the place of AdamW after clipping to ``max_grad_norm``, and the schedule is for the log alone.

    Raises:
      ValueError: an empty dataset; no labelled token; rows that cannot be read (all are listed).
      NotImplementedError: ``compute_metrics`` and others that have another way here; says which.
      TypeError: an argument that nobody knows, a callback or an optimizer that is none.
    """

    def __init__(
        self,
        model: Model,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        tokenizer: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        packing: bool | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **arguments: Any,
    ):
        refused = [f"{name}: {INSTEAD[name]}" for name in INSTEAD if arguments.pop(name, None) is not None]
        if refused:
            raise NotImplementedError(f"SFTTrainer does not take {'; '.join(refused)}")
        refuse_unknown("SFTTrainer", arguments, IGNORED, inspect.signature(SFTTrainer).parameters)
        self.model, self.args = model, args or SFTConfig()
        self.processing_class = processing_class if processing_class is not None else tokenizer
        self._formatting, self._collator = formatting_func, data_collator
        self._packing = self.args.packing if packing is None else packing
        self._text_field = dataset_text_field or self.args.dataset_text_field
        self._max_length = max_seq_length or self.args.max_length or self.args.max_seq_length or model.max_seq_length
        if not jax.tree.leaves(dict(model.trainable)):
            raise ValueError("nothing is trained: call get_peft_model first, or load with full_finetuning=True")
        if train_dataset is None:
            raise ValueError("train_dataset is missing")
        self.train_source = self._source(train_dataset)
        self.eval_source = None if eval_dataset is None else self._source(eval_dataset)
        self._optimizers = _checked_optimizers(*optimizers, self.args)
        self._events = Callbacks(callbacks or (), self.args, model, self.processing_class)
        self._events.notify("on_init_end", loop.Control())

    @property
    def state(self) -> TrainerState:
        """transformers' record of the run: ``global_step``, ``epoch``, ``log_history`` with one dict a logged step, the best metric."""
        return self._events.state

    def add_callback(self, callback: Any) -> None:
        """Adds a TrainerCallback, or an instance of a class of them."""
        self._events.add(callback)

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Runs to the end; ``resume_from_checkpoint`` True continues from the newest checkpoint of ``output_dir``, exactly.

        Raises:
          NonFiniteError, Interrupted: as the loop; the checkpoints written so far are complete.
          OutOfMemoryError: a step does not fit; the text says what to change.
          ValueError: there is nothing to resume, or it was another run (the differences are listed).
        """
        args, model = self.args, self.model
        batches = self._batches(
            self.train_source, args.per_device_train_batch_size, args.gradient_accumulation_steps, shuffle=args.shuffle_dataset
        )
        total = args.total_steps(len(self.train_source.lengths))
        tx, rate = self._optimizer(total)
        dropout = model.lora is not None and model.lora.lora_dropout > 0
        key = jax.random.key(args.seed) if dropout else None
        options = {"dropout_key": key, "deterministic": args.full_determinism, "alike": layers_alike(model.module())}
        self._banner(batches, total)
        make = functools.partial(make_step, model.graphdef, tx, **options)
        policy = self._policy(make, tx, batches)
        step = make(execution(policy))
        trainable = model.lend(_HOLDER)
        state = loop.LoopState(trainable=trainable, opt_state=tx.init(dict(trainable)))
        self._events.begin(total, state)

        def taking(trainable: Any, *rest: Any) -> Any:
            # What was given back for a save, an evaluation or a callback is taken again: the step reuses its buffers.
            if model.lent_to is None:
                model.lend(_HOLDER)
            return step(trainable, *rest)

        try:
            self._resume(state, resume_from_checkpoint)
            first = state.step
            if first >= total:
                print(f"jaxlora: the checkpoint is of step {first} and the run has {total}: nothing is left to train", flush=True)
            rows = batches.starting(state.step, total)
            largest = f"{batches.rows} x {batches.shapes[-1].tokens} tokens"
            with explained(f"micro-batches of up to {largest} under use_gradient_checkpointing={policy!r}"):
                loop.run(taking, state, model.frozen, rows, self._loop_config(total, batches), self._callbacks(batches, rate))
        finally:
            model.give_back(state.trainable)
            self._events.follow(state, batches.epoch(state.step))
        losses = state.losses
        metrics = {"train_loss": loop.mean_loss(losses), "train_steps": float(state.step - first), "first_step_s": state.first_step_s}
        return TrainOutput(state.step, loop.mean_loss(losses), metrics)

    def evaluate(self) -> dict[str, float]:
        """Mean token loss on the evaluation rows: the same masked loss as in training, without dropout; no logits are kept.

        Raises:
          ValueError: there is no eval_dataset.
        """
        if self.eval_source is None:
            raise ValueError("there is no eval_dataset to evaluate on")
        batches = self._batches(self.eval_source, self.args.per_device_eval_batch_size, 1, shuffle=False)
        total, count = 0.0, 0
        state = self.model.state
        for batch in batches.starting(0, batches.steps_per_epoch):
            total += float(_eval_loss(self.model.graphdef, state, jax.tree.map(lambda a: jnp.asarray(a[0]), batch)))
            count += labelled_tokens(batch)
        if not count:
            raise ValueError("the evaluation rows have no labelled token")
        return {"eval_loss": total / count}

    def save_model(self, output_dir: str | None = None) -> None:
        """Saves the adapter (or the trained model) and the tokenizer."""
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder)
        if self.processing_class is not None:
            folders.save_processor(self.processing_class, folder)

    def _source(self, rows: Any) -> Source:
        if not len(rows):
            raise ValueError("the dataset is empty")
        if self._collator is not None:
            if self._packing:
                raise NotImplementedError("packing=True with a data_collator: rows with images are not packed; leave packing off")
            return CollatedSource(rows, self._collator)
        if self.processing_class is None:
            raise ValueError("text rows need a tokenizer: pass tokenizer= (or processing_class=)")
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        options = ChatOptions(responses_only=self.args.assistant_only_loss or self.args.completion_only_loss is True)
        encoded = encode_rows(
            rows, tokenizer, options, max_length=self._max_length, text_field=self._text_field, formatting=self._formatting
        )
        return TextSource(encoded, tokenizer, pack_to=self._max_length if self._packing else None)

    def _batches(self, source: Source, rows: int, accumulate: int, *, shuffle: bool) -> Batches:
        values = self.model.loaded.spec.values(self.model.loaded.raw_config)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Batches(
            source, values, rows=rows, accumulate=accumulate, seed=seed, shuffle=shuffle, drop_last=self.args.dataloader_drop_last
        )

    def _policy(self, make: Callable[[Execution], jax.stages.Wrapped], tx: optax.GradientTransformation, batches: Batches) -> bool | str:
        """The model's gradient checkpointing; "auto" is decided by the step of the largest shape."""
        policy, model = self.model.use_gradient_checkpointing, self.model
        if policy != "auto":
            return policy
        trainable = dict(model.trainable)
        arguments = (trainable, jax.eval_shape(tx.init, trainable), model.frozen, batches.largest(), jnp.int32(0))
        limit_gib = self.args.max_memory_gib or auto.memory_gib()
        choice = auto.choose(lambda p: make(execution(p)).lower(*arguments), limit_gib, cache=folders.cache() / "remat.json")
        print(choice.describe(), flush=True)
        return choice.policy

    def _optimizer(self, total: int) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
        config, (given, rate) = self.args.optimizer(total), self._optimizers
        return (optimizer(config), schedule(config)) if given is None else (clipped(given, config.max_grad_norm), rate)

    def _loop_config(self, total: int, batches: Batches) -> loop.LoopConfig:
        def every(strategy: str, steps: int | None) -> int | None:
            return {"no": None, "epoch": batches.steps_per_epoch, "steps": steps}[strategy]

        return loop.LoopConfig(
            total_steps=total,
            steps_per_epoch=batches.steps_per_epoch,
            unused=functools.partial(self.model.loaded.spec.unused, self.model.loaded.config),
            logging_steps=self.args.logging_steps,
            save_steps=every(self.args.save_strategy, self.args.save_steps),
            eval_steps=every(self.args.eval_strategy, self.args.eval_steps or self.args.logging_steps),
        )

    def _callbacks(self, batches: Batches, rate: optax.Schedule | None) -> loop.Callbacks:
        def save(state: loop.LoopState) -> pathlib.Path:
            self.model.give_back(state.trainable)
            return self._save_checkpoint(state, batches)

        def evaluate(state: loop.LoopState) -> dict[str, float]:
            self.model.give_back(state.trainable)
            return self.evaluate()

        def notify(event: str, state: loop.LoopState, control: loop.Control, **more: Any) -> None:
            self.model.give_back(state.trainable)
            self._events.follow(state, batches.epoch(state.step))
            self._events.notify(event, control, **more)

        return loop.Callbacks(
            rate=lambda step: None if rate is None else _on_host(rate, step),
            epoch=batches.epoch,
            save=save,
            notify=notify if self._events.wanted else None,
            evaluate=None if self.eval_source is None else evaluate,
        )

    def _save_checkpoint(self, state: loop.LoopState, batches: Batches) -> pathlib.Path:
        model = self.model

        def extra(folder: pathlib.Path) -> None:
            if model.lora is not None:
                model.write_adapter(folder, state.trainable)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

        record = {
            "data": dataclasses.asdict(batches.state(state.step)),
            "config": self._settings(),
            "losses": state.losses,
            "skipped": state.skipped,
            "log_history": state.log_history,
            "best": self._events.best,
        }
        return checkpoint.save(
            pathlib.Path(self.args.output_dir),
            state.step,
            state.trainable,
            state.opt_state,
            record,
            extra=extra,
            keep=self.args.save_total_limit,
        )

    def _settings(self) -> dict[str, Any]:
        """What must agree between a run and its continuation, as JSON gives it back."""
        settings = {k: v for k, v in vars(self.args).items() if k not in FREE_TO_DIFFER}
        settings |= {"rows": len(self.train_source.lengths), "use_gradient_checkpointing": self.model.use_gradient_checkpointing}
        lora = self.model.lora
        return json.loads(json.dumps({**settings, "lora": None if lora is None else dataclasses.asdict(lora)}, default=str))

    def _resume(self, state: loop.LoopState, wanted: bool | str | None) -> None:
        if not wanted:
            return
        checkpoint.sweep(pathlib.Path(self.args.output_dir))
        if wanted is True:
            found = checkpoint.find_all(pathlib.Path(self.args.output_dir))
            if not found:
                raise ValueError(f"resume_from_checkpoint=True, but {self.args.output_dir} holds no complete checkpoint")
            folder = found[-1]
        else:
            folder = pathlib.Path(wanted)
        record = checkpoint.read_record(folder)
        now = self._settings()
        then = record["config"]
        faults = [f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in sorted({*now, *then}) if now.get(k) != then.get(k)]
        raise_all(f"{folder} was written by a run with other settings", faults)
        state.trainable, state.opt_state = checkpoint.restore(folder, state.trainable, state.opt_state)
        state.step, state.skipped = record["global_step"], record["skipped"]
        state.losses, state.log_history = record["losses"], record["log_history"]
        self._events.best = record["best"]

    def _banner(self, batches: Batches, total: int) -> None:
        args, model = self.args, self.model
        trained, whole = model.parameter_counts()
        devices = f"{len(jax.local_devices())} x {jax.local_devices()[0].device_kind}"
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        dtypes = sorted(
            {str(leaf.dtype) for leaf in jax.tree.leaves(dict(model.frozen))}
            | {f"trained {leaf.dtype}" for leaf in jax.tree.leaves(dict(model.trainable))}
        )
        lines = [
            f"devices       {devices}; {', '.join(dtypes)}",
            f"parameters    {trained:,} trainable of {whole:,} ({100 * trained / whole:.3f} %)",
            f"adapted       {'all weights (full fine-tuning)' if model.selection is None else model.selection.describe()}",
            f"data          {len(batches.source.lengths):,} rows, {total:,} steps of {args.per_device_train_batch_size} x "
            f"{args.gradient_accumulation_steps} = {per_step} rows ({batches.epoch(total):.2f} epochs)",
            f"buckets       {', '.join(f'{s.tokens}' + (f'+{s.patches} patches' if s.patches else '') for s in batches.shapes)} "
            f"({100 * batches.waste:.0f} % padding)",
            f"memory        gradient checkpointing {model.use_gradient_checkpointing!r}; deterministic {args.full_determinism}",
        ]
        print("\n".join(["jaxlora", *lines]), flush=True)


UnslothTrainer = SFTTrainer


def _checked_optimizers(tx: Any, rate: Any, args: SFTConfig) -> tuple[optax.GradientTransformation | None, optax.Schedule | None]:
    if tx is not None and not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"optimizers=(an optax.GradientTransformation, …), got {type(tx).__name__}; torch's have no meaning here")
    if rate is not None and tx is None:
        raise TypeError("the second of optimizers is the schedule (step → rate) inside the first: build the optax transformation with it")
    if tx is not None and args.embedding_learning_rate is not None:
        raise ValueError("embedding_learning_rate is of the built-in optimizer: with optimizers=, use optax.partition")
    return tx, rate


def _on_host(rate: optax.Schedule, step: int) -> float:
    """A schedule's value, which on the training's device would wait for the step that runs there, and the next step for it."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        host = None
    with jax.default_device(host):
        return float(jnp.asarray(rate(step)))


@functools.partial(jax.jit, static_argnums=0)
def _eval_loss(graphdef: Any, state: Any, batch: Batch) -> jax.Array:
    return loss_sum(nnx.merge(graphdef, state), batch, Execution(), head_grad=False)
