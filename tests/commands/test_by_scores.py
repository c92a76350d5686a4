"""`compress --expert-scores`: a plan by given routing statistics, and nothing goes through the model."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from command_line import refused, run
from moejax.calibrate import Inputs
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.native import NativeCheckpoint
from moejax.formats import ExpertWeights, GroupedCodes, format_name, parse_format
from moejax.model import named_leaves
from moejax.transforms.rounding import round_weight, to_float32
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
        raise AssertionError("something goes through the model")

    for what in (
        "moejax.calibrate.calibration.Calibration.__init__",
        "moejax.pipeline.variants.Variants.__init__",
        "moejax.pipeline.job.evaluate",
        "moejax.model.sliced.enter",
        "moejax.model.sliced.run_block",
    ):
        monkeypatch.setattr(what, refuse)
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
    original, written = (dict(named_leaves(load_model(open_checkpoint(own)))) for own in (small, tmp_path / "out"))
    seen = 0
    for name in ("head", "layers.0.mlp.down", "layers.2.self_attn.o", "layers.2.mlp.experts.down"):
        before, after = original[name], written[name]
        if isinstance(before, ExpertWeights):
            assert isinstance(after, ExpertWeights)
            before, after = before.expert(0), after.expert(0)  # which is chosen often
        if isinstance(after, GroupedCodes):
            to, ones = parse_format(format_name(after)), Inputs(jnp.ones(before.shape[-1]))
            expected = round_weight(to_float32(before), ones, to)
            jax.tree.map(np.testing.assert_array_equal, after, expected)
            seen += 1
    assert seen >= 3


@pytest.mark.parametrize("option", ["--plan", "--calibration", "--text", "--calibration-chunks"])
def test_what_would_not_be_read_is_refused(small: Path, scores: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("")
    value = 8 if option == "--calibration-chunks" else tmp_path / "file"
    given = ["--budget", "600KB", "--expert-scores", scores, option, value]
    message = refused(tmp_path, "compress", small, *given, "--output", tmp_path / "out")
    assert f"--expert-scores plans with nothing going through the model; {option} beside it is not accepted" in message


def test_a_recipe_that_asks_for_calibration_is_refused(small: Path, scores: Path, tmp_path: Path) -> None:
    given = ["--budget", "600KB", "--expert-scores", scores, "--recipe", "best"]
    message = refused(tmp_path, "compress", small, *given, "--output", tmp_path / "out")
    assert "nothing goes through the model, which error_feedback and sequential ask for" in message
