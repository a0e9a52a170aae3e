"""Qwen2 and Qwen2.5 as transformers writes them: Llama with biases on queries, keys and values."""
from granvit.checkpoint.layouts import Layout
from granvit.checkpoint.layouts.llama import LEFT_OUT, ROWS, read_config

QWEN2 = Layout(
    name="qwen2",
    model_types=("qwen2",),
    rows=(
        *ROWS,
        *((f"model.layers.{{i}}.self_attn.{p}_proj.bias", f"language.model.layers.{{i}}.self_attn.{p}_proj.bias") for p in "qkv"),
    ),
    left_out=LEFT_OUT,
    read_config=lambda tree: read_config(tree) | {"qkv_bias": True},
)
