from moejax.kernels.xla import expert_matmul, matmul, matmul_transposed, take
