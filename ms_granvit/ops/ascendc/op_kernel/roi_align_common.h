// The sampling weights of ROIAlign, and copies of [cells, channels] pieces between global memory and the unified buffer (UB).
#ifndef GRANVIT_ROI_ALIGN_COMMON_H
#define GRANVIT_ROI_ALIGN_COMMON_H
#include "kernel_operator.h"
#include "roi_align_tiling_data.h"

// The cells that one bin reads along one axis, with the mean of its samples' bilinear weights. No cell occurs twice.
struct Taps {
    uint32_t count;
    uint32_t cell[ROI_TAPS];
    float weight[ROI_TAPS];
};

// Coordinate in cells of sample `index` of `2 * grid` between two coordinates in 0..1, half-pixel aligned, clamped to the
// centres of the border cells. A NaN stays NaN.
__aicore__ inline float SamplePoint(float low, float high, uint32_t index, uint32_t grid, uint32_t cells)
{
    float tick = (static_cast<float>(index) + 0.5f) * (0.5f / static_cast<float>(grid));
    float point = (low + (high - low) * tick) * static_cast<float>(cells) - 0.5f;
    float last = static_cast<float>(cells - 1);
    return point < 0.0f ? 0.0f : (point > last ? last : point);
}

__aicore__ inline void AddTap(Taps &taps, uint32_t cell, float weight)
{
    for (uint32_t i = 0; i < taps.count; ++i) {
        if (taps.cell[i] == cell) {
            taps.weight[i] += weight;
            return;
        }
    }
    taps.cell[taps.count] = cell;
    taps.weight[taps.count++] = weight;
}

__aicore__ inline void BinTaps(Taps &taps, float low, float high, uint32_t bin, uint32_t grid, uint32_t cells)
{
    taps.count = 0;
    for (uint32_t sample = 0; sample < 2; ++sample) {
        float point = SamplePoint(low, high, 2 * bin + sample, grid, cells);
        if (!(point >= 0.0f)) {  // a box with NaN: NaN in its output, as in `composed`
            AddTap(taps, 0, point);
            continue;
        }
        int32_t cell = AscendC::ScalarCast<float, int32_t, AscendC::RoundMode::CAST_FLOOR>(point);
        float rest = point - static_cast<float>(cell);
        AddTap(taps, cell, 0.5f * (1.0f - rest));
        if (rest > 0.0f) {
            AddTap(taps, cell + 1, 0.5f * rest);
        }
    }
}

__aicore__ inline uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Channels [start, start + count) of a task. `pitch` is their distance from cell to cell in UB: whole blocks of 32 bytes.
template <typename T> struct Channels {
    uint32_t start, count, pitch;

    __aicore__ inline Channels(uint32_t tile, uint32_t index, uint32_t channels)
    {
        constexpr uint32_t lane = 32 / sizeof(T);
        start = tile * index;
        count = channels - start < tile ? channels - start : tile;
        pitch = CeilDiv(count, lane) * lane;
    }
};

// Both copies move `cells` neighbouring cells of an array [..., cells, channels]; the rest of a block in UB is filled with zeros.
template <typename T>
__aicore__ inline void CopyIn(AscendC::LocalTensor<T> local, AscendC::GlobalTensor<T> global, uint32_t cells, uint32_t channels,
                              const Channels<T> &part)
{
    uint32_t length = part.count * sizeof(T), gap = (channels - part.count) * sizeof(T);
    AscendC::DataCopyExtParams copy{static_cast<uint16_t>(cells), length, gap, 0, 0};
    AscendC::DataCopyPadExtParams<T> pad{true, 0, static_cast<uint8_t>(part.pitch - part.count), 0};
    AscendC::DataCopyPad(local, global, copy, pad);
}

template <typename T>
__aicore__ inline void CopyOut(AscendC::GlobalTensor<T> global, AscendC::LocalTensor<T> local, uint32_t cells, uint32_t channels,
                               const Channels<T> &part)
{
    uint32_t length = part.count * sizeof(T), gap = (channels - part.count) * sizeof(T);
    AscendC::DataCopyExtParams copy{static_cast<uint16_t>(cells), length, 0, gap, 0};
    AscendC::DataCopyPad(global, local, copy);
}

// dst = weight * src for the first term of a sum, dst += weight * src for the others.
__aicore__ inline void Accumulate(AscendC::LocalTensor<float> dst, AscendC::LocalTensor<float> src, float weight, uint32_t count,
                                  bool first)
{
    if (first) {
        AscendC::Muls(dst, src, weight, static_cast<int32_t>(count));
    } else {
        AscendC::Axpy(dst, src, weight, static_cast<int32_t>(count));
    }
}
#endif
