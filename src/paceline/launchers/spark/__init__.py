"""What the Spark engine and `paceline.compat.spark` share."""
