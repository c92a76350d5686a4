"""The native checkpoint: a manifest beside one store item per block, from which the compressed model is rebuilt.

manifest.json          format version, config, every leaf's format, shape and checksums, plan, provenance
items/<item>/...       the arrays, one orbax item per block (see `store`)
tokenizer.json, ...    copied from the original
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint import store
from moejax.checkpoint.json_file import read_json_object
from moejax.errors import InputError
from moejax.formats import abstract_experts, abstract_leaf, describe
from moejax.model import Config, DeepseekV3, Layout, config_from_hf, named_leaves
from moejax.model.leaves import Weight

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_OUTER = "outer"
_NO_CHECKSUM = "0" * 8


@dataclass(frozen=True)
class Description:
    """What a manifest says beside the leaves: plain JSON values."""

    raw_config: dict[str, Any]
    plan: dict[str, Any]
    provenance: dict[str, Any]


def item_of(name: str) -> tuple[str, str]:
    """A leaf's item and its name within: `layers.3.x` lies in `layer_3` as `x`, what is in no block in `outer`."""
    kind, _, rest = name.partition(".")
    if kind not in ("layers", "mtp"):
        return _OUTER, name
    index, _, rest = rest.partition(".")
    return f"{'layer' if kind == 'layers' else kind}_{index}", rest


def native_bytes(abstract_model: DeepseekV3, description: Description, copied: Sequence[Path]) -> int:
    """The exact bytes of the folder that `write_native` will write, from shapes alone."""
    items = _items(abstract_model)
    manifest = _manifest(abstract_model, description, dict.fromkeys(_all_arrays(items), _NO_CHECKSUM))
    arrays = sum(store.item_bytes(_arrays_of(leaves)) for leaves in items.values())
    return arrays + len(manifest) + sum(file.stat().st_size for file in copied)


def write_native(model: DeepseekV3, output: Path, description: Description, copied: Sequence[Path], budget: int) -> int:
    """Write the checkpoint and return its bytes. Raises InputError, leaving nothing, if they exceed `budget`."""
    items = _items(model)
    with store.atomic_folder(output) as folder:
        checksums: dict[str, str] = {}
        for item, leaves in items.items():
            arrays = {name: np.asarray(array) for name, array in _arrays_of(leaves).items()}
            checksums |= {f"{item}/{name}": store.checksum(array) for name, array in arrays.items()}
            store.write_item(folder, item, arrays)
        (folder / MANIFEST).write_bytes(_manifest(model, description, checksums))
        for file in copied:
            (folder / file.name).write_bytes(file.read_bytes())
        written = store.folder_bytes(folder)
        if written > budget:
            raise InputError(f"{output}: {written} bytes are over the budget of {budget}; nothing was written")
    return written


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

    def leaf(self, name: str) -> Weight:
        """The weight called `name`. Raises InputError if its bytes are not those that the manifest names."""
        item, within = item_of(name)
        if within not in self.items.get(item, {}):
            raise InputError(f"{self.path / MANIFEST}: the weight {name} is missing; the config asks for it")
        spec, checksums = self.items[item][within]
        abstract = _abstract(within, spec)
        arrays = _read_item(self.path, item, tuple(_item_arrays(self.items[item])))
        names = list(_arrays(within, abstract))
        for n, array_name in enumerate(names):
            if store.checksum(arrays[array_name]) != checksums[8 * n : 8 * n + 8]:
                raise InputError(
                    f"{self.path}: the bytes of {name} are not those that its manifest names; copy it anew"
                )
        restored = [jnp.asarray(arrays[array_name]) for array_name in names]
        _check_shapes(self.path, name, restored, jax.tree.leaves(abstract))
        return jax.tree.unflatten(jax.tree.structure(abstract), restored)

    def abstract_leaves(self) -> Iterable[tuple[str, Weight]]:
        """Every weight by name, in shapes alone."""
        for name in Layout(self.config).shapes():
            item, within = item_of(name)
            yield name, _abstract(within, self.items[item][within][0])


