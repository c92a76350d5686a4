"""The native checkpoint: a manifest beside one store item per block, from which the compressed model is rebuilt.

manifest.json          format version, config, every leaf's format, shape and checksums, plan, provenance; a checksum of
                       its own, made with zeros in its place, and one of every file that was copied
items/<item>/...       the arrays, one orbax item per block (see `store`)
tokenizer.json, ...    copied from the original
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from moejax.checkpoint import store
from moejax.checkpoint.chunks import Index, StoredArray, bytes_checksum, grid_of
from moejax.checkpoint.hf_names import num_elements
from moejax.checkpoint.json_file import read_json_object
from moejax.checkpoint.leaf_checks import check_arrays, check_indices
from moejax.checkpoint.placed import placed
from moejax.errors import InputError, brief
from moejax.formats import ExpertWeights, abstract_experts, abstract_leaf, select_experts
from moejax.model import Config, Layout, config_from_hf
from moejax.model.leaves import Weight
from moejax.model.weights import PER_EXPERT, block_name, row_of

T = TypeVar("T")
# Gives a part of an array, or all of it.
Read = Callable[..., np.ndarray]

MANIFEST = "manifest.json"
FORMAT_VERSION = 3
# What is otherwise in older folders.
_OLDER = {
    1: "whose packed words are in another order than in",
    2: "whose arrays are one file each where they are several in",
}
COPIED_FILES = (
    "tokenizer.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
NO_CHECKSUM = "0" * 8
_OUTER = "outer"
_OWN_CHECKSUM = re.compile(rb'"checksum":"[0-9a-f]{8}"')


def item_of(name: str) -> tuple[str, str]:
    """A leaf's item and its name within: `layers.3.x` lies in `layer_3` as `x`, what is in no block in `outer`."""
    kind, _, rest = name.partition(".")
    if kind not in ("layers", "mtp"):
        return _OUTER, name
    index, _, rest = rest.partition(".")
    return f"{'layer' if kind == 'layers' else kind}_{index}", rest


def arrays_of(name: str, leaf: Weight) -> dict[str, jax.Array]:
    """A leaf's arrays under names of their own: `self_attn.q_a.words`, or just the leaf's if it is one array."""
    flat, _ = jax.tree_util.tree_flatten_with_path(leaf)
    return {
        ".".join((name, *(str(getattr(key, "name", getattr(key, "idx", ""))) for key in path))): a for path, a in flat
    }


def checksum_digits(array: jax.Array) -> int:
    """How many digits the checksums of an array's chunks have; of use is its shape alone."""
    return 8 * grid_of(array.shape, np.dtype(array.dtype)).count


def with_checksum(manifest: bytes) -> bytes:
    """A manifest with its own checksum in place of whatever it has for one."""
    zeroed = _OWN_CHECKSUM.sub(f'"checksum":"{NO_CHECKSUM}"'.encode(), manifest, count=1)
    return _OWN_CHECKSUM.sub(f'"checksum":"{bytes_checksum(zeroed)}"'.encode(), manifest, count=1)


