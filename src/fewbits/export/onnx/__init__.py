"""Models as ONNX graphs: how operators hold codes, layers as nodes, tracing, and reading back."""
