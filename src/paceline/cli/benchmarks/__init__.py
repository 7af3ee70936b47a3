"""The benchmarks of `paceline bench`, one command per file."""
