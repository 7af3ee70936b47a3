"""Sums over all ranks with codecs, and what strategies build on them."""
