"""What the arrays of a native checkpoint's leaf must be, beyond having the bytes that its manifest names.

Checksums tell what a writer wrote, not that it was right: a slot or group out of range would be clipped in silence.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from moejax.checkpoint.chunks import StoredArray
from moejax.errors import InputError
from moejax.formats import ExpertWeights
from moejax.model import Config
from moejax.model.leaves import Weight
from moejax.model.weights import row_of


def check_arrays(
    path: Path, name: str, arrays: Sequence[jax.Array | StoredArray], abstract: Sequence[jax.ShapeDtypeStruct]
) -> None:
    """Raises InputError where an array has not the shape and dtype that the manifest gives it."""
    for array, expected in zip(arrays, abstract, strict=True):
        if array.shape != expected.shape or array.dtype != expected.dtype:
            raise InputError(
                f"{path}: {name} holds {array.dtype}{array.shape}; its manifest names {expected.dtype}{expected.shape}"
            )


def check_indices(path: Path, name: str, weight: Weight, config: Config) -> None:
    """Raises InputError unless every expert has a slot of its own, every group is one of the config's, and a rotation's
    signs are 1 and -1."""
    if isinstance(weight, ExpertWeights):
        places = zip(np.asarray(weight.bucket_E).tolist(), np.asarray(weight.index_E).tolist(), strict=True)
        if sorted(places) != [(b, slot) for b, bucket in enumerate(weight.buckets) for slot in range(bucket.shape[0])]:
            raise InputError(f"{path}: {name} does not give each of its experts a place of its own; copy it anew")
    own = row_of(name).name
    if own == "mlp.group_id" and not set(np.asarray(weight).tolist()) <= set(range(config.n_group)):
        raise InputError(f"{path}: {name} names a group that is none of the {config.n_group}; copy it anew")
    if own == "signs" and not np.all(np.abs(np.asarray(weight, np.float32)) == 1):
        raise InputError(f"{path}: {name} holds numbers other than 1 and -1; copy it anew")
