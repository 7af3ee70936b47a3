"""Paceline below the data parallelism of PyTorch itself: hooks for DistributedDataParallel and FSDP2."""
