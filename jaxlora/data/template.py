"""Chat templates rendered in a sandbox: a template is a program that came with the weights, and is not trusted."""

import dataclasses
import datetime
import functools
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARS = 10_000_000
MAX_SECONDS = 5.0
MAX_LOOPS = 1_000_000

# Unicode noncharacters: reserved for use inside a program, so no text holds them.
SPAN_START, SPAN_END, ESCAPE_START, ESCAPE_END, PROBE, OTHER_PROBE, ANSWER = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4\ufdd5\ufdd6"
RESERVED = re.compile("[\ufdd0-\ufdd6]")

# One date a process: a run that crosses midnight must not see two prompts, nor half a prefix of one.
_NOW = datetime.datetime.now()


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A rendered chat, and the character spans of its ``{% generation %}`` blocks."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


def render(template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any) -> Rendered:
    """Renders a chat template as transformers does: same filters, globals, white space rules and variables.

    Runs in jinja's immutable sandbox, with a limit on characters, seconds, loop steps and repeated text.

    >>> render("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", [{"role": "user", "content": "hi"}]).text
    '<user>hi'

    Raises:
      ValueError: the template is not valid, calls raise_exception, or breaks a limit.
    """
    started, pieces, length = time.monotonic(), [], 0
    given = {"tools": None, "documents": None, **variables}
    try:
        compiled = _parsed(template)
        for piece in compiled.generate(range=_Loops(), messages=messages, add_generation_prompt=add_generation_prompt, **given):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARS or time.monotonic() - started > MAX_SECONDS:
                raise SecurityError(f"more than {MAX_CHARS} characters or {MAX_SECONDS} seconds")
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"the chat template refuses these messages: {type(error).__name__}: {error}") from error
    return _without_marks("".join(pieces))


def _without_marks(text: str) -> Rendered:
    spans, kept, length = [], [], 0
    for piece in re.split(f"([{SPAN_START}{SPAN_END}])", text):
        if piece == SPAN_START:
            spans.append((length, length))
        elif piece == SPAN_END:
            spans[-1] = (spans[-1][0], length)
        else:
            kept.append(piece)
            length += len(piece)
    return Rendered("".join(kept), tuple(span for span in spans if span[0] < span[1]))


class _Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``: marks its text, so that spans survive macros and captured blocks."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return f"{SPAN_START}{caller()}{SPAN_END}"


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        repeats = (left, right) if isinstance(right, int) else (right, left)
        if operator == "*" and isinstance(repeats[0], str | list | tuple) and len(repeats[0]) * repeats[1] > MAX_CHARS:
            raise SecurityError(f"text repeated to more than {MAX_CHARS} characters")
        if operator == "**" and abs(right) > 64:
            raise SecurityError(f"power of {right}")
        if operator == "%" and isinstance(left, str) and re.search(r"\d{5,}|\*", left):
            raise SecurityError(f"format {left!r}")
        return super().call_binop(context, operator, left, right)


class _Loops:
    """``range`` for templates: all loops of one render share a budget of steps."""

    def __init__(self):
        self.left = MAX_LOOPS

    def __call__(self, *bounds: int) -> Sequence[int]:
        return _Steps(self, range(*bounds))


class _Steps(Sequence):
    def __init__(self, loops: _Loops, steps: range):
        self.loops, self.steps = loops, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, at: Any) -> Any:
        return self.steps[at]

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            self.loops.left -= 1
            if self.loops.left < 0:
                raise SecurityError(f"more than {MAX_LOOPS} loop steps")
            yield step


@functools.lru_cache(maxsize=64)
def _parsed(template: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_NOW.strftime)
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
