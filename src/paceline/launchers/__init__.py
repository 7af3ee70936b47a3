"""Turn a job description into processes on an engine that exists.

A module that is listed by `registry.names` is an engine; the others are what engines share.
"""

NOT_PLUGINS = (
    "agent",
    "call",
    "console",
    "crew",
    "engine",
    "failure",
    "guard",
    "job",
    "keeper",
    "launch",
    "manifest",
    "output",
    "program",
    "signals",
    "spark_session",
    "spark_tasks",
    "wire",
    "workers",
)
