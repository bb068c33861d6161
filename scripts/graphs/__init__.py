"""Hierarchies of latents with known edges: what graph discovery is measured on."""
