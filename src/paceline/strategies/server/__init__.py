"""The parts of the parameter server: messages, the client in a worker, shards, and who hosts them."""
