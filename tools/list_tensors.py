"""Write tests/golden/deepseek_v3_tensors.json: every tensor of the published checkpoint, without loss, in a few rows.

    python tools/list_tensors.py TENSORS tests/golden/deepseek_v3_tensors.json

TENSORS is a JSON file, gzipped or not, of name -> {"shape", "dtype"}, as the headers of the checkpoint's safetensors
files give them. A row is [pattern, shape, dtype], a pattern's `{3-61}` standing for layers or experts 3 to 61.
"""

import argparse
import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from tensor_list import expand

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def rows_of(tensors: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """The rows that `tensor_list.expand` undoes. Raises RuntimeError where tensors of one row leave gaps."""
    numbers_of: defaultdict[tuple[str, tuple[int, ...], str], list[list[int]]] = defaultdict(list)
    for name, info in tensors.items():
        kind = _NUMBER.sub("{}", name), tuple(info["shape"]), info["dtype"]
        numbers_of[kind].append([int(number) for number in _NUMBER.findall(name)])
    rows = []
    for (pattern, shape, dtype), numbers in sorted(numbers_of.items()):
        ranges = [f"{{{min(of_place)}-{max(of_place)}}}" for of_place in zip(*numbers, strict=True)]
        rows.append([pattern.format(*ranges), list(shape), dtype])
    if expand(rows) != {name: (tuple(info["shape"]), info["dtype"]) for name, info in tensors.items()}:
        raise RuntimeError("layers or experts of equal tensors are no ranges")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint's tensors in a few rows.")
    parser.add_argument("tensors", type=Path, help="JSON file, perhaps gzipped: name -> shape and dtype")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()

    text = arguments.tensors.read_bytes()
    tensors = json.loads(gzip.decompress(text) if arguments.tensors.suffix == ".gz" else text)
    rows = rows_of(tensors)
    arguments.output.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(f"{arguments.output}: {len(tensors)} tensors in {len(rows)} rows")


if __name__ == "__main__":
    main()
