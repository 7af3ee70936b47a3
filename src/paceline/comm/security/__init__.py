"""Who may talk to a job: the key that its processes share, the handshake that proves it, and private folders.

Nothing that a process without the key sends is parsed, unpickled or waited for.
"""
