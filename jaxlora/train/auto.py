"""``use_gradient_checkpointing="auto"``: the fastest policy whose compiled step fits into the device's memory."""

import dataclasses
import hashlib
import json
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from conversion.atomic import new_file
from jaxlora.nn import host
from jaxlora.train.meters import GIB

log = logging.getLogger(__name__)

# Fastest first, as measured at 8B: 476, 583, 600 and 629 ms a step. "unsloth" needs least of the device and much of the host, for want of
# which True may be what fits. False is no candidate: it saves more than "dots" does, and writing it takes longer than computing it again.
CANDIDATES = ("dots", "attention", "unsloth", True)

type Lower = Callable[[bool | str], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class Tried:
    """A policy and what its compiled step needs: arguments, results and temporaries, in GiB of device memory, and pinned memory of the host
    in GiB, where ``pinned`` says whether it can have it."""

    policy: bool | str
    needed_gib: float
    compile_s: float
    host_gib: float = 0.0
    pinned: bool = True

    def describe(self) -> str:
        """What it needs.

        >>> Tried("unsloth", 8.0, 9.0, host_gib=9.125).describe(), Tried(True, 10.0, 9.0).describe()
        ('8.0 GiB and 9.1 of the host', '10.0 GiB')
        """
        of_host = f" and {self.host_gib:.1f} of the host" if self.host_gib else ""
        return f"{self.needed_gib:.1f} GiB{of_host}{'' if self.pinned else ', which it cannot pin'}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The policy that was taken, and the table that it was taken from."""

    policy: bool | str
    limit_gib: float
    tried: tuple[Tried, ...]

    def describe(self) -> str:
        """One line a policy that was compiled.

        >>> print(Choice("unsloth", 16.0, (Tried("dots", 33.2, 8.0), Tried("unsloth", 8.1, 8.0, host_gib=9.1))).describe())
        gradient checkpointing "auto" with 16.0 GiB: 'unsloth'
          'dots'     33.2 GiB
          'unsloth'  8.1 GiB and 9.1 of the host  <- taken
        """
        lines = [f'gradient checkpointing "auto" with {self.limit_gib:.1f} GiB: {self.policy!r}']
        lines += [f"  {t.policy!r:10} {t.describe()}{'  <- taken' if t.policy == self.policy else ''}" for t in self.tried]
        return "\n".join(lines)


def choose(lower: Lower, limit_gib: float, *, cache: pathlib.Path | None = None, candidates: Sequence[bool | str] = CANDIDATES) -> Choice:
    """Compiles the candidates in order until one fits device and host; ``lower(policy)`` gives the step of the largest shape, lowered.

    The choice is kept in the file ``cache`` under a hash of the program and the limits, so that a second run compiles nothing for it.

    Raises:
      ValueError: none fits; the text is the table.
    """
    first = lower(candidates[0])
    # What "unsloth" keeps, and whether it can, follows from the host.
    limits = f"{limit_gib} {host.room_bytes() >> 30}"
    key = hashlib.sha256(f"{jax.__version__} {limits} {list(candidates)} {first.as_text()}".encode()).hexdigest()
    known = _read(cache).get(key)
    if known is not None:
        return Choice(known["policy"], limit_gib, tuple(Tried(**t) for t in known["tried"]))
    tried: list[Tried] = []
    for policy in candidates:
        started = time.perf_counter()
        compiled = (first if policy == candidates[0] else lower(policy)).compile()
        compile_s, host_bytes = time.perf_counter() - started, _analysis(compiled).host_temp_size_in_bytes
        tried.append(Tried(policy, needed_gib(compiled), compile_s, host_bytes / GIB, host.can_pin(host_bytes)))
        if tried[-1].needed_gib <= limit_gib and tried[-1].pinned:
            choice = Choice(policy, limit_gib, tuple(tried))
            _write(cache, key, choice)
            return choice
    table = "; ".join(f"{t.policy!r} needs {t.describe()}" for t in tried)
    raise ValueError(
        f"no gradient checkpointing fits into {limit_gib:.1f} GiB: {table}; lower per_device_train_batch_size or max_seq_length "
        "(gradient_accumulation_steps keeps the effective batch)"
    )


def needed_gib(compiled: jax.stages.Compiled) -> float:
    """Device memory of a compiled program: arguments, results that do not reuse them, temporaries."""
    memory = _analysis(compiled)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (held + memory.temp_size_in_bytes) / GIB


def _analysis(compiled: jax.stages.Compiled) -> Any:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory


def memory_gib() -> float:
    """What programs may use on the first device: the allocator's limit, or the machine's memory where there is none (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", host.memory_bytes()) / GIB


def _read(cache: pathlib.Path | None) -> dict[str, Any]:
    if cache is None or not cache.is_file():
        return {}
    try:
        return json.loads(cache.read_text())
    except json.JSONDecodeError:
        log.warning("%s is not readable: the choice is made again", cache)
        return {}


def _write(cache: pathlib.Path | None, key: str, choice: Choice) -> None:
    if cache is None:
        return
    entry = {"policy": choice.policy, "tried": [dataclasses.asdict(t) for t in choice.tried]}
    cache.parent.mkdir(parents=True, exist_ok=True)
    with new_file(cache) as new:
        new.write_text(json.dumps({**_read(cache), key: entry}, indent=1))