def open_native(path: Path) -> NativeCheckpoint:
    """Open a folder with a manifest and check it against its own config, without reading the weights."""
    source = path / MANIFEST
    raw = read_json_object(source)
    if raw.get("format") != "moejax" or raw.get("version") != FORMAT_VERSION:
        raise InputError(f"{source}: not a moejax manifest of version {FORMAT_VERSION}, the only one that is read")
    try:
        items = {
            item: {name: (str(spec), str(checksums)) for name, (spec, checksums) in leaves.items()}
            for item, leaves in raw["items"].items()
        }
        per_token = tuple(int(k) for k in raw["experts_per_token"])
        config = config_from_hf(raw["config"], str(source))
        checkpoint = NativeCheckpoint(path, raw["config"], config, per_token, items, raw["plan"], raw["provenance"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: damaged ({error!r}); a manifest that compress wrote is needed") from None
    _check_against_config(checkpoint)
    return checkpoint


def _check_against_config(checkpoint: NativeCheckpoint) -> None:
    source = checkpoint.path / MANIFEST
    expected = Layout(checkpoint.config).shapes()
    if len(checkpoint.experts_per_token) != checkpoint.config.num_blocks:
        raise InputError(f"{source}: experts_per_token needs {checkpoint.config.num_blocks} entries, one per block")
    for name, shape in expected.items():
        item, within = item_of(name)
        if within not in checkpoint.items.get(item, {}):
            raise InputError(f"{source}: the weight {name} is missing; the config asks for it")
        own = _abstract(within, checkpoint.items[item][within][0]).shape
        # Pruning shortens the expert axis, which comes first, and nothing else.
        pruned = within.startswith(("mlp.router", "mlp.bias", "mlp.group_id", "mlp.experts")) and len(own) == len(shape)
        if own != shape and not (pruned and own[1:] == shape[1:] and own[0] <= shape[0]):
            raise InputError(f"{source}: the weight {name} has shape {own}; the config asks for {shape}")
    known = {item_of(name) for name in expected}
    for item, leaves in checkpoint.items.items():
        for within in leaves:
            if (item, within) not in known:
                raise InputError(f"{source}: the weight {within} of {item} is none of a model with this config")


def _manifest(model: DeepseekV3, description: Description, checksums: Mapping[str, str]) -> bytes:
    items = {
        item: {
            name: [describe(leaf), "".join(checksums[f"{item}/{array}"] for array in _arrays(name, leaf))]
            for name, leaf in leaves.items()
        }
        for item, leaves in _items(model).items()
    }
    blocks = [*model.layers, *(mtp.block for mtp in model.mtp)]
    per_token = [getattr(block.mlp, "experts_per_token", model.config.num_experts_per_tok) for block in blocks]
    manifest = {
        "format": "moejax",
        "version": FORMAT_VERSION,
        "config": description.raw_config,
        "experts_per_token": per_token,
        "items": items,
        "plan": description.plan,
        "provenance": description.provenance,
    }
    return json.dumps(manifest, separators=(",", ":")).encode()


def _items(model: DeepseekV3) -> dict[str, dict[str, Weight]]:
    items: dict[str, dict[str, Weight]] = {}
    for name, leaf in named_leaves(model).items():
        item, within = item_of(name)
        items.setdefault(item, {})[within] = leaf
    return items


def _arrays(name: str, leaf: Weight) -> dict[str, jax.Array]:
    """A leaf's arrays under names of their own: `self_attn.q_a.words`, or just the leaf's if it is one array."""
    flat, _ = jax.tree_util.tree_flatten_with_path(leaf)
    return {
        ".".join((name, *(str(getattr(key, "name", getattr(key, "idx", ""))) for key in path))): a for path, a in flat
    }


def _arrays_of(leaves: Mapping[str, Weight]) -> dict[str, jax.Array]:
    return {array: value for name, leaf in leaves.items() for array, value in _arrays(name, leaf).items()}


def _all_arrays(items: Mapping[str, Mapping[str, Weight]]) -> list[str]:
    return [f"{item}/{array}" for item, leaves in items.items() for array in _arrays_of(leaves)]


def _abstract(within: str, spec: str) -> Weight:
    return abstract_experts(spec) if within.rpartition(".")[0].endswith("experts") else abstract_leaf(spec)


def _item_arrays(leaves: Mapping[str, tuple[str, str]]) -> list[str]:
    return [array for name, (spec, _) in leaves.items() for array in _arrays(name, _abstract(name, spec))]


@cache
def _read_item(path: Path, item: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return store.read_item(path, item, names)


def _check_shapes(path: Path, name: str, arrays: list[jax.Array], abstract: list[jax.ShapeDtypeStruct]) -> None:
    for array, expected in zip(arrays, abstract, strict=True):
        if array.shape != expected.shape or array.dtype != expected.dtype:
            raise InputError(
                f"{path}: {name} holds {array.dtype}{array.shape}; its manifest names {expected.dtype}{expected.shape}"
            )
