"""Names by which torch.distributed knows this backend."""

BACKEND = "paceline"
