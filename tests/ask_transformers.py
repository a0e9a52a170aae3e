"""Runs exported models with the installed transformers: `python tests/ask_transformers.py FOLDER`. Does not import granvit.

FOLDER holds exports in directories encoder-* and llava-*, each with an input.npz; the outputs are written to
FOLDER/answers-<major version>.npz.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def ask(folder: Path) -> Path:
    """Computes the features of every encoder (its config.json says which output they are) and the logits of every LLaVA; returns
    the path of the file with them."""
    answers = {}
    for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
        inputs = {name: torch.from_numpy(array) for name, array in np.load(directory / "input.npz").items()}
        llava = directory.name.startswith("llava")
        loader = transformers.LlavaForConditionalGeneration if llava else transformers.AutoModel
        model, info = loader.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        with torch.no_grad():
            output = model.eval()(**inputs, **({} if llava else {"output_hidden_states": True}))
        features = "logits" if llava else json.loads((directory / "config.json").read_text())["granvit"]["features"]
        name, _, index = features.partition("[")
        tensors = getattr(output, name)
        answers[directory.name] = (tensors[int(index.rstrip("]"))] if index else tensors).numpy()
    path = folder / f"answers-{transformers.__version__.partition('.')[0]}.npz"
    np.savez(path, **answers)
    return path


if __name__ == "__main__":
    ask(Path(sys.argv[1]))
