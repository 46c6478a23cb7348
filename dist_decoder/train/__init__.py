"""Training: engine, step, loop, checkpoints, run folder, logs."""
