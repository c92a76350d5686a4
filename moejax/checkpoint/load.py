"""One way to open a checkpoint, whichever kind it is."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax.sharding import Mesh

from moejax.checkpoint.huggingface import open_huggingface
from moejax.checkpoint.native import MANIFEST, open_native
from moejax.checkpoint.safetensors_folder import resolve_checkpoint
from moejax.errors import InputError
from moejax.formats import ExpertWeights
from moejax.model import Config, DeepseekV3, Layout
from moejax.model.leaves import Weight, named_leaves
from moejax.progress import Progress, counted, silent
from moejax.resources import tiny_checkpoint
from moejax.sharding import on_mesh


class Checkpoint(Protocol):
    """An opened and checked checkpoint, native or Hugging Face's."""

    @property
    def path(self) -> Path: ...

    @property
    def raw_config(self) -> dict[str, Any]: ...

    @property
    def config(self) -> Config: ...

    @property
    def experts_per_token(self) -> tuple[int, ...]:
        """K of every block."""
        ...

    @property
    def num_elements(self) -> int:
        """Numbers of the original checkpoint, two bytes each in BF16."""
        ...

    def leaf(self, name: str, like: Weight | None = None) -> Weight:
        """One weight of the model, by the name that `Layout` gives it; where `like`, it in shapes that have shardings,
        has it."""
        ...

    def experts(self, name: str, members: Sequence[int]) -> ExpertWeights:
        """Of routed experts' weights of that name those of some experts, by rising number."""
        ...

    @property
    def experts_in_slice(self) -> int | None:
        """How many experts are worth reading together; None if all of a layer's are."""
        ...

    def abstract_leaves(self) -> Iterable[tuple[str, Weight]]:
        """Every weight by name, in shapes alone."""
        ...


def open_checkpoint(name: str | Path | None = None, drop_mtp: bool = False) -> Checkpoint:
    """Open a folder (native if it has a manifest), a hub name, or, given none, the tiny checkpoint of the package.

    With `drop_mtp` it is as if a Hugging Face checkpoint had no MTP layers, see `open_huggingface`. Raises InputError
    for a folder that is no sound checkpoint, and if the MTP layers of a native one are to be dropped.
    """
    path = tiny_checkpoint() if name is None else resolve_checkpoint(name)
    if not (path / MANIFEST).is_file():
        return open_huggingface(path, drop_mtp)
    if drop_mtp:
        raise InputError(
            f"{path}: is compressed already; MTP layers can be dropped from an original Hugging Face checkpoint"
        )
    return open_native(path)


def load_model(checkpoint: Checkpoint, mesh: Mesh | None = None, *, progress: Progress = silent) -> DeepseekV3:
    """The whole model, its weights in the checkpoint's own formats; on a mesh, where `shardings` has it, every process
    reads those parts alone that lie on its own devices.

    Raises InputError as `shardings` does, and for what a weight's bytes should not be.
    """
    like = {} if mesh is None else named_leaves(on_mesh(abstract_model(checkpoint), mesh))
    with counted(progress, len(Layout(checkpoint.config).shapes()), "reading") as begin:

        def leaf(name: str) -> Weight:
            begin()
            return checkpoint.leaf(name, like.get(name))

        return DeepseekV3(checkpoint.config, leaf, checkpoint.experts_per_token)


def abstract_model(checkpoint: Checkpoint) -> DeepseekV3:
    """`load_model` in shapes alone; no weight is read."""
    return DeepseekV3(checkpoint.config, dict(checkpoint.abstract_leaves()).__getitem__, checkpoint.experts_per_token)
