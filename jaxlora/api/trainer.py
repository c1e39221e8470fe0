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
import numpy as np
import optax
from flax import nnx

from jaxlora.api.config import SFTConfig
from jaxlora.api.dataset import Batches, CollatedSource, Source, TextSource, encode_rows
from jaxlora.api.model import Model, refuse_unknown
from jaxlora.data.batches import Batch, labelled_tokens
from jaxlora.data.chat import ChatOptions
from jaxlora.data.responses import make_markers, mask_to_responses
from jaxlora.errors import raise_all
from jaxlora.nn.decoder import Execution
from jaxlora.train import checkpoint, loop
from jaxlora.train.loss import loss_sum
from jaxlora.train.optim import optimizer, schedule
from jaxlora.train.remat import execution
from jaxlora.train.step import make_step, merge_trees

log = logging.getLogger(__name__)

IGNORED = ("dataset_num_proc", "compute_metrics", "preprocess_logits_for_metrics", "callbacks", "optimizers", "peft_config", "model_init")
# Settings that may differ between a checkpoint and the run that resumes it.
FREE_TO_DIFFER = ("output_dir", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps")


@dataclasses.dataclass(frozen=True)
class TrainOutput:
    """What ``train`` returns: the last step, the mean loss of this run's steps, and figures of it."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@dataclasses.dataclass
class TrainerState:
    """``log_history`` as in transformers: one dict a logged step."""

    global_step: int = 0
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class SFTTrainer:
    """Supervised fine-tuning of a model from ``get_peft_model`` (or a full fine-tuning one).

    Text rows (messages, conversations, prompt/completion, instruction/output, a text column) are tokenised at once; with a
    ``data_collator`` that has ``measure`` (UnslothVisionDataCollator), rows stay as they are until their step.

    Raises:
      ValueError: an empty dataset; no labelled token; rows that cannot be read (all are listed).
      TypeError: an argument that nobody knows.
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
        **arguments: Any,
    ):
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
        self.state = TrainerState()

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Runs to the end; ``resume_from_checkpoint`` True continues from the newest checkpoint of ``output_dir``, exactly.

        Raises:
          NonFiniteError, Interrupted: as the loop; the checkpoints written so far are complete.
          ValueError: there is nothing to resume, or it was another run (the differences are listed).
        """
        args, model = self.args, self.model
        batches = self._batches(
            self.train_source, args.per_device_train_batch_size, args.gradient_accumulation_steps, shuffle=args.shuffle_dataset
        )
        total = args.total_steps(len(self.train_source.lengths))
        config = args.optimizer(total)
        adamw, rate = optimizer(config), schedule(config)
        dropout = model.lora is not None and model.lora.lora_dropout > 0
        step = make_step(
            model.graphdef,
            adamw,
            self._execution(),
            dropout_key=jax.random.key(args.seed) if dropout else None,
            deterministic=args.full_determinism,
        )
        self._banner(batches, total)
        trainable = model.lend("a running trainer")
        state = loop.LoopState(trainable=trainable, opt_state=adamw.init(dict(trainable)))
        try:
            self._resume(state, resume_from_checkpoint)
            first = state.step
            loop.run(
                step, state, model.frozen, batches.starting(state.step), self._loop_config(total, batches), self._callbacks(batches, rate)
            )
        finally:
            model.give_back(state.trainable)
            self.state = TrainerState(state.step, state.log_history)
        losses = state.losses
        metrics = {"train_loss": loop.mean_loss(losses), "train_steps": float(state.step - first), "first_step_s": state.first_step_s}
        return TrainOutput(state.step, loop.mean_loss(losses), metrics)

    def evaluate(self) -> dict[str, float]:
        """Mean token loss on the evaluation rows: the same masked loss as in training, without dropout; no logits are kept.

        Raises:
          ValueError: there is no eval_dataset.
        """
        return self._evaluate(self.model.trainable)

    def save_model(self, output_dir: str | None = None) -> None:
        """Saves the adapter (or the trained model) and the tokenizer."""
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

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

    def _execution(self) -> Execution:
        return execution(self.model.use_gradient_checkpointing)

    def _loop_config(self, total: int, batches: Batches) -> loop.LoopConfig:
        def every(strategy: str, steps: int | None) -> int | None:
            return {"no": None, "epoch": batches.steps_per_epoch, "steps": steps}[strategy]

        return loop.LoopConfig(
            total_steps=total,
            logging_steps=self.args.logging_steps,
            save_steps=every(self.args.save_strategy, self.args.save_steps),
            eval_steps=every(self.args.eval_strategy, self.args.eval_steps or self.args.logging_steps),
        )

    def _callbacks(self, batches: Batches, rate: optax.Schedule) -> loop.Callbacks:
        def save(state: loop.LoopState) -> None:
            self._save_checkpoint(state, batches)

        evaluate = None if self.eval_source is None else lambda state: self._evaluate(state.trainable)
        return loop.Callbacks(rate=lambda step: float(jnp.asarray(rate(step))), epoch=batches.epoch, save=save, evaluate=evaluate)

    def _evaluate(self, trainable: Any) -> dict[str, float]:
        if self.eval_source is None:
            raise ValueError("there is no eval_dataset to evaluate on")
        batches = self._batches(self.eval_source, self.args.per_device_eval_batch_size, 1, shuffle=False)
        total, count = 0.0, 0
        state = merge_trees(trainable, self.model.frozen)
        for _, batch in zip(range(batches.steps_per_epoch), batches, strict=False):
            total += float(_eval_loss(self.model.graphdef, state, jax.tree.map(lambda a: jnp.asarray(a[0]), batch)))
            count += labelled_tokens(batch)
        if not count:
            raise ValueError("the evaluation rows have no labelled token")
        return {"eval_loss": total / count}

    def _save_checkpoint(self, state: loop.LoopState, batches: Batches) -> None:
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
            "log_history": state.log_history,
        }
        checkpoint.save(
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
        state.step, state.losses, state.log_history = record["global_step"], record["losses"], record["log_history"]

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


@functools.partial(jax.jit, static_argnums=0)
def _eval_loss(graphdef: Any, state: Any, batch: Batch) -> jax.Array:
    return loss_sum(nnx.merge(graphdef, state), batch, Execution(), head_grad=False)


def train_on_responses_only(
    trainer: SFTTrainer,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    *,
    last_response_only: bool = False,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Masks everything but the responses, found by two marker strings, in the rows of a trainer for text; returns the trainer.

    With ``return_function`` it returns instead the function (rows of ids, their labels) → labels. Rows without a target are dropped.

    Raises:
      ValueError: one marker without the other; no row has a target (says which marker never matched).
    """
    tokenizer = tokenizer or getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    markers = make_markers(tokenizer, instruction_part, response_part, force_match=force_match)

    def mask(rows: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        return mask_to_responses(rows, labels, markers, last_response_only=last_response_only)

    if return_function:
        return mask
    trainer.train_source = _masked(trainer.train_source, mask)
    if trainer.eval_source is not None:
        trainer.eval_source = _masked(trainer.eval_source, mask)
    return trainer


def _masked(source: Source, mask: Callable[..., list[np.ndarray]]) -> Source:
    if not isinstance(source, TextSource):
        raise NotImplementedError("rows with a collator are masked by the collator: pass train_on_responses_only=True to it")
    return source.relabelled(mask([row.input_ids for row in source.encoded], [row.labels for row in source.encoded]))
