"""A plan carried out on the parts of a model, one after another, and written."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from moejax.calibrate import OutputWeights, Statistics
from moejax.checkpoint.native import item_of
from moejax.checkpoint.native_writer import NativeWriter, native_writer
from moejax.model.leaves import Weight
from moejax.model.source import Source
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.room import NO_ROOM, Room
from moejax.pipeline.shapes import Shapes
from moejax.pipeline.work import NOT_KEPT, Work
from moejax.planning import Plan
from moejax.planning.plan import digest
from moejax.progress import Progress
from moejax.transforms.compress import calibrate_and_compress, compress_by
from moejax.transforms.on_the_way import Unseen
from moejax.transforms.rounder import Afresh, Rounder


def write_plan(
    source: Source,
    shapes: Shapes,
    plan: Plan,
    calibrated: Calibrated | None,
    output: Path,
    budget: int,
    progress: Progress,
    known: Statistics | None = None,
    rounder: Rounder | None = None,
    work: Work = NOT_KEPT,
    room: Room = NO_ROOM,
    outputs: Sequence[OutputWeights] | None = None,
) -> int:
    """Carry a plan out on what it compresses, whose `shapes` these are, and write the checkpoint; returns its bytes.

    Of the model, one part and what becomes of it are in memory, and the compressed embedding. `known`, `outputs` and
    `rounder` as in `calibrate_and_compress`; states have the `room`; without a rounder all is rounded afresh, on the
    devices of the work's crew; without `calibrated` nothing goes through the model. Where work is kept, items that an
    earlier run of the job has finished are taken over; the folder is the same. Raises what `native_writer` and
    `calibrate_and_compress` raise, and InputError for processes that have come to different plans.
    """
    crew = work.crew
    crew.agree({"plan": digest(plan)})
    # What the rounder knows has other Hessians than a sequential method's.
    rounder = Afresh(crew) if rounder is None or plan.method.sequential else rounder
    description, model = shapes.description(plan), shapes.compressed(plan)
    job = None if work.job is None else f"{digest(plan)} of {work.job}"
    with native_writer(model, output, description, shapes.copied, budget, job, progress, crew) as writer:
        parts = _Items(writer)
        if writer.missing and calibrated is None:
            compress_by(source, plan, Unseen(source.config), parts, rounder=rounder, progress=progress)
        elif writer.missing and calibrated is not None:
            calibrate_and_compress(
                source,
                plan,
                *calibrated,
                parts,
                known=known,
                outputs=outputs,
                rounder=rounder,
                kept=room.kept,
                within=room.within,
                progress=progress,
            )
    return writer.bytes


class _Items:
    """Weights on their way to a writer, which takes whole items."""

    def __init__(self, writer: NativeWriter):
        self._writer = writer
        self._waiting: dict[str, dict[str, Weight]] = {}

    def known(self, name: str) -> Callable[[], dict[str, Weight]] | None:
        item, _ = item_of(f"{name}.")
        return partial(self._writer.read, item) if item in self._writer.finished else None

    def add(self, leaves: Mapping[str, Weight]) -> None:
        for name, leaf in leaves.items():
            item, within = item_of(name)
            if item not in self._writer.finished:
                self._waiting.setdefault(item, {})[within] = leaf
        for item in [item for item, own in self._waiting.items() if len(own) == len(self._writer.items[item])]:
            self._writer.add(item, self._waiting.pop(item))
