"""Samplers: autoregressive with a key/value cache, masked diffusion in any order, infilling."""
