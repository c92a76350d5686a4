"""How a command ends: what a user is told in a sentence, and the exit code."""

import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from moejax.errors import InputError, InternalError, Note

_STOPPED_BY = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


@contextmanager
def in_sentences() -> Iterator[None]:
    """What the block fails by ends the process: bad input in one sentence and exit code 2, a failure of the machine in
    one sentence and 1, an interrupt in one sentence and 128 and the signal's number, as shells have it. Notes are a
    line each. Other errors are bugs, and raised."""
    try:
        with warnings.catch_warnings(), _stopping():
            warnings.simplefilter("always", Note)
            warnings.showwarning = _shown_by(warnings.showwarning)
            yield
    except InputError as error:
        _leave(str(error), 2)
    except (OSError, MemoryError, RuntimeError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        _leave(sentence, 1)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        _leave(_STOPPED_BY[number], 128 + number)


@contextmanager
def _stopping() -> Iterator[None]:
    """What asks this process to end is an interrupt, so that all that ends one's work cleanly does so here too."""

    def interrupt(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number))

    before = {own: signal.getsignal(own) for own in (signal.SIGTERM, signal.SIGHUP)}
    asked = [own for own, handler in before.items() if handler != signal.SIG_IGN]  # nohup ignores SIGHUP
    for own in asked:
        signal.signal(own, interrupt)
    try:
        yield
    finally:
        for own in asked:
            signal.signal(own, before[own])


def _sentence(error: Exception) -> str | None:
    """What a failure of the machine says to a user; None if it is none."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    if isinstance(error, InternalError):
        return f"{error}: this is a bug of moejax, please report it"
    # XLA's own error, by what it says: its class is in JAX, which not every command imports.
    if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):
        size = re.search(r"allocat\w+ (\d[\d.]*) ?([kKMGTP]i?B|bytes|B)", str(error))
        wanted = f"; {size[1]} {size[2]} could not be had" if size else ""
        return f"out of memory{wanted}"
    return None


def _shown_by(otherwise: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: a note is one sentence, said once, others are as `otherwise` has them."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Note):
            if str(message) not in said:
                print(f"moejax: {message}", file=sys.stderr)
            said.add(str(message))
        else:
            otherwise(message, category, *where, **more)

    return show


def _leave(message: str, code: int) -> None:
    print(f"moejax: {message}", file=sys.stderr)
    sys.exit(code)
