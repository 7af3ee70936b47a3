"""Messages between ranks: `serve`, `call` and `post` over authenticated sockets and shared memory.

In the order in which a message passes them: `mailbox` (what a rank calls), `framing` (bytes of a frame),
`outboxes` (frames that wait, and the lock), `service` (the thread), `connection` and `authentication` (one
socket), `shared_blocks` (large tensors within a host), `channels` (handlers), `calls` and `reply` (answers).
"""
