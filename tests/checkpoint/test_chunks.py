"""Arrays in chunks: any part of one comes back, and its checksums are those of its chunks' bytes."""

import math
import tempfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from moejax.checkpoint import chunks
from moejax.checkpoint.chunks import StoredArray, grid_of
from moejax.checkpoint.held import Held
from moejax.checkpoint.store import read_item, write_item
from moejax.errors import InputError
from moejax.sharding import mesh_of

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_LEAST_BYTES", 16)


def stored(folder: Path, array: np.ndarray) -> StoredArray:
    held = Held(array)
    for name, content, _ in map(held.chunk, held.own_chunks):
        (folder / name).write_bytes(content)
    return StoredArray(folder, array.shape, array.dtype)


@st.composite
def arrays_and_parts(draw: st.DrawFn) -> tuple[np.ndarray, tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 12, 16]), max_size=3)))
    dtype = draw(st.sampled_from([np.uint8, np.uint32, np.float32, ml_dtypes.bfloat16]))
    array = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)

    def part(n: int) -> slice:
        start = draw(st.integers(0, n - 1))
        return slice(start, draw(st.integers(start + 1, n)))

    return array, tuple(map(part, shape))


@given(arrays_and_parts())
@settings(max_examples=200, deadline=None)
def test_any_part_comes_back_with_the_checksums_of_its_chunks(case: tuple[np.ndarray, tuple[slice, ...]]) -> None:
    array, index = case
    with tempfile.TemporaryDirectory() as folder:
        own = stored(Path(folder), array)
        own.check_sizes()
        part, found = own.read(index)
        every = [f"{zlib.crc32(file.read_bytes()):08x}" for file in own.files]
        assert own.checksums() == "".join(every)
    np.testing.assert_array_equal(part, array[index])
    assert part.dtype == array.dtype and part.shape == array[index].shape
    needed = {
        n
        for n in range(own.grid.count)
        if np.intersect1d(numbers(array)[own.grid.index(n)], numbers(array)[index]).size
    }
    assert found == {n: every[n] for n in needed}
    assert every == [Held(array).chunk(n)[2] for n in Held(array).own_chunks]


def numbers(array: np.ndarray) -> np.ndarray:
    return np.arange(array.size).reshape(array.shape)


@pytest.mark.parametrize(
    ("shape", "axis", "count"),
    [
        ((), 0, 1),
        ((64 * MEGABYTE,), 0, 1),
        ((128, MEGABYTE), 0, 8),
        ((12, MEGABYTE), 0, 4),
        ((7, MEGABYTE), 0, 1),
        ((8, MEGABYTE // 2), 0, 4),
        ((64, 2047), 0, 1),
        ((3, 16, MEGABYTE), 1, 8),
        ((256, 4, 8192), 1, 4),
    ],
)
def test_the_grid(shape: tuple[int, ...], axis: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs in as many as eight, of a megabyte or more."""
    monkeypatch.undo()
    grid = grid_of(shape, np.dtype(np.uint8))
    assert (grid.axis, grid.count) == (axis, count)
    assert grid_of(shape, np.dtype(np.uint32)).count >= count


def test_plain_orbax_restores_chunks(tmp_path: Path) -> None:
    leaves = {
        "matrix": np.arange(16 * 5, dtype=np.float32).reshape(16, 5),
        "experts": np.arange(3 * 8 * 5, dtype=np.uint32).reshape(3, 8, 5),
    }
    write_item(tmp_path, "a", leaves)
    assert len(list((tmp_path / "items" / "a" / "experts").glob("0.*.0"))) == 8
    with ocp.PyTreeCheckpointer() as plain_orbax:
        restored = plain_orbax.restore(tmp_path / "items" / "a")
    for name, array in leaves.items():
        np.testing.assert_array_equal(restored[name], array)
        np.testing.assert_array_equal(read_item(tmp_path, "a")[name].read()[0], array)


@pytest.mark.parametrize("inputs", [4, 1 << 18])  # and in large pages
def test_what_is_read_is_not_copied_by_jax(tmp_path: Path, inputs: int) -> None:
    array = np.arange(16 * inputs, dtype=np.uint32).reshape(16, inputs)
    part, _ = stored(tmp_path, array).read()
    np.testing.assert_array_equal(part, array)
    assert jax.device_put(part).unsafe_buffer_pointer() == part.ctypes.data


def test_a_chunk_that_became_shorter_is_refused(tmp_path: Path) -> None:
    own = stored(tmp_path, np.arange(64, dtype=np.uint32).reshape(16, 4))
    file = own.files[3]
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match=rf"{file}: has 27 bytes where leaf .* \[16, 4\] needs 32"):
        own.check_sizes()
    with pytest.raises(InputError, match=rf"{file}: ends 5 bytes too early"):
        own.read()


def test_checksums_of_jax_and_strided_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert Held(jnp.arange(4, dtype=jnp.uint8)).chunk(0)[2] == "8bb98613"
    turned = np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert Held(turned).chunk(0)[2] == f"{zlib.crc32(turned.tobytes()):08x}"


PLACES = [
    PartitionSpec(),
    PartitionSpec("tensor"),
    PartitionSpec(None, "tensor"),
    PartitionSpec(("data", "tensor"), None),
    PartitionSpec("data", "tensor"),
    PartitionSpec(None, "data", "tensor"),
]


@pytest.mark.parametrize("shape", [(16, 8), (24, 16), (3, 16, 8), (16,), ()])
def test_chunks_do_not_depend_on_where_an_array_lies(shape: tuple[int, ...]) -> None:
    array, mesh = np.arange(math.prod(shape), dtype=np.float32).reshape(shape), mesh_of("data=2,tensor=4")
    expected = [Held(array).chunk(n) for n in Held(array).own_chunks]
    assert len(expected) == grid_of(shape, array.dtype).count
    for place in PLACES:
        sharding = NamedSharding(mesh, place)
        if len(place) <= len(shape) and is_cut(sharding, shape):
            held = Held(jax.device_put(array, sharding))
            assert [held.chunk(n) for n in held.own_chunks] == expected


def is_cut(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether the shape falls into equal parts."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True
