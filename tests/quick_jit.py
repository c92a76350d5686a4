"""`jax.jit` for tests whose cost is compiling: without optimizations and fusions it takes a third as long."""

from functools import partial

import jax

quick_jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
)
