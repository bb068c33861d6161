"""transformers models: their sites, `generate()`, caches, padding, beams."""
