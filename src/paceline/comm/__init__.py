"""How bytes really move: the Communicator and its fabrics."""
