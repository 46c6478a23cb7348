"""Start ranks: on this machine, and later on a cluster. Nothing here imports torch."""
