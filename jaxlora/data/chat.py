"""Conversations to token ids and labels, by the tokenizer's own chat template; labels follow the template's places, never token ids."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlora.data.rows import Conversation, Message, PlainText
from jaxlora.data.template import ANSWER, ESCAPE_END, ESCAPE_START, OTHER_PROBE, PROBE, RESERVED, Rendered, render

IGNORE = -100
Render = Callable[[Sequence[Message], bool], Rendered]


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


def encode(row: Conversation | PlainText, tokenizer: Any, options: ChatOptions | None = None, *, where: str = "row") -> Encoded:
    """Tokenises a row; nothing is truncated. A chat template brings its own BOS, so that none is added.

    Plain text gets the tokenizer's own special tokens, and EOS where it has none at its end.

    Raises:
      ValueError: names ``where``: no chat template, no assistant turn, a template whose turns cannot be told apart.
    """
    if isinstance(row, PlainText):
        return _encode_plain(row, tokenizer)
    options = options or ChatOptions()
    try:
        if any(RESERVED.search(text) for message in row.messages for text in _texts(message)):
            raise ValueError("a text holds Unicode noncharacters U+FDD0 to U+FDD6, which are reserved for use inside programs")
        messages = row.messages if options.allow_special_in_text else _escape_control_tokens(row.messages, tokenizer)
        render_turns = renderer(tokenizer)
        rendered = render_turns(messages, False)
        spans = _trained_spans(render_turns, rendered, messages, row.prompt_turns, options)
        return _tokenise(rendered.text, spans, tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def renderer(tokenizer: Any, **variables: Any) -> Render:
    """The tokenizer's chat template as a function (messages, add_generation_prompt) -> Rendered."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ValueError("the tokenizer has no chat template; give rows with a text column, or set tokenizer.chat_template")
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}

    def render_turns(messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        given = {**special, **variables}
        return render(template, messages, add_generation_prompt=add_generation_prompt, **given)

    return render_turns


def assistant_spans(render_turns: Render, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """The characters of every assistant turn in the rendered conversation: what the model is to write, with its end-of-turn token.

    The template's ``{% generation %}`` blocks where it has them. Otherwise a turn starts where the generation prompt of the turns
    before it ends. Its end is found by rendering it again with known content, which shows the text that closes a turn and opens the
    next; white space after the closing token is not the model's to write.

    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s> {% endfor %}{{ '<assistant>' if add_generation_prompt }}"
    >>> turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    >>> assistant_spans(lambda messages, prompt: render(template, messages, add_generation_prompt=prompt), turns)
    [(24, 30)]

    Raises:
      ValueError: the template writes a turn differently depending on its content, so that its end is not certain.
    """
    full = render_turns(messages, False)
    if full.spans:
        return list(full.spans)
    return [_span_of(render_turns, full.text, messages, i) for i, message in enumerate(messages) if message["role"] == "assistant"]


def end_of_turn(tokenizer: Any) -> str:
    """The text with which the chat template ends an assistant turn, for instance ``<|im_end|>``: what must stop generation."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    render_turns = renderer(tokenizer)
    start, end = assistant_spans(render_turns, turns)[-1]
    return render_turns(turns, False).text[start:end].rpartition(ANSWER)[2]


def _trained_spans(
    render_turns: Render, rendered: Rendered, messages: Sequence[Message], prompt_turns: int, options: ChatOptions
) -> list[tuple[int, int]]:
    if not options.responses_only and not prompt_turns:
        return [(0, len(rendered.text))]
    if not any(message["role"] == "assistant" for message in messages[prompt_turns:]):
        raise ValueError(f"no assistant turn to train on; the roles are {[message['role'] for message in messages]}")
    spans = assistant_spans(render_turns, messages)
    if not spans:
        raise ValueError("the chat template's generation blocks are empty for this conversation")
    if prompt_turns:
        before = _common_prefix(rendered.text, render_turns(messages[:prompt_turns], True).text)
        spans = [span for span in spans if span[1] > before] if options.responses_only else [(before, len(rendered.text))]
    return spans[-1:] if options.last_response_only else spans


def _span_of(render_turns: Render, text: str, messages: Sequence[Message], i: int) -> tuple[int, int]:
    before, turn, after = list(messages[:i]), messages[i], list(messages[i + 1 :])
    # What follows a turn may depend neither on it nor on the turn before it.
    earlier = [*before[:-1], _with_content(before[-1], ANSWER)] if before else []
    alone = [
        _suffix_after(render_turns([*before, _with_content(turn, PROBE)], False).text, PROBE),
        _suffix_after(render_turns([*earlier, _with_content(turn, OTHER_PROBE)], False).text, OTHER_PROBE),
    ]
    if alone[0] != alone[1]:
        raise _irregular(i)
    if after:
        following = render_turns([*before, _with_content(turn, PROBE), _with_content(after[0], OTHER_PROBE)], False).text
        between = _suffix_after(following, PROBE).partition(OTHER_PROBE)[0]
        next_content = _common_prefix(text, render_turns([*before, turn, _with_content(after[0], PROBE)], False).text)
        closing = alone[0][: _common_prefix(alone[0], between)]
        end_of_between = next_content
    else:
        between = closing = alone[0]
        end_of_between = len(text)
    if text[end_of_between - len(between) : end_of_between] != between:
        raise _irregular(i)
    end = end_of_between - len(between) + len(closing.rstrip() or closing)
    prompt = render_turns(before, True).text if before else ""
    if before and text.startswith(prompt):
        return len(prompt), end
    return _common_prefix(text, render_turns([*before, _with_content(turn, PROBE), *after], False).text), end


def _irregular(i: int) -> ValueError:
    return ValueError(
        f"the end of message {i} cannot be found, because the chat template writes turns differently depending on their content; "
        "put {% generation %} … {% endgeneration %} around the assistant's turn in the template"
    )


def _with_content(message: Message, text: str) -> Message:
    """The same turn with other content, of the same form: a template may treat text and parts differently."""
    content = [{"type": "text", "text": text}] if isinstance(message.get("content"), list) else text
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


def _suffix_after(text: str, probe: str) -> str:
    head, found, tail = text.partition(probe)
    if not found:
        raise ValueError("the chat template drops a turn's content")
    return tail


def _common_prefix(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))


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


def control_tokens(tokenizer: Any) -> list[str]:
    """The tokens that mean something besides their text: special ones, not those that a tokenizer merely adds."""
    added = [entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.special]
    return sorted({*added, *tokenizer.all_special_tokens})


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
