"""How a worker without a server tells all its peers."""
