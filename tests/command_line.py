"""Commands as a user types them, run in the tests' own process."""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from moejax import cli


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code and output."""

    code: int
    out: str
    err: str


def moejax(*arguments: object) -> Ran:
    """Run a command, in a terminal so wide that tables do not wrap."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["moejax", *map(str, arguments)]),
        mock.patch.dict(os.environ, COLUMNS="200"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def run(*arguments: object) -> str:
    """What a command that succeeds prints."""
    ran = moejax(*arguments)
    assert ran.code == 0, ran.err
    return ran.out


def refused(folder: Path, *arguments: object) -> str:
    """The one line that a command prints which refuses its input; it changes nothing in `folder`."""
    before = sorted(folder.rglob("*"))
    ran = moejax(*arguments)
    assert ran.code == 2
    assert ran.err.startswith("moejax: ") and ran.err.endswith("\n") and ran.err.count("\n") == 1, ran.err
    assert sorted(folder.rglob("*")) == before
    return ran.err
