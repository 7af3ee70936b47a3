"""What the Ray engine consists of: the connection to a cluster, and the driver of its actors."""
