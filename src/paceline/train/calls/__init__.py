"""What training loops call on a job, beside what `loop_calls` has: one kind of call in each file."""
