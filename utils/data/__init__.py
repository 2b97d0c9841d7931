"""Bytes to batches: decode, augment, read samples, and the loader with its threads or processes."""
