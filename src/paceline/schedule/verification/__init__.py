"""Proof that a lowered program does what its operation promises."""
