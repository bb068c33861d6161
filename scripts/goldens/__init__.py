"""The cases of `scripts/golden.py`: laws on text models, on pipelines, and banks."""
