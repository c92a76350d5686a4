"""The golden files that `tools/make_golden.py` wrote, and how results are compared with them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

Golden = dict[str, NDArray[Any]]


def load_golden(name: str) -> Golden:
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
        return dict(arrays)


def relative_error(actual: NDArray[Any], golden: NDArray[Any]) -> float:
    """The largest error in units of the golden values' standard deviation."""
    return float(np.max(np.abs(actual.astype(np.float64) - golden)) / np.std(golden))


def as_choice(experts_BTK: NDArray[Any]) -> jax.Array:
    """Experts of a golden file as what replays them, (B*T, K)."""
    return jnp.asarray(experts_BTK.reshape(-1, experts_BTK.shape[-1]), jnp.int32)
