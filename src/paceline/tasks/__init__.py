"""The built-in tasks, and the contract of a user's own."""
