// The kernels of ROIAlign behind MindSpore's interface for operators in C ("aot", CPU), so that the Python function that calls
// them on a device can be called on a host. float32 only.
#define DTYPE_FEATURES float
#define DTYPE_OUT_GRAD float
#include "../../ms_granvit/ops/ascendc/op_host/roi_align_tiling.h"
#include "../../ms_granvit/ops/ascendc/op_kernel/granvit_roi_align.cpp"
#include "../../ms_granvit/ops/ascendc/op_kernel/granvit_roi_align_grad.cpp"

using Kernel = void (*)(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR);

static int Run(int inputs, void **params, int *ndims, int64_t **shapes, RoiAlignTiling tiling, bool planned, Kernel kernel)
{
    if (!planned) {
        return 1;
    }
    auto bytes = [&](int index) {
        uint64_t product = sizeof(float);
        for (int axis = 0; axis < ndims[index]; ++axis) {
            product *= shapes[index][axis];
        }
        return product;
    };
    auto address = [&](int index) { return static_cast<uint8_t *>(params[index]); };
    harness::regions = {{"array", address(0), bytes(0), {}},
                        {"boxes", address(1), bytes(1), {}},
                        {"output", address(inputs), bytes(inputs), std::vector<uint16_t>(bytes(inputs) / 2)}};
    harness::blocks = 4;
    for (harness::block = 0; harness::block < harness::blocks; ++harness::block) {
        kernel(address(0), address(1), address(inputs), nullptr, reinterpret_cast<GM_ADDR>(&tiling));
    }
    harness::CheckOutputs();
    return 0;
}

static uint32_t Size(int64_t **shapes, int index, int axis) { return static_cast<uint32_t>(shapes[index][axis]); }

extern "C" int GranvitRoiAlign(int count, void **params, int *ndims, int64_t **shapes, const char **, void *, void *)
{
    RoiAlignTiling t{Size(shapes, 0, 0), Size(shapes, 0, 1), Size(shapes, 0, 2), Size(shapes, 0, 3), Size(shapes, 1, 1),
                     Size(shapes, count - 1, 2), 0, 0, 0};
    bool planned = granvit::PlanForward(t, sizeof(float), 4, harness::ubBytes);
    return Run(count - 1, params, ndims, shapes, t, planned, granvit_roi_align);
}

extern "C" int GranvitRoiAlignGrad(int count, void **params, int *ndims, int64_t **shapes, const char **, void *, void *)
{
    int out = count - 1;
    RoiAlignTiling t{Size(shapes, 0, 0), Size(shapes, out, 1), Size(shapes, out, 2), Size(shapes, 0, 4), Size(shapes, 1, 1),
                     Size(shapes, 0, 2), 0, 0, 0};
    bool planned = granvit::PlanBackward(t, sizeof(float), 4, harness::ubBytes);
    return Run(out, params, ndims, shapes, t, planned, granvit_roi_align_grad);
}
