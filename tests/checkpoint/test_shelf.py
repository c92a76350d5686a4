"""What a job keeps: in memory while it fits, else in files that go with what they hold."""

import gc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint.shelf import OnDisk, Shelf, remove_left, shelf_beside
from moejax.errors import Note

ARRAY = jnp.asarray(np.random.RandomState(0).randn(5, 3, 2), jnp.float32)
SIZE = 4 * 30


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


def test_arrays_stay_in_memory_as_long_as_they_fit(tmp_path: Path) -> None:
    shelf = Shelf(2 * SIZE, tmp_path)
    own = [shelf.put(ARRAY + n) for n in range(2)]
    assert not files(tmp_path) and all(isinstance(kept, jnp.ndarray) for kept in own)
    third = shelf.put(ARRAY)
    assert isinstance(third, OnDisk) and len(files(tmp_path)) == 1
    del own[0]  # which makes room
    assert isinstance(shelf.put(ARRAY + 5), jnp.ndarray)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_what_lies_on_the_disk_gives_the_same_numbers(tmp_path: Path, dtype: jnp.dtype) -> None:
    array = (4 * ARRAY).astype(dtype)
    kept = Shelf(0, tmp_path).put(array)
    assert (kept.shape, kept.dtype, len(kept)) == (array.shape, array.dtype, 5)
    np.testing.assert_array_equal(jnp.asarray(kept), array)
    assert jnp.asarray(kept).dtype == array.dtype
    for index in (3, slice(1, 4), np.asarray([4, 0]), np.s_[:, :-1]):
        np.testing.assert_array_equal(jnp.asarray(kept[index]), array[index])


def test_a_file_goes_with_what_it_holds(tmp_path: Path) -> None:
    shelf = Shelf(0, tmp_path)
    kept = [shelf.put(ARRAY), shelf.put(ARRAY)]
    assert len(files(tmp_path)) == 2
    del kept[0]
    gc.collect()
    assert len(files(tmp_path)) == 1


def folders(output: Path) -> list[Path]:
    return [own for own in output.parent.iterdir() if own.name.startswith(f".{output.name}.states-")]


def test_the_folder_lies_beside_the_output_and_goes_behind(tmp_path: Path) -> None:
    output = tmp_path / "out[1]"
    with pytest.raises(KeyError), shelf_beside(output, 0) as shelf:
        kept = shelf.put(ARRAY)
        (folder,) = folders(output)
        assert [file.name for file in files(folder)] == ["0.bin"]
        raise KeyError
    assert not list(tmp_path.iterdir())
    del kept  # which finds its file gone already


def test_what_a_killed_process_left_is_removed_and_what_another_has_is_not(tmp_path: Path) -> None:
    output = tmp_path / "out"
    left = tmp_path / ".out.states-killed"
    left.mkdir()
    (left / "0.bin").write_bytes(b"of a run that was killed")
    note = pytest.warns(Note, match=r"\.out\.states-killed, which a process that was killed left, is removed")
    with note:
        remove_left(output)
    assert not left.exists()
    with shelf_beside(output, 0) as own:
        kept = own.put(ARRAY)
        with shelf_beside(output, 0) as another:  # of a process at the same output
            remove_left(output)
            assert len(folders(output)) == 2
            np.testing.assert_array_equal(another.put(ARRAY + 1), ARRAY + 1)
        np.testing.assert_array_equal(kept, ARRAY)
    assert not folders(output)


def test_a_disk_that_takes_nothing_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "0.bin").mkdir()
    with pytest.raises(OSError, match=r"/0\.bin"):
        Shelf(0, tmp_path).put(ARRAY)
