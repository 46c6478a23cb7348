"""Start ranks on one machine or on a cluster. This package never imports torch."""
