"""The decoder: subject ridge layers, backbone, heads, prior, adapters."""
