"""The compression steps: pure functions of a matrix, a block or a model, and the walk that takes a plan over one."""
