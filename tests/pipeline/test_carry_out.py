"""A plan carried out by itself on the small checkpoint, with error feedback and sequential calibration."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moejax.calibrate import Statistics, calibrate
from moejax.checkpoint.atomic import partial_path
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.source import CheckpointSource
from moejax.checkpoint.store import folder_bytes
from moejax.formats import ExpertWeights, format_name
from moejax.ledger import ledger_of
from moejax.model import DeepseekV3, named_leaves
from moejax.model.leaves import Weight
from moejax.model.source import ModelSource, model_of
from moejax.pipeline import job
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.check import check_plan_bytes, require_original
from moejax.pipeline.shapes import ready
from moejax.pipeline.work import Work
from moejax.progress import silent
from moejax.transforms.choose_damping import choose_damping
from moejax.transforms.compress import Collected, calibrate_and_compress
from native_checkpoint import files
from sequential_plan import PLAN
from stopped import stopped_again_and_again


@dataclass(frozen=True)
class Whole:
    """What is compressed, in memory, and its statistics, made all at once."""

    model: DeepseekV3
    calibrated: Calibrated
    statistics: Statistics


def whole(checkpoint: HuggingFaceCheckpoint, calibrated: Calibrated) -> Whole:
    model = model_of(ready(ModelSource(load_model(checkpoint)), PLAN.method))
    own, held_out = (calibrate(model, chunks, hessians=True) for chunks in calibrated)
    return Whole(model, calibrated, choose_damping(model, own, held_out))


@pytest.fixture(scope="module")
def done(
    small: Path,
    calibration_text: Path,
    heldout_text: Path,
    tokenize: Callable[[Path], np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, job.Result, Whole]:
    """The folder, what is told of it, and what was carried out, read into memory."""
    calibrated = job.split_calibration(tokenize(calibration_text), calibration=2, probed=1)
    checkpoint, output = require_original(open_checkpoint(small)), tmp_path_factory.mktemp("carried") / "out"
    size, evaluated = check_plan_bytes(checkpoint, PLAN, None), tokenize(heldout_text)
    result = job.carry_out(checkpoint, PLAN, calibrated, {}, output, size, evaluated, ledger_of(None), silent)
    return output, result, whole(checkpoint, calibrated)


def in_sequence(origin: Whole, statistics: Statistics) -> dict[str, Weight]:
    parts = Collected()
    calibrate_and_compress(ModelSource(origin.model), PLAN, *origin.calibrated, parts, known=statistics)
    return parts.leaves


def test_the_bytes_are_those_of_the_plan(small: Path, done: tuple[Path, job.Result, Whole]) -> None:
    output, result, _ = done
    assert (
        result.bytes == folder_bytes(output) == check_plan_bytes(require_original(open_checkpoint(small)), PLAN, None)
    )
    assert (result.plan, result.planned, result.predicted) == (PLAN, None, None)
    assert (
        result.evaluation is not None and result.evaluation.kld_mean is not None and 0 < result.evaluation.kld_mean < 1
    )


def test_weights_are_rounded_in_sequence_with_the_damping_that_was_chosen(
    done: tuple[Path, job.Result, Whole],
) -> None:
    """On so few tokens it is chosen for every matrix; what is written has it, and it makes a difference."""
    output, _, origin = done
    chosen = [*origin.statistics.blocks[1].damping.values(), origin.statistics.head_damping]
    assert len(chosen) > 5 and {float(multiple) for multiple in chosen if multiple is not None} - {1.0}
    written = named_leaves(load_model(open_checkpoint(output)))
    expected = in_sequence(origin, origin.statistics)
    usual = in_sequence(origin, without_damping(origin.statistics))
    differing = 0
    for name, leaf in written.items():
        if format_name(in_one_bucket(leaf)).startswith("int2"):
            own, other = (in_one_bucket(leaves[name]).words for leaves in (expected, usual))
            np.testing.assert_array_equal(in_one_bucket(leaf).words, own, err_msg=name)
            differing += not np.array_equal(own, other)
    assert differing > 2


@pytest.mark.filterwarnings("ignore::moejax.errors.Note")
def test_stopped_and_begun_again_it_goes_on_to_the_same_bytes(
    done: tuple[Path, job.Result, Whole],
    small: Path,
    heldout_text: Path,
    tokenize: Callable[[Path], np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind the first block, and behind the second: those are read back, and the later ones calibrated on them. Its
    figures are the same too, evaluated as where both models do not fit the memory."""
    (unbroken, result, origin), output = done, tmp_path / "out"
    checkpoint, evaluated = require_original(open_checkpoint(small)), tokenize(heldout_text)
    monkeypatch.setattr(job, "read_within", lambda *_: (CheckpointSource, 8))

    def run(work: Work) -> job.Result:
        size, ledger = result.bytes, ledger_of(None)
        return job.carry_out(checkpoint, PLAN, origin.calibrated, {}, output, size, evaluated, ledger, silent, work)

    again, runs = stopped_again_and_again(run, tmp_path / "work", [1, 1])
    assert runs == [["layer_0"], ["layer_1"], ["layer_2", "mtp_0", "outer"]]
    assert files(output) == files(unbroken)
    assert again.evaluation == result.evaluation
    assert not partial_path(output).exists()


def in_one_bucket(leaf: Any) -> Any:
    """The weight, experts of one format among them, as one leaf."""
    return leaf.buckets[0] if isinstance(leaf, ExpertWeights) else leaf


def without_damping(statistics: Statistics) -> Statistics:
    blocks = tuple(
        replace(own, damping={}, experts=own.experts and replace(own.experts, damping={})) for own in statistics.blocks
    )
    return replace(statistics, blocks=blocks, head_damping=None)
