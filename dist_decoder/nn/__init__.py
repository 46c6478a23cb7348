"""Subject ridge layers, shared backbone, heads, diffusion prior, and the decoder made of them."""
