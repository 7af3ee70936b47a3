"""Measurements of a run: rows, and the files that they go to."""
