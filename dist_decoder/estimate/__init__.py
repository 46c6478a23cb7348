"""What a training run needs, before any device is asked for."""
