"""Workers on machines that an engine chose: a driver here, a supervisor beside each worker."""
