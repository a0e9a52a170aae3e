// ROIAlign, backward: dF = sum over the boxes of My[k]^T . dout[k] . Mx[k], without atomics.
//
// A task is an image, a band of rows of its feature map and a tile of channels; its block alone writes them. It goes through the
// image's boxes in order, so the sum does not depend on the number of blocks. For some columns of bins at a time, the rows of
// the output's gradient are added up for each row of the band, [band, bins, tile], with long instructions; then the columns of
// those rows are spread over the map.
#include "roi_align_common.h"

template <typename T> class RoiAlignGrad {
    static constexpr bool WIDE = AscendC::IsSameType<T, float>::value;

public:
    __aicore__ inline void Init(GM_ADDR outGrad, GM_ADDR boxes, GM_ADDR featuresGrad, const RoiAlignTiling &tiling,
                                AscendC::TPipe *pipe)
    {
        t = tiling;
        uint64_t maps = static_cast<uint64_t>(t.images) * t.height * t.width * t.channels;
        uint64_t outputs = static_cast<uint64_t>(t.images) * t.boxes * t.grid * t.grid * t.channels;
        outGradGm.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(outGrad), outputs);
        boxesGm.SetGlobalBuffer(reinterpret_cast<__gm__ float *>(boxes), static_cast<uint64_t>(t.images) * t.boxes * 4);
        featuresGradGm.SetGlobalBuffer(reinterpret_cast<__gm__ T *>(featuresGrad), maps);
        pipe->InitBuffer(inQueue, ROI_BUFFERS, t.bins * t.tile * sizeof(T));
        pipe->InitBuffer(outQueue, ROI_BUFFERS, t.width * t.tile * sizeof(T));
        pipe->InitBuffer(linesBuffer, t.rows * t.bins * t.tile * sizeof(float));
        pipe->InitBuffer(mapBuffer, t.rows * t.width * t.tile * sizeof(float));
        lines = linesBuffer.Get<float>();
        map = mapBuffer.Get<float>();
        if constexpr (!WIDE) {
            pipe->InitBuffer(lineBuffer, t.bins * t.tile * sizeof(float));
        }
    }

    __aicore__ inline void Process()
    {
        uint32_t tiles = CeilDiv(t.channels, t.tile), bands = CeilDiv(t.height, t.rows);
        uint32_t tasks = t.images * bands * tiles;
        for (uint32_t task = AscendC::GetBlockIdx(); task < tasks; task += AscendC::GetBlockNum()) {
            uint32_t band = task / tiles % bands, image = task / tiles / bands;
            begin = band * t.rows;
            end = begin + t.rows < t.height ? begin + t.rows : t.height;
            Band(image, Channels<T>(t.tile, task % tiles, t.channels));
        }
    }

