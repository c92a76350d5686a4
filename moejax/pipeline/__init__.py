"""The main job: calibrate, measure, plan, compress, write, evaluate."""
