"""Run as a script by tests/ms/test_compile_cache.py: launches the named graphs in order, each on an input of 2 and 3 numbers,
with their cache in a directory. Prints the results, and how many graphs were loaded and compiled.

    python tests/ms/cached_graphs.py DIRECTORY 3 5     # multiplies by weight 3, then by weight 5
"""
import json
import sys

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from granvit import logs
from ms_granvit.compile_cache import CompileCache


class Scaled(nn.Cell):
    """x * factor + weight, where `factor` is a constant of the graph."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor
        self.weight = Parameter(Tensor(np.full(300_000, factor, np.float32)), name="weight")

    def construct(self, x: Tensor) -> Tensor:
        return x * self.factor + self.weight[:1]


def main(directory: str, *factors: str) -> None:
    logs.to_console(0)
    ms.set_context(mode=ms.GRAPH_MODE)
    results, counts = [], {"loaded": 0, "compiled": 0}
    for factor in map(float, factors):
        cache, cell = CompileCache(directory, 0, {"factor": factor}), Scaled(factor)
        cache.attach("scaled", cell)
        for weight in (factor, 7.0):  # a loaded graph uses the weight that the cell has now
            cell.weight.set_data(Tensor(np.full(300_000, weight, np.float32)))
            for size in (2, 3):
                results.append(cell(Tensor(np.ones(size, np.float32))).asnumpy().tolist())
        counts = {outcome: counts[outcome] + cache.counts[outcome] for outcome in counts}
    print(json.dumps([results, counts]))


if __name__ == "__main__":
    main(*sys.argv[1:])
