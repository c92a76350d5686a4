"""Every printed figure, as JSON values under stable keys and as rows of a table."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moejax.checkpoint.atomic import write_text
from moejax.checkpoint.summary import KindSummary
from moejax.errors import InputError
from moejax.evaluate.divergence import Evaluation
from moejax.evaluate.text import Text
from moejax.model import Config
from moejax.pipeline.job import Planned
from moejax.planning import Plan
from moejax.planning.memory import DeviceMemory
from moejax.planning.size import format_size

Rows = list[tuple[str, str]]


def require_writable(path: Path | None, *others: Path | None) -> None:
    """Raise InputError, before the work whose figures are to be written, if they could not be, or would be written over
    another output."""
    if path is not None and any(own is not None and own.absolute() == path.absolute() for own in others):
        raise InputError(f"{path}: is given for two outputs; a path of its own is needed for each")
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise InputError(f"{path}: cannot be written; give a file in a folder that exists")


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures if a path is given, whole or not at all. Raises ValueError if one is NaN or infinite, which no
    number in JSON is."""
    if path is not None:
        write_text(path, json.dumps(figures, indent=2, allow_nan=False) + "\n")


def evaluation_figures(evaluation: Evaluation, text: Text) -> dict[str, Any]:
    """The figures of one evaluation; those that need an original are absent without one."""
    figures = {name: value for name, value in asdict(evaluation).items() if value is not None}
    return {"text": {"source": text.source, "sha256": text.sha256}, **figures}


def evaluation_rows(evaluation: Evaluation, predicted: float | None = None) -> Rows:
    """Perplexity, and the divergence from the original if there is one, beside what was predicted if anything was."""
    rows = [("tokens scored", str(evaluation.tokens)), ("perplexity", f"{evaluation.ppl:.4f}")]
    if evaluation.mtp_ppl is not None:
        rows += [("perplexity of the token after the next", f"{evaluation.mtp_ppl:.4f}")]
    if evaluation.base_ppl is not None:
        rows += [
            ("perplexity of the original", f"{evaluation.base_ppl:.4f}"),
            ("ln(PPL ratio)", f"{evaluation.ln_ppl_ratio:.5f}"),
            ("KL divergence, mean", f"{evaluation.kld_mean:.5f}"),
            *([("KL divergence predicted", f"{predicted:.5f}")] if predicted is not None else []),
            ("KL divergence, 99.9 %", f"{evaluation.kld_p999:.4f}"),
            ("equal top-1", f"{evaluation.same_top1:.2f} %"),
        ]
    return rows


def size_figures(size: int, elements: int) -> dict[str, Any]:
    """Bytes of a folder against the numbers of the original checkpoint."""
    return {"bytes": size, "ratio": 2 * elements / size, "bits_per_weight": 8 * size / elements}


def size_rows(figures: dict[str, Any]) -> Rows:
    """The same as rows."""
    return [
        ("folder", f"{format_size(figures['bytes'])} ({figures['bytes']} bytes)"),
        ("against BF16", f"{figures['ratio']:.2f}x smaller"),
        ("bits per original weight", f"{figures['bits_per_weight']:.3f}"),
    ]


def memory_rows(memory: DeviceMemory, device: tuple[int, int] | None) -> Rows:
    """What a device takes to decode, and, given its memory and the longest context that fits, whether it can."""
    sequences = f"{memory.batch} x {memory.context} tokens"
    rows = [
        ("device memory: weights", format_size(memory.weights)),
        (f"  latent cache, {sequences}, bfloat16", format_size(memory.cache)),
        ("  workspace of a decode step", format_size(memory.workspace)),
        ("  in all", format_size(memory.total)),
    ]
    if device is None:
        return rows
    limit, longest = device
    left = limit - memory.total
    fits = f"fits, {format_size(left)} left" if left >= 0 else f"does not fit, {format_size(-left)} too much"
    return [
        *rows,
        (f"  of {format_size(limit)}", fits),
        ("  longest context that fits", f"{longest} tokens" if longest else "none: the weights alone are too much"),
    ]


def memory_figures(memory: DeviceMemory, device: tuple[int, int] | None) -> dict[str, Any]:
    """What `memory_rows` prints, for JSON."""
    figures = {
        "weights": memory.weights,
        "cache": memory.cache,
        "workspace": memory.workspace,
        "total": memory.total,
        "context": memory.context,
        "batch": memory.batch,
    }
    if device is None:
        return figures
    limit, longest = device
    return figures | {"memory_limit_bytes": limit, "fits": memory.total <= limit, "longest_context": longest}


