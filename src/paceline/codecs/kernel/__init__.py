"""What all codecs stand on: the base class, payloads, the C++ kernels and the readable reference steps."""
