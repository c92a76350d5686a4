"""`moejax plan`."""

import time
from pathlib import Path

from moejax.checkpoint.toml_file import write_toml
from moejax.commands.common import cost_of_the_run, read_recipe
from moejax.errors import InputError
from moejax.pipeline.outlook import plan
from moejax.planning.plan import to_json
from moejax.report import figures
from moejax.report.console import print_table
from moejax.report.forecast import SPLIT_COLUMNS, forecast_figures, forecast_rows, layer_rows, split_rows


def run_plan(
    config: str,
    budget: str | None,
    fit: str | None,
    expert_scores: Path | None,
    context: int | None,
    batch: int,
    recipe: str,
    drop_mtp: bool,
    output: Path | None,
    json: Path | None,
) -> None:
    """A forecast, printed; and the plan in a file, if one is given."""
    started = time.monotonic()
    figures.require_writable(json, output)
    figures.require_writable(output)
    if output is not None and output.exists():
        raise InputError(f"{output}: exists already; give a path that is free")
    forecast = plan(
        config,
        budget,
        fit=fit,
        expert_scores=expert_scores,
        context=context,
        batch=batch,
        recipe=read_recipe(recipe),
        drop_mtp=drop_mtp,
    )
    columns = ("layer", "experts kept", "of each group", "experts per token", "gate mass kept", "choices kept")
    if forecast.layers:
        print_table("experts, layer by layer", columns, layer_rows(forecast))
    print_table("weights", ("kind", "numbers", "bytes", "bits each"), figures.kind_rows(forecast.kinds))
    if forecast.layers:
        print_table("pruning or bits, at this budget", SPLIT_COLUMNS, split_rows(forecast.splits))
    cost = cost_of_the_run(started)
    print_table(config, ("figure", "value"), [*forecast_rows(forecast), *figures.cost_rows(cost)])
    figures.write_json(json, {**forecast_figures(forecast), **cost})
    if output is not None:
        write_toml(output, to_json(forecast.plan))
