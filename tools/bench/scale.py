"""What `moejax compress` takes of memory and time, as models grow: deeper, and with more experts.

    python tools/bench/scale.py FOLDER --calibration FILE --text FILE [--memory SIZE] [--recipe NAME|FILE]
           [--layers 3 6 12] [--experts 16 32 64] [--budget 6x] [--json FILE] [--plot FILE.svg]
           [-- MORE SIZES OF synthetic_checkpoint.py]

For every number of layers, with the fewest experts, and every number of experts, with the fewest layers, a checkpoint
is made in FOLDER (see `synthetic_checkpoint.py`), compressed on 16 chunks by a process of its own, and removed. Prints
bytes, seconds and the most memory that the process held, beside what it was allowed; `--plot` draws that (it needs
matplotlib).
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

MAKER = Path(__file__).with_name("synthetic_checkpoint.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--memory")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--budget", default="6x")
    parser.add_argument("--chunks", default="16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, sizes = parser.parse_args(arguments[:at]), arguments[at + 1 :]
    options.folder.mkdir(parents=True, exist_ok=True)
    shapes = [(layers, min(options.experts)) for layers in sorted(options.layers)]
    shapes += [(min(options.layers), experts) for experts in sorted(options.experts)]
    print("| layers | experts | BF16 bytes | seconds | peak memory | allowed |\n|---|---|---|---|---|---|", flush=True)
    rows = []
    for layers, experts in dict.fromkeys(shapes):
        rows.append(compressed(layers, experts, sizes, options))
        told = rows[-1]
        allowed = f"{told['memory_limit_bytes'] / 1e9:.2f} GB" if "memory_limit_bytes" in told else "what was free"
        print(
            f"| {layers} | {experts} | {told['original_bytes'] / 1e9:.2f} GB | {told['seconds']:.0f} "
            f"| {told['peak_memory_bytes'] / 1e9:.2f} GB | {allowed} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if options.plot:
        draw(rows, min(options.layers), min(options.experts), options.plot)


def draw(rows: list[dict[str, Any]], least_layers: int, least_experts: int, file: Path) -> None:
    """Peak memory beside the model's bytes in BF16 and what was allowed: over layers, and over experts."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moejax"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.2, 4.0), sharey=True, layout="constrained")
    for axes, of, other, least in (
        (panels[0], "layers", "experts", least_experts),
        (panels[1], "experts", "layers", least_layers),
    ):
        own = sorted((row for row in rows if row[other] == least), key=lambda row: row[of])
        lines = (("peak memory", "peak_memory_bytes", "C0o-"), ("--memory", "memory_limit_bytes", "C7--"))
        for label, name, style in (*lines, ("the model in BF16", "original_bytes", "C3^:")):
            if all(name in row for row in own):
                axes.plot([row[of] for row in own], [row[name] / 1e9 for row in own], style, label=label)
        axes.set(xlabel=f"{of} ({least} {other})", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set(ylabel="GB")
    figure.savefig(file, metadata={"Date": None})


def compressed(layers: int, experts: int, sizes: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one checkpoint, which is made for it and removed."""
    model, output, told = (options.folder / name for name in ("model", "out", "told.json"))
    for own in (model, output):
        shutil.rmtree(own, ignore_errors=True)
    run([MAKER, model, "--layers", layers, "--experts", experts, *sizes])
    given = ["--calibration", options.calibration, "--text", options.text, "--calibration-chunks", options.chunks]
    more = [] if options.memory is None else ["--memory", options.memory]
    own = ["--budget", options.budget, "--recipe", options.recipe, "--output", output, "--json", told, *given, *more]
    run(["-m", "moejax", "compress", model, *own])
    figures: dict[str, Any] = json.loads(told.read_text())
    for folder in (model, output):
        shutil.rmtree(folder)
    return {
        "layers": layers,
        "experts": experts,
        "original_bytes": figures["bytes"] * figures["ratio"],
        **{
            name: own for name, own in figures.items() if name in ("seconds", "peak_memory_bytes", "memory_limit_bytes")
        },
    }


def run(arguments: list[object]) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.stderr.decode().strip().splitlines()[-1])


if __name__ == "__main__":
    main()
