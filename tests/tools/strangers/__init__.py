"""Strangers at the listeners of a job: where it listens, how they attack, and what that costs the job."""
