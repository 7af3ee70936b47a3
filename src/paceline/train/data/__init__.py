"""Which samples a rank trains on, in which order, and where it resumes."""
