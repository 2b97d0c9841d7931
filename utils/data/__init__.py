"""Bytes to batches: decode, augment, read samples, the source contract, and the loader with its threads."""
