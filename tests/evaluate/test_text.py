import codecs
import hashlib
import random
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.errors import InputError, Note
from moejax.evaluate import text
from moejax.evaluate.text import Text, chunks, default_calibration_text, default_evaluation_text, read_text

DEFAULT_TEXTS = [default_calibration_text, default_evaluation_text]


def install(folder: Path, package: str, files: dict[str, str]) -> None:
    """Writes a package and the record that an installer leaves, as if `folder` were a site-packages folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, newline="")
    record = folder / f"{package}-1.2.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (record / "RECORD").write_text("".join(f"{name},,\n" for name in [*files, "../../bin/tool", f"{package}/gone.py"]))


@pytest.fixture
def only_spam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the module path in which a test installs `spam`, the one package to calibrate on."""
    monkeypatch.setattr(text, "_CALIBRATION_PACKAGES", ("spam",))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("default_text", DEFAULT_TEXTS)
def test_a_default_text_fills_its_size_and_says_what_it_is(default_text: Callable[[int], Text]) -> None:
    found = default_text(300_000)
    encoded = found.content.encode()
    assert 299_990 <= len(encoded) <= 300_000
    assert found.sha256 == hashlib.sha256(encoded).hexdigest()
    assert f"numpy=={metadata.version('numpy')}" in found.source


