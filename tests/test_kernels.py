"""The choice among implementations (`granvit.kernels`), and what both tables must have."""
import importlib

import pytest

from granvit.config import parse_config
from granvit.kernels import COMPOSED, NAMES, OPERATORS, Kernels, Row

TABLE = (
    Row("attention", "flash", "npu", "bfloat16 float16", "ops.attention.flash", mask="ops.attention.mask"),
    Row("attention", "sdpa", "cpu npu", "any", "ops.attention.sdpa", cannot=lambda head_dim: "odd" if head_dim % 2 else ""),
    Row("attention", "native", "cpu", "float32", "ops.attention.native", missing=lambda: "no C++ compiler; install g++"),
    Row("attention", "flex", "any", "any", "ops.attention.flex", unwise=lambda head_dim: "small" if head_dim < 64 else ""),
    Row("attention", "npu_fusion", "any", "any", "ops.attention.npu_fusion", by_name="not run on a device yet"),
    Row("attention", COMPOSED, "any", "any", "ops.attention.composed"),
)


def chosen(device="cpu", dtype="float32", name="auto", head_dim=8):
    return Kernels("granvit", TABLE, device, dtype, {"attention": name}).row("attention", head_dim=head_dim).name


def test_the_first_row_that_takes_device_dtype_and_sizes_is_chosen():
    assert chosen("npu", "bfloat16") == "flash"
    assert chosen("npu", "float32") == "sdpa"
    assert chosen("cpu", head_dim=7) == COMPOSED  # not `flex`, which is unwise, nor `npu_fusion`, which nobody named
    assert chosen("cpu", head_dim=65) == "flex"


def test_a_named_implementation_is_taken_where_it_can_run_even_if_another_is_better():
    assert chosen(name="flex") == "flex"
    assert chosen(name="npu_fusion") == "npu_fusion"
    assert chosen(name="sdpa", head_dim=7) == COMPOSED  # `sdpa` cannot


def test_what_the_machine_lacks_is_said_once_and_passed_over_even_if_it_was_named():
    kernels = Kernels("granvit", TABLE, "cpu", "float32", {"attention": "native"})
    assert [kernels.row("attention", head_dim=7).name for _ in range(2)] == [COMPOSED, COMPOSED]
    assert kernels.hints == ["'native': no C++ compiler; install g++"]
    assert kernels.names == {"attention": COMPOSED}


def test_of_several_names_the_first_is_taken_that_the_package_has_and_that_runs():
    assert chosen(name=["flash", "flex", COMPOSED]) == "flex"
    assert chosen(name=["flash", "auto"]) == "sdpa"
    assert chosen("npu", "float16", name=[COMPOSED, "flash"]) == COMPOSED


def test_a_name_of_the_other_package_leaves_the_choice_to_the_table_and_is_said():
    kernels = Kernels("granvit", TABLE, "cpu", "float32", {"roi_align": "triton", "attention": ["composed"]})
    assert kernels.hints == ["roi_align 'triton': granvit does not have it"]


def test_the_log_names_every_implementation_that_was_picked():
    kernels = Kernels("granvit", TABLE, "cpu", "float32")
    for head_dim in (8, 7, 8):
        kernels.row("attention", head_dim=head_dim)
    assert kernels.names == {"attention": f"sdpa and {COMPOSED}"}


def test_runnable_lists_also_what_only_a_name_picks():
    assert Kernels("granvit", TABLE, "cpu", "float32").runnable("attention", head_dim=7) == ["flex", "npu_fusion", COMPOSED]


@pytest.mark.parametrize(
    ("device", "named", "message"),
    [
        ("cpu", {"attentoin": "flash"}, r"runtime\.kernels\.attentoin: no such operator"),
        ("cpu", {"attention": "sdap"}, r"runtime\.kernels\.attention 'sdap' is not one of auto, composed"),
        ("cpu", {"attention": "flash"}, r"'flash' runs on npu in bfloat16, float16, not on cpu in float32; use auto"),
        ("npu", {"attention": "flash"}, r"'flash' runs on npu in bfloat16, float16, not on npu in float32; use auto"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(device, named, message):
    with pytest.raises(ValueError, match=message):
        Kernels("granvit", TABLE, device, "float32", named)


def test_every_name_of_a_configuration_exists_in_a_package():
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    rows = [row for package in ("ms_granvit", "pt_granvit") for row in importlib.import_module(f"{package}.ops.table").TABLE]
    assert {(row.operator, row.name) for row in rows} == {(operator, name) for operator in NAMES for name in NAMES[operator]}


@pytest.mark.parametrize("package", ["ms_granvit", "pt_granvit"])
def test_every_operator_can_be_composed_everywhere_and_every_function_exists(package):
    pytest.importorskip({"ms_granvit": "mindspore", "pt_granvit": "torch"}[package])
    table = importlib.import_module(f"{package}.ops.table").TABLE
    kernels = Kernels(package, table, "cpu", "float32")
    for operator in OPERATORS:
        rows = [row for row in table if row.operator == operator]
        assert (rows[-1].name, rows[-1].devices, rows[-1].dtypes) == (COMPOSED, "any", "any"), operator
        assert len({row.name for row in rows}) == len(rows), operator
    for row in table:
        assert bool(row.mask) == (row.operator == "attention"), row
        for path in filter(None, (row.function, row.mask)):
            if not row.missing():
                assert callable(kernels.load(path)), path


def run_config(**runtime):
    data = {"sources": [{"path": "unused"}], "buckets": [{"length": 1, "answers": 1}]}
    return parse_config({"stage": "stage1", "output": "unused", "data": data, "runtime": runtime}, "a test")


def test_the_configuration_names_implementations_and_reads_the_key_of_earlier_versions():
    assert run_config().runtime.kernels == {}
    assert run_config(kernels={"attention": "flash"}).runtime.kernels == {"attention": "flash"}
    assert run_config(attention="flash").runtime.kernels == {"attention": "flash"}
    assert run_config(attention="auto").runtime.kernels == {}
    with pytest.raises(ValueError, match="attentoin"):
        run_config(kernels={"attentoin": "flash"})
