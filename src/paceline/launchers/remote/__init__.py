"""Workers that an engine placed on other hosts: the driver here, and one supervisor beside each worker."""
