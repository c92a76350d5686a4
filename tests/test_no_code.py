"""No file that moejax reads can run code: nothing in the package unpickles or evaluates."""

import re
from pathlib import Path

import pytest

import moejax

SOURCES = sorted(Path(moejax.__file__).parent.rglob("*.py"))
RUNS_CODE = re.compile(
    r"pickle|\bmarshal\b|\bshelve\b|\bdill\b|\bjoblib\b|\btorch\b\.load|yaml\.(unsafe_|full_)?load\b|trust_remote_code"
    r"|(?<![\w.])(eval|exec|compile|__import__)\("
)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "np.load(f, allow_pickle=True)",
        "marshal.loads(b)",
        "torch.load(f)",
        "x = eval(text)",
        "exec(code)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert RUNS_CODE.search(line)


@pytest.mark.parametrize("line", ["jax.eval_shape(f)", "model.eval()", "re.compile(r'x')", "np.load(file)"])
def test_the_search_leaves_alone_what_runs_no_code(line: str) -> None:
    assert not RUNS_CODE.search(line)


def test_nothing_in_the_package_can_run_code_from_a_file() -> None:
    assert len(SOURCES) > 50
    found = [
        f"{file.name}: {line}" for file in SOURCES for line in file.read_text().splitlines() if RUNS_CODE.search(line)
    ]
    assert not found
