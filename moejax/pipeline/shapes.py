"""A model in shapes alone, and the exact bytes of what any plan makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.native import COPIED_FILES
from moejax.checkpoint.native_bytes import Description, NativeBytes, native_bytes
from moejax.model import Config, DeepseekV3
from moejax.model.config import ROTATION_FIELDS
from moejax.model.source import ModelSource, Source, model_of
from moejax.planning import Method, Plan
from moejax.planning.plan import to_json
from moejax.transforms.compressed_shapes import compressed_shapes
from moejax.transforms.rotate import rotated_source

# Of the rotations' signs.
_SEED = 0


@dataclass(frozen=True)
class Shapes:
    """What decides the bytes of a plan's folder: the model that is compressed, in shapes alone, and what the folder
    holds beside it: its config, the files that are copied, and what the manifest says about how it was made."""

    model: DeepseekV3
    raw_config: Mapping[str, Any]
    copied: Sequence[Path]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return self.model.config

    def compressed(self, plan: Plan) -> DeepseekV3:
        """The plan's model, in shapes alone."""
        return compressed_shapes(self.model, plan)

    def bytes_of(self, plan: Plan) -> NativeBytes:
        """Of the plan's folder."""
        return native_bytes(self.compressed(plan), self.description(plan), self.copied)

    def size_of(self, plan: Plan) -> int:
        """The sum of `bytes_of`."""
        return self.bytes_of(plan).total

    def description(self, plan: Plan) -> Description:
        """What the manifest says of the plan."""
        return Description(dict(self.raw_config), to_json(plan), dict(self.provenance))


def shapes_for(
    original: DeepseekV3,
    method: Method,
    raw_config: Mapping[str, Any],
    copied: Sequence[Path],
    provenance: Mapping[str, Any] | None = None,
) -> Shapes:
    """Of a model, concrete or abstract, with its Hugging Face config, compressed by a method."""
    model = jax.eval_shape(lambda model: model_of(ready(ModelSource(model), method)), original)
    rotations = {name: getattr(model.config, name) for name in ROTATION_FIELDS}
    described = {**raw_config, **{name: value for name, value in rotations.items() if value is not None}}
    return Shapes(model, described, copied, provenance or {})


def ready(original: Source, method: Method) -> Source:
    """What a method compresses: the model, rotated first if it says so."""
    return rotated_source(original, _SEED, down=method.down_rotation) if method.rotation else original


def copied_files(folder: Path) -> list[Path]:
    """The files that go from an original's folder into every compressed checkpoint."""
    return [file for name in COPIED_FILES if (file := folder / name).is_file()]


def shapes_of(checkpoint: HuggingFaceCheckpoint, method: Method, provenance: Mapping[str, Any] | None = None) -> Shapes:
    """Of an original checkpoint."""
    copied = copied_files(checkpoint.path)
    return shapes_for(checkpoint.abstract_model(), method, checkpoint.raw_config, copied, provenance)
