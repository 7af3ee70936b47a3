"""Proofs of every shipped algorithm."""
