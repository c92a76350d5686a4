import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from leaf_oracle import random_leaf
from moejax.checkpoint.predictions import BaseOrigin, open_predictions, saved_predictions
from moejax.errors import InputError
from moejax.formats import describe

ORIGIN = BaseOrigin("some/där", "text.txt", "ab" * 32)
N, T, D, C = 5, 16, 64, 40
TOKENS = np.random.RandomState(0).randint(C, size=(N, T)).astype(np.int32)
STATES: NDArray[Any] = np.random.RandomState(1).randn(N, T - 1 - T // 2, D).astype(np.float32)


def save(path: Path, head: Any, states: NDArray[Any] = STATES) -> None:
    with saved_predictions(path, ORIGIN, TOKENS, lambda: head, states.dtype) as append:
        for first in (0, 2, 4):
            append(states[first : first + 2])


def head_of(spec: str) -> Any:
    return random_leaf(f"{spec}[{C},{D}]", seed=3)


@pytest.mark.parametrize("spec", ["f32", "bf16", "fp8b16x32", "int4g32", "int6g64", "ternaryg32"])
def test_predictions_come_back_bit_for_bit(tmp_path: Path, spec: str) -> None:
    head = head_of(spec)
    states = STATES.astype(ml_dtypes.bfloat16 if spec == "bf16" else np.float32)
    save(tmp_path / "base", head, states)
    saved = open_predictions(tmp_path / "base")
    assert (saved.origin, saved.dtype) == (ORIGIN, states.dtype.name)
    np.testing.assert_array_equal(saved.tokens_NT, TOKENS)
    for chunks in (slice(0, 5), slice(1, 3), slice(4, 9)):
        np.testing.assert_array_equal(saved.states_NSD[chunks], states[chunks], strict=True)
    read = saved.head()
    assert describe(read) == describe(head)
    for array, expected in zip(jax.tree.leaves(read), jax.tree.leaves(head), strict=True):
        assert array.dtype == expected.dtype and np.asarray(array).tobytes() == np.asarray(expected).tobytes()


def test_the_safetensors_library_finds_the_file_sound(tmp_path: Path) -> None:
    save(tmp_path / "base", head_of("f32"))
    with safe_open(tmp_path / "base", framework="numpy") as file:
        assert sorted(file.keys()) == ["head.0", "states", "tokens"]
        np.testing.assert_array_equal(file.get_tensor("states"), STATES)


@pytest.mark.parametrize("states", [STATES[:3], np.concatenate([STATES, STATES[:1]]), STATES[:, 1:], STATES[:, :, 1:]])
def test_states_that_are_not_those_of_the_tokens_leave_no_file(tmp_path: Path, states: NDArray[Any]) -> None:
    with (
        pytest.raises(ValueError, match="states"),
        saved_predictions(tmp_path / "base", ORIGIN, TOKENS, lambda: head_of("f32"), np.float32) as append,
    ):
        append(states)
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_or_cannot_be_written_is_named(tmp_path: Path) -> None:
    save(tmp_path / "base", head_of("f32"))
    with pytest.raises(InputError, match="base: exists already; give a path that is free"):
        save(tmp_path / "base", head_of("f32"))
    with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\); give a file in a folder"):
        save(tmp_path / "nowhere" / "base", head_of("f32"))


def rewritten(path: Path, **changes: Any) -> Path:
    """The same bytes under a header in which some metadata (or, `tensors`, names of tensors) are changed."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for old, new in changes.pop("tensors", {}).items():
        header[new] = header.pop(old)
    header["__metadata__"] |= changes
    header["__metadata__"] = {key: value for key, value in header["__metadata__"].items() if value is not None}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "holds no predictions of version 1; a file that --save-base wrote is needed"),
        ({"version": "2"}, "holds no predictions of version 1"),
        ({"head": None}, "is damaged"),
        ({"head": "f32[40]"}, "is damaged"),
        ({"head": "f99[40,64]"}, "is damaged"),
        ({"head": "f32[64,40]"}, "is damaged"),
        ({"head": "bf16[40,64]"}, "is damaged"),
        ({"text": None}, "is damaged"),
        ({"tensors": {"states": "state"}}, "is damaged"),
        ({"tensors": {"head.0": "head.1"}}, "is damaged"),
    ],
    ids=str,
)
def test_damage_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(tmp_path / "base", head_of("f32"))
    with pytest.raises(InputError, match=message):
        open_predictions(rewritten(tmp_path / "base", **changes))


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, size: int) -> None:
    save(tmp_path / "base", head_of("f32"))
    raw = (tmp_path / "base").read_bytes()
    (tmp_path / "base").write_bytes(raw[:size])
    with pytest.raises(InputError, match="base: "):
        open_predictions(tmp_path / "base")
