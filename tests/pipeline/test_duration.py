"""How long a job takes is counted: here beside what a job does, and with pieces that are known."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import open_checkpoint
from moejax.checkpoint.source import CheckpointSource
from moejax.model import sliced
from moejax.model.moe import Experts, Routing
from moejax.pipeline import crossing, duration
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.check import require_original
from moejax.pipeline.duration import Pieces, expected, expected_seconds, timed_pieces
from moejax.pipeline.job import plan_within, prepare
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.room import Room
from moejax.progress import silent
from small_job import RECIPE
from small_models import RAW_CONFIG

SAMPLED = replace(RECIPE, formats=RECIPE.formats[2:5], prices="sampled")
CHUNKS = np.random.RandomState(0).randint(RAW_CONFIG["vocab_size"], size=(12, 32)).astype(np.int32)
CALIBRATED = Calibrated(CHUNKS[:8], CHUNKS[8:])
SEEN, T = 4, CHUNKS.shape[1]
NOTHING = Pieces(*[0.0] * 8)
TOGETHER = 20


@pytest.fixture
def checkpoint(small: Path, monkeypatch: pytest.MonkeyPatch) -> HuggingFaceCheckpoint:
    """With slices of five experts."""
    own = require_original(open_checkpoint(small))
    each = 3 * own.config.hidden_size * own.config.moe_intermediate_size
    monkeypatch.setattr(sliced, "MOST_NUMBERS", 5 * each)
    return own


def room(checkpoint: HuggingFaceCheckpoint) -> Room:
    """For all statistics, and so many runs within a layer."""
    return Room(statistics=1 << 30, within=TOGETHER * 4 * 4 * SEEN * T * checkpoint.config.hidden_size)


def counted(checkpoint: HuggingFaceCheckpoint, **one: float) -> dict[str, float]:
    return expected_seconds(replace(NOTHING, **one), checkpoint.config, SAMPLED, 8, SEEN, 2, TOGETHER)


def test_reads_and_runs_are_those_that_a_job_makes(
    checkpoint: HuggingFaceCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: Counter[str] = Counter()
    experts, onto = HuggingFaceCheckpoint.experts, sliced.onto

    def read(self: HuggingFaceCheckpoint, name: str, members: Sequence[int]) -> Any:
        done["read"] += name.endswith("gate") and len(members) > 1
        return experts(self, name, members)

    def through(
        of: Experts, members: Sequence[int], normed_TD: jax.Array, routing: Routing, routed_TD: jax.Array
    ) -> jax.Array:
        done["run"] += len(normed_TD)
        return onto(of, members, normed_TD, routing, routed_TD)

    monkeypatch.setattr(HuggingFaceCheckpoint, "experts", read)
    monkeypatch.setattr(crossing, "onto", through)
    prepared = prepare(checkpoint, CALIBRATED, SAMPLED, {}, silent, room=room(checkpoint))
    measured = dict(done)
    plans = len(plan_within(prepared, 1_700_000, silent).candidates)
    monkeypatch.setattr(duration, "PRUNING_WEIGHTS", range(plans + 1))  # how many differ is not known before
    for piece, unit in (("read", 1), ("run", SEEN * T)):
        seconds = counted(checkpoint, **{piece: 1.0})
        assert seconds["measuring"] == pytest.approx(measured[piece] / unit, rel=0.2)
        assert seconds["trying plans"] == pytest.approx((done[piece] - measured[piece]) / unit, rel=0.2)


def test_phases_are_sums_over_pieces(checkpoint: HuggingFaceCheckpoint) -> None:
    every = expected_seconds(Pieces(*range(1, 9)), checkpoint.config, SAMPLED, 8, SEEN, 2, TOGETHER)
    each = [counted(checkpoint, **{name: n + 1.0}) for n, name in enumerate(asdict(NOTHING))]
    for phase, seconds in every.items():
        assert seconds == pytest.approx(sum(own[phase] for own in each))
    assert set(every) == {"measuring", "trying plans", "compressing", "evaluating"}


def test_what_outputs_are_fitted_and_weighed_by_takes_time(checkpoint: HuggingFaceCheckpoint) -> None:
    """Which is beside all else, and a phase of its own."""
    pieces, fed_back = Pieces(*range(1, 9)), replace(SAMPLED, error_feedback=True)

    def phases(recipe: Recipe) -> dict[str, float]:
        return expected_seconds(pieces, checkpoint.config, recipe, 8, SEEN, 2, TOGETHER)

    without, fitted = phases(fed_back), phases(replace(fed_back, output_fit=True))
    assert fitted.pop("compressing") > without.pop("compressing") and fitted == without
    weighed = phases(replace(fed_back, row_feedback=True))
    assert next(iter(weighed)) == "weighing outputs"  # it comes first
    assert weighed.pop("weighing outputs") > 0 and weighed == phases(fed_back)


def test_pieces_take_time(checkpoint: HuggingFaceCheckpoint) -> None:
    source = CheckpointSource(checkpoint)
    pieces = timed_pieces(source, SAMPLED, CALIBRATED, CHUNKS[8:], room(checkpoint))
    assert min(pieces.imitated, pieces.rounded, pieces.head) > 0
    assert min(asdict(pieces).values()) >= 0 and pieces.read + pieces.run + pieces.trunk_run > 0
    assert min(expected(source, SAMPLED, CALIBRATED, room(checkpoint), 2).values()) > 0


def test_what_one_takes_follows_from_sums() -> None:
    counts: list[tuple[int, ...]] = [(2, 2, 1), (2, 6, 3), (4, 4, 1), (4, 12, 3)]
    seconds = [3.0 * a + 5 * b + 7 * c for a, b, c in counts]
    assert duration._fitted(counts, seconds) == pytest.approx([3, 5, 7])
    assert duration._fitted([(1,), (1,)], [-2.0, -1.0]) == [0.0]
