"""A checkpoint that is written item by item is the one that is written in one go, or none."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint.atomic import partial_path
from moejax.checkpoint.native import item_of
from moejax.checkpoint.native_bytes import native_bytes
from moejax.checkpoint.native_writer import NativeWriter, native_writer
from moejax.checkpoint.store import folder_bytes
from moejax.errors import InputError, InternalError, Note
from moejax.formats import GroupedInt
from moejax.model import DeepseekV3, named_leaves
from moejax.progress import Step
from native_checkpoint import BUDGET, DESCRIPTION, files, random_experts

# That finished items are taken over is said wherever they are.
pytestmark = pytest.mark.filterwarnings("ignore:.* items of an earlier run are taken over:moejax.errors.Note")

Items = dict[str, dict[str, Any]]
JOB = "a hash"


@pytest.fixture
def items(model: DeepseekV3) -> Items:
    found: Items = {}
    for name, leaf in named_leaves(model).items():
        item, within = item_of(name)
        found.setdefault(item, {})[within] = leaf
    return found


@pytest.fixture
def abstract(model: DeepseekV3) -> DeepseekV3:
    return jax.eval_shape(lambda m: m, model)


def test_the_order_of_items_and_leaves_does_not_matter(
    abstract: DeepseekV3, items: Items, copied: list[Path], written: Path, tmp_path: Path
) -> None:
    output, size = tmp_path / "out", native_bytes(abstract, DESCRIPTION, copied).total
    with native_writer(abstract, output, DESCRIPTION, copied, size) as writer:
        for item, leaves in reversed(items.items()):
            writer.add(item, dict(reversed(leaves.items())))
    assert writer.bytes == size
    assert files(output) == files(written)


@contextmanager
def begun(abstract: DeepseekV3, output: Path) -> Iterator[NativeWriter]:
    """A writer whose block is given up, after which nothing is left."""
    with (
        pytest.raises(InternalError, match="out lacks "),
        native_writer(abstract, output, DESCRIPTION, [], BUDGET) as w,
    ):
        yield w
    assert not list(output.parent.iterdir())


def test_missing_items_are_named(abstract: DeepseekV3, items: Items, tmp_path: Path) -> None:
    with (
        pytest.raises(InternalError, match=r"out lacks layer_0, mtp_0; nothing was written$"),
        native_writer(abstract, tmp_path / "out", DESCRIPTION, [], BUDGET) as writer,
    ):
        for item in ("layer_2", "outer", "layer_1"):
            writer.add(item, items[item])
        assert writer.missing == ["layer_0", "mtp_0"]
    assert not list(tmp_path.iterdir())


def test_no_item_is_added_twice_and_no_other(abstract: DeepseekV3, items: Items, tmp_path: Path) -> None:
    with begun(abstract, tmp_path / "out") as writer:
        writer.add("layer_1", items["layer_1"])
        for item in ("layer_1", "layer_3"):
            with pytest.raises(
                ValueError, match=f"{item} is none of those that are missing: outer, layer_0, layer_2, mtp_0"
            ):
                writer.add(item, items["layer_1"])


@pytest.mark.parametrize(
    ("name", "leaf", "found", "promised"),
    [
        ("input_norm", lambda: jnp.zeros(65), r"float32\[65\]", r"float32\[64\]"),
        ("input_norm", lambda: jnp.zeros(64, jnp.bfloat16), r"bfloat16\[64\]", r"float32\[64\]"),
        ("input_norm", lambda: np.zeros(64), r"float64\[64\]", r"float32\[64\]"),
        (
            "mlp.experts.up",
            lambda: random_experts("up", 4, (64, 64), 0),
            r"ExpertWeights\(.*int32\[4\]",
            r"Expert.*int32\[5\]",
        ),
        ("mlp.experts.up", lambda: random_experts("gate", 5, (64, 64), 0), r"GroupedInt\(.*bits=2", r"Expert.*bits=4"),
    ],
)
def test_a_leaf_that_is_not_what_was_promised(
    abstract: DeepseekV3, items: Items, tmp_path: Path, name: str, leaf: Callable[[], Any], found: str, promised: str
) -> None:
    with begun(abstract, tmp_path / "out") as writer:
        with pytest.raises(
            InternalError, match=f"layer_1: the weight {name} is .*{found}.* and was to be .*{promised}"
        ):
            writer.add("layer_1", items["layer_1"] | {name: leaf()})
        assert "layer_1" in writer.missing


def test_a_format_is_promised_too(abstract: DeepseekV3, items: Items, tmp_path: Path) -> None:
    """Though the arrays are alike."""
    name, leaf = next((name, leaf) for name, leaf in items["layer_0"].items() if isinstance(leaf, GroupedInt))
    other = replace(leaf, inputs=leaf.inputs - 1)
    with begun(abstract, tmp_path / "out") as writer, pytest.raises(InternalError, match=f"{name} .*={other.inputs}.*"):
        writer.add("layer_0", items["layer_0"] | {name: other})


def test_leaves_of_an_item_that_lack_one_or_have_one_more(abstract: DeepseekV3, items: Items, tmp_path: Path) -> None:
    own = items["layer_1"]
    without = {name: leaf for name, leaf in own.items() if name != "input_norm"}
    with begun(abstract, tmp_path / "out") as writer:
        with pytest.raises(InternalError, match="layer_1: the weight input_norm is missing"):
            writer.add("layer_1", without)
        with pytest.raises(InternalError, match="layer_1: the weight more is none of this item"):
            writer.add("layer_1", own | {"more": own["input_norm"]})


def test_a_budget_one_byte_short_leaves_nothing(abstract: DeepseekV3, copied: list[Path], tmp_path: Path) -> None:
    size = native_bytes(abstract, DESCRIPTION, copied).total
    with (
        pytest.raises(InputError, match=f"{size} bytes are over the budget of {size - 1}; nothing was written"),
        native_writer(abstract, tmp_path / "out", DESCRIPTION, copied, size - 1),
    ):
        pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_output(abstract: DeepseekV3, items: Items, written: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with native_writer(abstract, output, DESCRIPTION, [], BUDGET, JOB) as writer:
        for item, leaves in items.items():
            writer.add(item, leaves)
            with (
                pytest.raises(InputError, match=f"another process is writing it, in {partial_path(output)}"),
                native_writer(abstract, output, DESCRIPTION, [], BUDGET, JOB),
            ):
                pytest.fail("the block must not run")
    arrays, others = (
        {path: own for path, own in files(each).items() if path.name != "manifest.json"} for each in (output, written)
    )
    assert arrays.items() <= others.items()


def stopped(abstract: DeepseekV3, items: Items, output: Path, finished: list[str], job: str | None = JOB) -> None:
    """A run that fails after these items."""
    with (
        pytest.raises(KeyboardInterrupt),
        native_writer(abstract, output, DESCRIPTION, [], BUDGET, job) as writer,
    ):
        for item in finished:
            writer.add(item, items[item])
        raise KeyboardInterrupt


def gone_on_with(
    abstract: DeepseekV3, items: Items, output: Path, copied: list[Path], job: str | None = JOB
) -> tuple[list[str], list[str]]:
    """The items that the next run finds finished, and those that it adds."""
    size = native_bytes(abstract, DESCRIPTION, copied).total
    with native_writer(abstract, output, DESCRIPTION, copied, size, job) as writer:
        found, missing = writer.finished, writer.missing
        for item in missing:
            writer.add(item, items[item])
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return found, missing


def test_what_was_stopped_is_gone_on_with(
    abstract: DeepseekV3, items: Items, copied: list[Path], written: Path, tmp_path: Path
) -> None:
    """Twice, the second time with the journal's last line and an item half-written."""
    output, partial = tmp_path / "out", partial_path(tmp_path / "out")
    stopped(abstract, items, output, ["layer_1"])
    stopped(abstract, items, output, ["outer", "mtp_0"])
    with (partial / "journal.jsonl").open("ab") as journal:
        journal.write(b'\n{"name": "layer_0", "val')
    (partial / "items" / ".layer_0.partial").mkdir()
    (partial / "items" / "layer_2").mkdir()
    (partial / "manifest.json").write_text("{")
    with pytest.warns(Note, match=r"\.out\.partial: 3 of 5 items of an earlier run are taken over$"):
        done = gone_on_with(abstract, items, output, copied)
    assert done == (["outer", "layer_1", "mtp_0"], ["layer_0", "layer_2"])
    assert files(output) == files(written)


