"""What users are told of their input, bad or merely surprising, in a place every folder may import."""

import reprlib
import warnings

MAX_MESSAGE = 2000
"""The most characters of a message; paths and lists of choices stay far below."""
_MAX_VALUE = 200

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxdict, _BRIEF.maxlist = 3, 4, 8
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that says why and what would be accepted.

    What was found stands in it, and may be anything. So a message over `MAX_MESSAGE` characters loses its middle, and
    line breaks and other characters that are not printable are escaped.
    """

    def __init__(self, message: str):
        super().__init__(_printable(_shortened(message, MAX_MESSAGE)))


class InternalError(RuntimeError):
    """moejax did not do what it says it does; the message is one sentence that says what."""


class Note(UserWarning):
    """What was done is not all that the input promises or asks for, but what a user would want; one sentence says so.

    The command line prints it on standard error; in Python it is a warning.
    """


def note(message: str) -> None:
    """Say so. A command says each sentence once; in Python the filters of warnings decide."""
    warnings.warn(Note(_printable(_shortened(message, MAX_MESSAGE))), stacklevel=3)


def brief(value: object) -> str:
    """repr(value) where that is short, parts of it where it is not: for values that a file holds, however nested."""
    return _shortened(_BRIEF.repr(value), _MAX_VALUE)


def _shortened(text: str, most: int) -> str:
    kept = most // 2 - 3
    return text if len(text) <= most else f"{text[:kept]} ... {text[-kept:]}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
