"""Turn a job description into processes on an engine that exists."""
