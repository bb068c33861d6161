"""Stage 5: useful amounts, safe ranges and measured effects."""
