"""What codecs share: their base, payloads, the C++ kernels, the steps of the readable reference."""
