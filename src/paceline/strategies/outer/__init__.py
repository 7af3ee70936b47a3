"""What bmuf, diloco and slowmo share: an outer optimizer on the mean of the workers' progress."""
