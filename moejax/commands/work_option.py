"""The option `--work` of `moejax compress`: what is finished is kept, and how a stopped job goes on is said."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moejax.checkpoint.atomic import partial_path
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.native_writer import require_no_other_job
from moejax.errors import InputError, note
from moejax.pipeline.work import Work, work_in
from moejax.sharding import Crew
from moejax.version import __version__


def require_work_beside(work: Path | None, output: Path) -> None:
    """Raises InputError if the folder lies in the output, or without one if another job is at work on the output."""
    if work is None:
        require_no_other_job(output)
    elif _is_within(work, output) or _is_within(work, partial_path(output)):
        raise InputError(f"--work {work} lies in the output {output}; another folder is needed")


def _is_within(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


@contextmanager
def kept_work(
    folder: Path | None, output: Path, checkpoint: HuggingFaceCheckpoint, made_of: Mapping[str, str], crew: Crew
) -> Iterator[Work]:
    """What the job, made of the checkpoint and of these, has found out, kept in a folder if one is given. If it
    is stopped, how it goes on is said."""
    named = {"version of moejax": __version__, "checkpoint": checkpoint.fingerprint(), **made_of}
    with work_in(folder, named, crew) as work:
        try:
            yield work
        except (KeyboardInterrupt, OSError, MemoryError, RuntimeError):  # the last is XLA's out of memory, too
            if output.exists():
                figures_of = ["moejax", "evaluate", str(output), "--against", str(checkpoint.path)]
                note(f"{output} is complete; its figures are told by: {shlex.join(figures_of)}")
            elif folder is not None:
                places = " and ".join(str(own) for own in (folder, partial_path(output)) if own.exists())
                note(f"what is finished is kept in {places}; this goes on: {shlex.join(['moejax', *sys.argv[1:]])}")
            raise