def cost_rows(cost: dict[str, Any]) -> Rows:
    """What the run itself took."""
    peak, limit = format_size(cost["peak_memory_bytes"]), cost.get("memory_limit_bytes")
    return [
        ("time", f"{cost['seconds']:.0f} s"),
        *(
            (f"of it {name}", f"{seconds:.0f} s{_expectation(cost, name)}")
            for name, seconds in cost.get("seconds_by_phase", {}).items()
        ),
        ("peak memory", peak if limit is None else f"{peak} of {format_size(limit)}"),
    ]


def _expectation(cost: dict[str, Any], phase: str) -> str:
    """What was said of a phase before it began, if anything."""
    seconds = cost.get("expected_seconds_by_phase", {}).get(phase)
    return "" if seconds is None else f", {seconds:.0f} s expected"


def plan_rows(plan: Plan, config: Config) -> Rows:
    """What a plan does to the experts."""
    moe_blocks = [block for block in plan.blocks if block.keep is not None]
    if not moe_blocks:
        return []
    kept = " ".join(str(len(block.keep or ())) for block in moe_blocks)
    per_token = alike([block.experts_per_token for block in moe_blocks])
    return [
        ("experts kept per layer", f"{kept} of {config.n_routed_experts}"),
        ("experts per token", f"{per_token} of {config.num_experts_per_tok}"),
        ("routing scale per layer", " ".join(f"{block.routing_scale:.2f}" for block in moe_blocks)),
    ]


def search_rows(planned: Planned | None) -> Rows:
    """What was tried on the way to a plan: measured beside predicted divergence."""
    if planned is None:
        return []
    rows = [
        (
            f"tried: {_pruning(c.pruning_weight)}",
            f"KL {c.divergence:.5f}, predicted {c.predicted:.5f}, at best {c.best_divergence:.5f} with a routing scale",
        )
        for c in planned.candidates
    ]
    for choice in planned.activated:
        scaled = "fitted routing scale" if choice.is_scaled else "routing scale 1"
        rows.append(
            (f"tried: {alike(choice.experts_per_token)} experts a token, {scaled}", f"KL {choice.divergence:.5f}")
        )
    return rows


def alike(values: Sequence[Any]) -> str:
    """`4` if all values are 4, else all of them."""
    return " ".join(map(str, values if len(set(values)) > 1 else values[:1]))


def _pruning(weight: float) -> str:
    return "no pruning" if weight == float("inf") else f"pruning at {100 * weight:.0f} % of its price"


def plan_figures(plan: Plan) -> dict[str, Any]:
    """The same as `plan_rows` for JSON."""
    moe_blocks = [block for block in plan.blocks if block.keep is not None]
    return {
        "experts_kept": [len(block.keep or ()) for block in moe_blocks],
        "experts_per_token": [block.experts_per_token for block in moe_blocks],
        "routing_scale": [block.routing_scale for block in moe_blocks],
    }


def search_figures(planned: Planned | None) -> dict[str, Any]:
    """The same as `search_rows` for JSON."""
    if planned is None:
        return {}
    return {
        "kld_predicted": planned.predicted,
        "weights_without_format": planned.without_format,
        "tried_plans": [
            {
                "pruning_weight": None if c.pruning_weight == float("inf") else c.pruning_weight,
                "kld_predicted": c.predicted,
                "kld_probe": c.divergence,
                "kld_probe_best": c.best_divergence,
            }
            for c in planned.candidates
        ],
        "tried_experts_per_token": [
            {"experts_per_token": a.experts_per_token, "routing_scale": a.routing_scales, "kld_probe": a.divergence}
            for a in planned.activated
        ],
    }


def kind_figures(kinds: Sequence[KindSummary]) -> dict[str, Any]:
    """Numbers, bytes and bits per number by kind of weight."""
    return {
        "numbers_by_kind": {kind.kind: kind.elements for kind in kinds},
        "bytes_by_kind": {kind.kind: kind.bytes for kind in kinds},
        "bits_by_kind": {kind.kind: kind.bits_per_weight for kind in kinds},
    }


def kind_rows(kinds: Sequence[KindSummary]) -> list[tuple[str, ...]]:
    """Kind, numbers, bytes, bits per number; and their total."""
    total = KindSummary("total", sum(kind.elements for kind in kinds), sum(kind.bytes for kind in kinds))
    return [
        (kind.kind, f"{kind.elements:,}", format_size(kind.bytes), f"{kind.bits_per_weight:.3f}")
        for kind in [*kinds, total]
    ]