private:
    __aicore__ inline void Band(uint32_t image, const Channels<T> &part)
    {
        uint32_t size = t.width * part.pitch;
        AscendC::Duplicate(map, 0.0f, static_cast<int32_t>((end - begin) * size));
        for (uint32_t box = image * t.boxes; box < (image + 1) * t.boxes; ++box) {
            float y1 = boxesGm.GetValue(4 * box + 1), y2 = boxesGm.GetValue(4 * box + 3);
            float first = SamplePoint(y1, y2, 0, t.grid, t.height), last = SamplePoint(y1, y2, 2 * t.grid - 1, t.grid, t.height);
            float low = first < last ? first : last, high = first < last ? last : first;
            if (high + 1.0f < static_cast<float>(begin) || low >= static_cast<float>(end)) {
                continue;  // never for NaN
            }
            for (uint32_t bin = 0; bin < t.grid; ++bin) {
                BinTaps(binRows[bin], y1, y2, bin, t.grid, t.height);
            }
            float x1 = boxesGm.GetValue(4 * box), x2 = boxesGm.GetValue(4 * box + 2);
            for (firstBin = 0; firstBin < t.grid; firstBin += t.bins) {
                bins = t.grid - firstBin < t.bins ? t.grid - firstBin : t.bins;
                SpreadColumns(x1, x2, AddRows(box, part), part);
            }
        }
        for (uint32_t y = begin; y < end; ++y) {
            AscendC::LocalTensor<T> out = outQueue.template AllocTensor<T>();
            if constexpr (WIDE) {
                AscendC::Muls(out, map[(y - begin) * size], 1.0f, static_cast<int32_t>(size));
            } else {
                AscendC::Cast(out, map[(y - begin) * size], AscendC::RoundMode::CAST_RINT, size);
            }
            outQueue.EnQue(out);
            out = outQueue.template DeQue<T>();
            uint64_t cell = (static_cast<uint64_t>(image) * t.height + y) * t.width * t.channels + part.start;
            CopyOut(featuresGradGm[cell], out, t.width, t.channels, part);
            outQueue.FreeTensor(out);
        }
    }

    // lines[y] = sum over the bins of My[bin][y] . dout[bin], for each row of the band; returns the mask of the rows touched.
    __aicore__ inline uint32_t AddRows(uint32_t box, const Channels<T> &part)
    {
        uint32_t size = bins * part.pitch, touched = 0;
        for (uint32_t bin = 0; bin < t.grid; ++bin) {
            const Taps &rows = binRows[bin];
            bool needed = false;
            for (uint32_t i = 0; i < rows.count; ++i) {
                needed = needed || (rows.cell[i] >= begin && rows.cell[i] < end);
            }
            if (!needed) {
                continue;
            }
            AscendC::LocalTensor<T> in = inQueue.template AllocTensor<T>();
            uint64_t first = ((static_cast<uint64_t>(box) * t.grid + bin) * t.grid + firstBin) * t.channels + part.start;
            CopyIn(in, outGradGm[first], bins, t.channels, part);
            inQueue.EnQue(in);
            in = inQueue.template DeQue<T>();
            AscendC::LocalTensor<float> line;
            if constexpr (WIDE) {
                line = in;
            } else {
                line = lineBuffer.Get<float>();
                AscendC::Cast(line, in, AscendC::RoundMode::CAST_NONE, size);
            }
            for (uint32_t i = 0; i < rows.count; ++i) {
                if (rows.cell[i] >= begin && rows.cell[i] < end) {
                    uint32_t y = rows.cell[i] - begin;
                    Accumulate(lines[y * size], line, rows.weight[i], size, (touched >> y & 1) == 0);
                    touched |= 1u << y;
                }
            }
            inQueue.FreeTensor(in);
        }
        return touched;
    }

    __aicore__ inline void SpreadColumns(float x1, float x2, uint32_t touched, const Channels<T> &part)
    {
        Taps taps;
        for (uint32_t bin = 0; touched != 0 && bin < bins; ++bin) {
            BinTaps(taps, x1, x2, firstBin + bin, t.grid, t.width);
            for (uint32_t y = 0; y < end - begin; ++y) {
                for (uint32_t i = 0; (touched >> y & 1) != 0 && i < taps.count; ++i) {
                    Accumulate(map[(y * t.width + taps.cell[i]) * part.pitch], lines[(y * bins + bin) * part.pitch],
                               taps.weight[i], part.pitch, false);
                }
            }
        }
    }

    RoiAlignTiling t;
    AscendC::GlobalTensor<T> outGradGm, featuresGradGm;
    AscendC::GlobalTensor<float> boxesGm;
    AscendC::TQue<AscendC::TPosition::VECIN, 1> inQueue;
    AscendC::TQue<AscendC::TPosition::VECOUT, 1> outQueue;
    AscendC::TBuf<AscendC::TPosition::VECCALC> linesBuffer, mapBuffer, lineBuffer;
    AscendC::LocalTensor<float> lines, map;  // [band, bins, pitch] and [band, width, pitch]
    uint32_t begin, end;                     // rows of the band
    uint32_t firstBin, bins;                 // columns of bins in UB
    Taps binRows[ROI_MAX_GRID];
};

extern "C" __global__ __aicore__ void granvit_roi_align_grad(GM_ADDR out_grad, GM_ADDR boxes, GM_ADDR features_grad,
                                                             GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    REGISTER_TILING_DEFAULT(RoiAlignTiling);
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    RoiAlignGrad<DTYPE_OUT_GRAD> op;
    op.Init(out_grad, boxes, features_grad, data, &pipe);
    op.Process();
}
