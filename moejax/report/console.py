"""Progress bars on standard error, and the tables that commands print."""

import math
import time
from collections.abc import Iterable, Sequence, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Step = TypeVar("Step")
# Columns of a table that goes to a file or a pipe, where there is no terminal to fit.
_FILE_WIDTH = 160


def progress_bar(steps: Iterable[Step], description: str) -> Iterable[Step]:
    """The steps, with a bar that shows how many are done and the time left."""
    total = len(steps) if isinstance(steps, Sized) else None
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # The time left is from all steps: of the last half minute alone, as by default, nothing is left of a long step.
    console = Console(stderr=True)
    with Progress(*columns, console=console, speed_estimate_period=math.inf, disable=not console.is_interactive) as bar:
        task = bar.add_task(description, total=total)
        for step in steps:
            yield step
            bar.advance(task)
    if not console.is_interactive:  # a file or a pipe is told of what comes to its end alone
        console.print(bar.get_renderable())


class Phases:
    """Progress bars that remember the seconds each phase of a job took, by what it is called; one that comes several
    times takes their sum. Where seconds are `expected`, every such phase begins by saying what is left, as much longer
    or shorter as those before it were."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, float] = {}

    def __call__(self, steps: Iterable[Step], description: str, /) -> Iterable[Step]:
        if description in self.expected and description not in self.seconds:
            self._tell(description)
        started, before = time.monotonic(), self.seconds.get(description, 0.0)
        try:
            yield from progress_bar(steps, description)
        finally:
            self.seconds[description] = before + time.monotonic() - started

    def _tell(self, beginning: str) -> None:
        """Of what begins and what comes behind: a job that goes on may not have come by those before."""
        done = [name for name in self.expected if name in self.seconds]
        taken, thought = (sum(own[name] for name in done) for own in (self.seconds, self.expected))
        ratio = taken / thought if thought > 0 else 1.0
        names = list(self.expected)
        left = {name: ratio * self.expected[name] for name in names[names.index(beginning) :]}
        each = ", ".join(f"{name} {format_seconds(own)}" for name, own in left.items())
        print(f"about {format_seconds(sum(left.values()))} to go: {each}", flush=True)


def format_seconds(seconds: float) -> str:
    """`40 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output, its first column to the left and the others to the right."""
    table = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(table)
