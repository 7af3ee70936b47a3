"""Arguments that several commands share: declarations for the command line, and what their texts mean."""
