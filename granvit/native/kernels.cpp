// ROIAlign and attention, forward and backward, float32, as a plain C interface.
//
// Every thread writes memory of its own and every sum has one order, so results do not depend on the number of threads.
#include <cmath>
#include "inner.h"
#include "machine.h"

using namespace granvit;

extern const Loops loops_base;
#if defined(__x86_64__)
extern const Loops loops_avx2, loops_avx512;
#endif

namespace {

constexpr int SAMPLES = 2;  // per bin and axis

const Loops &loops() {
#if defined(__x86_64__)
  const Loops *const sets[] = {&loops_base, &loops_avx2, &loops_avx512};
  return *sets[instruction_set()];
#else
  return loops_base;
#endif
}

// The bins of one axis of one box, computed as the composed implementation does: sample c lies at c * cells - 0.5, clamped to
// the centres of the border cells.
Axis axis(float low, float high, long grid, long cells, Bin *bins) {
  Axis made = {bins, (int)cells, 0, false};
  for (long i = 0; i < grid; ++i) {
    Bin bin = {0, {0, 0, 0, 0}, {0, 0, 0, 0}};
    for (int s = 0; s < SAMPLES; ++s) {
      const float tick = ((float)(i * SAMPLES + s) + 0.5f) / (float)(grid * SAMPLES);
      float point = (low + (high - low) * tick) * (float)cells - 0.5f;
      if (point != point) {
        made.nan = true;
        return made;
      }
      point = std::fmin(std::fmax(point, 0.0f), (float)(cells - 1));
      const int cell = (int)point;
      const float above = point - (float)cell;
      const float weights[2] = {(1.0f - above) / SAMPLES, above / SAMPLES};
      for (int n = 0; n < 2; ++n) {
        if (weights[n] == 0.0f) continue;
        int slot = 0;
        while (slot < bin.cells && bin.cell[slot] != cell + n) ++slot;
        if (slot == bin.cells) ++bin.cells;
        bin.cell[slot] = cell + n;
        bin.weight[slot] += weights[n];
        if (cell + n < made.low) made.low = cell + n;
        if (cell + n + 1 > made.high) made.high = cell + n + 1;
      }
    }
    bins[i] = bin;
  }
  return made;
}

// The axes of every box; `call` may be used while this exists.
struct Boxes {
  std::vector<Bin> bins;
  std::vector<Axis> rows, columns;

  Boxes(RoiAlign &call, const float *boxes)
      : bins(call.B * call.K * 2 * call.g), rows(call.B * call.K), columns(call.B * call.K) {
    for (long i = 0; i < call.B * call.K; ++i) {
      const float *box = boxes + 4 * i;
      rows[i] = axis(box[1], box[3], call.g, call.H, bins.data() + 2 * i * call.g);
      columns[i] = axis(box[0], box[2], call.g, call.W, bins.data() + (2 * i + 1) * call.g);
    }
    call.rows = rows.data();
    call.columns = columns.data();
  }
};

double pairs(const Attention &call) { return (double)call.B * call.H * call.S * call.L * call.D; }

}  // namespace

