"""The forms in which users keep conversations, brought to one: a list of messages with a role and a content."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora.errors import nearest

Message = dict[str, Any]

# Frames a second where nobody says: that at which Qwen's own tools sample videos.
DEFAULT_FPS = 2.0
ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {
    **dict.fromkeys(("human", "input"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "output"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
_FORMS = "messages; conversations; prompt and completion; instruction, input and output; a text column; or the list of messages itself"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages; those before ``prompt_turns`` are never trained on (0: no such limit)."""

    messages: list[Message]
    prompt_turns: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainText:
    """Text without a chat template: ``prompt`` is not trained on, ``text`` is."""

    prompt: str = ""
    text: str


def read_row(row: Any, *, text_field: str = "text", where: str = "row") -> Conversation | PlainText:
    """Brings one row to `Conversation` or `PlainText`; keys whose value is None count as absent.

    >>> read_row({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}).messages[1]
    {'role': 'assistant', 'content': 'yo'}
    >>> read_row({"prompt": "2 + 2 =", "completion": " 4"})
    PlainText(prompt='2 + 2 =', text=' 4')

    Raises:
      ValueError: names ``where``: no known form, an unknown role, content that is neither text nor parts.
    """
    if isinstance(row, Sequence) and not isinstance(row, str):
        return Conversation(messages=read_messages(row, where=where))
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a mapping with {_FORMS}; got {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    for key in ("messages", "conversations"):
        if key in row:
            return Conversation(messages=read_messages(row[key], where=where))
    if "prompt" in row and "completion" in row:
        return _read_completion(row["prompt"], row["completion"], where)
    if "instruction" in row and "output" in row:
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return Conversation(messages=read_messages([_turn("user", question), _turn("assistant", row["output"])], where=where))
    if isinstance(row.get(text_field), str):
        return PlainText(text=row[text_field])
    raise ValueError(f"{where}: expected {_FORMS}; got the columns {sorted(row)}")


def read_messages(messages: Any, *, where: str = "row") -> list[Message]:
    """Checks a list of messages and brings it to role and content: ShareGPT's from and value, OpenAI's image_url, None-valued keys dropped.

    >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "hi", "image": None}]}])
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]}]
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: expected a list of messages, at least one; got {messages!r:.80}")
    return [_read_message(message, f"{where}, message {turn}") for turn, message in enumerate(messages)]


def media_of(messages: Sequence[Message], kind: str) -> list[Any]:
    """The images (or videos) that the messages carry themselves, in order; a part without one stands for a row's own column.

    >>> media_of([{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "image"}]}], "image")
    ['a.png']
    """
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    return [part[kind] for part in parts if part["type"] == kind and kind in part]


def fps_of(messages: Sequence[Message]) -> list[float]:
    """The frames a second of each video that the messages carry: its part's ``fps``, or ``DEFAULT_FPS``.

    >>> fps_of([{"role": "user", "content": [{"type": "video", "video": [], "fps": 4}, {"type": "video", "video": []}]}])
    [4.0, 2.0]
    """
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    return [float(part.get("fps", DEFAULT_FPS)) for part in parts if part["type"] == "video" and "video" in part]


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected a mapping with role and content, got {type(message).__name__}")
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.pop("role", None) or kept.pop("from", None)
    content = kept.pop("content") if "content" in kept else kept.pop("value", None)
    known = _ALIASES.get(str(role), role)
    if known not in ROLES:
        raise ValueError(f"{where}: unknown role {role!r}{nearest(str(role), [*ROLES, *_ALIASES])}; known are {', '.join(ROLES)}")
    if content is None and "tool_calls" not in kept:
        raise ValueError(f"{where}: no content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = [_read_part(part, f"{where}, part {i}") for i, part in enumerate(content)]
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"{where}: content is text or a list of parts, got {type(content).__name__}")
    return {"role": known, **({} if content is None else {"content": content}), **kept}


def _read_part(part: Any, where: str) -> Message:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"{where}: expected a mapping with a type, got {type(part).__name__}")
    kept = {key: value for key, value in part.items() if value is not None}
    kind = kept.get("type")
    if kind == "image_url":
        url = kept["image_url"]
        return {"type": "image", "image": url["url"] if isinstance(url, Mapping) else url}
    if kind not in ("text", "image", "video"):
        raise ValueError(f"{where}: unknown type {kind!r}{nearest(str(kind), ['text', 'image', 'video', 'image_url'])}")
    if kind == "text" and not isinstance(kept.get("text"), str):
        raise ValueError(f"{where}: a text part needs text, got {type(kept.get('text')).__name__}")
    return kept


def _read_completion(prompt: Any, completion: Any, where: str) -> Conversation | PlainText:
    if isinstance(prompt, str) and isinstance(completion, str):
        return PlainText(prompt=prompt, text=completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError(f"{where}: prompt and completion are both text or both lists of messages")
    before = read_messages(prompt, where=f"{where}, prompt")
    return Conversation(messages=before + read_messages(completion, where=f"{where}, completion"), prompt_turns=len(before))


def _turn(role: str, content: Any) -> Message:
    return {"role": role, "content": content}
