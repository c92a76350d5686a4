"""What pruning costs, layer by layer: measured with re-routing, beside what gate weights alone would say."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.model import Config
from moejax.pipeline.prices import LayerPruning, PruningProbe

# Of every layer the probe nearest to this share of experts pruned is shown.
_SHARE = 0.25


def pruning_rows(pruning: Mapping[int, LayerPruning], config: Config) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Column names and a row per layer."""
    columns = ("layer", "pruned", "gate mass lost", "gate² lost", "error, dropped", "error, re-routed", "ratio", "KL")
    return columns, [_row(probe, config) for probe in _shown(pruning, config)]


def _shown(pruning: Mapping[int, LayerPruning], config: Config) -> list[PruningProbe]:
    wanted = _SHARE * config.n_routed_experts
    return [min(own.probes, key=lambda probe: abs(probe.pruned - wanted)) for own in pruning.values() if own.probes]


def _row(probe: PruningProbe, config: Config) -> tuple[str, ...]:
    error = probe.error
    return (
        str(probe.block),
        f"{probe.pruned} of {config.n_routed_experts}",
        f"{100 * error.gate_lost:.1f} %",
        f"{100 * error.gate2_lost:.1f} %",
        f"{100 * error.dropped:.1f} %",
        f"{100 * error.rerouted:.1f} %",
        f"{probe.rerouting_ratio:.2f}",
        f"{probe.divergence:.5f}",
    )


def pruning_figures(pruning: Mapping[int, LayerPruning]) -> dict[str, Any]:
    """Every probe, for JSON; nothing if none was made."""
    if not pruning:
        return {}
    probes = [probe for own in pruning.values() for probe in own.probes]
    return {
        "pruning_probes": [
            {
                "layer": probe.block,
                "pruned": probe.pruned,
                **{name: float(value) for name, value in probe.error._asdict().items()},
                "rerouting_ratio": probe.rerouting_ratio,
                "kld": probe.divergence,
            }
            for probe in probes
        ]
    }
