// Runs the kernels over edge cases in memory of exactly the needed size, for the sanitizers; and checks exp2_of, which is not
// exported, against the C library. Prints what is wrong and returns 1.
#define LOOPS loops_of_the_driver
#include "inner.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

extern "C" {
void granvit_limit_instruction_set(int);
const char *granvit_instruction_set();
int granvit_roi_align_forward(const float *, const float *, float *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
int granvit_roi_align_backward(const float *, const float *, float *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
int granvit_attention_forward(const float *, const float *, const float *, const int32_t *, float *, float *, int64_t, int64_t,
                              int64_t, int64_t, int64_t, int64_t);
int granvit_attention_backward(const float *, const float *, const float *, const int32_t *, const float *, const float *,
                               const float *, const float *, float *, float *, float *, int64_t, int64_t, int64_t, int64_t,
                               int64_t, int64_t);
int granvit_norm_forward(const float *, const float *, const float *, const float *, float *, float *, float *, int64_t, int64_t);
int granvit_norm_backward(const float *, const float *, const float *, const float *, const float *, float *, float *, float *,
                          int64_t, int64_t);
int granvit_rope(const float *, const float *, const float *, float *, int64_t, int64_t, int64_t, int64_t, int64_t);
int granvit_swiglu_forward(const float *, const float *, float *, int64_t);
int granvit_swiglu_backward(const float *, const float *, const float *, float *, float *, int64_t);
int granvit_gelu_forward(const float *, float *, int64_t);
int granvit_gelu_backward(const float *, const float *, float *, int64_t);
int granvit_adamw(float *, float *, float *, float *, const float *, int64_t);
}

static int faults = 0;

static void expect(bool true_one, const char *what, const char *where) {
  if (true_one) return;
  std::printf("%s: %s\n", where, what);
  faults = 1;
}

// An array of its own allocation, so that a read or write beside it is seen. Numbers between -1 and 1.
struct Array {
  long count;
  std::unique_ptr<float[]> at;
  explicit Array(long n) : count(n), at(new float[n]) {
    static uint32_t state = 1;
    for (long i = 0; i < n; ++i) at[i] = (float)(int32_t)(state = state * 1664525u + 1013904223u) / 2147483648.0f;
  }
  operator float *() const { return at.get(); }
  bool finite() const {
    for (long i = 0; i < count; ++i)
      if (!std::isfinite(at[i])) return false;
    return true;
  }
  bool all_nan() const {
    for (long i = 0; i < count; ++i)
      if (!std::isnan(at[i])) return false;
    return true;
  }
};

static void attention(long B, long H, long G, long S, long L, long D, int segments) {
  const Array q(B * H * S * D), k(B * G * L * D), v(B * G * L * D), out(B * H * S * D), lse(B * H * S), dout(B * H * S * D),
      dq(B * H * S * D), dk(B * G * L * D), dv(B * G * L * D);
  std::unique_ptr<int32_t[]> rows(segments ? new int32_t[B * S] : nullptr);
  for (long i = 0; segments && i < B * S; ++i) rows[i] = segments == 1 ? (int32_t)(i % S) + 1 : (int32_t)(i * 7 % 5) - 1;
  char where[99];
  std::snprintf(where, sizeof where, "%s attention %ld %ld %ld %ld %ld %ld mask %d", granvit_instruction_set(), B, H, G, S, L, D,
                segments);
  expect(granvit_attention_forward(q, k, v, rows.get(), out, lse, B, H, G, S, L, D) == 0, "status", where);
  expect(granvit_attention_backward(q, k, v, rows.get(), out, lse, dout, nullptr, dq, dk, dv, B, H, G, S, L, D) == 0, "status",
         where);
  expect(out.finite() && lse.finite() && dq.finite() && dk.finite() && dv.finite(), "not finite", where);
}

// One query, and then one key, of numbers that are none or beyond float32; segments at the ends of int32; a gradient of the lse.
static void unusual_attention(float number, bool masked) {
  const long H = 2, S = 33, D = 5;
  const Array q(H * S * D), k(S * D), v(S * D), out(H * S * D), lse(H * S), dout(H * S * D), dlse(H * S), dq(H * S * D), dk(S * D),
      dv(S * D);
  std::unique_ptr<int32_t[]> segments(masked ? new int32_t[S] : nullptr);
  for (long i = 0; masked && i < S; ++i) segments[i] = i % 3 ? INT32_MAX : INT32_MIN;
  for (const Array *changed : {&q, &k}) {
    for (long d = 0; d < D; ++d) changed->at[7 * D + d] = number;
    expect(granvit_attention_forward(q, k, v, segments.get(), out, lse, 1, H, 1, S, S, D) == 0, "status", "unusual attention");
    expect(granvit_attention_backward(q, k, v, segments.get(), out, lse, dout, dlse, dq, dk, dv, 1, H, 1, S, S, D) == 0, "status",
           "unusual attention");
    bool others = true;  // of the first head, the queries before the changed one
    for (long i = 0; i < 7 * D; ++i) others = others && std::isfinite(out[i]);
    expect(others || !(masked || changed == &q), "a later query or key matters", "unusual attention");
    expect(!std::isnan(number) || std::isnan(out[7 * D]), "NaN is lost", "unusual attention");
  }
}

static void roi_align(long B, long K, long H, long W, long C, long g) {
  const Array features(B * H * W * C), boxes(B * K * 4), out(B * K * g * g * C), dout(B * K * g * g * C), dfeatures(B * H * W * C);
  const float special[] = {0, 1, -3, 2, 1e30f, -1e38f, INFINITY};
  for (int first = -1; first < 7; ++first) {
    char where[99];
    std::snprintf(where, sizeof where, "%s roi_align %ld %ld %ld %ld %ld %ld from %d", granvit_instruction_set(), B, K, H, W, C, g,
                  first);
    for (long i = 0; first >= 0 && i < B * K * 4; ++i) boxes[i] = special[(i * 3 + first) % 6];  // INFINITY stays out
    if (first == 6 && B * K) boxes[2] = special[6];
    expect(granvit_roi_align_forward(features, boxes, out, B, K, H, W, C, g) == 0, "status", where);
    expect(granvit_roi_align_backward(dout, boxes, dfeatures, B, K, H, W, C, g) == 0, "status", where);
    expect(out.finite() && dfeatures.finite(), "not finite", where);
  }
  for (long i = 0; i < B * K; ++i) boxes[4 * i + i % 4] = NAN;
  granvit_roi_align_forward(features, boxes, out, B, K, H, W, C, g);
  granvit_roi_align_backward(dout, boxes, dfeatures, B, K, H, W, C, g);
  expect(out.all_nan() && (K == 0 || dfeatures.all_nan()), "NaN is lost", "roi_align");
}

static void exponential() {
  double worst = 0;
  for (float x = -124.5f; x <= 0; x += 0.0007f) {
    const double found = exp2_of(Vector{} + x)[0], expected = std::exp2((double)x);
    worst = std::fmax(worst, std::fabs(found - expected) / expected * 8388608);  // in units of the last place, 2^-23
  }
  std::printf("exp2: %.2f units of the last place\n", worst);
  expect(worst <= 2, "not accurate", "exp2");
  const float edges[] = {-125.5f, -1e30f, -INFINITY}, none = NAN;
  for (float x : edges) expect(exp2_of(Vector{} + x)[0] == 0, "not zero", "exp2");
  expect(std::isnan(exp2_of(Vector{} + none)[0]) && std::isnan(exp2_of(Vector{} - none)[0]), "NaN is lost", "exp2");
}

// Norms of N rows of C numbers, and elementwise operators over as many numbers.
static void small(long N, long C) {
  const Array x(N * C), weight(C), bias(C), eps(1), out(N * C), mean(N), scale(N), dout(N * C), dx(N * C), dweight(C), dbias(C);
  char where[99];
  std::snprintf(where, sizeof where, "%s small %ld %ld", granvit_instruction_set(), N, C);
  *eps = 1e-5f;
  for (int layer = 0; layer < 2; ++layer) {
    expect(granvit_norm_forward(x, weight, layer ? (float *)bias : nullptr, eps, out, mean, scale, N, C) == 0, "status", where);
    expect(granvit_norm_backward(dout, x, weight, mean, scale, dx, dweight, layer ? (float *)dbias : nullptr, N, C) == 0, "status",
           where);
    expect(out.finite() && dx.finite() && dweight.finite(), "not finite", where);
  }
  const float special[] = {3e38f, -3e38f, INFINITY, -INFINITY, NAN, 0.0f};
  for (int filled = 0; filled < 2; ++filled) {
    for (long i = 0; filled && i < N * C; ++i) x[i] = special[i % 6];
    granvit_swiglu_forward(x, dout, out, N * C);
    granvit_swiglu_backward(dout, x, dout, out, dx, N * C);
    granvit_gelu_forward(x, out, N * C);
    granvit_gelu_backward(dout, x, dx, N * C);
    expect(filled || (out.finite() && dx.finite()), "not finite", where);
  }
  const Array first(N * C), second(N * C), factors(9);
  expect(granvit_adamw(x, dout, first, second, factors, N * C) == 0, "status", where);
}

static void rope(long B, long H, long S, long D) {
  const Array x(B * H * S * D), cosine(B * S * D), sine(B * S * D), out(B * H * S * D);
  for (int back = 0; back < 2; ++back) {
    granvit_rope(x, cosine, sine, out, back, B, H, S, D);
    expect(out.finite(), "not finite", "rope");
  }
}

int main() {
  exponential();
  for (int set = 0; set < 3; ++set) {
    granvit_limit_instruction_set(set);
    for (int segments = 0; segments < 3; ++segments) {
      attention(1, 1, 1, 1, 1, 1, segments);
      attention(2, 4, 2, 33, 33, 5, segments);
      attention(1, 2, 1, 97, 97, 72, segments);
      attention(1, 1, 1, 200, 200, 24, segments);
      attention(0, 2, 1, 8, 8, 4, segments);
    }
    for (float number : {NAN, INFINITY, -INFINITY, 3e38f})
      for (bool masked : {false, true}) unusual_attention(number, masked);
    attention(1, 2, 1, 0, 5, 4, 0);
    attention(1, 2, 2, 3, 193, 36, 0);
    attention(1, 2, 2, 65, 2, 130, 0);
    attention(1, 8, 4, 160, 160, 40, 2);  // enough work for several threads
    small(1, 1);
    small(3, 5);
    small(130, 33);
    small(0, 4);
    small(9000, 70);  // enough work for several threads
    rope(1, 1, 1, 2);
    rope(2, 3, 7, 10);
    rope(0, 1, 1, 4);
    roi_align(1, 1, 1, 1, 1, 1);
    roi_align(2, 3, 5, 7, 130, 3);
    roi_align(1, 2, 3, 4, 17, 9);
    roi_align(1, 6, 12, 9, 257, 8);
    roi_align(2, 0, 4, 4, 8, 2);
    roi_align(0, 2, 4, 4, 8, 2);
  }
  return faults;
}
