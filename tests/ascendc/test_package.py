"""The Python side of the Ascend C operators: what it declares, and that it runs in the static graph, on the host's kernels."""
import subprocess

import numpy as np
import pytest

from .harness import build, compiler

ms = pytest.importorskip("mindspore")

from mindspore.ops.operations._custom_ops_utils import CustomCodeGenerator, CustomInfoGenerator  # noqa: E402

from ms_granvit.ops.ascendc import roi_align as ascendc  # noqa: E402
from ms_granvit.ops.roi_align import roi_align as composed  # noqa: E402

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

REGISTRATIONS = (
    ascendc.registration(ascendc.FORWARD, "features", ("grid",), "out"),
    ascendc.registration(ascendc.BACKWARD, "out_grad", ("height", "width"), "features_grad"),
)
# The declaration that CANN generates from the definition of the operator: inputs, attributes, outputs.
HEADER = """
__attribute__((visibility("default")))
aclnnStatus {name}GetWorkspaceSize(
    const aclTensor *a,
    const aclTensor *boxes,
    {attributes}
    const aclTensor *out,
    uint64_t *workspaceSize,
    aclOpExecutor **executor);
"""
CALLER = """
#include <cstdint>
#include "callback.cc"
static int Fake(aclTensor *a, aclTensor *boxes, {parameters}, aclTensor *out, uint64_t *size, aclOpExecutor **) {{
  return *size = 7, a == (aclTensor *)1 && boxes == (aclTensor *)2 && {checks} && out == (aclTensor *)3 ? 0 : 1;
}}
int main() {{
  int64_t values[] = {{10, 11}};
  uint64_t size = 0;
  aclOpExecutor *executor = nullptr;
  int status = {name}GetWorkSpaceSize((void *)&Fake, {{(void *)1, (void *)2, {arguments}}}, {{(void *)3}}, &size, &executor);
  return status == 0 && size == 7 ? 0 : 1;
}}
"""


def test_the_declared_names_are_those_of_the_definitions(harness):
    program = harness("float32").program
    defined = subprocess.run([program, "definitions"], capture_output=True, text=True, check=True).stdout.splitlines()
    parameters = [[item["name"] for key in ("inputs", "attr", "outputs") for item in info[key]] for info in REGISTRATIONS]
    names = [info["op_name"].removeprefix("aclnn") for info in REGISTRATIONS]
    assert sorted(defined) == sorted(" ".join([name, *words]) for name, words in zip(names, parameters, strict=True))


@pytest.mark.parametrize("info", REGISTRATIONS, ids=lambda info: info["op_name"])
def test_mindspores_callback_compiles_and_passes_the_arguments_on(tmp_path, monkeypatch, info):
    name, attributes = info["op_name"], [attribute["name"] for attribute in info["attr"]]
    include = tmp_path / "op_api" / "include"
    (tmp_path / "acl").mkdir()
    (tmp_path / "acl" / "acl_base.h").write_text("#include <cstdint>\n")
    include.mkdir(parents=True)
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", str(tmp_path))
    monkeypatch.setenv("ASCEND_OPP_PATH", str(tmp_path / "opp"))
    generator = CustomInfoGenerator(name)
    header = HEADER.format(name=name, attributes="".join(f"int64_t {attribute}," for attribute in attributes))
    (include / generator.aclnn_api_file_name).write_text(header)
    callback = CustomCodeGenerator().generate_callback_by_types(name, info, generator.get_aclnn_api_types())
    (tmp_path / "callback.cc").write_text(callback)
    caller = CALLER.format(
        name=name,
        parameters=", ".join(f"int64_t {attribute}" for attribute in attributes),
        checks=" && ".join(f"{attribute} == {10 + index}" for index, attribute in enumerate(attributes)),
        arguments=", ".join(f"&values[{index}]" for index in range(len(attributes))),
    )
    (tmp_path / "caller.cc").write_text(caller)
    subprocess.run(["g++", "-std=c++17", "-I", tmp_path, tmp_path / "caller.cc", "-o", tmp_path / "caller"], check=True)
    assert subprocess.run([tmp_path / "caller"]).returncode == 0
    if name == ascendc.FORWARD:
        assert ascendc.missing() == ""
        monkeypatch.delenv("ASCEND_CUSTOM_OPP_PATH")
        assert "not installed" in ascendc.missing()


def test_the_function_in_the_static_graph_agrees_with_composed(tmp_path, monkeypatch):
    library = build("aot.cpp", tmp_path / "kernels.so", "-shared", "-fPIC")
    monkeypatch.setattr(ascendc, "FORWARD", f"{library}:GranvitRoiAlign")
    monkeypatch.setattr(ascendc, "BACKWARD", f"{library}:GranvitRoiAlignGrad")
    monkeypatch.setattr(ascendc, "TARGET", "CPU")
    rng = np.random.default_rng(0)
    low = rng.random((2, 3, 2))
    boxes = ms.Tensor(np.concatenate([low, low + rng.random((2, 3, 2)) * (1 - low)], -1).astype(np.float32))
    shapes = (2, 5, 7, 20), (2, 3, 4, 4, 20)
    features, cotangent = (ms.Tensor(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)

    def run(function):
        def weighted(features, boxes):
            out = function(features, boxes, 4)
            return (out * cotangent).sum(), out

        (_, out), gradients = ms.jit(ms.value_and_grad(weighted, (0, 1), has_aux=True))(features, boxes)
        return out.asnumpy(), *(gradient.asnumpy() for gradient in gradients)

    (out, gradient, of_boxes), (expected_out, expected_gradient, _) = run(ascendc.roi_align), run(composed)
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=4e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=4e-6)
    assert not of_boxes.any()
    ascendc.forward.cache_clear()  # they are operators of this test's library
    ascendc.backward.cache_clear()
