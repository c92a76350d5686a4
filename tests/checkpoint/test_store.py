import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from moejax.checkpoint.store import (
    folder_bytes,
    is_whole,
    item_bytes,
    payload_bytes,
    read_item,
    write_item,
)
from moejax.errors import InputError, InternalError

DTYPES = [
    np.dtype(scalar)
    for scalar in (
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
        *(np.bool_, np.float16, np.float32, np.float64),
        *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    )
]
LEAVES: dict[str, np.ndarray] = {
    "q_a": np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16),
    "experts.0.words": np.arange(6, dtype=np.uint32).reshape(1, 2, 3),
    "scale": np.asarray(0.5, np.float32),
}


@st.composite
def random_arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st_np.array_shapes(min_dims=0, max_dims=8, max_side=3))
    count = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    data = bytes(byte & 1 for byte in data) if dtype.kind == "b" else data
    return np.frombuffer(data, np.uint8).view(dtype).reshape(shape)


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


def read_whole(folder: Path, item: str, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    return {name: stored.read()[0] for name, stored in read_item(folder, item, names).items()}


def assert_same_bits(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype), name
        assert np.asarray(array).tobytes() == np.asarray(expected[name]).tobytes(), name


@given(st.dictionaries(names, random_arrays(), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_round_trip_and_predicted_size(leaves: dict[str, np.ndarray]) -> None:
    abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_item(Path(folder), "layer_0", leaves)
        assert folder_bytes(Path(folder)) == item_bytes(leaves) == item_bytes(abstract)
        assert_same_bits(read_whole(Path(folder), "layer_0", leaves), leaves)
        with ocp.PyTreeCheckpointer() as plain_orbax:
            assert_same_bits(plain_orbax.restore(Path(folder) / "items" / "layer_0"), leaves)


def test_payload_bytes() -> None:
    assert payload_bytes(LEAVES) == 12 * 2 + 6 * 4 + 4
    assert payload_bytes({"a": jax.ShapeDtypeStruct((3, 5), jnp.float8_e4m3fn)}) == 15


def test_jax_arrays_and_strided_arrays(tmp_path: Path) -> None:
    matrix = np.arange(24, dtype=np.int32).reshape(4, 6)
    write_item(tmp_path, "a", {"jax": jnp.asarray(matrix, jnp.bfloat16), "columns": matrix[:, ::2], "turned": matrix.T})
    expected = {"jax": matrix.astype(ml_dtypes.bfloat16), "columns": matrix[:, ::2].copy(), "turned": matrix.T.copy()}
    assert folder_bytes(tmp_path) == item_bytes(expected)
    assert_same_bits(read_whole(tmp_path, "a"), expected)


def test_the_items_are_one_orbax_checkpoint_too(tmp_path: Path) -> None:
    write_item(tmp_path, "embed", {"weight": LEAVES["q_a"]})
    write_item(tmp_path, "layer_0", LEAVES)
    wanted = ocp.args.Composite(embed=ocp.args.PyTreeRestore(), layer_0=ocp.args.PyTreeRestore())
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as plain_orbax:
        restored = plain_orbax.restore(tmp_path / "items", args=wanted)
    assert_same_bits(restored.embed, {"weight": LEAVES["q_a"]})
    assert_same_bits(restored.layer_0, LEAVES)


def test_two_writes_are_equal_byte_for_byte_wherever_they_lie(tmp_path: Path) -> None:
    contents = []
    for folder in (tmp_path / "a", tmp_path / "a_longer_path"):
        folder.mkdir()
        write_item(folder, "embed", LEAVES)
        files = [file for file in folder.rglob("*") if file.is_file()]
        contents.append({file.relative_to(folder): file.read_bytes() for file in files})
    assert contents[0] == contents[1] and len(contents[0]) == 1 + 2 * len(LEAVES)


def test_writing_and_reading_log_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        write_item(tmp_path, "a", LEAVES)
        read_item(tmp_path, "a")
    assert not caplog.records


@pytest.mark.parametrize(
    ("leaves", "reason"),
    [
        ({}, "without leaves"),
        ({"a": np.zeros((2, 0))}, r"leaf a: shape \(2, 0\) has no elements"),
        ({"a": np.zeros(2, np.complex64)}, "leaf a: dtype complex64 cannot be stored"),
        ({"a": np.zeros(2, ">f4")}, "leaf a: dtype >f4 cannot be stored"),
        ({"a": np.zeros(2, ml_dtypes.int4)}, "leaf a: dtype int4 cannot be stored"),
        ({"a": np.asarray(["text"])}, "leaf a: dtype <U4 cannot be stored"),
        ({"a/b": np.zeros(2)}, "the name 'a/b' cannot be stored"),
        ({".a": np.zeros(2)}, "the name '.a' cannot be stored"),
        ({"": np.zeros(2)}, "the name '' cannot be stored"),
        ({"a" * 201: np.zeros(2)}, "the name 'a+' cannot be stored"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_writing(
    tmp_path: Path, leaves: dict[str, np.ndarray], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        item_bytes(leaves)
    with pytest.raises(ValueError, match=reason):
        write_item(tmp_path, "a", leaves)
    assert not list(tmp_path.iterdir())


def test_an_item_is_not_overwritten(tmp_path: Path) -> None:
    write_item(tmp_path, "a", LEAVES)
    with pytest.raises(InputError, match="items/a: exists already"):
        write_item(tmp_path, "a", {"b": np.zeros(2)})
    with pytest.raises(ValueError, match=r"the name '\.\./b' cannot be stored"):
        write_item(tmp_path, "../b", LEAVES)
    assert_same_bits(read_whole(tmp_path, "a"), LEAVES)


def test_an_item_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_item(tmp_path, "a", LEAVES)
    assert not list((tmp_path / "items").iterdir())


def test_a_disk_that_takes_no_more_is_one_error_and_nothing_is_printed(tmp_path: Path) -> None:
    """In a process of its own, which may write no file over 1000 bytes."""
    program = f"""
import resource, signal
from pathlib import Path
import numpy as np
from moejax.checkpoint.store import write_item
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    write_item(Path({str(tmp_path)!r}), "a", {{f"leaf_{{n}}": np.ones(2000, np.uint8) for n in range(40)}})
except OSError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{tmp_path / 'items' / 'a'}'\n"
    assert not ran.stderr
    assert not list((tmp_path / "items").iterdir())


def test_an_item_that_is_larger_than_what_is_free_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=item_bytes(LEAVES) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("nothing must be written"))
    with pytest.raises(OSError, match=r"No space left on device: '.*items/a'"):
        write_item(tmp_path, "a", LEAVES)


def test_an_item_of_other_bytes_than_predicted_is_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, size = Path.write_bytes, item_bytes(LEAVES)
    monkeypatch.setattr(Path, "write_bytes", lambda file, own: write(file, bytes(own) + b" " * (file.name == "0")))
    with pytest.raises(InternalError, match=f"item a takes {size + 1} bytes and was predicted to take {size}; nothing"):
        write_item(tmp_path, "a", LEAVES)
    assert not list((tmp_path / "items").iterdir())


def damage_chunk(item: Path) -> None:
    chunk = item / "q_a" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])


def damage_array_file(item: Path, old: str, new: str) -> None:
    file = item / "q_a" / ".zarray"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_chunk, r"q_a/0.0: has 23 bytes where leaf q_a of bfloat16 \[3, 4\] needs 24"),
        (lambda item: (item / "scale" / "0").unlink(), "scale/0: has 0 bytes where leaf scale of float32 .* needs 4"),
        (lambda item: shutil.rmtree(item / "q_a"), "items/a: leaf q_a is missing"),
        (lambda item: shutil.copytree(item / "q_a", item / "q_b"), "items/a: leaf q_b does not belong there"),
        (lambda item: (item / "_METADATA").unlink(), "items/a/_METADATA: cannot be read"),
        (lambda item: (item / "_METADATA").write_text("{"), "items/a/_METADATA: is not valid JSON"),
        (lambda item: (item / "_METADATA").write_text("{}"), "items/a/_METADATA: lacks the object `tree_metadata`"),
        (lambda item: (item / "q_a" / ".zarray").unlink(), "q_a/.zarray: cannot be read"),
        (lambda item: (item / "q_a" / ".zarray").write_text("{}"), "q_a/.zarray: does not describe"),
        (lambda item: damage_array_file(item, '"bfloat16"', '"float128"'), "q_a/.zarray: does not describe"),
        (lambda item: damage_array_file(item, '"chunks":[3,4]', '"chunks":[1,4]'), "q_a/.zarray: does not describe"),
        (lambda item: damage_array_file(item, '"shape":[3,4]', '"shape":[-3,4]'), "q_a/.zarray: does not describe"),
        (lambda item: damage_array_file(item, '"compressor":null', '"compressor":1'), "q_a/.zarray: does not describe"),
    ],
)
def test_a_damaged_item_is_refused(tmp_path: Path, damage: Any, reason: str) -> None:
    write_item(tmp_path, "a", LEAVES)
    damage(tmp_path / "items" / "a")
    with pytest.raises(InputError, match=reason):
        read_item(tmp_path, "a")


def test_an_item_with_other_leaves_than_expected_is_refused(tmp_path: Path) -> None:
    write_item(tmp_path, "a", LEAVES)
    with pytest.raises(InputError, match="items/a: leaf q_b is missing"):
        read_item(tmp_path, "a", [*LEAVES, "q_b"])
    with pytest.raises(InputError, match="items/a: leaf scale does not belong there"):
        read_item(tmp_path, "a", LEAVES.keys() - {"scale"})
    with pytest.raises(InputError, match="has no item b"):
        read_item(tmp_path, "b")


def test_an_item_is_whole_until_a_byte_of_any_file_changes(tmp_path: Path) -> None:
    own = write_item(tmp_path, "a", LEAVES)
    abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in LEAVES.items()}
    assert is_whole(tmp_path, "a", abstract, own)
    for file in [path for path in (tmp_path / "items" / "a").rglob("*") if path.is_file()]:
        content = file.read_bytes()
        for n in range(0, len(content), 7):
            file.write_bytes(content[:n] + bytes([content[n] ^ 1]) + content[n + 1 :])
            assert not is_whole(tmp_path, "a", abstract, own), (file, n)
        for other in (content[:-1], content + b" "):
            file.write_bytes(other)
            assert not is_whole(tmp_path, "a", abstract, own), file
        file.write_bytes(content)
    assert is_whole(tmp_path, "a", abstract, own)


def test_what_is_whole_is_what_was_asked_for(tmp_path: Path) -> None:
    own = write_item(tmp_path, "a", LEAVES)
    turned = LEAVES | {"q_a": LEAVES["q_a"].reshape(4, 3)}
    fewer = {name: array for name, array in LEAVES.items() if name != "scale"}
    assert is_whole(tmp_path, "a", LEAVES, own)
    assert not is_whole(tmp_path, "b", LEAVES, own)
    assert not is_whole(tmp_path, "a", turned, own)
    assert not is_whole(tmp_path, "a", fewer, own)
    assert not is_whole(tmp_path, "a", LEAVES, {name: own[name] for name in fewer})
    (tmp_path / "items" / "a" / "scale" / "more").touch()
    assert not is_whole(tmp_path, "a", LEAVES, own)


def test_folder_bytes_counts_every_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / ".hidden").write_bytes(bytes(3))
    (tmp_path / "a" / "b" / "c").write_bytes(bytes(4))
    (tmp_path / "empty").touch()
    assert folder_bytes(tmp_path) == 7
