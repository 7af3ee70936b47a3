"""The user's side: prepare, replica, data, evaluation, checkpoints."""
