"""One file per engine that runs workers: each defines one concrete Runner."""
