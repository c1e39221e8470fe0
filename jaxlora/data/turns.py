"""What a chat template makes of turns: the text of a conversation, and where in it the assistant speaks."""

import functools
import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxlora.data.rows import Message
from jaxlora.data.template import ANSWER, OTHER_PROBE, PROBE, Rendered, render

Render = Callable[[Sequence[Message], bool], Rendered]


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


def assistant_spans(render_turns: Render, messages: Sequence[Message], control: Sequence[str] = ()) -> list[tuple[int, int]]:
    """The characters of every assistant turn in the rendered conversation: what the model is to write, with its end-of-turn token.

    The template's ``{% generation %}`` blocks where it has them. Otherwise a turn starts where the generation prompt of the turns
    before it ends, or with its content where there is no such prompt. Its end is found by rendering it again with known content,
    which shows the text that closes a turn and opens the next; white space after the closing token is not the model's to write.
    ``control`` tokens are not cut in two.

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
    return [_span_of(render_turns, full.text, messages, i, control) for i, message in enumerate(messages) if message["role"] == "assistant"]


def end_of_turn(tokenizer: Any) -> str:
    """The text with which the chat template ends an assistant turn, for instance ``<|im_end|>``: what must stop generation."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "?"}]
    render_turns = renderer(tokenizer)
    start, end = assistant_spans(render_turns, turns, control_tokens(tokenizer))[0]
    return render_turns(turns, False).text[start:end].rpartition(ANSWER)[2]


def control_tokens(tokenizer: Any) -> list[str]:
    """The tokens that mean something besides their text: special ones, not those that a tokenizer merely adds."""
    added = [entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.special]
    return sorted({*added, *tokenizer.all_special_tokens})


def takes_parts(tokenizer: Any, role: str) -> bool:
    """Whether the chat template writes the text of a list of parts, rather than the list itself, or an error."""
    return _takes_parts(tokenizer, role, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=64)
def _takes_parts(tokenizer: Any, role: str, template: str) -> bool:
    turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    turns[role == "assistant"] = {"role": role, "content": [{"type": "text", "text": ANSWER}]}
    try:
        text = renderer(tokenizer)(turns, False).text
    except ValueError:
        return False
    return ANSWER in text and "'type'" not in text


def in_the_templates_form(messages: Sequence[Message], tokenizer: Any) -> list[Message]:
    """Text as a part where the template takes parts; text parts joined where it writes strings only."""
    formed = []
    for message in messages:
        content, parts = message.get("content"), takes_parts(tokenizer, message["role"])
        if parts and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not parts and isinstance(content, list) and all(part["type"] == "text" for part in content):
            content = "".join(part["text"] for part in content)
        formed.append({**message, **({} if content is None else {"content": content})})
    return formed


def _span_of(render_turns: Render, text: str, messages: Sequence[Message], i: int, control: Sequence[str]) -> tuple[int, int]:
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
        # The rest of the conversation stays, because some templates write a turn differently when it is the last.
        following = render_turns([*before, _with_content(turn, PROBE), _with_content(after[0], OTHER_PROBE), *after[1:]], False).text
        between = _suffix_after(following, PROBE).partition(OTHER_PROBE)[0]
        end_of_between = common_prefix(text, render_turns([*before, turn, _with_content(after[0], PROBE), *after[1:]], False).text)
        closing = _common_units(alone[0], between, control)
    else:
        between = closing = alone[0]
        end_of_between = len(text)
    if text[end_of_between - len(between) : end_of_between] != between:
        raise _irregular(i)
    end = end_of_between - len(between) + len(closing.rstrip() or closing)
    return _start_of(render_turns, text, messages, i), end


def _start_of(render_turns: Render, text: str, messages: Sequence[Message], i: int) -> int:
    before, turn, after = list(messages[:i]), messages[i], list(messages[i + 1 :])
    prompt = render_turns(before, True).text if before else ""
    # A template that ignores the generation prompt would make the header look like the model's words.
    if before and text.startswith(prompt) and prompt != render_turns(before, False).text:
        return len(prompt)
    content = common_prefix(text, render_turns([*before, _with_content(turn, PROBE), *after], False).text)
    # A space before the first word is part of that word's token.
    return len(text[:content].rstrip(" "))


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


def _common_units(a: str, b: str, control: Sequence[str]) -> str:
    """The common prefix in whole control tokens and characters: ``<|end|><|user|>`` and ``<|end|><|endoftext|>`` share ``<|end|>``."""
    unit = re.compile("|".join([*(re.escape(token) for token in sorted(control, key=len, reverse=True)), "."]), re.DOTALL)
    pairs = zip(unit.findall(a), unit.findall(b), strict=False)
    return "".join(first for first, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def common_prefix(a: str, b: str) -> int:
    """The number of characters that both start with."""
    return len(os.path.commonprefix([a, b]))
