"""From a compressed PyTorch model to its artefact: packed weights, ONNX graph, files, and the proof that they agree."""
