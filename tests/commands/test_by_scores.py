"""`compress --expert-scores`: a plan by given routing statistics, and nothing goes through the model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import refused, run
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.native import NativeCheckpoint
from moejax.evaluate.divergence import evaluate
from small_models import CONFIG


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """By which the odd experts of every layer are hardly chosen."""
    path, count = tmp_path / "scores.json", [100, 1] * (CONFIG.n_routed_experts // 2)
    layers = [index for index in range(CONFIG.num_hidden_layers) if CONFIG.is_moe(index)]
    own = {"scores": count, "activations": count}
    path.write_text(json.dumps({"source": "somewhere", **{f"layer_{index}": own for index in layers}}))
    return path


def test_what_is_chosen_seldom_is_pruned_and_nothing_is_run(
    small: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a block was run")

    for module in ("moejax.model.sliced", "moejax.pipeline.crossing", "moejax.evaluate.forward"):
        monkeypatch.setattr(f"{module}.run_block", refuse, raising=False)
        monkeypatch.setattr(f"{module}.enter", refuse, raising=False)
    output, figures = tmp_path / "out", tmp_path / "figures.json"
    options: list[Any] = ["--budget", "500KB", "--output", output, "--json", figures]
    printed = run("compress", small, "--expert-scores", scores, *options)
    assert "planning by somewhere; nothing goes through the model" in printed
    told = json.loads(figures.read_text())
    assert told["bytes"] <= told["budget_bytes"] == 500_000 and "kld_mean" not in told
    written = open_checkpoint(output)
    assert isinstance(written, NativeCheckpoint) and written.provenance["expert_scores"] == "somewhere"
    kept = [block["keep"] for block in written.plan["blocks"] if block.get("keep")]
    pruned = [set(range(CONFIG.n_routed_experts)) - set(numbers(own)) for own in kept]
    assert any(pruned) and all(e % 2 for own in pruned for e in own)


def numbers(ranges: str | list[int]) -> list[int]:
    if isinstance(ranges, list):
        return ranges
    parts = [own.split("-") for own in ranges.split()]
    return [e for own in parts for e in range(int(own[0]), int(own[-1]) + 1)]


def test_it_is_rounded_as_if_every_input_counted_alike(small: Path, scores: Path, tmp_path: Path) -> None:
    run("compress", small, "--expert-scores", scores, "--budget", "1.5MB", "--output", tmp_path / "out")
    original, compressed = (load_model(open_checkpoint(own)) for own in (small, tmp_path / "out"))
    found = evaluate(compressed, np.arange(64).reshape(2, 32), original)
    assert found.kld_mean is not None and found.kld_mean < 0.02


@pytest.mark.parametrize("option", ["--plan", "--calibration", "--text"])
def test_what_would_not_be_read_is_refused(small: Path, scores: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("")
    given = ["--budget", "600KB", "--expert-scores", scores, option, tmp_path / "file"]
    message = refused(tmp_path, "compress", small, *given, "--output", tmp_path / "out")
    assert f"--expert-scores plans with nothing going through the model; {option} beside it is not accepted" in message


def test_a_recipe_that_asks_for_calibration_is_refused(small: Path, scores: Path, tmp_path: Path) -> None:
    given = ["--budget", "600KB", "--expert-scores", scores, "--recipe", "best"]
    message = refused(tmp_path, "compress", small, *given, "--output", tmp_path / "out")
    assert "nothing goes through the model, which error_feedback and sequential ask for" in message
