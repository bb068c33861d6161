"""Scores: how much steering moves a concept, and what it costs."""
