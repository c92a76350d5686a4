"""The Flax model: config, MLA, router, experts, blocks, latent cache. It does not know that compression exists."""

from moejax.model.config import Config, Yarn, config_from_hf, require_tokens
from moejax.model.deepseek_v3 import DeepseekV3
from moejax.model.leaves import named_leaves
from moejax.model.weights import Layout

__all__ = ["Config", "DeepseekV3", "Layout", "Yarn", "config_from_hf", "named_leaves", "require_tokens"]
