"""A model on a mesh is written from where it lies, by several processes too: the files are those of one device."""

from pathlib import Path

import jax
import pytest

from moejax.checkpoint import chunks
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.native_writer import write_native
from moejax.model import DeepseekV3
from moejax.sharding import crew_of, mesh_of, shardings
from native_checkpoint import BUDGET, DESCRIPTION, files
from processes import Processes

# Restores a checkpoint onto the devices of two processes and writes it again; each says how many chunks it wrote.
AGAIN = """
import sys
from pathlib import Path
from moejax.checkpoint import chunks
from moejax.checkpoint.held import Held
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.native_bytes import Description
from moejax.checkpoint.native_writer import write_native
from moejax.commands.devices import mesh_from
from moejax.commands.ending import in_sentences
from moejax.sharding import crew_of
chunks._LEAST_BYTES = 64
folder, output, said, mesh, join = sys.argv[1:]
written = []
chunk = Held.chunk
Held.chunk = lambda held, number: written.append(number) or chunk(held, number)
with in_sentences(), mesh_from(mesh, join) as own:
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, own)
    description = Description(checkpoint.raw_config, checkpoint.plan, checkpoint.provenance)
    write_native(model, Path(output), description, [], 10**9, crew=crew_of(own))
    Path(said).write_text(str(len(written)))
"""


@pytest.fixture(autouse=True)
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_LEAST_BYTES", 64)


@pytest.fixture
def native(model: DeepseekV3, tmp_path: Path) -> Path:
    write_native(model, tmp_path / "one", DESCRIPTION, [], BUDGET)
    return tmp_path / "one"


@pytest.mark.parametrize("spec", ["tensor=8", "tensor=4,data=2", "tensor=3"])
def test_files_do_not_depend_on_the_mesh(model: DeepseekV3, native: Path, spec: str, tmp_path: Path) -> None:
    mesh = mesh_of(spec)
    on_devices = load_model(open_checkpoint(native), mesh)
    assert [own.sharding for own in jax.tree.leaves(on_devices)] == jax.tree.leaves(shardings(model, mesh))
    write_native(on_devices, tmp_path / "again", DESCRIPTION, [], BUDGET, crew=crew_of(mesh))
    assert files(tmp_path / "again") == files(native)


@pytest.mark.parametrize("devices", [1, 4])
def test_two_processes_write_what_each_holds(devices: int, native: Path, tmp_path: Path) -> None:
    processes, mesh = Processes(tmp_path, devices), f"tensor={2 * devices}"
    started = [
        processes.start(n, "-c", AGAIN, native, tmp_path / "again", tmp_path / f"said{n}", mesh, join)
        for n, join in enumerate(processes.join)
    ]
    assert [own.wait(timeout=300) for own in started] == [0, 0], processes.said(0) + processes.said(1)
    assert files(tmp_path / "again") == files(native)
    first, second = (int((tmp_path / f"said{n}").read_text()) for n in (0, 1))
    assert first + second == len([file for file in files(native) if file.name[0].isdigit()])
    assert second > 0.3 * first
