"""A text-to-image model of figures whose parts and wholes are known: renderer, reader, training, and measures."""
