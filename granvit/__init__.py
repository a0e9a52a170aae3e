"""GranViT's core: numpy and well-kept libraries, no framework."""
import os

# MindSpore's generated protobuf code needs the pure Python implementation, and asks for it only as long as nobody has
# imported protobuf; grain and TensorBoard do so before a framework is chosen.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
