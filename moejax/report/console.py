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
    times takes their sum."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, steps: Iterable[Step], description: str, /) -> Iterable[Step]:
        started = time.monotonic()
        try:
            yield from progress_bar(steps, description)
        finally:
            self.seconds[description] = self.seconds.get(description, 0.0) + time.monotonic() - started


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
