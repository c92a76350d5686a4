"""A forecast of the small model as rows and as JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moejax.pipeline.forecast import Forecast, Split
from moejax.pipeline.outlook import SHARES, plan
from moejax.planning.predict import Losses
from moejax.planning.size import format_size
from moejax.report.forecast import SPLIT_COLUMNS, forecast_figures, forecast_rows, layer_rows, split_rows


@pytest.fixture(scope="module")
def forecast(small_fp8: Path, small_scores: Path) -> Forecast:
    return plan(small_fp8 / "config.json", "508KB", expert_scores=small_scores, fit="4MB", context=1024)


@pytest.fixture
def rows(forecast: Forecast) -> dict[str, str]:
    found = forecast_rows(forecast)
    assert len(dict(found)) == len(found) and all(isinstance(part, str) for row in found for part in row)
    return dict(found)


def test_rows_of_parameters(forecast: Forecast, rows: dict[str, str]) -> None:
    before, after = forecast.before, forecast.after
    assert rows["parameters"] == f"{before.total / 1e6:.1f}M -> {after.total / 1e6:.1f}M"
    assert rows["parameters with MTP"] == f"{before.with_mtp / 1e6:.1f}M -> {after.with_mtp / 1e6:.1f}M"
    kept = [layer.kept for layer in forecast.layers[:2]]
    assert rows["experts kept"] == f"{sum(kept) / 2:.1f} of 12 a layer, {min(kept)} to {max(kept)}"
    assert rows["experts per token"] == "3 of 3" and rows["pruned by"] == "squared gate weights"
    worst = min(forecast.layers[:2], key=lambda layer: layer.gate_mass_kept)
    assert rows["gate mass kept"].endswith(f"least in layer {worst.block}: {100 * worst.gate_mass_kept:.2f} %")
    survive = sum(layer.choices_kept for layer in forecast.layers[:2]) / 2
    assert rows["original choices that survive"] == f"{3 * survive:.2f} of 3 ({100 * survive:.1f} %)"


def test_dropped_mtp_blocks_are_named(forecast: Forecast, rows: dict[str, str]) -> None:
    assert "MTP blocks dropped" not in rows and forecast_figures(forecast)["dropped_mtp_blocks"] == 0
    dropped = replace(forecast, dropped_mtp=1)
    assert dict(forecast_rows(dropped))["MTP blocks dropped"] == "1"
    assert forecast_figures(dropped)["dropped_mtp_blocks"] == 1


def test_rows_of_bytes_add_up(forecast: Forecast, rows: dict[str, str]) -> None:
    names = ("weights", "scales", "padding of words", "descriptions of arrays", "manifest", "tokenizer files")
    parts = [int(rows[f"  {name}"].removesuffix(" bytes")) for name in names]
    assert sum(parts) == forecast.bytes.total and min(parts) > 0
    assert rows["budget"] == "508.00 KB (508000 bytes)"
    assert rows["folder"].endswith(f"({forecast.bytes.total} bytes)")
    alone = replace(forecast, bytes=replace(forecast.bytes, copied=0))
    assert dict(forecast_rows(alone))["  tokenizer files"] == "0 bytes: none beside the config"


def test_rows_of_memory(forecast: Forecast, rows: dict[str, str]) -> None:
    assert rows["  latent cache, 1 x 1024 tokens, bfloat16"] == "983.04 KB"
    assert rows["  of 4.00 MB"] == f"fits, {format_size(4_000_000 - forecast.memory.total)} left"
    assert rows["  longest context that fits"] == f"{forecast.longest_context} tokens"
    small = dict(forecast_rows(replace(forecast, memory_limit=100_000)))
    assert small["  of 100.00 KB"].startswith("does not fit, ") and small["  of 100.00 KB"].endswith(" too much")
    assert small["  longest context that fits"] == "none: the weights alone are too much"
    unlimited = dict(forecast_rows(replace(forecast, memory_limit=None)))
    assert not [name for name in unlimited if name.startswith(("  of 4", "  longest"))]


def test_rows_of_losses(forecast: Forecast, rows: dict[str, str]) -> None:
    assert rows["KL predicted"] == f"{forecast.predicted:.3f}"
    assert rows["  of pruning"] == f"{forecast.losses.pruning:.3f}"
    assert rows["routing statistics"] == "made up"
    nothing = dict(forecast_rows(replace(forecast, scores_source=None)))
    assert nothing["routing statistics"] == "none: all experts taken to be alike"


def test_a_row_per_layer(forecast: Forecast) -> None:
    found = layer_rows(forecast)
    assert [row[0] for row in found] == ["1", "2", "3 (MTP)"]
    first = forecast.layers[0]
    assert found[0] == (
        "1",
        str(first.kept),
        " ".join(map(str, first.kept_per_group)),
        "3",
        f"{100 * first.gate_mass_kept:.1f} %",
        f"{100 * first.choices_kept:.1f} %",
    )


def test_a_row_per_share_and_the_best_is_marked(forecast: Forecast) -> None:
    found = split_rows(forecast.splits)
    assert [row[0] for row in found] == ["100.0 %", "87.5 %", "75.0 %", "62.5 %", "50.0 %", "37.5 %", "25.0 %"]
    assert all(len(row) == len(SPLIT_COLUMNS) == 5 for row in found)
    assert sum(row[4].endswith(" best") for row in found) == 1
    # Routing needs half of the experts.
    assert found[5] == ("37.5 %", "does not fit", "", "", "") and found[6][1] == "does not fit"


def test_rows_of_made_up_shares() -> None:
    splits = [
        Split(1.0, None, None, None),
        Split(0.75, 1.494, Losses(0.01, 0.257, 0.164), 0.549),
        Split(0.5, 2.21, Losses(0.005, 0.1, 0.506), 0.575),
    ]
    assert split_rows(splits) == [
        ("100.0 %", "does not fit", "", "", ""),
        ("75.0 %", "1.49", "0.267", "0.164", "0.549 best"),
        ("50.0 %", "2.21", "0.105", "0.506", "0.575"),
    ]
    assert split_rows(splits[:1]) == [("100.0 %", "does not fit", "", "", "")]


def test_figures_for_json(forecast: Forecast) -> None:
    figures = json.loads(json.dumps(forecast_figures(forecast), allow_nan=False))
    assert figures["bytes"] == sum(figures["bytes_by_part"].values()) == forecast.bytes.total
    assert figures["ratio"] * figures["bits_per_weight"] == pytest.approx(16)
    assert [own["share_kept"] for own in figures["splits"]] == list(SHARES)
    assert figures["splits"][-1] == {
        "share_kept": 0.25,
        "bits_per_expert_weight": None,
        "losses": None,
        "kld_predicted": None,
    }
    assert [own["layer"] for own in figures["layers"]] == [1, 2, 3]
    assert figures["layers"][0]["kept_per_group"] == list(forecast.layers[0].kept_per_group)
    assert figures["memory"]["memory_limit_bytes"] == 4_000_000 and figures["memory"]["fits"] is True
    assert figures["memory"]["longest_context"] == forecast.longest_context
    unlimited = forecast_figures(replace(forecast, memory_limit=None))["memory"]
    assert unlimited.keys() == {"weights", "cache", "workspace", "total", "context", "batch"}
    assert set(figures["losses"]) == {"others", "experts", "pruning"}
    assert figures["expert_scores"] == "made up" and figures["pruned_by"] == "squared gate weights"
