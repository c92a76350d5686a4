"""Quality at equal bytes: the planned result against baselines of the same code, and against llama.cpp's figures.

usage: python tools/bench/quality.py CHECKPOINT --calibration FILE --text FILE --output FOLDER [--llama-cpp TABLE.json]

At every budget three plans are carried out with the same rounding: *planned* by `compress`; *uniform*, no pruning, the
largest width that fits everywhere and the rest spent raising whole layers from layer 0; *frequency*, pruning by
frequency at r = 0.75, then uniform. With llama.cpp's table (rows of `type`, `bytes`, `kld_mean`), the planned result is
measured at the bytes of each of its rows too. Everything is calibrated on one text and measured on the other. One line
of JSON per row goes to FOLDER/rows.jsonl as it comes; the table is printed at the end.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.tokenizer import load_tokenizer
from moejax.errors import InputError
from moejax.evaluate.divergence import evaluate, log_probabilities
from moejax.evaluate.text import chunks, read_text
from moejax.pipeline import compress as job
from moejax.pipeline.options import Settings
from moejax.planning import Plan
from moejax.planning.baselines import all_experts, most_needed, uniform_plan
from moejax.planning.size import parse_budget
from moejax.report.console import progress_bar
from moejax.transforms.prune import expert_scores, min_per_group, pruning_order

BUDGETS = ("4x", "6x", "8x", "12.6x")
BATCH = 8


def main() -> None:
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = job.require_original(open_checkpoint(options.checkpoint))
    prepared, held_out = prepare(checkpoint, options)
    base = [jax.block_until_ready(log_probabilities(prepared.model, batch, "float32")) for batch in batches(held_out)]
    rows = []
    with (options.output / "rows.jsonl").open("w") as log:
        for method, label, budget, plan in plans(prepared, options):
            if plan is None:
                row = {"method": method, "budget": label, "bytes": None}
            else:
                row = {"method": method, "budget": label, **carry_out(prepared, plan, budget, held_out, base, options)}
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
    print_baselines(rows, options.budgets)
    if options.llama_cpp:
        print_peer(rows, llama_cpp_rows(options))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--calibration-chunks", type=int, default=256)
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS))
    return parser.parse_args()


def prepare(checkpoint: Any, options: argparse.Namespace) -> tuple[job.Prepared, np.ndarray]:
    """Everything measured on the calibration text, and the held-out chunks."""
    tokenizer = load_tokenizer(checkpoint.path)
    source, text = read_text(options.calibration), read_text(options.text)
    calibration, held_out = (
        chunks(tokenizer.encode(t.content), bos_token_id=tokenizer.bos_token_id) for t in (source, text)
    )
    calibrated, probed = job.split_calibration(calibration, options.calibration_chunks, 8)
    settings = Settings()
    made = job.provenance(source, len(calibrated), settings)
    return job.prepare(checkpoint, calibrated, probed, settings, made, progress_bar), held_out


def plans(prepared: job.Prepared, options: argparse.Namespace) -> Iterator[tuple[str, str, int, Plan | None]]:
    """Method, budget as written, budget in bytes, and the plan, None where the method cannot meet the budget."""
    elements, config = prepared.checkpoint.num_elements, prepared.model.config
    keep = {
        "uniform": all_experts(prepared.costs),
        "frequency": most_needed(frequency_orders(prepared), config.n_routed_experts, 0.75),
    }
    for label in options.budgets:
        budget = parse_budget(label, elements)
        yield "planned", label, budget, planned_or_none(prepared, budget)
        for method, kept in keep.items():
            yield method, label, budget, uniform_plan(prepared.costs, config, kept, prepared.size_of, budget)
    for row in llama_cpp_rows(options) if options.llama_cpp else []:
        yield "planned", row["type"], row["bytes"], planned_or_none(prepared, row["bytes"])


def planned_or_none(prepared: job.Prepared, budget: int) -> Plan | None:
    try:
        return job.plan_within(prepared, budget, progress_bar).plan
    except InputError:
        return None


def frequency_orders(prepared: job.Prepared) -> dict[int, np.ndarray]:
    """Per block, experts in the order in which pruning by frequency takes them."""
    config = prepared.model.config
    group_E = np.arange(config.n_routed_experts) // (config.n_routed_experts // config.n_group)
    at_least = min_per_group(config, config.num_experts_per_tok)
    sums = {block: prepared.statistics.blocks[block].experts for block in prepared.costs.experts}
    return {
        block: pruning_order(expert_scores(own, "frequency"), group_E, at_least)
        for block, own in sums.items()
        if own is not None
    }


def carry_out(
    prepared: job.Prepared,
    plan: Plan,
    budget: int,
    held_out: np.ndarray,
    base: list[jax.Array],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Write a plan's checkpoint, read it back and measure it."""
    started = time.monotonic()
    folder = options.output / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    size = prepared.write(plan, folder, budget)
    figures = evaluate(load_model(open_checkpoint(folder)), held_out, base, batch=BATCH, progress=progress_bar)
    kept = [len(block.keep) for block in plan.blocks if block.keep is not None]
    return {
        "bytes": size,
        "ppl": figures.ppl,
        "ln_ppl_ratio": figures.ln_ppl_ratio,
        "kld_mean": figures.kld_mean,
        "kld_p999": figures.kld_p999,
        "same_top1": figures.same_top1,
        "experts": " ".join(map(str, kept)),
        "seconds": time.monotonic() - started,
    }


def batches(held_out: np.ndarray) -> Iterator[jax.Array]:
    return (jax.numpy.asarray(held_out[i : i + BATCH]) for i in range(0, len(held_out), BATCH))


def llama_cpp_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The peer's rows without the original's."""
    rows: list[dict[str, Any]] = json.loads(options.llama_cpp.read_text())
    return [row for row in rows if "kld_mean" in row]


def print_baselines(rows: list[dict[str, Any]], budgets: list[str]) -> None:
    """One line of Markdown per budget and method."""
    print("| budget | method | bytes | experts kept | perplexity | KL mean | KL 99.9 % | equal top-1 |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        if row["budget"] not in budgets:
            continue
        if row["bytes"] is None:
            print(f"| {row['budget']} | {row['method']} | cannot be met | | | | | |")
            continue
        print(
            f"| {row['budget']} | {row['method']} | {row['bytes']:,} | {row['experts']} | {row['ppl']:.3f} "
            f"| {row['kld_mean']:.4f} | {row['kld_p999']:.3f} | {row['same_top1']:.1f} % |"
        )


def print_peer(rows: list[dict[str, Any]], peer: list[dict[str, Any]]) -> None:
    """One line of Markdown per row of llama.cpp's table, beside the planned result at its bytes."""
    planned = {row["budget"]: row for row in rows if row["method"] == "planned" and row["bytes"] is not None}
    print("\n| llama.cpp's type | its bytes | its KL | moejax's bytes | moejax's KL | ratio | its top-1 | our top-1 |")
    print("|---|---|---|---|---|---|---|---|")
    for own in peer:
        ours = planned.get(own["type"])
        if ours is None:
            print(f"| {own['type']} | {own['bytes']:,} | {own['kld_mean']:.4f} | cannot be met | | | | |")
            continue
        print(
            f"| {own['type']} | {own['bytes']:,} | {own['kld_mean']:.4f} | {ours['bytes']:,} | {ours['kld_mean']:.4f} "
            f"| {ours['kld_mean'] / own['kld_mean']:.2f} | {own['same_top']:.1f} % | {ours['same_top1']:.1f} % |"
        )


if __name__ == "__main__":
    main()
