"""The parts of the parameter server: slices, shards, and who hosts them."""
