"""Seeded initialisation in numpy, by parameter name: both frameworks start from the same bytes."""
import hashlib

import numpy as np

from granvit.models import Shapes

EMBEDDING = 0.1  # standard deviation
POSITION = 0.5  # of an image's position embeddings; patch embeddings have about 1, and the decoder must tell positions apart
RESIDUAL = 0.2  # factor on the last matrix of attention and MLP, so that the first blocks do not outweigh the embeddings
INTO_RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The start value of one parameter, float32.

    Norm weights and layer scales are 1, biases 0. Everything else is normal, with standard deviation `fan_in ** -0.5` for
    matrices (times `RESIDUAL` if they write into the residual stream), `EMBEDDING` for token and class embeddings and `POSITION`
    for position embeddings of an image. The random stream depends only on `seed` and `name`, so neither the order of construction
    nor the presence of other parameters changes a value.
    """
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if "norm" in name.rsplit(".", 2)[-2] or "layer_scale" in name:
        return np.ones(shape, np.float32)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    stream = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    if "position_embedding" in name:
        std = POSITION
    elif "embed_tokens" in name or "class_embedding" in name:
        std = EMBEDDING
    else:
        std = float(np.prod(shape[1:])) ** -0.5 * (RESIDUAL if name.endswith(INTO_RESIDUAL) else 1)
    return (stream.standard_normal(shape, np.float32) * np.float32(std)).astype(np.float32)


def initial_values(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """`initial_value` for every name."""
    return {name: initial_value(name, shape, seed) for name, shape in shapes.items()}
