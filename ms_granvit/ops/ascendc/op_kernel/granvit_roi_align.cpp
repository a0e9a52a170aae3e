// ROIAlign, forward: out[k] = My[k] . F . Mx[k]^T, for features [B, H, W, C] of float32, float16 or bfloat16, summed in float32.
//
// A task is one box, a tile of channels, and some rows and columns of bins; tasks are dealt out to the blocks in turn. The
// columns are interpolated first, once for each row of the map that the bins touch. Those rows, [bins, tile] each, stay in UB
// for as long as an output row needs them (at most four at a time), and an output row is a sum of whole rows: one long
// instruction for each of them.
#include "roi_align_common.h"

template <typename T> class RoiAlign {
    static constexpr bool WIDE = AscendC::IsSameType<T, float>::value;  // no conversion, and no buffers for it

public:
    __aicore__ inline void Init(GM_ADDR features, GM_ADDR boxes, GM_ADDR out, const RoiAlignTiling &tiling, AscendC::TPipe *pipe)
    {
        t = tiling;
        uint64_t maps = static_cast<uint64_t>(t.images) * t.height * t.width * t.channels;
        uint64_t outputs = static_cast<uint64_t>(t.images) * t.boxes * t.grid * t.grid * t.channels;
        featuresGm.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(features), maps);
        boxesGm.SetGlobalBuffer(reinterpret_cast<__gm__ float *>(boxes), static_cast<uint64_t>(t.images) * t.boxes * 4);
        outGm.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(out), outputs);
        pipe->InitBuffer(inQueue, ROI_BUFFERS, t.width * t.tile * sizeof(T));
        pipe->InitBuffer(outQueue, ROI_BUFFERS, t.bins * t.tile * sizeof(T));
        pipe->InitBuffer(keptBuffer, ROI_TAPS * t.bins * t.tile * sizeof(float));
        kept = keptBuffer.Get<float>();
        if constexpr (!WIDE) {
            pipe->InitBuffer(cellsBuffer, t.width * t.tile * sizeof(float));
            pipe->InitBuffer(sumBuffer, t.bins * t.tile * sizeof(float));
        }
    }

    __aicore__ inline void Process()
    {
        uint32_t tiles = CeilDiv(t.channels, t.tile), bands = CeilDiv(t.grid, t.rows), parts = CeilDiv(t.grid, t.bins);
        uint32_t tasks = t.images * t.boxes * bands * parts * tiles;
        for (uint32_t task = AscendC::GetBlockIdx(); task < tasks; task += AscendC::GetBlockNum()) {
            uint32_t begin = task / tiles / parts % bands * t.rows;
            firstBin = task / tiles % parts * t.bins;
            bins = t.grid - firstBin < t.bins ? t.grid - firstBin : t.bins;
            Rows(task / tiles / parts / bands, begin, begin + t.rows < t.grid ? begin + t.rows : t.grid,
                 Channels<T>(t.tile, task % tiles, t.channels));
        }
    }

