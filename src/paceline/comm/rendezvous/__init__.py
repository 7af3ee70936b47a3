"""Which rank this process is, and how the ranks of a job find each other."""
