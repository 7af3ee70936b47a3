"""How bytes really move: the Communicator and its fabrics."""

NOT_PLUGINS = ("communicator", "ledger", "placement", "rendezvous")
