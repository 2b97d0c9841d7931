"""Class-row arithmetic under ``partial_fc.py``: rows, the kernels that pass over them, their optimisers, sampling."""
