// Norms, rotary embedding, SwiGLU, GELU and AdamW, float32, as a plain C interface.
//
// Work is cut into pieces of fixed size, each sum has one order, and the loops give the same bits with every instruction set: neither
// the number of threads nor the processor changes a result.
#include "machine.h"
#include "small.h"

using namespace granvit;

extern const SmallLoops small_base;
#if defined(__x86_64__)
extern const SmallLoops small_avx2, small_avx512;
#endif

namespace {

constexpr long ROWS = 64;        // of a norm, for one share of the gradient of its weight
constexpr long NUMBERS = 16384;  // of an elementwise operator

const SmallLoops &loops() {
#if defined(__x86_64__)
  const SmallLoops *const sets[] = {&small_base, &small_avx2, &small_avx512};
  return *sets[instruction_set()];
#else
  return small_base;
#endif
}

// Calls work(first, last) for pieces of `count` things that cost `cost` multiplications each.
template <class Work> void in_pieces(long count, long piece, double cost, const Work &work) {
  parallel((count + piece - 1) / piece, count * cost, 0, [&](long task, float *) {
    work(task * piece, count < (task + 1) * piece ? count : (task + 1) * piece);
  });
}

long product(const int64_t *shape, int axes) {
  long count = 1;
  for (int i = 0; i < axes; ++i) count *= shape[i];
  return count;
}

int norm_backward(const Norm &call, float *dweight, float *dbias, long rows) {
  return guarded([&] {
    const long C = call.C, pieces = (rows + ROWS - 1) / ROWS;
    const Floats shares = floats(2 * pieces * C);  // of the weight, then of the bias
    in_pieces(rows, ROWS, 8.0 * C, [&](long first, long last) {
      float *share = shares.get() + first / ROWS * C;
      loops().norm_backward(call, first, last, share, dbias ? share + pieces * C : nullptr);
    });
    for (int which = 0; which < (dbias ? 2 : 1); ++which) {
      const float *from = shares.get() + which * pieces * C;
      float *to = which ? dbias : dweight;
      for (long n = 0; n < C; ++n) to[n] = 0.0f;
      for (long piece = 0; piece < pieces; ++piece)
        for (long n = 0; n < C; ++n) to[n] += from[piece * C + n];
    }
  });
}

}  // namespace

