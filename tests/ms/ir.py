"""Finds operators that are slow or impossible on a device in the intermediate representation of a MindSpore graph.

Compilation stops before kernels are chosen. Up to there it accepts every precision and operator, so graphs for an NPU can be
compiled on a CPU.
"""
from collections.abc import Iterator

from mindspore import Tensor, nn
from mindspore.graph.api import _cell_graph_executor as executor
from mindspore.train import anf_ir_pb2 as ir

HOST = ("Py", "Print", "Callback", "Summary", "Dump", "Assert")  # parts of the names of operators that call the host
SLOW = (ir.DT_FLOAT64, ir.DT_INT64, ir.DT_UINT64)


def compiled(cell: nn.Cell, *inputs: Tensor | int) -> str:
    """Compiles a cell up to the choice of kernels; returns the graph's name. Nothing is launched."""
    phase, _ = executor.compile(cell, *inputs, phase="export.mindir", do_convert=False)
    return phase


def faults(phase: str) -> list[str]:
    """One line for each operator of a compiled graph, and each constant tensor in it, that calls the host, is 64 bits wide, or
    has a shape that is not known. Numbers and tuples of numbers are not tensors: they are known when the graph is compiled."""
    graph = _graph(phase)
    found = []
    for node in graph.node:
        attributes = {attribute.name: attribute.value for attribute in node.attribute}
        on_cpu = "primitive_target" in attributes and attributes["primitive_target"].str_val == "CPU"
        if on_cpu or any(word in node.op_type for word in HOST) or "pyfunc" in str(attributes.get("func_type", "")):
            found.append(f"{node.op_type} calls the host: {node.full_name}")
        for tensor in _tensors(node.output_type):
            if tensor.elem_type in SLOW:
                found.append(f"{node.op_type} makes {ir.DataType.Name(tensor.elem_type)}: {node.full_name}")
            if any(axis.size < 0 for axis in tensor.shape.dim):
                found.append(f"{node.op_type} has a dynamic shape: {node.full_name}")
    for constant in graph.const_vals:
        if constant.value.dtype == ir.DT_TENSOR and constant.value.tensor_val.data_type in SLOW:
            found.append(f"constant {constant.key} is {ir.DataType.Name(constant.value.tensor_val.data_type)}")
    return found


def operators(phase: str, kind: str = "") -> int:
    """How many operators a compiled graph has: all, or those of one kind (`Softmax`)."""
    return sum(kind in ("", node.op_type) for node in _graph(phase).node)


def _graph(phase: str) -> ir.GraphProto:
    model = ir.ModelProto()
    model.ParseFromString(executor._graph_executor.get_func_graph_proto(phase, "anf_ir", False))
    return model.graph


def _tensors(kind: ir.TypeProto) -> Iterator[ir.TypeProto.Tensor]:
    if kind.data_type == ir.DT_TENSOR:
        yield kind.tensor_type
    for inner in kind.sequence_type.elem_types:
        yield from _tensors(inner)
