"""Broadcast of updates between peers, without a server."""
