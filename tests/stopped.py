"""Jobs that are stopped where something is finished, and begun again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moejax.checkpoint.journal import Journal
from moejax.pipeline.job import Result
from moejax.pipeline.work import Work, work_in

MADE_OF = {"recipe": "a", "version of moejax": "1"}

Run = Callable[[Work], Result]


@contextmanager
def stopped_behind(count: int) -> Iterator[list[str]]:
    """As if the process were killed when so many lines have been added to journals, and states kept; yields what they
    are called."""
    added: list[str] = []
    add, keep_states = Journal.add, Work.keep_states

    def stop_behind(name: str) -> None:
        added.append(name)
        if len(added) == count:
            raise KeyboardInterrupt

    def add_and_stop(journal: Journal, name: str, value: Any) -> None:
        add(journal, name, value)
        stop_behind(name)

    def keep_and_stop(work: Work, stage: str, passed: int, states: Mapping[str, np.ndarray]) -> None:
        keep_states(work, stage, passed, states)
        stop_behind(f"states of {stage} behind block {passed}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", add_and_stop)
        patch.setattr(Work, "keep_states", keep_and_stop)
        yield added


def stopped_again_and_again(run: Run, folder: Path, after: list[int]) -> tuple[Result, list[list[str]]]:
    """The result of a job that is stopped so many times, and what each run added."""
    runs = []
    for count in after:
        with pytest.raises(KeyboardInterrupt), stopped_behind(count) as added, work_in(folder, MADE_OF) as work:
            run(work)
        runs.append(added)
    with stopped_behind(0) as added, work_in(folder, MADE_OF) as work:
        result = run(work)
    return result, [*runs, added]
