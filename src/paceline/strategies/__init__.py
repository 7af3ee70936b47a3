"""What travels, when, and how it is applied: one file per training method."""
