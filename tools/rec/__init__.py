"""The parts of ``tools/rec.py``: writing record sets and verifying them."""
