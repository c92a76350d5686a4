"""Tokens per second and peak memory of moejax, beside transformers on the same CPU, in one run.

    python tools/bench/speed.py CHECKPOINT [--transformers PYTHON] [--json FILE]

PYTHON is an interpreter that has torch and transformers. Where the checkpoint is FP8, transformers reads a
float32 copy that `moejax export --dequantize` writes to a temporary folder. Runs alternate, `--rounds` times, each in a
process of its own; the table gives medians over them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--transformers", type=Path, help="a Python that has torch and transformers")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    protocol = [f"--{name}={getattr(arguments, name)}" for name in ("prompt", "tokens", "repeats")]

    with tempfile.TemporaryDirectory() as folder:
        rows = [("moejax", dtype, lambda d=dtype: run_moejax(arguments.checkpoint, d, protocol)) for dtype in DTYPES]
        if arguments.transformers:
            plain = without_fp8(arguments.checkpoint, Path(folder) / "plain")
            peer = [str(arguments.transformers), str(Path(__file__).with_name("transformers_speed.py")), str(plain)]
            rows += [("transformers", dtype, lambda d=dtype: run_peer(peer, d, protocol)) for dtype in DTYPES]
        found: dict[tuple[str, str], list[dict[str, Any]]] = {(who, dtype): [] for who, dtype, _ in rows}
        for _ in range(arguments.rounds):
            for who, dtype, measure in rows:
                found[who, dtype].append(measure())
    table: list[dict[str, Any]] = [
        {"program": who, "dtype": dtype, **medians(runs)} for (who, dtype), runs in found.items()
    ]
    print("| program | dtype | prefill, tokens/s | decode, tokens/s | peak memory |\n|---|---|---|---|---|")
    for row in table:
        prefill, decode, memory = (row[name] for name in FIGURES)
        print(f"| {row['program']} | {row['dtype']} | {prefill:.1f} | {decode:.1f} | {memory / 1e9:.2f} GB |")
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")


def run_moejax(checkpoint: Path, dtype: str, protocol: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        moejax("bench", checkpoint, "--dtype", dtype, *protocol, "--json", figures)
        return json.loads(figures.read_text())


def run_peer(command: Sequence[str], dtype: str, protocol: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run([*command, "--dtype", dtype, *protocol], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def without_fp8(checkpoint: Path, output: Path) -> Path:
    """The checkpoint itself, or a float32 copy where it is FP8.

    transformers' own dequantization takes wrong tiles where a matrix's last block is partial.
    """
    if "quantization_config" not in json.loads((checkpoint / "config.json").read_text()):
        return checkpoint
    moejax("export", checkpoint, "--to", "hf", "--dequantize", "float32", "--output", output)
    return output


def moejax(*arguments: object) -> None:
    command = [sys.executable, "-m", "moejax", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in FIGURES}


if __name__ == "__main__":
    main()