def test_a_failure_at_the_end_is_gone_on_with(
    abstract: DeepseekV3, items: Items, copied: list[Path], written: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.touch()
    with (
        pytest.raises(FileNotFoundError),
        native_writer(abstract, tmp_path / "out", DESCRIPTION, [copy], BUDGET, JOB) as writer,
    ):
        for item, leaves in items.items():
            writer.add(item, leaves)
        copy.unlink()
    assert gone_on_with(abstract, items, tmp_path / "out", copied) == (list(items), [])
    assert files(tmp_path / "out") == files(written)


@pytest.mark.parametrize("file", ["_METADATA", "input_norm/.zarray", "input_norm/0"])
def test_an_item_of_which_a_byte_changed_is_made_anew(
    abstract: DeepseekV3, items: Items, copied: list[Path], written: Path, tmp_path: Path, file: str
) -> None:
    stopped(abstract, items, tmp_path / "out", ["layer_2", "layer_1"])
    damaged = partial_path(tmp_path / "out") / "items" / "layer_1" / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(Note, match=r"items/layer_1, which an earlier run had finished, is damaged and made anew$"):
        found, missing = gone_on_with(abstract, items, tmp_path / "out", copied)
    assert (found, missing) == (["layer_2"], ["outer", "layer_0", "layer_1", "mtp_0"])
    assert files(tmp_path / "out") == files(written)


@pytest.mark.parametrize("job", ["another job", None])
def test_another_job_begins_anew(
    abstract: DeepseekV3, items: Items, copied: list[Path], written: Path, tmp_path: Path, job: str | None
) -> None:
    stopped(abstract, items, tmp_path / "out", ["outer", "layer_0"])
    with pytest.warns(Note, match=r"\.out\.partial, which a process that was killed left half-written, is removed"):
        assert gone_on_with(abstract, items, tmp_path / "out", copied, job) == ([], list(items))
    assert files(tmp_path / "out") == files(written)


def test_nothing_stays_of_a_run_without_a_job_or_without_an_item(
    abstract: DeepseekV3, items: Items, tmp_path: Path
) -> None:
    stopped(abstract, items, tmp_path / "out", ["layer_1"], job=None)
    assert not list(tmp_path.iterdir())
    stopped(abstract, items, tmp_path / "out", [])
    assert not list(tmp_path.iterdir())


def test_what_is_finished_needs_no_space(
    abstract: DeepseekV3, items: Items, copied: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, size = tmp_path / "out", native_bytes(abstract, DESCRIPTION, []).total
    stopped(abstract, items, output, ["layer_1", "layer_2", "outer"])
    needed = size - folder_bytes(partial_path(output))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with (
        pytest.raises(InputError, match=f"out: {needed} bytes are needed and {tmp_path} has {needed - 1} free"),
        native_writer(abstract, output, DESCRIPTION, [], BUDGET, JOB),
    ):
        pytest.fail("the block must not run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert gone_on_with(abstract, items, output, [])[1] == ["layer_0", "mtp_0"]


def test_checking_what_is_written_is_shown(abstract: DeepseekV3, items: Items, tmp_path: Path) -> None:
    shown: list[tuple[list[Any], str]] = []

    def progress(steps: Iterable[Step], description: str) -> Iterable[Step]:
        shown.append((list(steps), description))
        return steps

    stopped(abstract, items, tmp_path / "out", ["outer", "layer_1"])
    with (
        pytest.raises(InternalError, match="out lacks layer_0, layer_2, mtp_0"),
        native_writer(abstract, tmp_path / "out", DESCRIPTION, [], BUDGET, JOB, progress),
    ):
        pass
    assert shown == [(["outer", "layer_1"], "checking what is written")]
