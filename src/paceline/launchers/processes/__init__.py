"""The processes of one host: started, listened to, and ended without a trace."""
