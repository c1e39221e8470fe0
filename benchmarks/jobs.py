"""The jobs of ``benchmarks.versus``: what we run, against whom, in how much memory, and by how much we mean to win."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """A script and its arguments beside the job's own; ``must`` and ``stretch`` are ratios of tokens a second, ours over its."""

    script: str
    arguments: str
    must: float
    stretch: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One line of the table: a geometry, a batch, our arguments for ``benchmarks.train_step``, the GB that we may use, the rivals."""

    model: str
    ours: str
    rivals: Mapping[str, Rival]
    limit_gb: float | None = None
    rows: int = 4
    sequence: int = 2048
    rank: int = 16


def _text(arguments: str, must: float, stretch: float | None = None) -> Rival:
    return Rival(script="benchmarks.rivals.torch_train", arguments=arguments, must=must, stretch=stretch)


def _vlm(arguments: str, must: float, stretch: float | None = None) -> Rival:
    return Rival(script="benchmarks.rivals.torch_vlm_train", arguments=arguments, must=must, stretch=stretch)


# "hf" is transformers + PEFT + bitsandbytes in its fastest mode, which needs 86 to 100 GB where that is without checkpointing;
# "hf-checkpointing" is then its mode on a card of 80 GB.
_HF: Mapping[str, Rival] = {
    "hf": _text("--stack hf --gc off", 2.0),
    "hf-checkpointing": _text("--stack hf --gc on", 2.0),
}
_AT_16_BITS: Mapping[str, Rival] = {
    "unsloth": _text("--stack unsloth --gc off --bits 16", 1.08, 1.2),
    "hf": _text("--stack hf --gc off --bits 16", 2.0),
    "hf-checkpointing": _text("--stack hf --gc on --bits 16", 2.0),
}

JOBS: Mapping[str, Job] = {
    "8b": Job(
        model="llama-3.1-8b",
        ours="--remat dots",
        limit_gb=38.8,
        rivals={
            "unsloth": _text("--stack unsloth --gc off", 1.12, 1.25),
            **_HF,
        },
    ),
    "8b-small": Job(
        model="llama-3.1-8b",
        ours="--remat unsloth",
        limit_gb=8.7,
        rivals={
            "unsloth": _text("--stack unsloth --gc unsloth", 1.12, 1.2),
            **_HF,
        },
    ),
    "8b-fp8": Job(
        model="llama-3.1-8b",
        ours="--remat dots --compute float8",
        rivals={
            "unsloth": _text("--stack unsloth --gc off", 1.3, 1.6),
            **_HF,
        },
    ),
    "8b-small-fp8": Job(
        model="llama-3.1-8b",
        ours="--remat unsloth --compute float8",
        rivals={"unsloth": _text("--stack unsloth --gc unsloth", 1.3, 1.6)},
    ),
    "8b-nf4": Job(
        model="llama-3.1-8b",
        ours="--remat dots --weights nf4",
        rivals={"int4": Rival(script="benchmarks.train_step", arguments="--remat dots --weights int4", must=0.95, stretch=0.98)},
    ),
    "8b-16bit": Job(
        model="llama-3.1-8b",
        ours="--remat dots --weights bf16",
        limit_gb=49.0,
        rows=2,
        sequence=4096,
        rivals=_AT_16_BITS,
    ),
    "8b-16bit-fp8": Job(
        model="llama-3.1-8b",
        ours="--remat dots --weights bf16 --compute float8",
        limit_gb=49.0,
        rows=2,
        sequence=4096,
        rivals=_AT_16_BITS,
    ),
    "8b-long": Job(
        model="llama-3.1-8b",
        # The memory allows for MLPs in one piece.
        ours="--remat unsloth --execution mlp_tile=32768",
        limit_gb=15.3,
        rows=1,
        sequence=32768,
        rivals={
            "unsloth": _text("--stack unsloth --gc unsloth", 1.15, 1.3),
            "hf": _text("--stack hf --gc on", 2.0),
        },
    ),
    "8b-long-fp8": Job(
        model="llama-3.1-8b",
        ours="--remat unsloth --compute float8 --execution mlp_tile=16384",
        limit_gb=15.3,
        rows=1,
        sequence=32768,
        rivals={
            "unsloth": _text("--stack unsloth --gc unsloth", 1.15, 1.3),
            "hf": _text("--stack hf --gc on", 2.0),
        },
    ),
    "vlm-small": Job(
        model="qwen2-vl-7b",
        ours="--remat unsloth",
        limit_gb=10.2,
        rivals={
            "unsloth": _vlm("--stack unsloth --gc unsloth", 1.2, 1.35),
            "hf": _vlm("--stack hf --gc on", 2.0),
        },
    ),
    "vlm": Job(
        model="qwen2-vl-7b",
        ours="--remat dots",
        limit_gb=70.7,
        rivals={
            "unsloth": _vlm("--stack unsloth --gc off", 1.2, 1.35),
            "hf": _vlm("--stack hf --gc on", 2.0),
        },
    ),
    "vlm-fp8": Job(
        model="qwen2-vl-7b",
        ours="--remat dots --compute float8",
        limit_gb=70.7,
        rivals={
            "unsloth": _vlm("--stack unsloth --gc off", 1.2, 1.6),
            "hf": _vlm("--stack hf --gc on", 2.0),
        },
    ),
}
