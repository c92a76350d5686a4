import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from safetensors.numpy import save_file

from moejax.checkpoint.safetensors_folder import (
    DTYPES,
    MAX_HEADER_BYTES,
    open_folder,
    read_config_json,
    resolve_checkpoint,
)
from moejax.errors import InputError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.float8_e4m3fn)
SCALE = np.full((1, 1), 0.125, np.float32)
NORM = np.arange(4).astype(ml_dtypes.bfloat16)


def write_shards(folder: Path, shards: dict[str, dict[str, np.ndarray]], index: dict[str, str] | None = None) -> None:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors} if index is None else index
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_raw(file: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def two_shards(folder: Path) -> None:
    write_shards(folder, {FIRST: {"a.weight": WEIGHT, "norm": NORM}, SECOND: {"a.weight_scale_inv": SCALE}})


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@st.composite
def random_arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st_np.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    count = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    data = bytes(byte & 1 for byte in data) if dtype.kind == "b" else data
    return np.frombuffer(data, np.uint8).view(dtype).reshape(shape)


@given(st.lists(st.tuples(random_arrays(), st.integers(0, 2)), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_reads_what_the_library_writes_however_it_is_sharded(tensors: list[tuple[np.ndarray, int]]) -> None:
    shards: dict[str, dict[str, np.ndarray]] = {}
    for number, (tensor, shard) in enumerate(tensors):
        shards.setdefault(f"model-{shard}.safetensors", {})[f"layer.{number}"] = tensor
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), shards)
        opened = open_folder(Path(folder))
        assert opened.tensors.keys() == {f"layer.{number}" for number in range(len(tensors))}
        for number, (tensor, shard) in enumerate(tensors):
            info = opened.tensors[f"layer.{number}"]
            assert (info.shape, info.dtype, info.nbytes) == (tensor.shape, tensor.dtype, tensor.nbytes)
            assert info.file.name == f"model-{shard}.safetensors"
            assert same_bits(info.load(), tensor)
            if tensor.ndim:
                assert same_bits(info.load(slice(1, 3)), tensor[1:3])


def test_a_file_cut_off_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    save_file({"w": WEIGHT}, tmp_path / "model.safetensors")
    info = open_folder(tmp_path).tensors["w"]
    os.truncate(info.file, info.file.stat().st_size - 1)
    assert same_bits(info.load(slice(0, 2)), WEIGHT[:2])
    with pytest.raises(InputError, match=r"model\.safetensors: is shorter than its header says"):
        info.load()


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"w": WEIGHT, "norm": NORM}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    folder = open_folder(tmp_path)
    assert folder.tensors.keys() == {"w", "norm"}
    assert same_bits(folder.tensors["w"].load(), WEIGHT)


def test_symlinked_files_are_read_as_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    two_shards(tmp_path / "blobs")
    for number, file in enumerate((FIRST, SECOND, INDEX)):
        (tmp_path / "blobs" / file).rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / file).symlink_to(f"../blobs/{number}")
    assert same_bits(open_folder(tmp_path / "snapshot").tensors["a.weight_scale_inv"].load(), SCALE)


def test_a_tensor_at_an_odd_offset_is_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [3, 11]},
    }
    write_raw(tmp_path / "model.safetensors", header, b"abc" + NORM.tobytes())
    tensor = open_folder(tmp_path).tensors["b"].load()
    assert same_bits(tensor, NORM)
    assert jnp.asarray(tensor).tolist() == (tensor + tensor / 2 - tensor / 2).tolist() == [0, 1, 2, 3]


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        open_folder(tmp_path / "missing")
    with pytest.raises(InputError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "not valid JSON"),
        ("{}", "lacks the object `weight_map`"),
        ('{"weight_map": ["a"]}', "lacks the object `weight_map`"),
        ('{"weight_map": {"norm": 3}}', "tensor norm the file 3, which is not a file name"),
        ('{"weight_map": {"norm": "../x.safetensors"}}', "tensor norm the file ../x.safetensors, which is outside"),
        ('{"weight_map": {"norm": "/x.safetensors"}}', "tensor norm the file /x.safetensors, which is outside"),
        ('{"weight_map": {"norm": "x/../../y.safetensors"}}', r"tensor norm the file x/\.\./.*, which is outside"),
        ('{"weight_map": {"norm": ""}}', "tensor norm the file '', which is not a file name"),
        (f'{{"weight_map": {{"norm": "{"x" * 256}"}}}}', "tensor norm the file 'x+...x+', which is not a file name"),
        (r'{"weight_map": {"norm": "\u0000"}}', r"names the file \\x00, which is not in the folder"),
        ('{"weight_map": {"norm": "x.safetensors"}}', "names the file x.safetensors, which is not in the folder"),
        ('{"weight_map": {"norm": "a", "norm": "b"}}', "'norm' stands twice"),
    ],
)
def test_bad_index(tmp_path: Path, index: str, reason: str) -> None:
    two_shards(tmp_path)
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(InputError, match=reason) as error:
        open_folder(tmp_path)
    assert str(tmp_path / INDEX) in str(error.value)


INDEXED = {"a": FIRST, "b": SECOND}
X = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("shards", "index", "reason"),
    [
        ({FIRST: {"a": X}, SECOND: {"c": X}}, INDEXED, f"{SECOND}: holds tensor c, which {INDEX} does not list"),
        ({FIRST: {"a": X, "b": X}, SECOND: {"b": X}}, INDEXED, f"tensor b is in {FIRST} and in {SECOND}"),
        ({FIRST: {"a": X}, SECOND: {}}, INDEXED, f"{SECOND}: does not hold tensor b, which {INDEX} says"),
        ({FIRST: {"b": X}, SECOND: {"a": X}}, INDEXED, f"{FIRST}: does not hold tensor a, which {INDEX} says"),
    ],
)
def test_index_and_files_disagree(
    tmp_path: Path, shards: dict[str, dict[str, np.ndarray]], index: dict[str, str], reason: str
) -> None:
    write_shards(tmp_path, shards, index)
    with pytest.raises(InputError, match=reason):
        open_folder(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 8, 30, -1])
