"""Stage 1: activations of a model, streamed to disk."""
