"""MXNet RecordIO without mxnet: read, write, pack, unpack, index. numpy only.

``from mxnet_reader import recordio`` replaces ``from mxnet import recordio``.
"""

from mxnet_reader import recordio
from mxnet_reader.errors import MissingKeyError, RecordError

__all__ = ["MissingKeyError", "RecordError", "recordio"]
