from pathlib import Path
from typing import Any

import pytest

from moejax.checkpoint import toml_file
from moejax.checkpoint.toml_file import read_toml, write_toml
from moejax.errors import InputError

VALUES: dict[str, Any] = {
    "name": 'quoted "ä"\n',
    "number": 7,
    "scale": 0.1,
    "empty": {},
    "list": [1, 2],
    "blocks": [{"formats": {"mlp.up": "a"}}, {"formats": {}, "keep": "0-2 5"}],
}


def refused(file: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_toml(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_toml(tmp_path / "values.toml", VALUES)
    assert read_toml(tmp_path / "values.toml") == VALUES


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "missing.toml", r"cannot be read \(No such file or directory\); a readable TOML file is needed$")
    refused(tmp_path, r"cannot be read \(Is a directory\); a readable TOML file is needed$")


@pytest.mark.parametrize(
    "content",
    [
        b"embed = ",
        b'{"embed": "a"}',
        b"a = 1\na = 2",
        b'text = "\xff"',
        "a = 'ä'".encode("utf-16"),
        b"x = " + b"[" * 5000,
    ],
    ids=lambda content: str(content[:20]),
)
def test_what_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.toml").write_bytes(content)
    refused(tmp_path / "plan.toml", r"is not valid TOML \(.*\); a TOML file is needed$")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toml_file, "MAX_TOML_BYTES", 100)
    file = tmp_path / "plan.toml"
    file.write_text("a = 1" + " " * 95)
    assert read_toml(file) == {"a": 1}
    file.write_text("\xff" * 51)
    refused(file, "102 bytes of TOML are more than the 100 that are accepted$")