private:
    __aicore__ inline void Rows(uint32_t box, uint32_t begin, uint32_t end, const Channels<T> &part)
    {
        float x1 = boxesGm.GetValue(4 * box), y1 = boxesGm.GetValue(4 * box + 1);
        float x2 = boxesGm.GetValue(4 * box + 2), y2 = boxesGm.GetValue(4 * box + 3);
        left = t.width - 1;
        right = 0;
        for (uint32_t bin = 0; bin < bins; ++bin) {
            BinTaps(columns[bin], x1, x2, firstBin + bin, t.grid, t.width);
            for (uint32_t i = 0; i < columns[bin].count; ++i) {
                left = columns[bin].cell[i] < left ? columns[bin].cell[i] : left;
                right = columns[bin].cell[i] > right ? columns[bin].cell[i] : right;
            }
        }
        for (uint32_t slot = 0; slot < ROI_TAPS; ++slot) {
            keptRow[slot] = t.height;  // none
        }
        Taps rows;
        for (uint32_t bin = begin; bin < end; ++bin) {
            BinTaps(rows, y1, y2, bin, t.grid, t.height);
            OutputRow(box, bin, rows, part);
        }
    }

    __aicore__ inline void OutputRow(uint32_t box, uint32_t bin, const Taps &rows, const Channels<T> &part)
    {
        uint32_t size = bins * part.pitch;
        uint32_t slots[ROI_TAPS];
        for (uint32_t i = 0; i < rows.count; ++i) {
            slots[i] = Keep(box / t.boxes, rows, i, part);
        }
        AscendC::LocalTensor<T> out = outQueue.template AllocTensor<T>();
        AscendC::LocalTensor<float> sum;
        if constexpr (WIDE) {
            sum = out;
        } else {
            sum = sumBuffer.Get<float>();
        }
        for (uint32_t i = 0; i < rows.count; ++i) {
            Accumulate(sum, kept[slots[i] * size], rows.weight[i], size, i == 0);
        }
        if constexpr (!WIDE) {
            AscendC::Cast(out, sum, AscendC::RoundMode::CAST_RINT, size);
        }
        outQueue.EnQue(out);
        out = outQueue.template DeQue<T>();
        uint64_t first = ((static_cast<uint64_t>(box) * t.grid + bin) * t.grid + firstBin) * t.channels + part.start;
        CopyOut(outGm[first], out, bins, t.channels, part);
        outQueue.FreeTensor(out);
    }

    // The slot that holds row `rows.cell[index]` of the map with interpolated columns. A row that is not there replaces one that
    // this output row does not need.
    __aicore__ inline uint32_t Keep(uint32_t image, const Taps &rows, uint32_t index, const Channels<T> &part)
    {
        uint32_t free = 0;
        for (uint32_t slot = 0; slot < ROI_TAPS; ++slot) {
            if (keptRow[slot] == rows.cell[index]) {
                return slot;
            }
            bool needed = false;
            for (uint32_t i = 0; i < rows.count; ++i) {
                needed = needed || keptRow[slot] == rows.cell[i];
            }
            free = needed ? free : slot;
        }
        keptRow[free] = rows.cell[index];
        Interpolate(kept[free * bins * part.pitch], image, rows.cell[index], part);
        return free;
    }

    __aicore__ inline void Interpolate(AscendC::LocalTensor<float> row, uint32_t image, uint32_t y, const Channels<T> &part)
    {
        uint32_t width = right - left + 1;
        AscendC::LocalTensor<T> in = inQueue.template AllocTensor<T>();
        uint64_t first = ((static_cast<uint64_t>(image) * t.height + y) * t.width + left) * t.channels + part.start;
        CopyIn(in, featuresGm[first], width, t.channels, part);
        inQueue.EnQue(in);
        in = inQueue.template DeQue<T>();
        AscendC::LocalTensor<float> cells;
        if constexpr (WIDE) {
            cells = in;
        } else {
            cells = cellsBuffer.Get<float>();
            AscendC::Cast(cells, in, AscendC::RoundMode::CAST_NONE, width * part.pitch);
        }
        for (uint32_t bin = 0; bin < bins; ++bin) {
            const Taps &taps = columns[bin];
            for (uint32_t i = 0; i < taps.count; ++i) {
                Accumulate(row[bin * part.pitch], cells[(taps.cell[i] - left) * part.pitch], taps.weight[i], part.pitch, i == 0);
            }
        }
        inQueue.FreeTensor(in);
    }

    RoiAlignTiling t;
    AscendC::GlobalTensor<T> featuresGm, outGm;
    AscendC::GlobalTensor<float> boxesGm;
    AscendC::TQue<AscendC::TPosition::VECIN, 1> inQueue;
    AscendC::TQue<AscendC::TPosition::VECOUT, 1> outQueue;
    AscendC::TBuf<AscendC::TPosition::VECCALC> keptBuffer, cellsBuffer, sumBuffer;
    AscendC::LocalTensor<float> kept;  // [ROI_TAPS, bins, pitch]
    uint32_t keptRow[ROI_TAPS];
    uint32_t firstBin, bins;  // of the task, along a row
    Taps columns[ROI_MAX_GRID];
    uint32_t left, right;  // the columns of the map that they touch
};

extern "C" __global__ __aicore__ void granvit_roi_align(GM_ADDR features, GM_ADDR boxes, GM_ADDR out, GM_ADDR workspace,
                                                        GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    REGISTER_TILING_DEFAULT(RoiAlignTiling);
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    RoiAlign<DTYPE_FEATURES> op;
    op.Init(features, boxes, out, data, &pipe);
    op.Process();
}
