"""Renders a chat template, in a process of its own and within limits: a template is a program that strangers wrote.

    python -I render_template.py CPU_SECONDS MEMORY_BYTES OUTPUT_CHARACTERS < request.json > answer.json

It imports nothing of moejax. The request has `template`, its source, and `variables`; the answer has `text` or `error`.
Blanks, filters, functions and tags are those of Hugging Face transformers' chat templates.
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


def main() -> None:
    cpu_seconds, memory, most = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    request = json.load(sys.stdin)
    try:
        answer = {"text": render(request["template"], request["variables"], most)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}".rstrip(": ")[:_MAX_ERROR]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
