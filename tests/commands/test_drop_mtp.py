"""`moejax compress --drop-mtp` of checkpoints whose MTP layer could not be read."""

import json
import re
import shutil
from pathlib import Path

import pytest

from command_line import refused
from moejax.checkpoint.huggingface import open_huggingface


@pytest.fixture
def damaged(small: Path, tmp_path: Path) -> Path:
    """The small checkpoint, the index of which says that its MTP layer lies in a file that is not there."""
    folder = Path(shutil.copytree(small, tmp_path / "damaged"))
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    weight_map = index["weight_map"]
    weight_map |= {name: "mtp.safetensors" for name in weight_map if name.startswith("model.layers.3.")}
    index_file.write_text(json.dumps(index))
    return folder


def test_it_is_not_read_and_ratios_are_of_the_whole(
    small: Path, damaged: Path, text_options: list[object], tmp_path: Path
) -> None:
    arguments = ["compress", damaged, "--budget", "40x", "--output", tmp_path / "out", *text_options]
    assert "names the file mtp.safetensors, which is not in the folder" in refused(tmp_path, *arguments)
    found = re.search(r"a budget of .* \((\d+) bytes\) cannot be met", refused(tmp_path, *arguments, "--drop-mtp"))
    assert found is not None and int(found[1]) == 2 * open_huggingface(small).num_elements // 40