def test_truncated_shard(tmp_path: Path, kept: int) -> None:
    two_shards(tmp_path)
    (tmp_path / FIRST).write_bytes((tmp_path / FIRST).read_bytes()[:kept])
    with pytest.raises(InputError, match=f"{FIRST}: is not a sound safetensors file"):
        open_folder(tmp_path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"not json", "not a sound safetensors file"),
        ({"a": {**F32, "shape": [3]}}, "not a sound safetensors file"),
        ({"a": F32, "b": F32}, "not a sound safetensors file"),
        ({"a": {**F32, "data_offsets": [-8, 0]}}, "not a sound safetensors file"),
        ({"a": {**F32, "data_offsets": [8, 16]}}, "not a sound safetensors file"),
        ({"a": {**F32, "dtype": "F99"}}, "not a sound safetensors file.*F99"),
        ({"a": {**F32, "dtype": "C64", "shape": [1]}}, "tensor a has dtype C64; accepted are BOOL, U8"),
        ({"a": {**F32, "shape": [-1, -2]}}, "not a sound safetensors file"),
        ({"a": {**F32, "shape": [2**63, 2]}}, "not a sound safetensors file"),
        ({"a": {**F32, "shape": [2**62, 2**62, 2**62, 2]}}, "not a sound safetensors file"),
        ({"a": {**F32, "shape": [10**400]}}, "not a sound safetensors file"),
        ({"a": {**F32, "data_offsets": [0, 2**63]}}, "not a sound safetensors file"),
        ({"a": {**F32, "data_offsets": [0, 4]}, "b": {**F32, "data_offsets": [2, 8]}}, "not a sound safetensors file"),
        # What the library lets pass: other forms of the same, shapes that NumPy cannot hold.
        ({"a": ["F32", [2], [0, 8]]}, r"tensor a is described by \['F32', \[2\], \[0, 8\]\]; an object"),
        ({"a": {**F32, "dtype": {"F32": None}}}, "tensor a is described by .*; an object with its dtype is needed"),
        ({"a": {**F32, "shape": [1] * 80 + [2]}}, r"tensor a has shape \[1, 1, .*\]; up to 8 axes are accepted"),
        ({"a": F32, "b": {"dtype": "U8", "shape": [0, 2**62], "data_offsets": [8, 8]}}, "tensor b has shape .*; up to"),
        (f'{{"a": {json.dumps(F32)}, "a": {json.dumps({**F32, "dtype": "I32"})}}}'.encode(), "'a' stands twice"),
    ],
)
def test_corrupt_header(tmp_path: Path, header: dict[str, Any] | bytes, reason: str) -> None:
    write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(InputError, match=reason) as error:
        open_folder(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


@pytest.mark.parametrize("header_bytes", [1 << 62, 200_000_000, MAX_HEADER_BYTES + 1])
def test_huge_header(tmp_path: Path, header_bytes: int) -> None:
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(header_bytes.to_bytes(8, "little"))
        stream.truncate(300_000_000)  # a sparse file: it takes no space
    with pytest.raises(InputError, match=r"not a sound safetensors file .header too large: .* 10000000 are accepted"):
        open_folder(tmp_path)


def test_a_header_of_too_many_tensors(tmp_path: Path) -> None:
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"{number:x}":{empty}' for number in range(150_000)) + "}"
    write_raw(tmp_path / "model.safetensors", header.encode(), b"")
    with pytest.raises(InputError, match="up to 1050001 values of JSON are more than the 1000000"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, FIRST])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    two_shards(tmp_path)
    for make in (os.mkfifo, lambda file: file.symlink_to("/dev/zero"), Path.mkdir):
        (tmp_path / name).unlink(missing_ok=True)
        make(tmp_path / name)
        if name == "model.safetensors":  # there are shards still
            assert len(open_folder(tmp_path).tensors) == 3
        else:
            with pytest.raises(InputError, match=f"neither .* nor {name}|{name}, which is not in the folder"):
                open_folder(tmp_path)
        shutil.rmtree(tmp_path / name) if make is Path.mkdir else (tmp_path / name).unlink()


def test_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        read_config_json(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    assert read_config_json(tmp_path) == {"model_type": "deepseek_v3"}


def test_resolve_a_folder(tmp_path: Path) -> None:
    assert resolve_checkpoint(tmp_path) == tmp_path
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["missing", "./org/name", "/org/name", "org/name/more", "", "org/", "~/name"])
def test_resolve_refuses_what_is_neither_folder_nor_hub_name(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"neither a folder nor a name of the form org/name"):
        resolve_checkpoint(name or tmp_path / "missing")


def test_resolve_fetches_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        calls.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_checkpoint("deepseek-ai/DeepSeek-V3") == tmp_path
    assert calls == [("deepseek-ai/DeepSeek-V3", ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "tiktoken*"])]


@pytest.mark.parametrize("reason", [ConnectionError("offline\nmore lines"), ValueError("offline"), OSError("offline")])
def test_resolve_says_in_one_line_why_fetching_failed(reason: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise reason

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=f"^org/name: .*{type(reason).__name__}: offline.*org/name of a model[^\n]*$"):
        resolve_checkpoint("org/name")
