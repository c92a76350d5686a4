"""The small checkpoint taken through the main job once; every test looks at another part of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.load import open_checkpoint
from moejax.evaluate.text import chunks, read_text
from moejax.pipeline.compress import (
    Prepared,
    evaluate_written,
    plan_within,
    prepare,
    provenance,
    require_original,
    split_calibration,
)
from moejax.progress import silent
from moejax.tokenizer import load_tokenizer
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
def smallest_bytes(prepared: Prepared) -> int:
    return prepared.problem.smallest().bytes


@pytest.fixture(scope="session")
def job(
    prepared: Prepared,
    smallest_bytes: int,
    heldout_text: Path,
    tokenize: Tokenize,
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    """The job at a budget at which some blocks keep all their experts and others do not."""
    budget, output = smallest_bytes * 8 // 5, tmp_path_factory.mktemp("job") / "out"
    planned = plan_within(prepared, budget, silent)
    written = prepared.origin.write(planned.plan, output, budget)
    evaluation = evaluate_written(output, prepared.model, tokenize(heldout_text), silent)
    return Job(budget, planned, written, output, evaluation)
