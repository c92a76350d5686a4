"""The small checkpoint taken through the main job once; every test looks at another part of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.evaluate.divergence import evaluate
from moejax.evaluate.text import chunks, read_text
from moejax.model import DeepseekV3
from moejax.pipeline.check import require_original
from moejax.pipeline.job import (
    Prepared,
    plan_within,
    prepare,
    provenance,
    split_calibration,
)
from moejax.planning import Plan
from moejax.progress import silent
from moejax.tokenizer import load_tokenizer
from moejax.transforms.compress import compress
from small_job import RECIPE, Job

Tokenize = Callable[[Path], np.ndarray]


@pytest.fixture(scope="session")
def tokenize(small: Path) -> Tokenize:
    tokenizer = load_tokenizer(small)
    return lambda text: chunks(tokenizer.encode(read_text(text).content), bos_token_id=tokenizer.bos_token_id)


@pytest.fixture(scope="session")
def prepared(small: Path, calibration_text: Path, tokenize: Tokenize) -> Prepared:
    calibrated = split_calibration(tokenize(calibration_text), calibration=2, probed=1)
    made = provenance(read_text(calibration_text), len(calibrated.chunks), RECIPE)
    return prepare(require_original(open_checkpoint(small)), calibrated, RECIPE, made, silent)


@pytest.fixture(scope="session")
def original(small: Path) -> DeepseekV3:
    """What `prepared` was made of."""
    return load_model(open_checkpoint(small))


@pytest.fixture(scope="session")
def divergence(prepared: Prepared, original: DeepseekV3) -> Callable[[DeepseekV3], float]:
    """The mean KL of another model on the chunks held out, as evaluation measures it."""

    def of(model: DeepseekV3) -> float:
        evaluation = evaluate(model, prepared.trials.calibrated.held_out, original)
        assert evaluation.kld_mean is not None
        return evaluation.kld_mean

    return of


@pytest.fixture(scope="session")
def planned_model(prepared: Prepared, original: DeepseekV3) -> Callable[[Plan], DeepseekV3]:
    """What a plan makes of the original."""
    statistics = prepared.trials.statistics.known
    assert statistics is not None
    return lambda plan: compress(original, plan, statistics)


@pytest.fixture(scope="session")
def smallest_bytes(prepared: Prepared) -> int:
    return prepared.problem.smallest().bytes


@pytest.fixture(scope="session")
def job(
    prepared: Prepared,
    original: DeepseekV3,
    smallest_bytes: int,
    heldout_text: Path,
    tokenize: Tokenize,
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    """The job at a budget at which some blocks keep all their experts and others do not."""
    budget, output = smallest_bytes * 8 // 5, tmp_path_factory.mktemp("job") / "out"
    planned = plan_within(prepared, budget, silent)
    written = prepared.write(planned.plan, output, budget)
    evaluation = evaluate(load_model(open_checkpoint(output)), tokenize(heldout_text), original)
    return Job(budget, planned, written, output, evaluation)