@pytest.mark.parametrize("default_text", DEFAULT_TEXTS)
def test_a_default_text_does_not_depend_on_the_order_of_files(
    default_text: Callable[[int], Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shuffled(package: str) -> list[metadata.PackagePath]:
        return random.Random(1).sample(recorded := files(package) or [], len(recorded))

    files = metadata.files
    expected = default_text(100_000)
    monkeypatch.setattr(metadata, "files", shuffled)
    assert default_text(100_000) == expected


def test_no_test_file_of_numpy_is_in_the_calibration_text() -> None:
    calibration = default_calibration_text(2_500_000).content
    tests = default_evaluation_text(2_500_000).content.split("\n\n\n")
    long = [passage for passage in tests if len(passage) > 400]
    assert len(long) > 100
    assert not [passage for passage in long if passage in calibration]


def test_sources_that_belong_to_tests_are_left_out(only_spam: Path) -> None:
    kept = {"spam/__init__.py": "A", "spam/attest.py": "B", "spam/latest/x.py": "C"}
    left_out = ["spam/tests/x.py", "spam/test/x.py", "spam/testing/x.py", "spam/test_x.py", "spam/x_test.py"]
    left_out += ["spam/_internal_test_data/x.py", "spam/notes.txt", "spam/x.pyi"]
    install(only_spam, "spam", kept | dict.fromkeys(left_out, "NO"))
    found = default_calibration_text(1000)
    assert sorted(found.content.split("\n\n")) == ["A", "B", "C"]
    assert found.source == "spam==1.2"


def test_files_are_taken_from_all_over_the_list(only_spam: Path) -> None:
    install(only_spam, "spam", {f"spam/f{i:03}.py": f"{i:03}\n" for i in range(200)})
    taken = [int(number) for number in default_calibration_text(20 * len("000\n\n")).content.split("\n\n") if number]
    assert len(taken) == 20
    assert max(np.diff([0, *sorted(taken), 200])) <= 20


def test_a_long_file_gives_its_first_lines(only_spam: Path) -> None:
    install(only_spam, "spam", {"spam/long.py": "x = 1\n" * 50_000, "spam/short.py": "y = 2\n"})
    long, short = sorted(default_calibration_text(1_000_000).content.split("\n\n"))
    assert 32_000 < len(long) <= 32_768
    assert set(long.split("\n")) == {"x = 1"}
    assert short == "y = 2"


def test_the_cut_never_splits_a_character(only_spam: Path) -> None:
    install(only_spam, "spam", {"spam/euro.py": "€€€\n"})
    assert default_calibration_text(7).content == "€€"


def test_a_file_is_read_in_its_declared_encoding(only_spam: Path) -> None:
    install(only_spam, "spam", {"spam/old.py": ""})
    (only_spam / "spam/old.py").write_bytes("# -*- coding: latin-1 -*-\r\né\r\n".encode("latin-1"))
    assert default_calibration_text(1000).content == "# -*- coding: latin-1 -*-\né"


@pytest.mark.parametrize("installed", [False, True])
def test_a_package_without_sources_is_named(only_spam: Path, installed: bool) -> None:
    if installed:
        install(only_spam, "spam", {"spam/tests/test_x.py": "NO"})
    with pytest.raises(InputError, match="the Python files of spam are not on this machine; give a text file instead"):
        default_calibration_text(1000)


def test_a_text_file_is_read_byte_for_byte(tmp_path: Path) -> None:
    content = "a\rb\n\né€\ufeff"
    (tmp_path / "held_out.txt").write_bytes(content.encode())
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert read_text(tmp_path / "held_out.txt") == Text("held_out", "held_out.txt", digest, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file"),
        (b"", "is empty"),
        (b"ab\xff", r"is not UTF-8 \(byte 2\)"),
        *(("a".encode(own), f"is {own.upper()}, by its byte-order mark") for own in ("utf-16", "utf-32")),
        (codecs.BOM_UTF16_BE + "a".encode("utf-16-be"), "is UTF-16, by its byte-order mark"),
        (codecs.BOM_UTF32_BE + "a".encode("utf-32-be"), "is UTF-32, by its byte-order mark"),
    ],
)
def test_an_unusable_text_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.txt {message}; a text file in UTF-8 is needed"):
        read_text(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("before", "line_end", "message"),
    [
        ("\ufeff", "\n", "its byte-order mark"),
        ("", "\r\n", "the carriage returns before its line ends"),
        ("\ufeff", "\r\n", "its byte-order mark and the carriage returns before its line ends"),
    ],
)
def test_what_an_editor_added_is_left_out(tmp_path: Path, before: str, line_end: str, message: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_bytes(b"one\ntwo\n")
    plain = read_text(tmp_path / "a" / "x.txt")
    (tmp_path / "x.txt").write_text(f"{before}one\ntwo\n", newline=line_end)
    with pytest.warns(Note, match=rf"x\.txt is read without {message}$"):
        assert read_text(tmp_path / "x.txt") == plain


def test_a_text_of_a_byte_order_mark_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(codecs.BOM_UTF8)
    with pytest.raises(InputError, match="is empty"):
        read_text(tmp_path / "x.txt")


@given(length=st.integers(1, 200), n_ctx=st.integers(1, 40))
def test_chunks_are_the_whole_slices_of_the_text(length: int, n_ctx: int) -> None:
    tokens = list(range(length))
    slices = [tokens[i : i + n_ctx] for i in range(0, length, n_ctx)]
    whole = [part for part in slices if len(part) == n_ctx]
    if whole:
        np.testing.assert_array_equal(chunks(tokens, n_ctx, bos_token_id=None), np.array(whole, np.int32), strict=True)
    else:
        with pytest.raises(InputError, match=f"has {length} tokens; at least {n_ctx} are needed"):
            chunks(tokens, n_ctx, bos_token_id=None)


def test_bos_stands_before_the_text_and_replaces_each_chunk_s_first_token() -> None:
    given_tokens = np.arange(10, 20, dtype=np.int32)
    assert chunks(given_tokens, 4, bos_token_id=7).tolist() == [[7, 10, 11, 12], [7, 14, 15, 16]]
    assert given_tokens.tolist() == list(range(10, 20))


def test_bos_counts_toward_a_chunk() -> None:
    assert chunks(range(511), bos_token_id=0).shape == (1, 512)
    with pytest.raises(InputError, match="the text has 511 tokens; at least 512 are needed for one chunk"):
        chunks(range(511), bos_token_id=None)