extern "C" {

// Each returns 0, or 1 if memory is short. Arrays are contiguous; sizes are checked by the caller.
int granvit_norm_forward(const float *x_NC, const float *weight_C, const float *bias_C, const float *eps, float *out_NC,
                         float *mean_N, float *scale_N, int64_t N, int64_t C) {
  return guarded([&] {
    const Norm call = {x_NC, weight_C, bias_C, out_NC, mean_N, scale_N, nullptr, nullptr, C, *eps};
    in_pieces(N, ROWS, 4.0 * C, [&](long first, long last) { loops().norm_forward(call, first, last); });
  });
}

// `mean_N` and `dbias_C` are null for an RMS norm.
int granvit_norm_backward(const float *dout_NC, const float *x_NC, const float *weight_C, const float *mean_N,
                          const float *scale_N, float *dx_NC, float *dweight_C, float *dbias_C, int64_t N, int64_t C) {
  const Norm call = {x_NC, weight_C, nullptr, nullptr, (float *)mean_N, (float *)scale_N, dout_NC, dx_NC, C, 0.0f};
  return norm_backward(call, dweight_C, dbias_C, N);
}

// `back`: the gradient, which turns by the opposite angle.
int granvit_rope(const float *x_BHSD, const float *cosine_BSD, const float *sine_BSD, float *out_BHSD, int64_t back, int64_t B,
                 int64_t H, int64_t S, int64_t D) {
  return guarded([&] {
    const Turn call = {x_BHSD, cosine_BSD, sine_BSD, out_BHSD, H, S, D};
    in_pieces(B * H * S, 1 + NUMBERS / (1 + D), 2.0 * D, [&](long first, long last) { loops().turn(call, back, first, last); });
  });
}

int granvit_swiglu_forward(const float *gate, const float *up, float *out, int64_t count) {
  return guarded([&] {
    in_pieces(count, NUMBERS, 12, [&](long i, long last) { loops().swiglu_forward(gate + i, up + i, out + i, last - i); });
  });
}

int granvit_swiglu_backward(const float *dout, const float *gate, const float *up, float *dgate, float *dup, int64_t count) {
  return guarded([&] {
    in_pieces(count, NUMBERS, 16, [&](long i, long last) {
      loops().swiglu_backward(dout + i, gate + i, up + i, dgate + i, dup + i, last - i);
    });
  });
}

int granvit_gelu_forward(const float *x, float *out, int64_t count) {
  return guarded([&] {
    in_pieces(count, NUMBERS, 12, [&](long i, long last) { loops().gelu_forward(x + i, out + i, last - i); });
  });
}

int granvit_gelu_backward(const float *dout, const float *x, float *dx, int64_t count) {
  return guarded([&] {
    in_pieces(count, NUMBERS, 16, [&](long i, long last) { loops().gelu_backward(dout + i, x + i, dx + i, last - i); });
  });
}

// In place; the gradient becomes zero. `factors`: see AdamW in small.h.
int granvit_adamw(float *parameter, float *gradient, float *first_moment, float *second_moment, const float *factors,
                  int64_t count) {
  return guarded([&] {
    const AdamW call = {parameter, gradient, first_moment, second_moment, factors};
    in_pieces(count, NUMBERS, 8, [&](long first, long last) { loops().adamw(call, first, last); });
  });
}

// The same for MindSpore's ops.Custom ("aot"): inputs, then outputs; their shapes say the sizes.
#define FROM_MINDSPORE(name) int name(int count, void **at, int *axes, int64_t **shapes, const char **dtypes, void *, void *)
#define F(i) ((float *)at[i])

FROM_MINDSPORE(GranvitRmsNorm) {
  if (count != 5 || !is(dtypes, 5, "float32")) return 3;  // x, weight, eps; out, scale
  return granvit_norm_forward(F(0), F(1), nullptr, F(2), F(3), nullptr, F(4), product(shapes[4], axes[4]), shapes[1][0]);
}

FROM_MINDSPORE(GranvitRmsNormGrad) {
  if (count != 6 || !is(dtypes, 6, "float32")) return 3;  // dout, x, weight, scale; dx, dweight
  return granvit_norm_backward(F(0), F(1), F(2), nullptr, F(3), F(4), F(5), nullptr, product(shapes[3], axes[3]), shapes[2][0]);
}

FROM_MINDSPORE(GranvitLayerNorm) {
  if (count != 7 || !is(dtypes, 7, "float32")) return 3;  // x, weight, bias, eps; out, mean, scale
  return granvit_norm_forward(F(0), F(1), F(2), F(3), F(4), F(5), F(6), product(shapes[6], axes[6]), shapes[1][0]);
}

FROM_MINDSPORE(GranvitLayerNormGrad) {
  if (count != 8 || !is(dtypes, 8, "float32")) return 3;  // dout, x, weight, mean, scale; dx, dweight, dbias
  return granvit_norm_backward(F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7), product(shapes[4], axes[4]), shapes[2][0]);
}

static int rope(int count, void **at, int64_t **shapes, const char **dtypes, int64_t back) {
  if (count != 4 || !is(dtypes, 4, "float32")) return 3;  // x, cosine, sine; out
  return granvit_rope(F(0), F(1), F(2), F(3), back, shapes[0][0], shapes[0][1], shapes[0][2], shapes[0][3]);
}

FROM_MINDSPORE(GranvitRope) { return rope(count, at, shapes, dtypes, 0); }
FROM_MINDSPORE(GranvitRopeGrad) { return rope(count, at, shapes, dtypes, 1); }

FROM_MINDSPORE(GranvitSwiglu) {
  if (count != 3 || !is(dtypes, 3, "float32")) return 3;  // gate, up; out
  return granvit_swiglu_forward(F(0), F(1), F(2), product(shapes[0], axes[0]));
}

FROM_MINDSPORE(GranvitSwigluGrad) {
  if (count != 5 || !is(dtypes, 5, "float32")) return 3;  // dout, gate, up; dgate, dup
  return granvit_swiglu_backward(F(0), F(1), F(2), F(3), F(4), product(shapes[0], axes[0]));
}

FROM_MINDSPORE(GranvitGelu) {
  if (count != 2 || !is(dtypes, 2, "float32")) return 3;  // x; out
  return granvit_gelu_forward(F(0), F(1), product(shapes[0], axes[0]));
}

FROM_MINDSPORE(GranvitGeluGrad) {
  if (count != 3 || !is(dtypes, 3, "float32")) return 3;  // dout, x; dx
  return granvit_gelu_backward(F(0), F(1), F(2), product(shapes[0], axes[0]));
}

// The first four inputs are changed in place. The output, one number, is there because an operator must have one.
FROM_MINDSPORE(GranvitAdamW) {
  if (count != 6 || !is(dtypes, 6, "float32")) return 3;  // parameter, gradient, moments, factors; done
  *F(5) = 0.0f;
  return granvit_adamw(F(0), F(1), F(2), F(3), F(4), product(shapes[0], axes[0]));
}

}  // extern "C"
