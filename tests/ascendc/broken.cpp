// A kernel that doubles numbers, and, for each rule of the stand-in, the same kernel with that rule broken: broken FAULT.
// Without a fault ("none") it ends with status 0.
#include "kernel_operator.h"

using namespace AscendC;

constexpr uint32_t COUNT = 64, BYTES = COUNT * sizeof(float), BLOCKS = 2;

static std::string fault;
static bool Is(const char *name) { return fault == name; }

static void Double(float *x, float *y)
{
    GlobalTensor<float> xGm, yGm;
    xGm.SetGlobalBuffer(x, COUNT * BLOCKS);
    yGm.SetGlobalBuffer(y, COUNT * BLOCKS);
    uint64_t first = Is("two writers") ? 0 : COUNT * GetBlockIdx();
    uint64_t from = Is("read out of range") ? first + COUNT * BLOCKS - 8 : first;

    TPipe pipe;
    TQue<TPosition::VECIN, 1> in;
    TQue<TPosition::VECOUT, 1> out;
    TBuf<TPosition::VECCALC> scratch;
    pipe.InitBuffer(in, Is("queue depth") ? 2 : 1, BYTES);
    pipe.InitBuffer(out, 1, Is("UB overflow") ? 192 * 1024 : BYTES);
    pipe.InitBuffer(scratch, BYTES);
    if (Is("too many buffers")) {
        pipe.InitBuffer(in, 8, BYTES);
    }
    if (Is("dequeue of nothing")) {
        in.DeQue<float>();
    }
    if (Is("copy to VECCALC")) {
        DataCopy(scratch.Get<float>(), xGm[from], COUNT);
    }

    LocalTensor<float> a = in.AllocTensor<float>();
    if (Is("copy of half a number")) {
        DataCopyPad(a, xGm[from], DataCopyExtParams{1, 6, 0, 0, 0}, DataCopyPadExtParams<float>{});
    }
    if (Is("wide padding")) {
        DataCopyPad(a, xGm[from], DataCopyExtParams{1, 32, 0, 0, 0}, DataCopyPadExtParams<float>{true, 0, 9, 0.0f});
    }
    DataCopy(a, xGm[from], Is("copy of 12 bytes") ? 3 : COUNT);
    if (!Is("read before dequeue")) {
        in.EnQue(a);
        if (Is("queue depth")) {
            in.EnQue(in.AllocTensor<float>());
        }
        if (Is("no free buffer")) {
            in.AllocTensor<float>();
        }
        a = Is("read while enqueued") ? a : in.DeQue<float>();
    }
    LocalTensor<float> b = out.AllocTensor<float>();
    if (Is("misaligned operand")) {
        Muls(b[1], a, 2.0f, 8);
    } else if (Is("buffer overrun")) {
        Muls(b, a[8], 2.0f, static_cast<int32_t>(COUNT));
    } else if (Is("uninitialised operand")) {
        Muls(b, scratch.Get<float>(), 2.0f, static_cast<int32_t>(COUNT));
    } else if (Is("uninitialised sum")) {
        Axpy(b, a, 2.0f, static_cast<int32_t>(COUNT));
    } else {
        Muls(b, a, 2.0f, static_cast<int32_t>(COUNT));
    }
    if (Is("rounding of Cast")) {
        Cast(scratch.Get<half>(), a, RoundMode::CAST_NONE, COUNT);
    }
    if (Is("no buffer")) {
        Muls(b, LocalTensor<float>(), 2.0f, static_cast<int32_t>(COUNT));
    }
    if (Is("overlap")) {
        Muls(b[8], b, 2.0f, 16);
    }
    in.FreeTensor(a);
    if (Is("use after free")) {
        Muls(b, a, 2.0f, static_cast<int32_t>(COUNT));
    }
    if (Is("freed twice")) {
        in.FreeTensor(a);
    }
    if (!Is("copy out before dequeue")) {
        out.EnQue(b);
        b = out.DeQue<float>();
    }
    uint64_t to = Is("write out of range") ? first + COUNT * BLOCKS - 8 : first;
    if (!Is("nothing written")) {
        DataCopy(Is("write to input") ? xGm[to] : yGm[to], b, COUNT);
    }
    if (Is("write while copied")) {
        Muls(b, b, 2.0f, static_cast<int32_t>(COUNT));
    }
    if (Is("no synchronisation")) {
        yGm.GetValue(COUNT * (1 - GetBlockIdx()));
    }
    if (!Is("never freed")) {
        out.FreeTensor(b);
    }
}

int main(int argc, char **argv)
{
    fault = argc > 1 ? argv[1] : "none";
    std::vector<float> x(COUNT * BLOCKS, 1.5f), y(COUNT * BLOCKS);
    uint64_t bytes = BYTES * BLOCKS;
    harness::regions = {{"x", reinterpret_cast<uint8_t *>(x.data()), bytes, {}},
                        {"y", reinterpret_cast<uint8_t *>(y.data()), bytes, std::vector<uint16_t>(bytes / 2)}};
    harness::blocks = BLOCKS;
    for (harness::block = 0; harness::block < BLOCKS; ++harness::block) {
        Double(x.data(), y.data());
    }
    harness::CheckOutputs();
    return y.front() == 3.0f && y.back() == 3.0f ? 0 : 1;
}
