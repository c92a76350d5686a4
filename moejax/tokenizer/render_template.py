"""Renders a chat template, in a process of its own and within limits: a template is a program that strangers wrote.

    python -I render_template.py CPU_SECONDS MEMORY_BYTES OUTPUT_CHARACTERS < request.json > answer.json

It imports nothing of moejax. The request has `template`, its source, and `variables`; the answer has `text` or `error`.
Blanks, filters, functions and tags are those of Hugging Face transformers' chat templates. Messages' texts are given as
the template takes them: as strings, or in parts.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_ERROR = 500
# Stands for a message's text while a template is tried out; none writes it of itself.
_PROBE = "6tQ0vXw3mZ"


class Generation(Extension):
    """`{% generation %}`, with which templates mark what the model wrote, changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: str, variables: dict[str, Any], most: int) -> str:
    """The text. Raises ValueError if it has more than `most` characters, or whatever jinja2 and the template raise."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    parts: list[str] = []
    length = 0
    for part in environment.from_string(template).generate(variables):
        parts.append(part)
        length += len(part)
        if length > most:
            raise ValueError(f"its text has more than {most} characters")
    text = "".join(parts)
    text.encode()  # raises if the template made half of a character
    return text


def suited(template: str, messages: list[dict[str, Any]], variables: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """The messages as they are; or, if more of their texts come out of the template so, with every text in parts:
    [{"type": "text", "text": text}]."""

    def found(probes: list[dict[str, Any]]) -> int:
        try:
            return render(template, {**variables, "messages": probes}, most).count(_PROBE)
        except Exception:
            return 0

    probes = [{**message, "content": _PROBE} if _is_text(message) else message for message in messages]
    as_text = found(probes)
    if as_text >= sum(map(_is_text, messages)) or as_text >= found(_in_parts(probes)):
        return messages
    return _in_parts(messages)


def _is_text(message: dict[str, Any]) -> bool:
    return isinstance(message.get("content"), str)


def _in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if _is_text(message) else message
        for message in messages
    ]


def main() -> None:
    cpu_seconds, memory, most = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    request = json.load(sys.stdin)
    template, variables = request["template"], request["variables"]
    try:
        messages = suited(template, variables["messages"], variables, most)
        answer = {"text": render(template, {**variables, "messages": messages}, most)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}".rstrip(": ")[:_MAX_ERROR]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
