"""How checkpoints are read for an evaluation within a limit of memory: whole, or part by part."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from moejax.checkpoint.load import Checkpoint, load_model
from moejax.checkpoint.source import CheckpointSource
from moejax.errors import InputError, note
from moejax.evaluate.memory import Needs
from moejax.machine import resident_memory
from moejax.model import DeepseekV3
from moejax.model.source import Source
from moejax.planning.size import format_size
from moejax.progress import Progress

Read = Callable[[Checkpoint], DeepseekV3 | Source]

# The least that a refusal asks for is a multiple of this: what a process holds at its start varies by less.
_STEP = 50_000_000


def read_within(limit: int, asked: Needs, path: Path, chunks: int, progress: Progress) -> tuple[Read, int]:
    """How the checkpoints of an evaluation on so many chunks are read so that this process holds no more than `limit`
    bytes, and the chunks of a wave (see `evaluate`). A note says so where they are read part by part.

    Raises InputError, naming the checkpoint's path, if not even that fits.
    """
    held = resident_memory()
    if held + asked.in_memory <= limit:
        return partial(load_model, progress=progress), asked.batch
    wave = min(asked.chunks_per_wave(limit - held), -(-chunks // asked.batch) * asked.batch)
    if not wave:
        least = -(-(held + asked.part_by_part(asked.batch)) // _STEP) * _STEP
        raise InputError(
            f"{path} cannot be evaluated in {format_size(limit)}, not even block by block; {least / 1e9:.2f}GB would do"
        )
    passes = -(-chunks // wave)
    note(
        f"{format_size(held + asked.in_memory)} for everything does not fit {format_size(limit)}: "
        f"read block by block from disk, {passes} time{'s' * (passes > 1)} over"
    )
    return CheckpointSource, wave
