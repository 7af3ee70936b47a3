"""Who this process is, and where its peers are."""
