"""One file per verb of ``dist-decoder``."""
