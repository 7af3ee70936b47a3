"""What users write on the command line, turned into values."""
