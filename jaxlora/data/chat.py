"""Conversations to token ids and labels, by the tokenizer's own chat template; labels follow the template's places, never token ids."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlora.data.rows import Conversation, Message, PlainText
from jaxlora.data.template import ESCAPE_END, ESCAPE_START, RESERVED
from jaxlora.data.turns import Render, assistant_spans, common_prefix, control_tokens, in_the_templates_form, renderer

IGNORE = -100


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """One row: token ids [n] and, per token, its id where it is trained and -100 elsewhere (not shifted, as Hugging Face has them)."""

    input_ids: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What of a conversation is trained on.

    ``responses_only``: the assistant's turns with their end-of-turn token, else every token. ``last_response_only``: only the last
    of them. ``allow_special_in_text``: control tokens typed in a text that the assistant did not write become control tokens.
    """

    responses_only: bool = True
    last_response_only: bool = False
    allow_special_in_text: bool = False


def encode(
    row: Conversation | PlainText,
    tokenizer: Any,
    options: ChatOptions | None = None,
    *,
    where: str = "row",
    prepare: Callable[[str], str] = str,
) -> Encoded:
    """Tokenises a row; nothing is truncated. A chat template brings its own BOS, so that none is added.

    Plain text gets the tokenizer's own special tokens, and EOS where it has none at its end. ``prepare`` writes out the placeholders of
    images in text that is rendered and whose labels are known.

    Raises:
      ValueError: names ``where``: no chat template, no assistant turn, a template whose turns cannot be told apart.
    """
    if isinstance(row, PlainText):
        return _encode_plain(dataclasses.replace(row, prompt=prepare(row.prompt), text=prepare(row.text)), tokenizer)
    options = options or ChatOptions()
    try:
        if any(RESERVED.search(text) for message in row.messages for text in _texts(message)):
            raise ValueError("a text holds Unicode noncharacters U+FDD0 to U+FDD6, which are reserved for use inside programs")
        messages = in_the_templates_form(row.messages, tokenizer)
        messages = messages if options.allow_special_in_text else _escape_control_tokens(messages, tokenizer)
        render_turns = renderer(tokenizer)
        rendered = render_turns(messages, False)
        spans = _trained_spans(render_turns, rendered.text, messages, row.prompt_turns, options, control_tokens(tokenizer))
        return _tokenise(*_prepared(rendered.text, spans, prepare), tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _prepared(text: str, spans: Sequence[tuple[int, int]], prepare: Callable[[str], str]) -> tuple[str, list[tuple[int, int]]]:
    """The text between the ends of spans prepared piece by piece, and where the spans are then."""
    cuts = sorted({0, len(text), *(edge for pair in spans for edge in pair)})
    pieces = [prepare(text[start:end]) for start, end in zip(cuts, cuts[1:], strict=False)]
    moved = dict(zip(cuts, np.cumsum([0, *map(len, pieces)]).tolist(), strict=True))
    return "".join(pieces), [(moved[start], moved[end]) for start, end in spans]


def _trained_spans(
    render_turns: Render, text: str, messages: Sequence[Message], prompt_turns: int, options: ChatOptions, control: Sequence[str]
) -> list[tuple[int, int]]:
    if not options.responses_only and not prompt_turns:
        return [(0, len(text))]
    if not any(message["role"] == "assistant" for message in messages[prompt_turns:]):
        raise ValueError(f"no assistant turn to train on; the roles are {[message['role'] for message in messages]}")
    spans = assistant_spans(render_turns, messages, control)
    if not spans:
        raise ValueError("the chat template's generation blocks are empty for this conversation")
    if prompt_turns:
        before = common_prefix(text, render_turns(messages[:prompt_turns], True).text)
        spans = [span for span in spans if span[1] > before] if options.responses_only else [(before, len(text))]
    return spans[-1:] if options.last_response_only else spans


def _escape_control_tokens(messages: Sequence[Message], tokenizer: Any) -> list[Message]:
    """Marks control tokens typed in any text that the assistant did not write, so that they survive the template as text."""
    control = control_tokens(tokenizer)
    pattern = re.compile("|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)) or r"(?!)")

    def escape(text: str) -> str:
        return pattern.sub(lambda found: f"{ESCAPE_START}{control.index(found[0])}{ESCAPE_END}", text)

    for message in messages:
        texts = _texts(message)
        if message["role"] != "assistant" and len(pattern.findall("".join(texts))) > sum(len(pattern.findall(text)) for text in texts):
            raise ValueError("a control token is spread over the text parts of one message")
    return [_map_text(message, escape) if message["role"] != "assistant" else message for message in messages]


def _texts(message: Message) -> list[str]:
    content = message.get("content", "")
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _map_text(message: Message, change: Callable[[str], str]) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": change(content)}
    if isinstance(content, list):
        return {**message, "content": [{**part, "text": change(part["text"])} if part["type"] == "text" else part for part in content]}
    return message


def _tokenise(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> Encoded:
    """Cuts the text at spans and escapes, so that no token straddles what is trained and what is not."""
    control = control_tokens(tokenizer)
    escapes = [(found.start(), found.end()) for found in re.finditer(f"{ESCAPE_START}\\d+{ESCAPE_END}", text)]
    if not _pieces_join(tokenizer):
        if escapes:
            found = control[int(text[escapes[0][0] + 1 : escapes[0][1] - 1])]
            raise ValueError(f"the control token {found!r} stands in a text, and this tokenizer cannot take it as text; remove it")
        return _tokenise_whole(text, spans, tokenizer)
    cuts = sorted({0, len(text), *(edge for pair in [*spans, *escapes] for edge in pair)})
    ids, labels = [], []
    for start, end in zip(cuts, cuts[1:], strict=False):
        literal = (start, end) in escapes
        piece = control[int(text[start + 1 : end - 1])] if literal else text[start:end]
        piece_ids = tokenizer(piece, add_special_tokens=False, split_special_tokens=literal)["input_ids"]
        trained = any(first <= start and end <= last for first, last in spans)
        ids += piece_ids
        labels += piece_ids if trained else [IGNORE] * len(piece_ids)
    return Encoded(input_ids=np.array(ids, np.int64), labels=np.array(labels, np.int64))


def _tokenise_whole(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> Encoded:
    """For tokenizers that put a space before every piece: one call, and a token is trained if it overlaps a span."""
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(whole["input_ids"], np.int64)
    offsets = np.array(whole["offset_mapping"], np.int64).reshape(-1, 2)
    trained = np.zeros(len(ids), bool)
    for start, end in spans:
        trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return Encoded(input_ids=ids, labels=np.where(trained, ids, IGNORE))


@functools.lru_cache(maxsize=16)
def _pieces_join(tokenizer: Any) -> bool:
    piece = tokenizer("x", add_special_tokens=False)["input_ids"]
    return tokenizer.decode(piece + piece) == "xx"


def _encode_plain(row: PlainText, tokenizer: Any) -> Encoded:
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    first = row.prompt or row.text
    head = tokenizer(first, add_special_tokens=not (bos and first.startswith(bos)))["input_ids"]
    # Some tokenizers close every text themselves; the prompt goes on.
    head = head[:-1] if row.prompt and head and head[-1] == tokenizer.eos_token_id else head
    tail = tokenizer(row.text, add_special_tokens=False)["input_ids"] if row.prompt else []
    ids = np.array(head + tail, np.int64)
    if eos and (not len(ids) or ids[-1] != tokenizer.eos_token_id):
        ids = np.append(ids, tokenizer.eos_token_id)
    labels = ids.copy()
    labels[: len(head) if row.prompt else 0] = IGNORE
    return Encoded(input_ids=ids, labels=labels)
