"""ONNX Runtime sessions of a bundle's two graphs; the decoder's KV cache is bound in place."""
