"""Stage 2: sparse encoders, fitted to activations."""
