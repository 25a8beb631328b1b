"""From a checkpoint to a remembered fact in ONNX Runtime (`run`), on one of a few base models (`bases`)."""
