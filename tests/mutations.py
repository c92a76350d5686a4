"""Damage to bytes and to JSON texts, drawn from a random number generator: what a hostile or broken file may hold."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# Written where a number, a name or a list stood; strings in <> are put into the text as they are, without quotes.
VALUES: list[Any] = [
    *(0, 1, 2, 3, 7, -1, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64, 10**9, 10**12, 1.5, -0.0, 1e-300, 1e308),
    *("<1e999>", "<-Infinity>", "<NaN>", "<0x10>", "<01>", f"<1{'0' * 400}>", f"<1{'0' * 5000}>"),
    *(True, False, None, "", "64", "F32", "BF16", "F16", "I32", "U8", "F8_E5M2", "C64", "F99", "bf16[2,3]", "i32[4]"),
    *("int4g64[999999999999999,64]", "bf16" + "[1]" * 3000, "x" * 100_000, "a\nb", "\ud800", "\0", "../x", "/dev/zero"),
    *([], {}, [-1], [2**40, 2**40], [1] * 80, [0, 2**62], ["F32", [2], [0, 8]], {"F32": None}, {"a": 1}),
    *(f"<{'[' * 400}{']' * 400}>", f"<{'[' * 90_000}>", "config.json", "model.safetensors", "fp8", "yarn"),
]


class Pairs(list[list[Any]]):
    """A JSON object as its [key, value] pairs, in which a key may stand twice."""


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four bytes changed, a piece cut off, cut out, repeated or inserted."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:at] + data[at:end] * 2 + data[end:]
    if kind == 3:
        return data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        changed[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b'0123456789-.,:"[]{}eE'])
    return bytes(changed)


def damaged_json(text: bytes, rng: random.Random) -> bytes:
    """A JSON text of which one to three values or keys are others."""
    tree = json.loads(text, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holder, place = rng.choice(_places(tree))
        rng.choice(_DAMAGES)(tree, holder, place, rng)
    return _written(tree).encode(errors="surrogatepass")


def _places(tree: Any) -> list[tuple[Any, int]]:
    """Every value, as the list it stands in and its place there; small parts of large objects come up as often."""
    found: list[tuple[Any, int]] = []
    values = [(pair, 1) for pair in tree] if isinstance(tree, Pairs) else [(tree, i) for i in range(len(tree))]
    for holder, place in values:
        found.append((holder, place))
        if isinstance(holder[place], list):
            found += _places(holder[place])
    return found


def _replace(_: Any, holder: Any, place: int, rng: random.Random) -> None:
    holder[place] = copy.deepcopy(rng.choice(VALUES))


def _shift(_: Any, holder: Any, place: int, rng: random.Random) -> None:
    value = holder[place]
    if type(value) in (int, float):
        holder[place] = rng.choice([value + 1, value - 1, 2 * value, value // 2, -value, float(value), str(value)])
    elif isinstance(value, str):
        holder[place] = rng.choice([value + "x", value[:-1], value.upper(), f"./{value}", value.replace("0", "1")])
    elif isinstance(value, list) and value:
        rng.choice([value.pop, value.reverse, lambda: value.append(value[0]), lambda: rng.shuffle(value)])()


def _exchange(tree: Any, holder: Any, place: int, rng: random.Random) -> None:
    """With a value of the same key, if there is one: an offset with an offset, a dtype with a dtype."""
    same = [h for h, p in _places(tree) if p == place and len(h) == len(holder) and (place != 1 or h[0] == holder[0])]
    other = rng.choice(same)
    holder[place], other[place] = other[place], holder[place]


def _copy(tree: Any, holder: Any, place: int, rng: random.Random) -> None:
    source, at = rng.choice(_places(tree))
    holder[place] = copy.deepcopy(source[at])


def _drop(tree: Any, holder: Any, place: int, rng: random.Random) -> None:
    owner = rng.choice([tree, *(h[p] for h, p in _places(tree) if isinstance(h[p], Pairs))])
    if owner:
        del owner[rng.randrange(len(owner))]


def _duplicate(tree: Any, holder: Any, place: int, rng: random.Random) -> None:
    owner = rng.choice([tree, *(h[p] for h, p in _places(tree) if isinstance(h[p], Pairs))])
    if owner:
        key, value = rng.choice(owner)
        owner.append([rng.choice([key, key + "x", key.replace("0", "1"), "../" + key, key + "\n"]), value])


_DAMAGES: list[Callable[[Any, Any, int, random.Random], None]] = [
    *(_replace, _replace, _shift, _shift, _exchange, _exchange, _copy, _drop, _duplicate)
]


def _written(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{_written(key)}:{_written(own)}" for key, own in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, str) and value.startswith("<") and value.endswith(">"):
        return value[1:-1]
    return json.dumps(value)
