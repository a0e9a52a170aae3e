"""GranViT's core: data, training loop, checkpoints and launching in numpy. It imports neither MindSpore nor PyTorch."""
import os

# MindSpore's generated protobuf code needs protobuf's pure Python implementation. MindSpore sets this variable itself, which is
# too late where grain or TensorBoard have imported protobuf before.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
