"""What Horovod offers beside torch: starting a function, a worker's environment, small helpers."""
