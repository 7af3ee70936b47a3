"""The processes of one host: started, their output read, and ended without a trace."""
