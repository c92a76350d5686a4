import os
import tracemalloc
from pathlib import Path

import pytest

from moejax.checkpoint.json_file import MAX_JSON_BYTES, MAX_JSON_VALUES, parse_json_object, read_json_object
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
    with pytest.raises(InputError, match="Is a directory"):
        read_json_object(tmp_path)


def test_refuses_a_huge_file_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)  # a sparse file: it takes no space
    with pytest.raises(InputError, match="more than the 64000000"):
        read_json_object(tmp_path / "a.json")


def test_refuses_what_is_no_file_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "endless.json"):
        with pytest.raises(InputError, match=f"{name}: is a pipe, socket or device; a readable JSON file is needed"):
            read_json_object(tmp_path / name)


def test_follows_links(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "a.json").symlink_to("blob")
    assert read_json_object(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"0,", b'"a":0,'])
def test_refuses_too_many_values_before_they_are_parsed(piece: bytes) -> None:
    is_object = piece.startswith(b'"')
    inner = piece * MAX_JSON_VALUES + (b'"b":0' if is_object else b"0")
    text = b'{"a":' + (b"{" + inner + b"}" if is_object else b"[" + inner + b"]") + b"}"
    tracemalloc.start()
    with pytest.raises(
        InputError, match=r"a.json: up to \d+ values of JSON are more than the 1000000 that are accepted"
    ):
        parse_json_object(text, Path("a.json"))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_key_that_stands_twice_is_not_shown_at_length() -> None:
    key = "k" * 100_000
    with pytest.raises(InputError, match=r"'kkk.*kkk' stands twice") as error:
        parse_json_object(f'{{"{key}": 1, "{key}": 2}}'.encode(), Path("a.json"))
    assert len(str(error.value)) < 200
