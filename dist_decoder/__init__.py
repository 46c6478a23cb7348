"""Train one fMRI-to-image decoder on every subject of every dataset, on any number of ranks."""

__version__ = "0.1.0"
