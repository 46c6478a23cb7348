"""Ridge fits, reliability, intervals."""
