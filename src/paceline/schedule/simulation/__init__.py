"""How long a program takes on a topology."""
