"""Engine, step, loop, checkpoints, logs."""
