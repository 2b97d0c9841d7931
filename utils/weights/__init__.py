"""Weights from elsewhere, in and out, hostile files included: pickles, PyTorch, ONNX, class centres."""
