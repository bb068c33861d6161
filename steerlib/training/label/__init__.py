"""Stage 3: what latents stand for, and whether steering them does it."""
