"""Sums over all ranks with codecs."""
