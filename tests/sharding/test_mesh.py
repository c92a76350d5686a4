import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import InputError
from moejax.sharding import DATA, TENSOR, around, local_bytes, mesh_of


@pytest.mark.parametrize(
    ("spec", "tensor", "data"),
    [("tensor=8", 8, 1), ("data=4", 1, 4), ("tensor=4,data=2", 4, 2), ("data=2,tensor=3", 3, 2), (" tensor=1 ", 1, 1)],
)
def test_axes_in_any_order(spec: str, tensor: int, data: int) -> None:
    mesh = mesh_of(spec)
    assert mesh.shape == {DATA: data, TENSOR: tensor}
    assert list(mesh.devices.flat) == jax.devices()[: tensor * data]  # neighbours along `tensor` are neighbours


@pytest.mark.parametrize(
    "spec", ["", "tensor", "tensor=", "tensor=-1", "tensor=01", "tensor=2;data=2", "x=2", "data=2,"]
)
def test_other_texts_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match=r"tensor=8, data=2 or tensor=4,data=2 are accepted$"):
        mesh_of(spec)


def test_more_devices_than_there_are() -> None:
    with pytest.raises(InputError, match=r"^--mesh tensor=3,data=3 is of 9 devices; there are 8 CPU devices$"):
        mesh_of("tensor=3,data=3")


def test_what_is_computed_around_a_mesh_lies_on_it() -> None:
    with around(mesh_of("tensor=2")):
        assert len(jax.jit(lambda: jnp.ones(4))().sharding.device_set) == 2
    with around(None):
        assert len(jax.jit(lambda: jnp.ones(4))().sharding.device_set) == 1


@pytest.mark.parametrize("spec", ["tensor=8", "tensor=2", "tensor=2,data=4"])
def test_equal_parts_are_counted_once(spec: str) -> None:
    """As they lie in memory: devices that hold the same share it."""
    tree = {"cut": jax.ShapeDtypeStruct((16, 4), np.float32), "whole": jax.ShapeDtypeStruct((5,), np.float32)}
    assert local_bytes(tree, mesh_of(spec)) == 4 * (16 * 4 + 5)
