"""Every command and every line of Python in the README works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from moejax.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every call of moejax in a shell block, split into words."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").replace("&&", "\n").splitlines()
    return [shlex.split(line)[1:] for line in lines if re.match(r"\s*(\S*/)?moejax ", line)]


def test_python_examples_run_one_behind_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    size = re.search(r"(\d+) -> (\d+) bytes$", capsys.readouterr().out.strip())
    assert size is not None and 0 < int(size[2]) < int(size[1])
    assert namespace["layer"].num_experts == 24  # type: ignore[attr-defined]
    assert namespace["packed"].shape == namespace["weight"].shape  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_and_their_options_exist(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["moejax", command[0], "--help"])
    with pytest.raises(SystemExit) as exit_code:
        main()
    assert exit_code.value.code == 0
    helped = capsys.readouterr().out
    for option in (word for word in command if word.startswith("--")):
        assert option in helped
