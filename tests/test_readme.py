"""Every command and every line of Python in the README works as it stands there, and every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from moejax.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """Every call of a program in a shell block, split into words."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").replace("&&", "\n").splitlines()
    return [shlex.split(line)[1:] for line in lines if re.match(rf"\s*(\S*/)?{program} ", line)]


def headings() -> set[str]:
    """The fragments by which links name the README's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_python_examples_run_one_behind_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    size = re.search(r"(\d+) -> (\d+) bytes$", capsys.readouterr().out, re.MULTILINE)
    assert size is not None and 0 < int(size[2]) < int(size[1])
    assert namespace["layer"].num_experts == 24  # type: ignore[attr-defined]
    assert namespace["packed"].shape == namespace["weight"].shape  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", commands("moejax"), ids=" ".join)
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


@pytest.mark.parametrize("command", commands("python"), ids=" ".join)
def test_scripts_and_their_options_exist(command: list[str]) -> None:
    """What is behind a bare `--` is handed on to another program."""
    source = (ROOT / command[0]).read_text()
    own = command[: command.index("--")] if "--" in command else command
    for option in (word for word in own if word.startswith("--")):
        assert f'"{option}"' in source


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)(.*?)\)", README))
def test_links_lead_to_headings_or_files(link: str) -> None:
    assert link[1:] in headings() if link.startswith("#") else (ROOT / link).is_file()
