"""What does not fit the disk is refused before the work."""

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from command_line import refused
from moejax.commands import compress

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def almost_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))


def test_compress(small: Path, text_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_is_read(*_: object) -> None:
        pytest.fail("the texts are read after it is known that the result fits")

    monkeypatch.setattr(compress, "_read_texts", nothing_is_read)
    monkeypatch.setattr(compress, "check_limit", lambda _, limit, __: limit)
    message = refused(tmp_path, "compress", small, "--budget", "600KB", "--output", tmp_path / "out", *text_options)
    assert f"{tmp_path / 'out'}: 600000 bytes are needed and {tmp_path} has 1000 free; make room, or " in message


def test_export(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(tmp_path, "export", small, "--to", "hf", "--output", tmp_path / "out")
    needed = re.search(rf"out: (\d+) bytes are needed and {tmp_path} has 1000 free", message)
    tensors = sum(file.stat().st_size for file in small.glob("*.safetensors"))
    assert needed is not None and 0.99 * tensors < int(needed[1]) < 1.1 * tensors


def test_saved_predictions(small: Path, heldout_text: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, "evaluate", small, "--text", heldout_text, "--save-base", tmp_path / "base")
    needed = re.search(rf"base: (\d+) bytes are needed and {tmp_path} has 1000 free", message)
    # A chunk of 512 int32, of which 255 are scored with 128 float32 each; the head, 320 x 128 of bfloat16; a header.
    arrays = 512 * 4 + 255 * 128 * 4 + 320 * 128 * 2
    assert needed is not None and arrays < int(needed[1]) < arrays + 1000
