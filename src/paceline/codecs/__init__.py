"""Fewer bytes for a tensor, one file per codec."""
