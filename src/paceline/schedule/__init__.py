"""What a collective is: programs over chunks as pure data. NumPy at most, never torch."""
