"""Where scripts import `ElasticSampler` from."""

from paceline.compat.horovod.elastic import ElasticSampler  # noqa: F401
