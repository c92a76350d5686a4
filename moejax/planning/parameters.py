"""How many parameters a model has, and how many of them a token uses."""

import math
from dataclasses import dataclass

from moejax.formats import ExpertWeights
from moejax.model import DeepseekV3, named_leaves
from moejax.model.moe import MoE

# What a checkpoint derives from its config is no parameter.
_DERIVED = (".group_id", ".routing_scale")


@dataclass(frozen=True)
class Parameters:
    """total: of embedding, layers and head. mtp: of the MTP blocks. active: what one token is multiplied with, so of
    the routed experts K each layer, and of the embedding nothing, since a row is looked up."""

    total: int
    mtp: int
    active: int

    @property
    def with_mtp(self) -> int:
        return self.total + self.mtp


def count_parameters(model: DeepseekV3) -> Parameters:
    """Of a model, concrete or in shapes alone."""
    total = mtp = active = 0
    for name, leaf in named_leaves(model).items():
        size = 0 if name.endswith(_DERIVED) else math.prod(leaf.shape)
        if name.startswith("mtp."):
            mtp += size
            continue
        total += size
        if isinstance(leaf, ExpertWeights):
            moe = model.layers[int(name.split(".")[1])].mlp
            assert isinstance(moe, MoE)
            size = size // leaf.num_experts * moe.experts_per_token
        active += 0 if name == "embed" else size
    return Parameters(total, mtp, active)
