import json

import pytest

from moejax.model import config_from_hf
from moejax.pipeline.prices import LayerPruning, PruningProbe
from moejax.report.pruning import pruning_figures, pruning_rows
from moejax.transforms.prune import PruningError
from small_checkpoint import CONFIG as RAW_CONFIG

CONFIG = config_from_hf(RAW_CONFIG)


def probe(block: int, pruned: int) -> PruningProbe:
    error = PruningError(rerouted=0.22, dropped=0.25, gate2_lost=0.2, gate_lost=0.1234)  # type: ignore[arg-type]
    return PruningProbe(block, pruned, pruned / 1000, error)


def layer(block: int, *counts: int) -> LayerPruning:
    return LayerPruning(None, None, tuple(probe(block, count) for count in counts))  # type: ignore[arg-type]


# A quarter of 12 experts is 3; the MTP block, 3, has no probes.
PRUNING = {1: layer(1, 1, 2, 4, 6), 2: layer(2, 6), 3: layer(3)}


def test_a_row_for_every_layer_that_was_probed_near_a_quarter_pruned() -> None:
    columns, rows = pruning_rows(PRUNING, CONFIG)
    assert [row[:2] for row in rows] == [("1", "2 of 12"), ("2", "6 of 12")]
    assert rows[0] == ("1", "2 of 12", "12.3 %", "20.0 %", "25.0 %", "22.0 %", "1.10", "0.00200")
    assert all(len(row) == len(columns) == 8 for row in rows)


def test_every_probe_is_a_figure() -> None:
    figures = json.loads(json.dumps(pruning_figures(PRUNING)))
    assert [(own["layer"], own["pruned"]) for own in figures["pruning_probes"]] == [
        (1, 1),
        (1, 2),
        (1, 4),
        (1, 6),
        (2, 6),
    ]
    assert figures["pruning_probes"][1] == {
        "layer": 1,
        "pruned": 2,
        "rerouted": 0.22,
        "dropped": 0.25,
        "gate2_lost": 0.2,
        "gate_lost": 0.1234,
        "rerouting_ratio": pytest.approx(1.1),
        "kld": 0.002,
    }


def test_nothing_probed_is_nothing_reported() -> None:
    assert pruning_figures({}) == {} and pruning_rows({}, CONFIG)[1] == []
