"""What can be trained and compared: built-in tasks, and the contract of a user's own."""
