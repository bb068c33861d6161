"""Stage 2, the other kind of bank: directions from labelled texts."""
