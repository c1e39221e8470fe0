"""Training arguments under the names of transformers and TRL."""

import dataclasses
import math
from typing import Any

from jaxlora.api.model import refuse_unknown
from jaxlora.errors import nearest, raise_all
from jaxlora.train.optim import OptimConfig

# Every AdamW there is trains the same way here: fp32 states, which LoRA keeps small.
OPTIMIZERS = (
    "adamw_8bit",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adamw_hf",
    "adamw",
)

# Arguments of TrainingArguments and SFTConfig that mean nothing here, or that are this library's only way.
IGNORED = (
    "bf16 fp16 tf32 bf16_full_eval fp16_full_eval remove_unused_columns dataset_kwargs dataset_num_proc report_to run_name push_to_hub "
    "hub_model_id hub_token hub_strategy logging_dir logging_strategy logging_first_step logging_nan_inf_filter disable_tqdm log_level "
    "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers group_by_length "
    "length_column_name ddp_find_unused_parameters ddp_timeout torch_compile torch_compile_backend use_cpu no_cuda fsdp fsdp_config "
    "deepspeed gradient_checkpointing gradient_checkpointing_kwargs save_safetensors save_only_model "
    "average_tokens_across_devices include_num_input_tokens_seen prediction_loss_only padding_free eval_accumulation_steps "
    "auto_find_batch_size skip_memory_metrics torch_empty_cache_steps optim_args seed_worker overwrite_output_dir do_train do_eval"
).split()

STRATEGIES = ("no", "steps", "epoch")


@dataclasses.dataclass(kw_only=True)
class _Known:
    output_dir: str = "trainer_output"
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 2
    max_steps: int = -1
    num_train_epochs: float = 3.0
    learning_rate: float = 5e-5
    embedding_learning_rate: float | None = None
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.001
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    optim: str = "adamw_8bit"
    seed: int = 3407
    data_seed: int | None = None
    logging_steps: int = 1
    save_strategy: str = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None
    eval_strategy: str = "no"
    eval_steps: int | None = None
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    load_best_model_at_end: bool = False
    max_length: int | None = None
    max_seq_length: int | None = None
    packing: bool = False
    dataset_text_field: str = "text"
    assistant_only_loss: bool = False
    completion_only_loss: bool | None = None
    shuffle_dataset: bool = True
    dataloader_drop_last: bool = False
    full_determinism: bool = False
    max_memory_gib: float | None = None


class SFTConfig(_Known):
    """Arguments of a run. Names and meanings are transformers' and TRL's, defaults Unsloth's.

    ``max_steps`` beats ``num_train_epochs``; ``warmup_steps`` beats ``warmup_ratio``. ``max_length`` (or ``max_seq_length``) cuts longer
    text rows; None takes the model's limit. ``packing`` fills rows with several documents that never see each other.
    ``embedding_learning_rate`` is for an embedding and a head that are trained whole (``modules_to_save``, full fine-tuning).
    ``assistant_only_loss`` trains the assistant's turns only. ``full_determinism`` asks for the same bits in every run.
    ``max_memory_gib`` is what ``use_gradient_checkpointing="auto"`` may use; None: all that the device has.

    >>> SFTConfig(max_steps=10, learning_rate=2e-4).total_steps(rows=100)
    10

    Raises:
      TypeError: an argument that nobody knows, with the nearest name.
      ValueError: wrong values, all at once.
    """

    def __init__(self, **arguments: Any):
        arguments = {_RENAMED.get(name, name): value for name, value in arguments.items()}
        known = {f.name for f in dataclasses.fields(_Known)}
        others = {name: value for name, value in arguments.items() if name not in known}
        unknown = [f"{name!r}{nearest(name, [*known, *IGNORED])}" for name in others if name not in IGNORED]
        if unknown:
            raise TypeError(f"SFTConfig got unknown arguments: {', '.join(unknown)}")
        refuse_unknown("SFTConfig", others, IGNORED)
        super().__init__(**{name: value for name, value in arguments.items() if name in known})
        self._check()

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the run on a dataset of that many rows."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * self.steps_per_epoch(rows))

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps of one epoch; the last may be short."""
        per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return max(rows // per_step if self.dataloader_drop_last else math.ceil(rows / per_step), 1)

    def optimizer(self, total_steps: int) -> OptimConfig:
        """The optimizer's arguments for a run of that length."""
        return OptimConfig(
            learning_rate=self.learning_rate,
            embedding_learning_rate=self.embedding_learning_rate,
            lr_scheduler_type=str(self.lr_scheduler_type),
            warmup_steps=self.warmup_steps or math.ceil(self.warmup_ratio * total_steps),
            total_steps=total_steps,
            weight_decay=self.weight_decay,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
            max_grad_norm=self.max_grad_norm,
        )

    def _check(self) -> None:
        faults = []
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_steps",
        ):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            faults.append(f"max_steps={self.max_steps}, num_train_epochs={self.num_train_epochs}: the run has no steps")
        if self.optim not in OPTIMIZERS:
            faults.append(f"optim must be one of {OPTIMIZERS} (all are AdamW here), got {self.optim!r}{nearest(self.optim, OPTIMIZERS)}")
        for name in ("save_strategy", "eval_strategy"):
            if getattr(self, name) not in STRATEGIES:
                faults.append(
                    f"{name} must be one of {STRATEGIES}, got {getattr(self, name)!r}{nearest(str(getattr(self, name)), STRATEGIES)}"
                )
        raise_all("the training arguments are wrong", faults)
        if self.load_best_model_at_end:
            raise NotImplementedError(
                "load_best_model_at_end=True is not available: every checkpoint-N folder is an adapter that from_pretrained loads, and "
                "trainer.state.best_global_step says which (with metric_for_best_model)"
            )
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")


TrainingArguments = UnslothTrainingArguments = SFTConfig

_RENAMED = {"evaluation_strategy": "eval_strategy", "learning_rate_scheduler": "lr_scheduler_type"}
