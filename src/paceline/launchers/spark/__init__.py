"""Jobs in barrier stages of Spark: the session, the driver, and what runs in a task."""
