"""Checkpoints: what they hold, how they are written and read, and a stop that saves one."""
