"""Measure, and write JSON."""
