"""Turn a job description into processes on an engine that exists: `engines/` has one file per engine."""
