"""Quality at equal bytes: recipes beside each other and beside llama.cpp's figures, and baselines of the same code.

usage: python tools/bench/quality.py CHECKPOINT --calibration FILE --output FOLDER [--text FILE]
           [--recipes fast best paper] [--llama-cpp TABLE.json] [--types Q2_K IQ2_M] [--budgets 4x 6x]

At every budget every recipe's plan is carried out as `compress` does it; a recipe is a name or a file. With the recipe
`fast` two plans that measure nothing come beside it: *uniform*, no pruning, the largest width that fits everywhere,
the rest spent raising whole layers from layer 0; *frequency*, pruning by frequency at r = 0.75, then uniform. With
llama.cpp's table (rows of `type`, `bytes`, `kld_mean`, `kld_999`, `ln_ppl_ratio`, `same_top`), all are measured at the
bytes of each of its rows too, or of `--types`.
Everything is calibrated on one text and measured on the other; without `--text`, on 40 chunks of the first that
calibration leaves out: what choices are made on. What was predicted before is shown beside it, and between them what is
measured on 40 chunks of the calibration text that nothing saw: what it is above the prediction is the prediction's
error, what is above that is the text's. One line of JSON per row goes to FOLDER/rows.jsonl as it comes; the tables are
printed at the end.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from baselines import all_experts, uniform_plan, with_pruning
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.commands.common import read_recipe
from moejax.errors import InputError
from moejax.evaluate.divergence import Predictions, evaluate
from moejax.evaluate.text import chunks, read_text
from moejax.pipeline import job
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.check import require_original
from moejax.pipeline.measure import measure
from moejax.pipeline.prices import Prices
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.work import NOT_KEPT
from moejax.planning import Plan
from moejax.planning.size import parse_budget
from moejax.planning.solve import menu_survivors
from moejax.report.console import progress_bar
from moejax.tokenizer import load_tokenizer

# The baseline that prunes first: by frequency, at the paper's share.
FREQUENCY = Recipe(formats=(), criterion="frequency", share_kept=0.75)
BUDGETS = ("4x", "6x", "8x", "12.6x")
BATCH = 8
# Chunks of the calibration text to measure on, beside the other text or where there is none.
LEFT_OUT = 40


def main() -> None:
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    texts = read_texts(options)
    rows: list[dict[str, Any]] = []
    with (options.output / "rows.jsonl").open("w") as log:
        for row in all_rows(texts, options):
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
    print_tables(rows, llama_cpp_rows(options) if options.llama_cpp else [])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["fast", "best", "paper"])
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--calibration-chunks", type=int, default=256)
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS))
    return parser.parse_args()


@dataclass(frozen=True)
class Texts:
    """Chunks to calibrate on, to measure on, and others of the calibration text."""

    calibrated: Calibrated
    held_out: np.ndarray
    left_out: np.ndarray


def read_texts(options: argparse.Namespace) -> Texts:
    tokenizer = load_tokenizer(open_checkpoint(options.checkpoint).path)

    def chunks_of(file: Path) -> np.ndarray:
        return chunks(tokenizer.encode(read_text(file).content), bos_token_id=tokenizer.bos_token_id)

    calibration = chunks_of(options.calibration)
    if not options.text:
        places = np.linspace(3, len(calibration) - 4, LEFT_OUT).astype(int)
        left_out, others = calibration[places], np.delete(calibration, places, axis=0)
        return Texts(job.split_calibration(others, options.calibration_chunks, 8), left_out, left_out)
    used = job.split_calibration(calibration, options.calibration_chunks, 8)
    seen = {chunk.tobytes() for own in used for chunk in own}
    others = np.stack([chunk for chunk in calibration if chunk.tobytes() not in seen])
    left_out = others[np.linspace(0, len(others) - 1, LEFT_OUT).astype(int)]
    return Texts(used, chunks_of(options.text), left_out)


@dataclass(frozen=True)
class Case:
    """A row: its plan, None where the method cannot meet the budget, and the KL predicted of it."""

    method: str
    label: str
    budget: int
    plan: Plan | None
    predicted: float | None


def all_rows(texts: Texts, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every recipe at every budget."""
    checkpoint = require_original(open_checkpoint(options.checkpoint))
    bases: list[Predictions] = []
    for recipe in options.recipes:
        prepared = job.prepare(checkpoint, texts.calibrated, read_recipe(recipe), {}, progress_bar)
        bases = bases or [predictions(prepared, own) for own in (texts.held_out, texts.left_out)]
        for case in cases(recipe, prepared, options):
            row: dict[str, Any] = {"method": case.method, "budget": case.label, "bytes": None}
            if case.plan is not None:
                row |= {"kld_predicted": case.predicted, **carry_out(prepared, case, texts, bases, options)}
            yield row


def predictions(prepared: job.Prepared, held_out: np.ndarray) -> Predictions:
    """The original's."""
    states: list[np.ndarray] = []
    original = load_model(prepared.checkpoint)
    evaluate(original, held_out, batch=BATCH, keep=states.append, progress=progress_bar)
    return Predictions(np.concatenate(states), original.head.get_value())