@dataclass(frozen=True)
class NativeCheckpoint:
    """An opened native checkpoint; `leaf` reads one weight of the model and checks its bytes."""

    path: Path
    raw_config: dict[str, Any]
    config: Config
    experts_per_token: tuple[int, ...]
    items: Mapping[str, Mapping[str, tuple[str, str]]]
    plan: dict[str, Any]
    provenance: dict[str, Any]
    _opened: dict[str, dict[str, StoredArray]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_elements(self) -> int:
        """Numbers of an original of this config."""
        return num_elements(self.config)

    def leaf(self, name: str, like: Weight | None = None) -> Weight:
        """The weight called `name`; where `like`, it in shapes that have shardings, has it: a process then reads no
        other chunks than those its own parts lie in, of what is one matrix per head all.

        Raises InputError if its bytes are not those that the manifest names, or name experts or groups that are none.
        """
        abstract, stored = self.abstract(name), self._stored(name)
        check_arrays(self.path, name, stored, jax.tree.leaves(abstract))
        reads: list[Read] = [partial(self._read, name, n, own) for n, own in enumerate(stored)]
        if len(abstract.shape) == 3 and not isinstance(abstract, ExpertWeights):  # chunks are not cut over heads
            reads = list(map(_whole_once, reads))
        if like is None:
            arrays = [jax.device_put(read()) for read in reads]
        else:
            arrays = [placed(own, read) for own, read in zip(jax.tree.leaves(like), reads, strict=True)]
        weight = jax.tree.unflatten(jax.tree.structure(abstract), arrays)
        check_indices(self.path, name, weight, self.config)
        return weight

    def experts(self, name: str, members: Sequence[int]) -> ExpertWeights:
        """Of routed experts' weights of that name those of some experts. Raises InputError as `leaf` does."""
        every = self.leaf(name)
        return every if list(members) == list(range(every.num_experts)) else select_experts(every, members)

    @property
    def experts_in_slice(self) -> None:
        """All of a layer's, which are packed, are read together: their checksums are of all."""

    def verify(self, name: str) -> int:
        """Reads every byte of the weight called `name` and returns how many they are. Raises InputError if they are not
        those that the manifest names."""
        stored = self._stored(name)
        for n, own in enumerate(stored):
            if own.checksums() != self._checksums(name)[n]:
                self._refuse(name)
        return sum(own.nbytes for own in stored)

    def abstract(self, name: str) -> Weight:
        """The weight called `name` in shapes alone. Raises InputError if the manifest does not describe it."""
        item, within = item_of(name)
        if within not in self.items.get(item, {}):
            raise InputError(f"{self.path / MANIFEST}: the weight {name} is missing; the config asks for it")
        try:
            spec = self.items[item][within][0]
            return abstract_experts(spec) if row_of(name).role == "routed experts" else abstract_leaf(spec)
        except InputError as error:
            raise InputError(f"{self.path / MANIFEST}: the weight {name}: {error}") from None

    def abstract_leaves(self) -> Iterable[tuple[str, Weight]]:
        """Every weight by name, in shapes alone."""
        return ((name, self.abstract(name)) for name in Layout(self.config).shapes())

    def _stored(self, name: str) -> list[StoredArray]:
        """Where the arrays of the weight called `name` lie."""
        item, within = item_of(name)
        if item not in self._opened:
            names = [name for name in Layout(self.config).shapes() if item_of(name)[0] == item]
            arrays = [array for name in names for array in arrays_of(item_of(name)[1], self.abstract(name))]
            self._opened[item] = store.read_item(self.path, item, arrays)
        return [self._opened[item][own] for own in arrays_of(within, self.abstract(name))]

    def _checksums(self, name: str) -> list[str]:
        """Of every array of the weight called `name` those of its chunks, one behind another."""
        item, within = item_of(name)
        sizes = map(checksum_digits, jax.tree.leaves(self.abstract(name)))
        digits = iter(self.items[item][within][1])
        return ["".join(islice(digits, size)) for size in sizes]

    def _read(self, name: str, number: int, stored: StoredArray, index: Index | None = None) -> np.ndarray:
        """A part of one of a weight's arrays, checked."""
        part, found = stored.read(index)
        expected = self._checksums(name)[number]
        if any(expected[8 * chunk : 8 * chunk + 8] != own for chunk, own in found.items()):
            self._refuse(name)
        return part

    def _refuse(self, name: str) -> NoReturn:
        raise InputError(f"{self.path}: the bytes of {name} are not those that its manifest names; copy it anew")


def _whole_once(read: Read) -> Read:
    """Gives parts of an array that is read whole, once."""
    whole, lock = cache(read), Lock()

    def part(index: Index | None = None) -> np.ndarray:
        with lock:
            own = whole()
        return own if index is None else own[index]

    return part


def open_native(path: Path) -> NativeCheckpoint:
    """Open a folder with a manifest and check it against its own config, without reading the weights."""
    source = path / MANIFEST
    raw = read_json_object(source)
    version = raw.get("version")
    if raw.get("format") == "moejax" and type(version) is int and version in _OLDER:
        raise InputError(
            f"{source}: a manifest of version {version}, {_OLDER[version]} version {FORMAT_VERSION}, the only one that "
            f"is read; moejax 0.{version} reads it, or compress the original again"
        )
    if raw.get("format") != "moejax" or raw.get("version") != FORMAT_VERSION:
        raise InputError(f"{source}: not a moejax manifest of version {FORMAT_VERSION}, the only one that is read")
    try:
        items = {
            item: {name: (_of(str, spec), _of(str, checksums)) for name, (spec, checksums) in leaves.items()}
            for item, leaves in raw["items"].items()
        }
        per_token = tuple(_of(int, k) for k in raw["experts_per_token"])
        config = config_from_hf(_of(dict, raw["config"]), str(source))
        plan, provenance = _of(dict, raw["plan"]), _of(dict, raw["provenance"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: damaged ({error!r}); a manifest that compress wrote is needed") from None
    checkpoint = NativeCheckpoint(path, raw["config"], config, per_token, items, plan, provenance)
    _check_against_config(checkpoint)
    return checkpoint


def _of(kind: type[T], value: object) -> T:
    """The value, if it is of exactly that type: `true` is no number, and nothing is converted."""
    if type(value) is not kind:
        raise TypeError(f"{brief(value)} is no {kind.__name__}")
    return value


def _check_against_config(checkpoint: NativeCheckpoint) -> None:
    source = checkpoint.path / MANIFEST
    expected = Layout(checkpoint.config).shapes()
    if len(checkpoint.experts_per_token) != checkpoint.config.num_blocks:
        raise InputError(f"{source}: experts_per_token needs {checkpoint.config.num_blocks} entries, one per block")
    for name, shape in expected.items():
        own = checkpoint.abstract(name).shape
        may_be_pruned = row_of(name).is_per_expert and len(own) == len(shape)
        if own != shape and not (may_be_pruned and own[1:] == shape[1:] and own[0] <= shape[0]):
            raise InputError(f"{source}: the weight {name} has shape {own}; the config asks for {shape}")
        _check_spec(checkpoint, name)
    known = {item_of(name) for name in expected}
    for item, leaves in checkpoint.items.items():
        if item not in {item for item, _ in known}:
            raise InputError(f"{source}: the item {item} is none of a model with this config")
        for within in leaves:
            if (item, within) not in known:
                raise InputError(f"{source}: the weight {within} of {item} is none of a model with this config")
    _check_experts(checkpoint)


def _check_experts(checkpoint: NativeCheckpoint) -> None:
    source, config = checkpoint.path / MANIFEST, checkpoint.config
    for block, k in enumerate(checkpoint.experts_per_token):
        if not config.is_moe(block):
            continue
        path = block_name(block, config.num_hidden_layers)
        counts = {name: checkpoint.abstract(name).shape[0] for name in (f"{path}.{row.name}" for row in PER_EXPERT)}
        router = f"{path}.mlp.router"
        survivors = counts[router]
        if other := next((name for name, count in counts.items() if count != survivors), None):
            raise InputError(f"{source}: the weight {other} is of {counts[other]} experts; its router has {survivors}")
        if not 1 <= k <= survivors:
            raise InputError(f"{source}: experts_per_token of {router} is {brief(k)}; 1 to {survivors} are accepted")


def _check_spec(checkpoint: NativeCheckpoint, name: str) -> None:
    source, leaf, (item, within) = checkpoint.path / MANIFEST, checkpoint.abstract(name), item_of(name)
    spec, checksums = checkpoint.items[item][within]
    if ("i32" in spec) != (row_of(name).dtype == "int32"):
        raise InputError(f"{source}: the weight {name} is {spec}; i32 is what group_id alone is made of")
    if len(checksums) != sum(map(checksum_digits, jax.tree.leaves(leaf))):
        raise InputError(f"{source}: the weight {name} needs a checksum of 8 digits for each of its arrays' chunks")