extern "C" {

const char *granvit_instruction_set() {
  const char *const names[] = {"base", "avx2", "avx512"};
  return names[instruction_set()];
}
// For tests: 0 plain, 1 AVX2, 2 AVX-512, as far as the processor has them.
void granvit_limit_instruction_set(int level) { chosen = usable(level); }
// For tests: at most so many threads; 0: as many as there are processors.
void granvit_limit_threads(long count) { most_threads = count; }

// Each returns 0, or 1 if memory is short. Arrays are contiguous; sizes are checked by the caller.
int granvit_roi_align_forward(const float *features_BHWC, const float *boxes_BK4, float *out_BKggC, int64_t B, int64_t K,
                              int64_t H, int64_t W, int64_t C, int64_t g) {
  return guarded([&] {
    RoiAlign call = {features_BHWC, nullptr, nullptr, out_BKggC, nullptr, nullptr, B, K, H, W, C, g};
    const Boxes boxes(call, boxes_BK4);
    const long slices = (C + CHANNELS - 1) / CHANNELS;
    // The boxes of one slice follow each other, so that the slice of the features stays in the cache.
    parallel(B * slices * K, 4.0 * B * K * C * g * (g + W), W * CHANNELS, [&](long task, float *scratch) {
      loops().roi_align_forward(call, task / (slices * K), task % K, task / K % slices, scratch);
    });
  });
}

int granvit_roi_align_backward(const float *dout_BKggC, const float *boxes_BK4, float *dfeatures_BHWC, int64_t B, int64_t K,
                               int64_t H, int64_t W, int64_t C, int64_t g) {
  return guarded([&] {
    RoiAlign call = {nullptr, nullptr, nullptr, nullptr, dout_BKggC, dfeatures_BHWC, B, K, H, W, C, g};
    const Boxes boxes(call, boxes_BK4);
    const long slices = (C + CHANNELS - 1) / CHANNELS;
    parallel(B * slices, 4.0 * B * K * C * g * (g + W), W * CHANNELS, [&](long task, float *scratch) {
      loops().roi_align_backward(call, task / slices, task % slices, scratch);
    });
  });
}

int granvit_attention_forward(const float *q_BHSD, const float *k_BGLD, const float *v_BGLD, const int32_t *segments_BS,
                              float *out_BHSD, float *lse_BHS, int64_t B, int64_t H, int64_t G, int64_t S, int64_t L,
                              int64_t D) {
  return guarded([&] {
    const Attention call = {q_BHSD, k_BGLD, v_BGLD, segments_BS, out_BHSD, lse_BHS, nullptr, nullptr,
                            nullptr, nullptr, nullptr, B, H, G, S, L, D};
    const long blocks = (S + QUERIES - 1) / QUERIES;
    parallel(B * H * blocks, 2 * pairs(call), loops().attention_forward_scratch(call), [&](long task, float *scratch) {
      const long head = task / blocks, block = blocks - 1 - task % blocks;  // under a mask the last blocks have the most keys
      loops().attention_forward(call, head / H, head % H, block, scratch);
    });
  });
}

// `dlse_BHS` may be null: no gradient arrives at the log-sum-exp.
int granvit_attention_backward(const float *q_BHSD, const float *k_BGLD, const float *v_BGLD, const int32_t *segments_BS,
                               const float *out_BHSD, const float *lse_BHS, const float *dout_BHSD,
                               const float *dlse_BHS, float *dq_BHSD, float *dk_BGLD, float *dv_BGLD, int64_t B, int64_t H,
                               int64_t G, int64_t S, int64_t L, int64_t D) {
  return guarded([&] {
    const long group = H / G, size = L * D;
    Floats dk, dv;
    if (group > 1) dk = floats(B * H * size), dv = floats(B * H * size);
    const Attention call = {q_BHSD, k_BGLD, v_BGLD, segments_BS, (float *)out_BHSD, (float *)lse_BHS, dout_BHSD, dlse_BHS,
                            dq_BHSD, group > 1 ? dk.get() : dk_BGLD, group > 1 ? dv.get() : dv_BGLD, B, H, G, S, L, D};
    parallel(B * H, 5 * pairs(call), loops().attention_backward_scratch(call), [&](long task, float *scratch) {
      loops().attention_backward(call, task / H, task % H, scratch);
    });
    if (group == 1) return;
    parallel(B * G, (double)B * H * size, 0, [&](long task, float *) {
      for (int which = 0; which < 2; ++which) {
        const float *from = (which ? dv : dk).get() + task * group * size;
        float *to = (which ? dv_BGLD : dk_BGLD) + task * size;
        std::memcpy(to, from, size * sizeof(float));
        for (long member = 1; member < group; ++member)
          for (long i = 0; i < size; ++i) to[i] += from[member * size + i];
      }
    });
  });
}

// The same for MindSpore's ops.Custom ("aot"): inputs, then outputs; their shapes say the sizes.
int GranvitRoiAlign(int count, void **at, int *, int64_t **shapes, const char **dtypes, void *, void *) {
  if (count != 4 || !is(dtypes, 4, "float32")) return 3;  // features, boxes, an array of g for its shape; out
  const int64_t *features = shapes[0], *out = shapes[3];
  return granvit_roi_align_forward((float *)at[0], (float *)at[1], (float *)at[3], features[0], out[1], features[1], features[2],
                                   features[3], out[2]);
}

int GranvitRoiAlignGrad(int count, void **at, int *, int64_t **shapes, const char **dtypes, void *, void *) {
  if (count != 4 || !is(dtypes, 4, "float32")) return 3;  // dout, boxes, features for their shape; dfeatures
  const int64_t *dout = shapes[0], *features = shapes[3];
  return granvit_roi_align_backward((float *)at[0], (float *)at[1], (float *)at[3], features[0], dout[1], features[1],
                                    features[2], features[3], dout[2]);
}

int GranvitAttention(int count, void **at, int *, int64_t **shapes, const char **dtypes, void *, void *) {
  const int m = count == 6;  // q, k, v, segments or not; out, lse
  if ((count != 5 && !m) || !is(dtypes, 3, "float32") || (m && !is(dtypes + 3, 1, "int32"))) return 3;
  const int64_t *q = shapes[0], *k = shapes[1];
  return granvit_attention_forward((float *)at[0], (float *)at[1], (float *)at[2], m ? (int32_t *)at[3] : nullptr,
                                   (float *)at[3 + m], (float *)at[4 + m], q[0], q[1], k[1], q[2], k[2], q[3]);
}

// MindSpore keeps one gradient for each name of an operator, and that with segments has another than that without.
int GranvitMaskedAttention(int count, void **at, int *axes, int64_t **shapes, const char **dtypes, void *stream, void *extra) {
  return GranvitAttention(count, at, axes, shapes, dtypes, stream, extra);
}

int GranvitAttentionGrad(int count, void **at, int *, int64_t **shapes, const char **dtypes, void *, void *) {
  const int m = count == 10;  // q, k, v, segments or not, out, lse, dout; dq, dk, dv
  if ((count != 9 && !m) || !is(dtypes, 3, "float32") || (m && !is(dtypes + 3, 1, "int32"))) return 3;
  const int64_t *q = shapes[0], *k = shapes[1];
  return granvit_attention_backward((float *)at[0], (float *)at[1], (float *)at[2], m ? (int32_t *)at[3] : nullptr,
                                    (float *)at[3 + m], (float *)at[4 + m], (float *)at[5 + m], nullptr, (float *)at[6 + m],
                                    (float *)at[7 + m], (float *)at[8 + m], q[0], q[1], k[1], q[2], k[2], q[3]);
}

}  // extern "C"
