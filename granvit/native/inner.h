// What kernels.cpp (threads, entry points) and inner.cpp (loops, compiled once for each instruction set) say to each other.
// No header of the C++ library here or in inner.cpp: its inline functions, compiled for a newer processor, could be the copy that
// the linker keeps for all.
#pragma once
#include <stdint.h>

constexpr long QUERIES = 32;  // in one block; they lie in the lanes of the vectors
constexpr long KEYS = 96;     // in one block at most; a multiple of every tile's rows
constexpr long CHANNELS = 128;  // in one slice of ROIAlign

struct Attention {
  const float *q, *k, *v;   // [B, H, S, D], [B, G, L, D] twice
  const int32_t *segments;  // [B, S] or null
  float *out, *lse;         // [B, H, S, D], [B, H, S]
  const float *dout, *dlse;  // [B, H, S, D], [B, H, S] or null
  float *dq, *dk, *dv;      // [B, H, S, D], [B, H, L, D] twice (one for each query head)
  long B, H, G, S, L, D;
};

// One output cell along one axis: its two samples touch at most four feature cells.
struct Bin {
  int cells;
  int cell[4];
  float weight[4];
};

// One axis of one box. A coordinate that is NaN makes every result NaN.
struct Axis {
  const Bin *bins;
  int low, high;  // the feature cells touched: low <= cell < high
  bool nan;
};

struct RoiAlign {
  const float *features;  // [B, H, W, C]
  const Axis *rows, *columns;  // [B, K]
  float *out;             // [B, K, g, g, C]
  const float *dout;      // [B, K, g, g, C]
  float *dfeatures;       // [B, H, W, C]
  long B, K, H, W, C, g;
};

struct Loops {
  long (*attention_forward_scratch)(const Attention &);  // floats
  long (*attention_backward_scratch)(const Attention &);
  // Queries block * QUERIES and the following of one head.
  void (*attention_forward)(const Attention &, long b, long h, long block, float *scratch);
  void (*attention_backward)(const Attention &, long b, long h, float *scratch);
  // Channels slice * CHANNELS and the following; scratch of W * CHANNELS floats.
  void (*roi_align_forward)(const RoiAlign &, long b, long k, long slice, float *scratch);
  void (*roi_align_backward)(const RoiAlign &, long b, long slice, float *scratch);
};
