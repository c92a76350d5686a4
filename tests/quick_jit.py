"""`jax.jit` for tests whose cost is compiling: without optimizations it takes half as long."""

from functools import partial

import jax

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
