"""Labels by marker strings, as in scripts that name an instruction part and a response part; `chat.encode` needs no markers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlora.data.padding import IGNORE
from jaxlora.data.template import ANSWER, PROBE
from jaxlora.data.turns import end_of_turn, renderer


@dataclasses.dataclass(frozen=True)
class Marker:
    """A marker's tokens: ``core`` must match; ``right`` are the ends that may follow it, longest first, and still belong to it."""

    text: str
    core: tuple[int, ...]
    right: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Markers:
    """Where a user's turn starts (``instruction``) and where an assistant's starts (``response``)."""

    instruction: Marker
    response: Marker


def make_markers(
    tokenizer: Any, instruction_part: str | None = None, response_part: str | None = None, *, force_match: bool = True
) -> Markers:
    """Tokenises both markers; with neither given, they are read off the chat template.

    ``force_match=False`` keeps only the tokens that a marker has whatever stands next to it, because tokenizers merge newlines.

    Raises:
      ValueError: one marker without the other, or a marker of which no token is left.
    """
    if (instruction_part is None) != (response_part is None):
        raise ValueError("instruction_part and response_part come together: give both, or neither to read them off the chat template")
    if instruction_part is None or response_part is None:
        instruction_part, response_part = template_markers(tokenizer)
    return Markers(*(_make_marker(tokenizer, part, force_match) for part in (instruction_part, response_part)))


def template_markers(tokenizer: Any) -> tuple[str, str]:
    """(instruction part, response part) of the chat template: what opens a user's turn after an assistant's, and an assistant's.

    Raises:
      ValueError: the template opens a turn with nothing that could be searched for.
    """
    turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": PROBE}]
    text = renderer(tokenizer)(turns, True).text
    parts = text.split(PROBE)
    response, _, rest = parts[1].partition(ANSWER)
    instruction = rest.removeprefix(end_of_turn(tokenizer)).lstrip("\n")
    # What closes a user's turn is not part of what opens an assistant's, where the two can be told apart.
    alone = renderer(tokenizer)(turns[:1], False).text.partition(PROBE)[2]
    opening = response.removeprefix(alone)
    response = opening if opening.strip() else response
    if not instruction.strip() or not response.strip():
        raise ValueError(f"the chat template opens turns with {instruction!r} and {response!r}; name instruction_part and response_part")
    return instruction, response


def mask_to_responses(
    rows: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None, markers: Markers, *, last_response_only: bool = False
) -> list[np.ndarray]:
    """Labels [n] of each row: what follows a response marker up to the next instruction marker, with the end of the turn; -100 elsewhere.

    Given ``labels`` win: what they mask stays masked.

    >>> ids = np.array([1, 5, 2, 6, 7, 1, 5])
    >>> mask_to_responses([ids], None, Markers(Marker("u", (1,)), Marker("a", (2,))))[0].tolist()
    [-100, -100, -100, 6, 7, -100, -100]

    Raises:
      ValueError: nothing is left to train in any row; says which marker never matched.
    """
    masked = []
    for i, ids in enumerate(rows):
        spans = response_spans(ids, markers)
        keep = np.zeros(len(ids), bool)
        for start, end in spans[-1:] if last_response_only else spans:
            keep[start:end] = True
        masked.append(np.where(keep, ids if labels is None else labels[i], IGNORE))
    if rows and all((row == IGNORE).all() for row in masked):
        counts = [(m.text, sum(bool(_find(ids, m)) for ids in rows)) for m in (markers.instruction, markers.response)]
        found = ", ".join(f"{text!r} matched in {count} of {len(rows)} rows" for text, count in counts)
        raise ValueError(f"all labels are -100: {found}. Are these the markers of this chat template, and was the answer cut off?")
    return masked


def response_spans(ids: np.ndarray, markers: Markers) -> list[tuple[int, int]]:
    """(first, last + 1) token of every response."""
    instructions = [start for start, _ in _find(ids, markers.instruction)]
    spans: list[tuple[int, int]] = []
    for _, start in _find(ids, markers.response):
        if spans and start < spans[-1][1]:
            continue
        spans.append((start, next((at for at in instructions if at >= start), len(ids))))
    return spans


def _find(ids: np.ndarray, marker: Marker) -> list[tuple[int, int]]:
    """(start of the core, first token after the marker) of every match."""
    core, found = np.array(marker.core), []
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(core)) if len(ids) >= len(core) else np.zeros((0, len(core)), int)
    for start in np.flatnonzero((windows == core).all(1)).tolist():
        end = start + len(core)
        extra = next((len(tail) for tail in marker.right if tuple(ids[end : end + len(tail)].tolist()) == tail), 0)
        found.append((start, end + extra))
    return found


def _make_marker(tokenizer: Any, text: str, force_match: bool) -> Marker:
    def ids(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False)["input_ids"]

    exact = ids(text)
    core = tuple(exact)
    right: tuple[tuple[int, ...], ...] = ()
    if not force_match:
        neighbours = [ids(before + text + after) for before in ("", "\n", " ", "a") for after in ("", "\n", " ", "a")]
        core = _common_run(exact, neighbours)
        at = next((i for i in range(len(exact)) if tuple(exact[i : i + len(core)]) == core), 0)
        tail = tuple(exact[at + len(core) :])
        right = tuple(tail[:n] for n in range(len(tail), 0, -1))
    if not core:
        raise ValueError(f"no token of the marker {text!r} is certain; choose a longer one, such as the whole header of the turn")
    return Marker(text, core, right)


def _common_run(exact: list[int], others: list[list[int]]) -> tuple[int, ...]:
    """The longest run of ``exact`` that every other tokenisation has too."""
    for length in range(len(exact), 0, -1):
        for start in range(len(exact) - length + 1):
            run = exact[start : start + length]
            if all(any(other[i : i + length] == run for i in range(len(other) - length + 1)) for other in others):
                return tuple(run)
    return ()
