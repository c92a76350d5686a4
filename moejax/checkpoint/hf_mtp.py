"""The MTP layers of a Hugging Face checkpoint: what its config promises of them, and what its files hold.

They follow the model's own layers, `model.layers.<num_hidden_layers>` and on. Converters and merges leave them out,
leave out what they share with the model, change only the model's, or forget to mention them.
"""

import re
from collections.abc import Collection, Iterator

import numpy as np

from moejax.checkpoint.hf_names import MTP_COPIES, SCALE, TOP
from moejax.checkpoint.safetensors_folder import SafetensorsFolder, TensorInfo
from moejax.errors import note
from moejax.model.config import Config

_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.")
# A tensor that no other layer has.
_OWN = ".eh_proj.weight"
# Bytes of a tensor that are compared at once.
_PIECE = 16_000_000


def left_out_mtp(names: Collection[str], config: Config, drop_mtp: bool) -> frozenset[str]:
    """Of all tensors, those of MTP layers that the config does not mention, or, with `drop_mtp`, of all MTP layers."""
    held = {_layer(name) for name in names if name.endswith(_OWN)}
    left_out = {layer for layer in held if layer >= config.num_blocks} | set(_mentioned(config) if drop_mtp else ())
    return frozenset(name for name in names if _layer(name) in left_out)


def mtp_layers(names: Collection[str]) -> list[int]:
    """The layers that the tensors of some MTP layers are of."""
    return sorted({_layer(name) for name in names})


def lacks_mtp(names: Collection[str], config: Config) -> bool:
    """Whether there is no tensor at all of the MTP layers that the config mentions."""
    mentioned = _mentioned(config)
    return len(mentioned) > 0 and not any(_layer(name) in mentioned for name in names)


def copies(config: Config) -> Iterator[tuple[str, str]]:
    """Every MTP layer's own embedding and head, and the model's, which it repeats: the tensors' names."""
    for layer in _mentioned(config):
        yield from ((f"model.layers.{layer}.{copy}", TOP[original]) for copy, original in MTP_COPIES.items())


def note_mtp(folder: SafetensorsFolder, promised: Config, config: Config) -> None:
    """Say once of each what of the MTP layers is not as the config promises: `config` is the model's, after that."""
    if folder.left_out:
        layers = ", ".join(f"model.layers.{layer}" for layer in mtp_layers(folder.left_out))
        note(
            f"{folder.path}: holds MTP layers ({layers}) beside the {promised.num_nextn_predict_layers} that the "
            "config's num_nextn_predict_layers names; they are left out"
        )
    if config.num_blocks < promised.num_blocks:
        note(
            f"{folder.path}: has no tensor of the MTP layers that the config's num_nextn_predict_layers "
            f"{promised.num_nextn_predict_layers} names (model.layers.{promised.num_hidden_layers}); "
            "the model is taken without them"
        )
    if unlike := [f"{copy} {reason}" for copy, own in copies(config) if (reason := _unlike(folder, copy, own))]:
        note(f"{folder.path}: {', '.join(unlike)}; the MTP layers use the model's own embedding and head")


def _layer(name: str) -> int:
    """The layer that a tensor is of, -1 if it is of none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _mentioned(config: Config) -> range:
    return range(config.num_hidden_layers, config.num_blocks)


def _unlike(folder: SafetensorsFolder, copy: str, own: str) -> str:
    """How an MTP layer's copy is not what it repeats, if it is not."""
    if copy not in folder.tensors:
        return "is missing"
    pairs = [[folder.tensors.get(name + suffix) for name in (copy, own)] for suffix in ("", SCALE)]
    return "" if all(_are_equal(one, other) for one, other in pairs) else f"differs from {own}"


def _are_equal(one: TensorInfo | None, other: TensorInfo | None) -> bool:
    """Whether two tensors have the same bytes, with a piece of each in memory; or are both not there."""
    if one is None or other is None:
        return one is other
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    rows = one.shape[0]
    step = max(1, _PIECE * rows // one.nbytes)
    return all(
        np.array_equal(one.load(piece).view(np.uint8), other.load(piece).view(np.uint8))
        for piece in (slice(start, start + step) for start in range(0, rows, step))
    )
