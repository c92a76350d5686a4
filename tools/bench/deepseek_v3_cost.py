"""What DeepSeek-V3 would cost at several budgets: a table in Markdown, and a plot of where pruning beats bits.

usage: python tools/bench/deepseek_v3_cost.py [--plot FILE.svg] [--public] [--budgets 80GB 96GB ...]

Plans the real model from its config, its published routing statistics and sensitivities; no weights. --plot needs
matplotlib. --public compares the unscaled estimate, nothing pruned, with public quantizations of known perplexity. Time
and peak memory, on standard error, are of the whole process so far.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

from moejax.machine import peak_memory
from moejax.pipeline.forecast import Forecast
from moejax.pipeline.outlook import Outlook, forecast, read_outlook, split
from moejax.pipeline.recipe import Recipe
from moejax.planning.predict import LossCurves
from moejax.planning.size import format_size, parse_size

BUDGETS = ("80GB", "96GB", "103GB", "131GB", "151GB")
MEMORY = 128_000_000_000
# Public llama.cpp recipes of DeepSeek-R1-0528 by size, with their perplexity on wikitext-2; the original's is 3.21.
PUBLIC = {"131GiB": 4.88, "151GiB": 4.36, "165GiB": 4.03, "217GiB": 3.43}
ORIGINAL_PPL = 3.21
# Shares of the experts kept at which the plot's lines are computed.
POINTS = [n / 16 for n in range(5, 17)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--public", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    outlook = read_outlook("deepseek_v3", None, Recipe())
    print(
        "| budget | bytes | against BF16 | parameters | experts kept | bits per expert weight | gate mass kept "
        "| original choices kept | in 128 GB | KL predicted | all experts | equal shares, best |"
    )
    print("|" + "---|" * 12)
    for label in options.budgets:
        print(row(label, forecast(outlook, parse_size(label), MEMORY, 4096, 1)), flush=True)
        print(f"{label}: {time.monotonic() - started:.0f} s, {format_size(peak_memory())}", file=sys.stderr)
    if options.public:
        print_public(outlook)
    if options.plot:
        draw(outlook, options.budgets, options.plot)


def row(label: str, own: Forecast) -> str:
    layers = [layer for layer in own.layers if layer.block < own.config.num_hidden_layers]
    experts = next(kind for kind in own.kinds if kind.kind == "routed experts")
    fits = "yes" if own.memory.total <= MEMORY else "no"
    context = f", {own.longest_context:,} tokens" if own.longest_context else ""
    unpruned = own.splits[0].predicted
    best = min((s for s in own.splits if s.predicted is not None), key=lambda s: s.predicted or 0.0)
    cells = (
        label,
        f"{own.bytes.total:,}",
        f"{2 * own.elements / own.bytes.total:.1f}x",
        f"{own.after.with_mtp / 1e9:.1f}B",
        f"{mean(layer.kept for layer in layers):.0f} of {own.config.n_routed_experts}",
        f"{experts.bits_per_weight:.2f}",
        f"{100 * mean(layer.gate_mass_kept for layer in layers):.1f} %",
        f"{mean(layer.choices_kept for layer in layers) * own.config.num_experts_per_tok:.2f} of 8",
        fits + context,
        f"{own.predicted:.2f}",
        "does not fit" if unpruned is None else f"{unpruned:.2f}",
        f"{best.predicted:.2f} at {100 * best.share_kept:.1f} %",
    )
    return "| " + " | ".join(cells) + " |"


def print_public(outlook: Outlook) -> None:
    """Summed costs, as they are before scaling, beside ln(PPL ratio)."""
    unscaled = replace(outlook, problem=replace(outlook.problem, curves=LossCurves()))
    for size, ppl in PUBLIC.items():
        own = split(unscaled, parse_size(size), 1.0)
        assert own.losses is not None
        total = own.losses.experts + own.losses.others
        ratio = math.log(ppl / ORIGINAL_PPL)
        print(f"{size}: summed costs {total:.3f}, of experts {own.losses.experts:.3f}; ln(PPL ratio) {ratio:.3f}")


def draw(outlook: Outlook, budgets: list[str], file: Path) -> None:
    """Predicted KL against the share of experts kept in every layer, one line a budget."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moejax"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label in budgets:
        splits = [split(outlook, parse_size(label), share) for share in POINTS]
        known = [(100 * own.share_kept, own.predicted) for own in splits if own.predicted is not None]
        axes.plot(*zip(*known, strict=True), marker=".", label=label)
        axes.plot(*min(known, key=lambda point: point[1]), marker="o", color=axes.lines[-1].get_color())
    axes.set(
        xlabel="experts kept in every layer, %",
        ylabel="predicted KL divergence, nats",
        title="DeepSeek-V3: pruning or bits",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(title="budget")
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
