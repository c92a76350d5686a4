from pathlib import Path

import pytest

from moejax.checkpoint.json_file import MAX_JSON_BYTES, read_json_object
from moejax.errors import InputError


def test_reads_an_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null], "b": {"a": "ü"}}', encoding="utf-8")
    assert read_json_object(tmp_path / "a.json") == {"a": [1, 2.5, None], "b": {"a": "ü"}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "JSON list"),
        (b"null", "JSON NoneType"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' stands twice"),
    ],
)
def test_refuses_what_is_no_object(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        read_json_object(file)
    assert str(file) in str(error.value)


def test_refuses_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_json_object(tmp_path / "missing.json")
    with pytest.raises(InputError, match="directory"):
        read_json_object(tmp_path)


def test_refuses_a_huge_file_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)  # a sparse file: it takes no space
    with pytest.raises(InputError, match="more than the 100000000"):
        read_json_object(tmp_path / "a.json")
