"""A job with hardly any memory makes the bytes that one with much of it does."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint.abstract import abstract_original
from moejax.checkpoint.load import open_checkpoint
from moejax.checkpoint.shelf import OnDisk, shelf_beside
from moejax.errors import InputError
from moejax.ledger import Ledger
from moejax.machine import resident_memory
from moejax.model import Config, sliced
from moejax.pipeline import job
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.check import require_original
from moejax.pipeline.room import Room, room_in, working_bytes
from moejax.planning import Method
from moejax.progress import silent
from moejax.resources import config_path
from native_checkpoint import files
from small_job import RECIPE
from small_models import RAW_CONFIG

GB = 10**9
CHUNKS = np.random.RandomState(0).randint(RAW_CONFIG["vocab_size"], size=(6, 32)).astype(np.int32)


def experts_together(config: Config, count: int) -> int:
    return count * 3 * config.hidden_size * config.moe_intermediate_size


@pytest.mark.slow
def test_memory_changes_no_byte_and_slices_no_plan(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With error feedback and slices of five experts: nothing kept between walks and all states and Hessians in files
    gives the bytes that ample room does. One slice of all experts: the same survivors, and nearly the same divergence.
    """
    checkpoint = require_original(open_checkpoint(small))
    kept: list[OnDisk | jax.Array] = []

    def compressed(name: str, room: Room | None) -> job.Result:
        calibrated = Calibrated(CHUNKS[:3], CHUNKS[3:5])
        recipe = replace(RECIPE, formats=RECIPE.formats[:2], error_feedback=True)
        prepared = job.prepare(checkpoint, calibrated, recipe, {}, silent, room=room)
        return job.compress_checkpoint(prepared, tmp_path / name, 1_700_000, CHUNKS[5:], Ledger(1 << 50), silent)

    whole = compressed("whole", None)
    monkeypatch.setattr(sliced, "MOST_NUMBERS", experts_together(checkpoint.config, 5))
    monkeypatch.setattr(sliced, "MOST_STATES", 16 * checkpoint.config.hidden_size)
    ample = compressed("ample", None)
    with shelf_beside(tmp_path / "states", 0) as shelf:

        def put(array: jax.Array) -> OnDisk | jax.Array:
            kept.append(shelf.put(array))
            return kept[-1]

        compressed("narrow", Room(0, 0, 1 << 30, put))
    assert len(kept) > 100 and all(isinstance(own, OnDisk) for own in kept)
    assert files(tmp_path / "narrow") == files(tmp_path / "ample")
    assert [own.keep for own in ample.plan.blocks] == [own.keep for own in whole.plan.blocks]
    assert ample.evaluation is not None and whole.evaluation is not None
    assert ample.evaluation.kld_mean == pytest.approx(whole.evaluation.kld_mean, rel=0.02)


def test_what_does_not_fit_goes_to_the_disk(tmp_path: Path) -> None:
    model = abstract_original(RAW_CONFIG)
    needed = working_bytes(model, 512, Method())
    with room_in(Ledger(resident_memory() + needed + GB // 10), model, 512, Method(), tmp_path / "out") as room:
        large = jax.numpy.zeros((30, 1000, 1000))
        assert isinstance(room.kept(large), OnDisk) and isinstance(room.kept(large[0, :3]), jax.Array)
        assert 0 < room.statistics + room.rounded + room.within < GB // 10
    assert not list(tmp_path.iterdir())


def test_too_little_is_refused_with_what_would_do(tmp_path: Path) -> None:
    model = abstract_original(RAW_CONFIG)
    message = r"^a block of the model, .* cannot be worked on in 300\.00 MB; \d+\.\d\dGB would do$"
    with (
        pytest.raises(InputError, match=message),
        room_in(Ledger(300_000_000), model, 512, Method(), tmp_path / "out"),
    ):
        raise AssertionError
    assert not list(tmp_path.iterdir())


def test_deepseek_v3_fits_small_machines() -> None:
    """By a block at a time, whatever its number of layers; with Hessians it takes those of its widest inputs more."""
    import json

    model = abstract_original(json.loads(config_path("models", "deepseek_v3").read_text()))
    methods = Method(), Method(error_feedback=True), Method(error_feedback=True, output_fit=True)
    plain, fed_back, fitted = (working_bytes(model, 512, method) for method in methods)
    assert 5 * GB < plain < 10 * GB and plain + 4 * GB < fed_back < plain + 12 * GB
    assert fed_back < fitted < 24 * GB
    # A layer's share of 103 GB is 1.8 GB, which is there twice; of 600 GB it is 10 GB.
    assert working_bytes(model, 512, Method(), 103 * GB) == plain
    assert working_bytes(model, 512, Method(), 600 * GB) > 20 * GB
