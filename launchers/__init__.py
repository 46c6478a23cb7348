"""Start ranks: on this machine, or on a cluster by SLURM. Nothing here imports torch."""
