"""Unusual input of attention and ROIAlign: every implementation that runs here, in either package, gives what its definition
says."""
import importlib
import importlib.util

import numpy as np
import pytest

from granvit.kernels import Kernels
from tests.native import oracle

TABLES = {"ms_granvit": "mindspore", "pt_granvit": "torch"}
SIZES = {"attention": {"head_dim": 8, "masked": True, "cached": False}, "roi_align": {"grid": 3}}


def implementations(operator):
    for package, framework in TABLES.items():
        if importlib.util.find_spec(framework) is None:
            continue
        kernels = Kernels(package, importlib.import_module(f"{package}.ops.table").TABLE, "cpu", "float32")
        for name in kernels.runnable(operator, **SIZES[operator]):
            yield pytest.param(package, name, id=f"{package}-{name}")


def tensor(package, array, apart=False):
    """A tensor of the package; with `apart` it is not contiguous."""
    framework = importlib.import_module(TABLES[package])
    make = framework.Tensor if package == "ms_granvit" else framework.from_numpy
    if array is None or not apart:
        return None if array is None else make(array)
    return make(np.ascontiguousarray(array.swapaxes(-1, -2))).swapaxes(-1, -2)


def kernels_of(package, operator, name):
    table = importlib.import_module(f"{package}.ops.table").TABLE
    return Kernels(package, table, "cpu", "float32", {operator: name})


def array(result):
    return result.asnumpy() if hasattr(result, "asnumpy") else result.numpy()


@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
@pytest.mark.parametrize("case", ["odd sizes", "head width 72", "shared prefix", "each query sees itself alone", "one query"])
@pytest.mark.parametrize("package, name", list(implementations("attention")))
def test_attention(package, name, case, apart):
    q, k, v, segments, dout = oracle.ATTENTION[case]
    mask, attend = kernels_of(package, "attention", name).attention(**SIZES["attention"])
    seen = None if segments is None else mask(tensor(package, segments))
    out = attend(*(tensor(package, x, apart) for x in (q, k, v)), seen)
    oracle.assert_near([array(out)], oracle.attention(q, k, v, segments, dout)[:1], 64)


@pytest.mark.parametrize("case", ["inverted", "outside", "zero width", "on the border", "NaN", "one cell", "two images"])
@pytest.mark.parametrize("package, name", list(implementations("roi_align")))
def test_roi_align(package, name, case):
    features, boxes, grid, dout = oracle.ROI_ALIGN[case]
    function = kernels_of(package, "roi_align", name).pick("roi_align", grid=grid)
    out = function(tensor(package, features), tensor(package, boxes), grid)
    oracle.assert_near([array(out)], oracle.roi_align(features, boxes, grid, dout)[:1], 64)


@pytest.mark.parametrize("package, name", list(implementations("roi_align")))
def test_no_box(package, name):
    features, boxes, grid, dout = oracle.ROI_ALIGN["no box"]
    function = kernels_of(package, "roi_align", name).pick("roi_align", grid=grid)
    assert tuple(function(tensor(package, features), tensor(package, boxes), grid).shape) == dout.shape
