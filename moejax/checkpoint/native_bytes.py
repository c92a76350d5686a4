"""What a native folder says of itself, and the exact bytes that it takes, from shapes alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moejax.checkpoint import store
from moejax.checkpoint.native import (
    FORMAT_VERSION,
    NO_CHECKSUM,
    arrays_of,
    checksum_digits,
    item_of,
    with_checksum,
)
from moejax.formats import describe
from moejax.model import DeepseekV3, named_leaves
from moejax.model.config import ROTATION_FIELDS
from moejax.model.leaves import Weight

# What a manifest sets aside for its provenance, filled with blanks, so that a folder's size is known before it is
# decided what to calibrate on.
PROVENANCE_BYTES = 2048


@dataclass(frozen=True)
class Description:
    """What a manifest says beside the leaves: plain JSON values."""

    raw_config: dict[str, Any]
    plan: dict[str, Any]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class NativeBytes:
    """The bytes of a folder: arrays, orbax's and zarr's descriptions of them, manifest, copied files."""

    arrays: int
    descriptions: int
    manifest: int
    copied: int

    @property
    def total(self) -> int:
        return self.arrays + self.descriptions + self.manifest + self.copied


def native_bytes(abstract_model: DeepseekV3, description: Description, copied: Sequence[Path]) -> NativeBytes:
    """The exact bytes of the folder that `native_writer` and `write_native` will write, from shapes alone."""
    items = {item: arrays_of_item(leaves) for item, leaves in items_of(abstract_model).items()}
    no_checksums = {
        item: {name: "0" * checksum_digits(array) for name, array in own.items()} for item, own in items.items()
    }
    files = {file.name: NO_CHECKSUM for file in copied}
    manifest = manifest_of(abstract_model, description, no_checksums, files)
    arrays = sum(store.payload_bytes(own) for own in items.values())
    in_items = sum(store.item_bytes(own) for own in items.values())
    return NativeBytes(arrays, in_items - arrays, len(manifest), sum(file.stat().st_size for file in copied))


def manifest_of(
    model: DeepseekV3,
    description: Description,
    checksums: Mapping[str, Mapping[str, str]],
    files: Mapping[str, str],
) -> bytes:
    """The manifest of a model, of which shapes are enough, with checksums of all items' arrays and of the copied files.
    Raises ValueError if the description is not the model's, or its provenance is too long."""
    items = {
        item: {
            name: [describe(leaf), "".join(checksums[item][array] for array in arrays_of(name, leaf))]
            for name, leaf in leaves.items()
        }
        for item, leaves in items_of(model).items()
    }
    blocks = [*model.layers, *(mtp.block for mtp in model.mtp)]
    per_token = [block.experts_per_token for block in blocks]
    manifest = {
        "format": "moejax",
        "version": FORMAT_VERSION,
        "checksum": NO_CHECKSUM,
        "files": dict(files),
        "config": description.raw_config,
        "experts_per_token": per_token,
        "items": items,
        "plan": description.plan,
        "provenance": description.provenance,
    }
    if wrong := [n for n in ROTATION_FIELDS if description.raw_config.get(n) != getattr(model.config, n)]:
        raise ValueError(f"the config says nothing of the model's {wrong[0]}; it would be read as another model")
    padding = PROVENANCE_BYTES - len(json.dumps(description.provenance, separators=(",", ":")))
    if padding < 0:
        raise ValueError(f"the provenance takes {PROVENANCE_BYTES - padding} bytes; {PROVENANCE_BYTES} are set aside")
    return with_checksum(json.dumps(manifest, separators=(",", ":")).encode() + b" " * padding)


def items_of(model: DeepseekV3) -> dict[str, dict[str, Weight]]:
    """A model's leaves by item, and by name within it."""
    items: dict[str, dict[str, Weight]] = {}
    for name, leaf in named_leaves(model).items():
        item, within = item_of(name)
        items.setdefault(item, {})[within] = leaf
    return items


def arrays_of_item(leaves: Mapping[str, Weight]) -> dict[str, jax.Array]:
    """The arrays of an item's leaves, by name within it."""
    return {array: value for name, leaf in leaves.items() for array, value in arrays_of(name, leaf).items()}
