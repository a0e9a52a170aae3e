"""Sets of tensors in safetensors files."""
import json

import ml_dtypes
import numpy as np
import pytest

from granvit.checkpoint.tensors import TensorSet, TensorWriter, write_set
from tests.checkpoint.conftest import as_bytes


def test_large_sets_are_sharded_and_every_dtype_survives(tmp_path):
    rng = np.random.default_rng(0)
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
    arrays = {f"t{i}": rng.normal(size=(3, 5)).astype(kind) for i, kind in enumerate(kinds)}
    arrays["scalar"] = np.float32(2.5).reshape(())
    shapes = {name: array.shape for name, array in arrays.items()}
    with TensorWriter(tmp_path, "model", shapes, shard_bytes=70) as writer:
        for name in reversed(arrays):
            writer.add(name, arrays[name])
        writer.finish()
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    read = TensorSet(tmp_path, checked=True)
    assert as_bytes((name, read.read(name)) for name in arrays) == as_bytes(arrays.items())
    next(tmp_path.glob("model-00001-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="model-00001-of-"):
        TensorSet(tmp_path)


def test_an_index_cannot_point_outside_its_directory(tmp_path):
    write_set(tmp_path, "secret", {"a": (1,)}, [("a", np.ones(1, np.float32))])
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="not in"):
        TensorSet(inside)
