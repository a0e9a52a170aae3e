// What the host tells the kernels of ROIAlign. It lies in op_kernel because only that folder goes into the operator package.
#ifndef GRANVIT_ROI_ALIGN_TILING_DATA_H
#define GRANVIT_ROI_ALIGN_TILING_DATA_H
#include <cstdint>

struct RoiAlignTiling {
    uint32_t images, height, width, channels;  // features [images, height, width, channels]
    uint32_t boxes, grid;                      // boxes [images, boxes, 4], output [images, boxes, grid, grid, channels]
    uint32_t tile;                             // channels of a task
    uint32_t rows;                             // rows of a task: of the output (forward), of the feature map (backward)
    uint32_t bins;                             // bins of an output row that are in UB at a time; forward: those of a task
};

constexpr uint32_t ROI_MAX_GRID = 64;  // the kernels keep the weights of one axis on their stack
constexpr uint32_t ROI_MAX_BAND = 32;  // rows of a backward task; a 32-bit mask marks those that a box touches
constexpr uint32_t ROI_TAPS = 4;       // cells along one axis that a bin reads: two samples, two cells each
constexpr uint32_t ROI_BUFFERS = 2;    // of each queue: copies overlap with arithmetic
#endif
