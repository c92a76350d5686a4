"""What is compressed: a model and its statistics, concrete or in shapes alone, and the exact bytes of what becomes of
it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.calibrate import Statistics, calibrate
from moejax.checkpoint.native import COPIED_FILES, Description, NativeBytes, native_bytes, write_native
from moejax.model import DeepseekV3
from moejax.planning import Plan
from moejax.planning.plan import to_json
from moejax.progress import Progress, silent
from moejax.transforms.compress import compress


@dataclass(frozen=True)
class Origin:
    """A model with its statistics, the config it came with, the files that are copied, and what a manifest says about
    how it was made."""

    model: DeepseekV3
    statistics: Statistics
    raw_config: dict[str, Any]
    copied: Sequence[Path]
    provenance: dict[str, Any]

    def abstract(self, plan: Plan) -> DeepseekV3:
        """The compressed model in shapes alone."""
        return jax.eval_shape(partial(compress, plan=plan), self.model, statistics=self.statistics)

    def bytes_of(self, plan: Plan, abstract: DeepseekV3) -> NativeBytes:
        """The exact bytes of the folder that `write` makes of a plan, `abstract` being its model."""
        return native_bytes(abstract, self._description(plan), self.copied)

    def size_of(self, plan: Plan) -> int:
        """The same, in all."""
        return self.bytes_of(plan, self.abstract(plan)).total

    def write(self, plan: Plan, output: Path, budget: int, progress: Progress = silent) -> int:
        """Carry a plan out and write the checkpoint; returns its bytes, never more than `budget`."""
        compressed = compress(self.model, plan, self.statistics, progress=progress)
        return write_native(compressed, output, self._description(plan), self.copied, budget, progress)

    def _description(self, plan: Plan) -> Description:
        return Description(self.raw_config, to_json(plan), self.provenance)


def abstract_origin(model: DeepseekV3, raw_config: dict[str, Any], copied: Sequence[Path]) -> Origin:
    """The same in shapes alone: sizes do not depend on what was calibrated on."""
    statistics = jax.eval_shape(lambda m: calibrate(m, np.zeros((1, 8), np.int32)), model)
    return Origin(model, statistics, raw_config, copied, {})


def without_mtp(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """The Hugging Face config of the same model without its MTP blocks."""
    return {**raw_config, "num_nextn_predict_layers": 0}


def copied_files(folder: Path) -> list[Path]:
    """The files that go from an original's folder into every compressed checkpoint."""
    return [file for name in COPIED_FILES if (file := folder / name).is_file()]
