"""Is this host, and the network between hosts, fit for training? Checks that explain what they find."""
