"""Statistics for walks that come one after another: kept or made again, they are those of `calibrate`."""

from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.calibrate import BlockStatistics, Inputs, calibrate
from moejax.checkpoint.load import open_checkpoint
from moejax.formats import Leaf, payload_bytes
from moejax.model.sliced import SlicedBlock, SlicedMtp
from moejax.model.source import ModelSource, Step, walk
from moejax.pipeline import job as main_job
from moejax.pipeline.calibrated import Calibrated, KeptStatistics
from moejax.pipeline.check import require_original
from moejax.pipeline.room import NO_ROOM
from moejax.planning import BlockPlan, Method
from moejax.progress import silent
from moejax.transforms.choose_damping import choose_damping
from moejax.transforms.on_the_way import Known, StatisticsOnTheWay
from native_checkpoint import files
from small_job import RECIPE, Job
from small_models import CONFIG, small_model

MODEL = small_model()
TOKENS = np.random.RandomState(0).randint(CONFIG.vocab_size, size=(3, 16))
CALIBRATED = Calibrated(TOKENS[:2], TOKENS[2:])


class Asking(Step):
    """A walk that asks for everything, or passes the first blocks by."""

    def __init__(self, statistics: StatisticsOnTheWay, passed: int = 0):
        self.blocks: list[BlockStatistics] = []
        self.head_inputs: Inputs | None = None
        self._statistics, self._passed = statistics, passed

    def embedding(self, embedding: Leaf) -> None:
        self._statistics.embedding(embedding, embedding)

    def block(self, index: int, block: SlicedBlock) -> None:
        if index < self._passed:
            self._statistics.pass_by(index, block, block.whole)
        else:
            self.blocks.append(self._statistics.block(index, block, BlockPlan()))

    def norm(self, gain_D: jax.Array) -> None:
        self._statistics.norm(gain_D)

    def mtp(self, depth: int, mtp: SlicedMtp) -> None:
        self.blocks.append(self._statistics.mtp(depth, mtp, BlockPlan()))

    def head(self, head: Leaf) -> None:
        self.head_inputs = self._statistics.head(head)


def asked(kept: KeptStatistics, passed: int = 0, mtp: int = CONFIG.num_nextn_predict_layers) -> Asking:
    step = Asking(kept.on_the_way(), passed)
    walk(ModelSource(MODEL), step, mtp=mtp, head=True)
    return step


def assert_equal(found: object, expected: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("method", "most_bytes"),
    [
        (Method(), 0),
        (Method(), 1 << 12),
        (Method(), 1 << 30),
        pytest.param(Method(error_feedback=True), 0, marks=pytest.mark.slow),
        pytest.param(Method(error_feedback=True), 1 << 30, marks=pytest.mark.slow),
    ],
    ids=["nothing", "a little", "all", "nothing of Hessians", "all of Hessians"],
)
def test_every_walk_sees_the_same(method: Method, most_bytes: int) -> None:
    """With Hessians of so few tokens, damping is chosen too."""
    expected, held_out = (calibrate(MODEL, chunks, hessians=method.error_feedback) for chunks in CALIBRATED)
    if method.error_feedback:
        expected = choose_damping(MODEL, expected, held_out)
    kept = KeptStatistics(CONFIG, method, CALIBRATED, most_bytes)
    for _ in range(2):
        step = asked(kept)
        assert_equal(step.blocks, list(expected.blocks))
        assert_equal(step.head_inputs, expected.head_inputs())
        assert (kept.known is not None) == (most_bytes > payload_bytes(expected.blocks))
        assert isinstance(kept.on_the_way(), Known) == (kept.known is not None)


def test_a_walk_that_passes_blocks_by_keeps_them_too() -> None:
    kept = KeptStatistics(CONFIG, Method(), CALIBRATED, 1 << 30)
    asked(kept, passed=2)
    whole = KeptStatistics(CONFIG, Method(), CALIBRATED, 1 << 30)
    asked(whole)
    assert kept.known is not None and whole.known is not None
    assert_equal(kept.known, whole.known)


def test_a_walk_that_leaves_blocks_out_keeps_nothing() -> None:
    kept = KeptStatistics(CONFIG, Method(), CALIBRATED, 1 << 30)
    asked(kept, mtp=0)
    assert kept.known is None


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_what_is_kept(
    small: Path, prepared: main_job.Prepared, job: Job, tmp_path: Path
) -> None:
    checkpoint, made = require_original(open_checkpoint(small)), dict(prepared.shapes.provenance)
    own = main_job.prepare(checkpoint, prepared.trials.calibrated, RECIPE, made, silent, room=NO_ROOM)
    planned = main_job.plan_within(own, job.budget, silent)
    assert own.trials.statistics.known is None
    own.write(planned.plan, tmp_path / "out", job.budget)
    assert files(tmp_path / "out") == files(job.output)
