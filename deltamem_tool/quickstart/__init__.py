"""The quickstart: from a checkpoint to a remembered fact in ONNX Runtime (`run`), for a few base models (`bases`)."""
