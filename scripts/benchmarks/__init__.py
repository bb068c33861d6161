"""Measurements of time: what is measured, in turns, and the tables it makes."""
