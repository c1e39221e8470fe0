"""The optimizer: a schedule, clipping and AdamW, all optax's."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxlora.errors import nearest
from jaxlora.nn.stack import flatten_leaves, nest
from jaxlora.select import is_stacked

# The names that transformers' Trainer.get_decay_parameter_names leaves out.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")

_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer arguments under transformers' names. ``warmup_steps`` counts optimizer steps; ``max_grad_norm`` 0 means no clipping.

    ``embedding_learning_rate`` is the peak rate of an embedding and a head that are trained whole; None: ``learning_rate``.
    """

    learning_rate: float = 5e-5
    embedding_learning_rate: float | None = None
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


def decayed(trainable: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of bools: which parameters weight decay shrinks, as transformers' Trainer chooses them.

    All but biases, norms by their name, and the weights of LayerNorms (which, unlike RMSNorms, have a bias beside them).

    >>> decayed({"q_proj": {"lora_A": jax.numpy.ones((2, 4))}, "q_norm": {"weight": jax.numpy.ones(4)}})
    {'q_proj': {'lora_A': True}, 'q_norm': {'weight': False}}
    """
    leaves = flatten_leaves(trainable)

    def decays(path: str, leaf: Any) -> bool:
        module, _, name = path.rpartition(".")
        # A Linear's weight is no array but a leaf of its own; what another optimizer holds is masked.
        vector = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and leaf.ndim - is_stacked(path) == 1
        layer_norm = name == "weight" and vector and f"{module}.bias" in leaves
        return not layer_norm and not _NOT_DECAYED.search(path.lower())

    return nest({path: decays(path, leaf) for path, leaf in leaves.items()})


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decoupled weight decay of what `decayed` names."""
    adamw, special = _adamw(config), config.embedding_learning_rate
    if special is not None:
        embedding = _adamw(dataclasses.replace(config, learning_rate=special))
        adamw = optax.partition({"embedding": embedding, "other": adamw}, _groups)
    return clipped(adamw, config.max_grad_norm)


def clipped(tx: optax.GradientTransformation, max_grad_norm: float) -> optax.GradientTransformation:
    """An optimizer of gradients clipped by their global norm; 0 clips nothing."""
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), tx) if max_grad_norm else tx


def _adamw(config: OptimConfig) -> optax.GradientTransformation:
    return optax.adamw(
        schedule(config),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


def _groups(trainable: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer of each parameter, for ``embedding_learning_rate``."""
    groups = {path: "embedding" if path.endswith(_EMBEDDINGS) else "other" for path in flatten_leaves(trainable)}
    if "embedding" not in groups.values():
        raise ValueError(
            "embedding_learning_rate is given, but neither embed_tokens nor lm_head is trained whole: add them to modules_to_save, "
            "or leave it out"
        )
    return nest(groups)
