"""Gradients of a prepared model: what they count, and where they go."""
