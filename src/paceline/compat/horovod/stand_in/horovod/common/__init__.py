"""Parts that Horovod shares between frameworks."""
