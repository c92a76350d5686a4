import json

import pytest

from command_line import moejax
from moejax.errors import MAX_MESSAGE, InputError, Note, brief, note


def test_a_message_of_one_short_line_is_kept() -> None:
    message = "/a/path with blanks/größe.json: hidden_size is '64'; it must be a positive integer"
    assert str(InputError(message)) == message


def test_a_message_is_one_line_whatever_was_found() -> None:
    message = str(InputError("a\nb\r\tc\x1b[31m\u2028\ud800\0d"))
    assert message == r"a\nb\r\tc\x1b[31m\u2028\ud800\x00d"


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    message = str(InputError(f"config.json: {'x' * 10**6} is none; accepted are 1 and 2"))
    assert message.startswith("config.json: xxx") and message.endswith("xxx is none; accepted are 1 and 2")
    assert " ... " in message and len(message) <= MAX_MESSAGE


@pytest.mark.parametrize("value", ["64", "it's", -3, 2.5, True, None, [128, 0], {"type": "linear", "factor": 4.0}])
def test_a_short_value_is_shown_as_it_is(value: object) -> None:
    assert brief(value) == repr(value) or brief(value) == repr(dict(sorted(value.items())))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps("x" * 10**6),
        "1" + "0" * 4000,
        json.dumps(list(range(10**5))),
        json.dumps({str(n): n for n in range(10**5)}),
        "[" * 900 + "]" * 900,
        '{"a":' * 300 + "1" + "}" * 300,
        json.dumps([["x" * 1000] * 100] * 100),
    ],
    ids=["string", "integer", "list", "object", "nested", "nested objects", "strings"],
)
def test_only_a_part_of_a_huge_value_is_shown(text: str) -> None:
    assert len(brief(json.loads(text))) <= 200


def test_notes_are_printed_by_commands_and_warnings_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        note("a byte-order mark was left out\n")
        note("a byte-order mark was left out\n")

    monkeypatch.setattr("moejax.commands.inspect.run_inspect", work)
    ran = moejax("inspect")
    assert (ran.code, ran.err) == (0, "moejax: a byte-order mark was left out\\n\n")
    with pytest.warns(Note, match="byte-order"):
        work()
