"""Export: bundles for QuPath, WSInfer and ONNX Runtime, and the model card."""
