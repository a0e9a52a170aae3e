// How the work of ROIAlign is cut: plain arithmetic, shared by the operator's host side and by the tests that run the kernels.
#ifndef GRANVIT_ROI_ALIGN_TILING_H
#define GRANVIT_ROI_ALIGN_TILING_H
#include <algorithm>

#include "../op_kernel/roi_align_tiling_data.h"

namespace granvit {

// A margin that our buffers leave free: on some chips, interfaces take 8 KB of UB for themselves (of ours none does on the 910B).
constexpr uint64_t UB_RESERVE = 8 * 1024;

inline uint64_t DivideUp(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
inline uint64_t RoundUp(uint64_t a, uint64_t b) { return DivideUp(a, b) * b; }

// Bytes of UB for each channel of a tile; `bytes` is the size of an element. They are the kernels' InitBuffer calls.
inline uint64_t ForwardUb(const RoiAlignTiling &t, uint64_t bytes)
{
    uint64_t queues = ROI_BUFFERS * (t.width + t.bins) * bytes, kept = ROI_TAPS * t.bins * 4;
    return queues + kept + (bytes == 4 ? 0 : (t.width + t.bins) * 4);
}

inline uint64_t BackwardUb(const RoiAlignTiling &t, uint64_t bytes)
{
    uint64_t queues = ROI_BUFFERS * (t.width + t.bins) * bytes, band = t.rows * (t.bins + t.width) * 4;
    return queues + band + (bytes == 4 ? 0 : t.bins * 4);
}

// The widest tile with `perChannel` bytes for each channel that fits: whole vectors of 64 float32 numbers if one fits, else whole
// blocks of 16; the channels in tiles of equal width. 0 if not even one block fits.
inline uint32_t Tile(uint64_t channels, uint64_t perChannel, uint64_t ub)
{
    uint64_t room = (ub > UB_RESERVE ? ub - UB_RESERVE : 0) / perChannel, step = room >= 64 && channels > 16 ? 64 : 16;
    uint64_t widest = std::min(room / step * step, RoundUp(channels, step));
    return widest == 0 ? 0 : static_cast<uint32_t>(RoundUp(DivideUp(channels, DivideUp(channels, widest)), step));
}

// Chooses `bins` and `tile`. Fewer bins in UB leave room for more channels, so for longer and fewer instructions on single bins,
// but cut the instructions on whole rows. Taken is what needs the fewest for a box over the whole map. False if nothing fits.
template <typename Ub> bool Cut(RoiAlignTiling &t, uint64_t bytes, uint64_t ub, Ub ubOf)
{
    uint64_t fewest = UINT64_MAX;
    for (uint64_t parts = 1; parts <= t.grid; ++parts) {
        RoiAlignTiling cut = t;
        cut.bins = static_cast<uint32_t>(DivideUp(t.grid, parts));
        cut.tile = Tile(t.channels, ubOf(cut, bytes), ub);
        if (cut.tile == 0) {
            continue;
        }
        uint64_t instructions = DivideUp(t.channels, cut.tile) * (static_cast<uint64_t>(t.height) * t.grid + t.grid * parts);
        if (instructions < fewest) {
            fewest = instructions;
            t = cut;
        }
    }
    return fewest != UINT64_MAX;
}

inline bool Valid(const RoiAlignTiling &t)
{
    return t.images > 0 && t.height > 0 && t.width > 0 && t.width <= 4095 && t.channels > 0 && t.boxes > 0 && t.grid > 0 &&
           t.grid <= ROI_MAX_GRID;  // 4095 is what one copy takes (blockCount)
}

// Both fill in `tile`, `rows` and `bins`, and return whether the sizes can be computed. Rows are cut until there are two tasks
// for each core: then no core waits for long.
inline bool PlanForward(RoiAlignTiling &t, uint64_t bytes, uint64_t cores, uint64_t ub)
{
    if (!Valid(t) || !Cut(t, bytes, ub, ForwardUb)) {
        return false;
    }
    uint64_t tasks = static_cast<uint64_t>(t.images) * t.boxes * DivideUp(t.grid, t.bins) * DivideUp(t.channels, t.tile);
    t.rows = static_cast<uint32_t>(DivideUp(t.grid, std::min<uint64_t>(t.grid, DivideUp(2 * cores, tasks))));
    return true;
}

inline bool PlanBackward(RoiAlignTiling &t, uint64_t bytes, uint64_t cores, uint64_t ub)
{
    if (!Valid(t)) {
        return false;
    }
    // A row of the output's gradient is read again by each band that its samples touch: four rows at least, if they fit.
    for (t.rows = std::min<uint32_t>(t.height, 4); !Cut(t, bytes, ub, BackwardUb) || (t.tile < 64 && t.rows > 1); --t.rows) {
        if (t.rows == 1) {
            return false;
        }
    }
    auto fits = [&](uint32_t rows) {
        RoiAlignTiling taller = t;
        taller.rows = rows;
        return BackwardUb(taller, bytes) * t.tile + UB_RESERVE <= ub;
    };
    auto tasks = [&](uint32_t rows) { return t.images * DivideUp(t.channels, t.tile) * DivideUp(t.height, rows); };
    while (t.rows < std::min(t.height, ROI_MAX_BAND) && fits(t.rows + 1) && tasks(t.rows + 1) >= 2 * cores) {
        ++t.rows;
    }
    while (t.rows > 1 && tasks(t.rows) < 2 * cores) {
        --t.rows;
    }
    return true;
}

}  // namespace granvit
#endif
