"""Tensors with a small header, over authenticated sockets: the mailbox of every real fabric. No pickle."""
