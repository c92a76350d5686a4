"""A forecast as tables and as JSON."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from moejax.pipeline.forecast import Forecast, LayerForecast, Split
from moejax.planning.parameters import Parameters
from moejax.planning.size import format_size
from moejax.report.figures import Rows, alike, kind_figures, memory_figures, memory_rows

SPLIT_COLUMNS = ("experts kept", "bits per expert weight", "rounding", "pruning", "KL predicted")


def forecast_rows(forecast: Forecast) -> Rows:
    """What the plan does, its bytes, its memory, and what it is predicted to lose."""
    return [
        *_parameter_rows(forecast),
        *_byte_rows(forecast),
        *memory_rows(forecast.memory, _device(forecast)),
        *_loss_rows(forecast),
    ]


def _parameter_rows(forecast: Forecast) -> Rows:
    before, after = forecast.before, forecast.after
    has_mtp = before.mtp > 0
    rows = [("parameters", f"{_billions(before.total)} -> {_billions(after.total)}")]
    if has_mtp:
        rows.append(("parameters with MTP", f"{_billions(before.with_mtp)} -> {_billions(after.with_mtp)}"))
    if forecast.dropped_mtp:
        rows.append(("MTP blocks dropped", str(forecast.dropped_mtp)))
    rows.append(("active per token", f"{_billions(before.active)} -> {_billions(after.active)}"))
    layers = _decoder_layers(forecast)
    if layers:
        config, kept = forecast.config, [layer.kept for layer in layers]
        per_token = alike([layer.experts_per_token for layer in layers])
        survive = mean(layer.choices_kept for layer in layers)
        worst = min(layers, key=lambda layer: layer.gate_mass_kept)
        rows += [
            ("experts kept", f"{mean(kept):.1f} of {config.n_routed_experts} a layer, {min(kept)} to {max(kept)}"),
            ("pruned by", forecast.pruned_by),
            (
                "gate mass kept",
                f"{100 * mean(layer.gate_mass_kept for layer in layers):.2f} %, least in layer {worst.block}: "
                f"{100 * worst.gate_mass_kept:.2f} %",
            ),
            ("experts per token", f"{per_token} of {config.num_experts_per_tok}"),
            (
                "original choices that survive",
                f"{survive * config.num_experts_per_tok:.2f} of {config.num_experts_per_tok} ({100 * survive:.1f} %)",
            ),
        ]
    return rows


def _byte_rows(forecast: Forecast) -> Rows:
    size, parts, budget = forecast.bytes, forecast.parts, forecast.budget
    return [
        ("budget", "what the device holds" if budget is None else f"{format_size(budget)} ({budget} bytes)"),
        ("folder", f"{format_size(size.total)} ({size.total} bytes)"),
        ("  weights", f"{parts.codes} bytes"),
        ("  scales", f"{parts.scales} bytes"),
        ("  padding of words", f"{parts.padding} bytes"),
        ("  descriptions of arrays", f"{size.descriptions} bytes"),
        ("  manifest", f"{size.manifest} bytes"),
        ("  tokenizer files", f"{size.copied} bytes" if size.copied else "0 bytes: none beside the config"),
        ("against BF16", f"{format_size(2 * forecast.elements)}, {2 * forecast.elements / size.total:.2f}x smaller"),
        ("bits per original weight", f"{8 * size.total / forecast.elements:.3f}"),
    ]


def _loss_rows(forecast: Forecast) -> Rows:
    losses = forecast.losses
    return [
        ("KL predicted", f"{forecast.predicted:.3f}"),
        ("  summed costs of rounding experts", f"{losses.experts:.3f}"),
        ("  of rounding other weights", f"{losses.others:.3f}"),
        ("  of pruning", f"{losses.pruning:.3f}"),
        ("routing statistics", forecast.scores_source or "none: all experts taken to be alike"),
        ("sensitivities", forecast.sensitivity_source),
    ]


def layer_rows(forecast: Forecast) -> list[tuple[str, ...]]:
    """Layer, experts kept, kept per group, experts per token, gate mass kept, choices kept."""
    return [
        (
            _layer_name(layer, forecast),
            str(layer.kept),
            " ".join(map(str, layer.kept_per_group)),
            str(layer.experts_per_token),
            f"{100 * layer.gate_mass_kept:.1f} %",
            f"{100 * layer.choices_kept:.1f} %",
        )
        for layer in forecast.layers
    ]


def split_rows(splits: Sequence[Split]) -> list[tuple[str, ...]]:
    """A row per share of experts kept; the best is marked."""
    best = min((own.predicted for own in splits if own.predicted is not None), default=None)
    return [_split_row(own, own.predicted is not None and own.predicted == best) for own in splits]


def _split_row(own: Split, is_best: bool) -> tuple[str, ...]:
    share = f"{100 * own.share_kept:.1f} %"
    if own.losses is None or own.predicted is None:
        return (share, "does not fit", "", "", "")
    return (
        share,
        f"{own.expert_bits:.2f}",
        f"{own.losses.others + own.losses.experts:.3f}",
        f"{own.losses.pruning:.3f}",
        f"{own.predicted:.3f}" + (" best" if is_best else ""),
    )


def forecast_figures(forecast: Forecast) -> dict[str, Any]:
    """Every printed figure, for JSON."""
    return {
        "bytes": forecast.bytes.total,
        "budget_bytes": forecast.budget,
        "ratio": 2 * forecast.elements / forecast.bytes.total,
        "bits_per_weight": 8 * forecast.bytes.total / forecast.elements,
        "bytes_by_part": {
            **forecast.parts._asdict(),
            "descriptions": forecast.bytes.descriptions,
            "manifest": forecast.bytes.manifest,
            "tokenizer": forecast.bytes.copied,
        },
        "dropped_mtp_blocks": forecast.dropped_mtp,
        "weights_without_format": forecast.without_format,
        "parameters": {"before": _counts(forecast.before), "after": _counts(forecast.after)},
        "layers": [
            {
                "layer": layer.block,
                "experts_kept": layer.kept,
                "kept_per_group": layer.kept_per_group,
                "experts_per_token": layer.experts_per_token,
                "gate_mass_kept": layer.gate_mass_kept,
                "choices_kept": layer.choices_kept,
            }
            for layer in forecast.layers
        ],
        "pruned_by": forecast.pruned_by,
        "memory": memory_figures(forecast.memory, _device(forecast)),
        "kld_predicted": forecast.predicted,
        "losses": forecast.losses._asdict(),
        "splits": [
            {
                "share_kept": own.share_kept,
                "bits_per_expert_weight": own.expert_bits,
                "losses": own.losses._asdict() if own.losses else None,
                "kld_predicted": own.predicted,
            }
            for own in forecast.splits
        ],
        "expert_scores": forecast.scores_source,
        "sensitivity": forecast.sensitivity_source,
        **kind_figures(forecast.kinds),
    }


def _device(forecast: Forecast) -> tuple[int, int] | None:
    """Its memory and the longest context that fits, if the memory was given."""
    if forecast.memory_limit is None or forecast.longest_context is None:
        return None
    return forecast.memory_limit, forecast.longest_context


def _counts(own: Parameters) -> dict[str, int]:
    return {"total": own.total, "with_mtp": own.with_mtp, "active": own.active}


def _decoder_layers(forecast: Forecast) -> list[LayerForecast]:
    return [layer for layer in forecast.layers if layer.block < forecast.config.num_hidden_layers]


def _layer_name(layer: LayerForecast, forecast: Forecast) -> str:
    return str(layer.block) + (" (MTP)" if layer.block >= forecast.config.num_hidden_layers else "")


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
