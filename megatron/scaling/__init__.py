"""Reading runs, comparing them, and the scaling laws behind AR and masked diffusion. Nothing here imports torch."""
