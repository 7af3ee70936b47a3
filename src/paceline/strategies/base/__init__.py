"""The abstract bases of training methods and of staleness policies."""
