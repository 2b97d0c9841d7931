"""Shared pieces, in rooms. Importing does nothing.

The files here are what every room needs: errors, collectives, one progress bar, what the system offers, files that
appear whole, rows of unit length, commands that start ranks. Rooms: ``head`` (class rows), ``data`` (bytes to batches),
``model`` (how a backbone is updated), ``photos`` (photos to aligned faces), ``weights`` (weights from elsewhere),
``run`` (the life of one run). ``run`` may use ``head``, ``data``, ``model`` and ``weights``; the others use the files
here alone (``tests/test_imports.py``).
"""