def cases(recipe: str, prepared: job.Prepared, options: argparse.Namespace) -> Iterator[Case]:
    """Every budget and every size of llama.cpp's, then baselines beside the recipe `fast`."""
    budgets = [(label, parse_budget(label, prepared.checkpoint.num_elements)) for label in options.budgets]
    budgets += [(row["type"], row["bytes"]) for row in llama_cpp_rows(options)] if options.llama_cpp else []
    for label, budget in budgets:
        yield planned_case(recipe, prepared, label, budget)
    if recipe == "fast":
        yield from baselines(prepared, budgets)


def baselines(prepared: job.Prepared, budgets: list[tuple[str, int]]) -> Iterator[Case]:
    config = prepared.shapes.config
    own = prepared.trials
    measured = measure(
        own.source, FREQUENCY, own.calibrated, own.statistics.on_the_way, own.rounder, NOT_KEPT, progress_bar
    )
    by_frequency = Prices(measured, config, FREQUENCY).pruning()
    pruned_first = replace(prepared, costs=with_pruning(prepared.costs, by_frequency))
    most = {i: menu_survivors(menu, menu.most_pruned).tolist() for i, menu in pruned_first.costs.experts.items()}
    kept_by = {"uniform": (prepared, all_experts(prepared.costs)), "frequency": (pruned_first, most)}
    for label, budget in budgets:
        for method, (costs_of, kept) in kept_by.items():
            plan = uniform_plan(costs_of.costs, config, kept, prepared.shapes.size_of, budget)
            yield Case(method, label, budget, plan, None if plan is None else costs_of.predicted(plan))


def planned_case(recipe: str, prepared: job.Prepared, label: str, budget: int) -> Case:
    try:
        planned = job.plan_within(prepared, budget, progress_bar)
    except InputError:
        return Case(recipe, label, budget, None, None)
    return Case(recipe, label, budget, planned.plan, planned.predicted)


def carry_out(
    prepared: job.Prepared,
    case: Case,
    texts: Texts,
    bases: list[Predictions],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Write a plan's checkpoint, read it back and measure it."""
    assert case.plan is not None
    started = time.monotonic()
    folder = options.output / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    size = prepared.write(case.plan, folder, case.budget)
    model = load_model(open_checkpoint(folder))
    figures, on_calibration = (
        evaluate(model, own, base, batch=BATCH, progress=progress_bar)
        for own, base in zip((texts.held_out, texts.left_out), bases, strict=True)
    )
    kept = [len(block.keep) for block in case.plan.blocks if block.keep is not None]
    return {
        "bytes": size,
        "ppl": figures.ppl,
        "ln_ppl_ratio": figures.ln_ppl_ratio,
        "kld_mean": figures.kld_mean,
        "kld_p999": figures.kld_p999,
        "kld_on_calibration_text": on_calibration.kld_mean,
        "same_top1": figures.same_top1,
        "experts": " ".join(map(str, kept)),
        "seconds": time.monotonic() - started,
    }


def llama_cpp_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The peer's rows without the original's."""
    rows: list[dict[str, Any]] = json.loads(options.llama_cpp.read_text())
    return [row for row in rows if "kld_mean" in row and (not options.types or row["type"] in options.types)]


COLUMNS = (
    "size", "method", "bytes", "experts kept", "KL predicted", "KL on the calibration text", "KL mean",
    "of llama.cpp's", "KL 99.9 %", "ln(PPL ratio)", "equal top-1",
)  # fmt: skip
HEADER = f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def print_tables(rows: list[dict[str, Any]], peer: list[dict[str, Any]]) -> None:
    """One line of Markdown per size and method: llama.cpp's sizes and itself first, then budgets."""
    print(HEADER)
    for theirs in peer:
        label, divergence = theirs["type"], theirs["kld_mean"]
        print(
            f"| {label} | llama.cpp | {theirs['bytes']:,} | | | | {divergence:.4f} | | {theirs['kld_999']:.3f} "
            f"| {theirs['ln_ppl_ratio']:.4f} | {theirs['same_top']:.1f} % |"
        )
        for own in rows:
            if own["budget"] == label:
                print(line(own, divergence))
    print(HEADER)
    sizes = {theirs["type"] for theirs in peer}
    for label in dict.fromkeys(own["budget"] for own in rows if own["budget"] not in sizes):
        for own in rows:
            if own["budget"] == label:
                print(line(own, None))


def line(row: dict[str, Any], peers_divergence: float | None) -> str:
    if row["bytes"] is None:
        return f"| {row['budget']} | {row['method']} | cannot be met | | | | | | | | |"
    ratio = "" if peers_divergence is None else f"{row['kld_mean'] / peers_divergence:.2f}"
    kept, predicted, on_calibration = row["experts"], row["kld_predicted"], row["kld_on_calibration_text"]
    return (
        f"| {row['budget']} | {row['method']} | {row['bytes']:,} | {kept} | {predicted:.4f} | {on_calibration:.4f} "
        f"| {row['kld_mean']:.4f} | {ratio} | {row['kld_p999']:.3f} | {row['ln_ppl_ratio']:.4f} "
        f"| {row['same_top1']:.1f} % |"
    )


if __name__ == "__main__":
    main()
