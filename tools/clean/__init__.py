"""The parts of ``tools/clean.py``: reading once, statistics, the passes over the embeddings, what is written."""
