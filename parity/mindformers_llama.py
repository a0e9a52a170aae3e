"""MindFormers' `LlamaForCausalLM` on CPU, in a separate process, because MindFormers sets MindSpore's context, writes a log
directory into the current directory, and reads its mode from environment variables.

`python -m parity.mindformers_llama DIR` reads DIR/config.json (its `LlamaConfig`) and DIR/in.safetensors (weights under its own
names, and `inputs_BSC`), and writes DIR/out.safetensors (`logits_BSV`).
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from granvit.checkpoint.layouts.mindformers import MINDFORMERS
from granvit.models import LanguageConfig

FORCED = {  # what MindFormers needs on CPU (tried with 1.9.0): no fused kernels, float32 everywhere
    "use_flash_attention": False, "fused_rms_norm": False, "use_rope_slice": True, "param_init_type": "float32",
    "compute_dtype": "float32", "layernorm_compute_type": "float32", "softmax_compute_type": "float32", "rotary_dtype": "float32",
}  # fmt: skip


def logits(language: LanguageConfig, weights: dict[str, np.ndarray], inputs_BSC: np.ndarray) -> np.ndarray:
    """Logits float32 `[B, S, V]` of one causal segment a row, from canonical weights; `RuntimeError` if MindFormers fails."""
    names = {name: MINDFORMERS.spellings[0].foreign(name) for name in weights if name.startswith("language.")}
    with tempfile.TemporaryDirectory(prefix="mindformers-") as directory:
        path = Path(directory)
        config = MINDFORMERS.write_config(None, language) | FORCED | {"seq_length": inputs_BSC.shape[1]}
        (path / "config.json").write_text(json.dumps(config))
        tensors = {foreign: np.ascontiguousarray(weights[name], np.float32) for name, foreign in names.items()}
        save_file(tensors | {"inputs_BSC": np.ascontiguousarray(inputs_BSC, np.float32)}, path / "in.safetensors")
        environment = os.environ | {"RUN_MODE": "train", "LOCAL_DEFAULT_PATH": directory, "GLOG_v": "3"}
        child = subprocess.run([sys.executable, "-m", __name__, directory], env=environment, capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"MindFormers' Llama failed:\n{child.stderr[-3000:]}")
        return load_file(path / "out.safetensors")["logits_BSV"]


def main() -> None:
    """The child process."""
    directory = Path(sys.argv[1])
    import mindspore as ms
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    tensors = load_file(directory / "in.safetensors")
    inputs_BSC = tensors.pop("inputs_BSC")
    fields = json.loads((directory / "config.json").read_text())
    fields.pop("model_type")
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.set_train(False)
    for name, parameter in model.parameters_and_names():
        parameter.set_data(ms.Tensor(tensors.pop(name)))
    assert not tensors, f"MindFormers' Llama has no parameter {sorted(tensors)}"
    ids_BS = ms.Tensor(np.ones(inputs_BSC.shape[:2], np.int32))  # with input_embeds, ids only say which are padding (0)
    logits_BSV = model(ids_BS, input_embeds=ms.Tensor(inputs_BSC))[0].asnumpy()
    save_file({"logits_BSV": np.ascontiguousarray(logits_BSV)}, directory / "out.safetensors")


if __name__ == "__main__":
    main()
