"""Judging a network: embeddings, verification, templates, identification, reports.

``verification.py``, ``ijb.py`` and ``megaface.py`` hold the command line alone; what training and tools use lies beside
them.
"""
