"""The optimizer: a schedule, clipping and AdamW, all optax's."""

import dataclasses

import optax

from jaxlora.errors import nearest

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer arguments under transformers' names. ``warmup_steps`` counts optimizer steps; ``max_grad_norm`` 0 means no clipping."""

    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    total_steps: int = 1
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if self.lr_scheduler_type not in SCHEDULES:
            hint = nearest(self.lr_scheduler_type, SCHEDULES)
            raise ValueError(f"lr_scheduler_type must be one of {SCHEDULES}, got {self.lr_scheduler_type!r}{hint}")
        if not 0 <= self.warmup_steps:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")


def schedule(config: OptimConfig) -> optax.Schedule:
    """The learning rate of each optimizer step, as transformers' schedulers give it: the first step of a warm-up has rate 0.

    >>> rate = schedule(OptimConfig(learning_rate=1.0, warmup_steps=2, total_steps=6))
    >>> [float(rate(t)) for t in (0, 1, 2, 4, 6)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(config.total_steps - warmup, 1)
    match config.lr_scheduler_type:
        case "linear":
            after = optax.linear_schedule(peak, 0.0, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest)
        case _:
            after = optax.constant_schedule(peak)
    if not warmup or config.lr_scheduler_type == "constant":
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decoupled weight decay."""
    adamw = optax.adamw(
        schedule(config), b1=config.adam_beta1, b2=config.adam_beta2, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw) if config.max_grad_norm else adamw
