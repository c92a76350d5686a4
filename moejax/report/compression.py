"""What `moejax compress` has made, for users to see."""

from typing import Any

from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import Checkpoint, abstract_model
from moejax.checkpoint.summary import summarize
from moejax.evaluate.text import Text
from moejax.pipeline.check import Limit
from moejax.pipeline.fit_device import Device
from moejax.pipeline.job import Result
from moejax.planning.memory import device_memory
from moejax.report import figures
from moejax.report.console import print_table
from moejax.report.pruning import pruning_figures, pruning_rows


def report_compression(
    checkpoint: HuggingFaceCheckpoint,
    limit: Limit,
    written: Checkpoint,
    result: Result,
    text: Text | None,
    cost: dict[str, Any],
) -> dict[str, Any]:
    """Print what has become of a checkpoint within a limit, and its cost; returns the figures, as JSON holds them."""
    kinds = summarize(written.abstract_leaves())
    print_table("weights", ("kind", "numbers", "bytes", "bits each"), figures.kind_rows(kinds))
    if result.pruning:
        columns, rows = pruning_rows(result.pruning, checkpoint.config)
        print_table("pruning, layer by layer", columns, rows)
    size = figures.size_figures(result.bytes, checkpoint.num_elements)
    device_rows, device_figures = _on_device(limit, written) if isinstance(limit, Device) else ([], {})
    evaluation_rows, evaluation_figures = [], {}
    if result.evaluation is not None and text is not None:
        evaluation_rows = figures.evaluation_rows(result.evaluation, result.predicted)
        evaluation_figures = figures.evaluation_figures(result.evaluation, text)
    rows = [
        *figures.size_rows(size),
        *device_rows,
        *figures.plan_rows(result.plan, checkpoint.config),
        *figures.search_rows(result.planned),
        *evaluation_rows,
        *figures.cost_rows(cost),
    ]
    print_table(str(written.path), ("figure", "value"), rows)
    return {
        **size,
        "budget_bytes": None if isinstance(limit, Device) else limit,
        **device_figures,
        "dropped_mtp_blocks": checkpoint.dropped_mtp,
        **evaluation_figures,
        **figures.plan_figures(result.plan),
        **figures.search_figures(result.planned),
        **pruning_figures(result.pruning),
        **figures.kind_figures(kinds),
        **cost,
    }


def _on_device(device: Device, written: Checkpoint) -> tuple[figures.Rows, dict[str, Any]]:
    """What the checkpoint takes of its device."""
    memory = device_memory(abstract_model(written), device.context, device.batch)
    given = device.memory, memory.longest_context(device.memory, written.config.max_position_embeddings)
    return figures.memory_rows(memory, given), {"memory": figures.memory_figures(memory, given)}
