import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from moejax.checkpoint.safetensors_folder import INDEX_FILE, open_folder
from moejax.checkpoint.safetensors_writer import write_shards

DTYPES = (np.float32, np.int32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, NDArray[Any]]:
    """Of any bytes, most of them a few, some of them none or one number alone."""
    names = draw(st.lists(st.text("abc.é", min_size=1, max_size=6), min_size=1, max_size=8, unique=True))
    random = np.random.RandomState(draw(st.integers(0, 99)))
    drawn = {}
    for name in names:
        shape = draw(st.sampled_from([(), (1,), (3,), (0, 2), (5, 3), (2, 1, 7)]))
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        size = int(np.prod(shape)) * dtype.itemsize
        drawn[name] = np.frombuffer(random.bytes(size), dtype).reshape(shape)
    return drawn


def written(folder: Path, own: Mapping[str, NDArray[Any]], shard_bytes: int) -> dict[str, bytes]:
    """The files that were written, by name."""
    write_shards(folder, iter(own.items()), own, shard_bytes)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@given(tensors(), st.integers(1, 200))
def test_what_is_written_is_read_as_it_was(own: dict[str, NDArray[Any]], shard_bytes: int) -> None:
    with TemporaryDirectory() as folder:
        files = written(Path(folder), own, shard_bytes)
        opened = open_folder(Path(folder))
        assert opened.tensors.keys() == own.keys()
        for name, array in own.items():
            read = opened.tensors[name].load()
            assert (read.shape, read.dtype, read.tobytes()) == (array.shape, array.dtype, array.tobytes())
            assert opened.tensors[name].offset % array.dtype.itemsize == 0
    with TemporaryDirectory() as folder:
        assert written(Path(folder), own, shard_bytes) == files


@given(tensors(), st.integers(1, 200))
def test_shards_are_runs_of_tensors_as_large_as_they_may_be(own: dict[str, NDArray[Any]], shard_bytes: int) -> None:
    with TemporaryDirectory() as folder:
        index = json.loads(written(Path(folder), own, shard_bytes)[INDEX_FILE])
        shards = len(list(Path(folder).glob("*.safetensors")))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in own.values())
    members: dict[str, list[int]] = {f"model-{n + 1:05}-of-{shards:05}.safetensors": [] for n in range(shards)}
    for name, array in own.items():
        members[index["weight_map"][name]].append(array.nbytes)
    assert [index["weight_map"][name] for name in own] == sorted(index["weight_map"].values())
    sizes = list(members.values())
    assert all(sum(shard) <= shard_bytes or len(shard) == 1 for shard in sizes)
    assert all(sum(shard) + following[0] > shard_bytes for shard, following in pairwise(sizes))


def test_hugging_faces_own_reader_reads_it(tmp_path: Path) -> None:
    own: dict[str, NDArray[Any]] = {
        "a": np.arange(3, dtype=np.uint8),
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    write_shards(tmp_path, iter(own.items()), own, 100)
    with safe_open(tmp_path / "model-00001-of-00001.safetensors", framework="numpy") as shard:
        assert shard.metadata() == {"format": "pt"}
        assert {name: shard.get_tensor(name).tolist() for name in shard.keys()} == {
            "a": [0, 1, 2],
            "b": [[0, 1, 2], [3, 4, 5]],
        }


def test_only_one_tensor_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """Each is on the disk before the next is made."""
    own = {name: np.full(1000, n, np.uint8) for n, name in enumerate("abc")}

    def one_by_one() -> Iterator[tuple[str, NDArray[Any]]]:
        for n, (name, array) in enumerate(own.items()):
            content = next(tmp_path.glob("*.safetensors")).read_bytes()[-3000:]
            assert content == b"".join(bytes([m]) * 1000 for m in range(n)) + bytes(1000 * (3 - n))
            yield name, array

    write_shards(tmp_path, one_by_one(), own, 10_000)


@pytest.mark.parametrize("wrong", [("b", np.zeros(3)), ("a", np.zeros(2)), ("a", np.zeros(3, np.float32))])
def test_another_tensor_than_was_announced(tmp_path: Path, wrong: tuple[str, NDArray[Any]]) -> None:
    with pytest.raises(ValueError, match="was expected"):
        write_shards(tmp_path, iter([wrong]), {"a": np.zeros(3)}, 100)
