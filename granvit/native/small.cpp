// The loops of the small operators, compiled once for each instruction set (SMALL_LOOPS names the table that a compilation fills).
//
// The same bits on every processor: compiled without contraction to fused multiply-adds, sums over 16 lanes in a fixed order, and
// otherwise only operations that IEEE 754 defines to the last bit. The compiler turns the plain loops into vectors.
#include "small.h"

namespace {

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
constexpr long WIDTH = 16;
#elif defined(__AVX2__)
constexpr long WIDTH = 8;
#else
constexpr long WIDTH = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef Vector Unaligned __attribute__((aligned(4), may_alias));

// 16 numbers that are added up side by side, in as many vectors as the processor needs for them.
constexpr long LANES = 16, VECTORS = LANES / WIDTH;

struct Lanes {
  Vector part[VECTORS];

  INLINE Lanes operator*(const Lanes &other) const {
    Lanes made;
    UNROLL for (int i = 0; i < VECTORS; ++i) made.part[i] = part[i] * other.part[i];
    return made;
  }
  INLINE Lanes operator-(float number) const {
    Lanes made;
    UNROLL for (int i = 0; i < VECTORS; ++i) made.part[i] = part[i] - number;
    return made;
  }
  INLINE void operator+=(const Lanes &other) {
    UNROLL for (int i = 0; i < VECTORS; ++i) part[i] += other.part[i];
  }
};

// `count` numbers, then `rest` in the other lanes.
INLINE Lanes get(const float *from, long count, float rest = 0.0f) {
  float last[LANES];
  if (count < LANES) {
    for (long i = 0; i < LANES; ++i) last[i] = i < count ? from[i] : rest;
    from = last;
  }
  Lanes x;
  UNROLL for (int i = 0; i < VECTORS; ++i) x.part[i] = *(const Unaligned *)(from + i * WIDTH);
  return x;
}

INLINE float total(const Lanes &x) {
  float sum[LANES];
  UNROLL for (int i = 0; i < VECTORS; ++i) *(Unaligned *)(sum + i * WIDTH) = x.part[i];
  UNROLL for (int n = LANES / 2; n > 0; n /= 2) {
    UNROLL for (int i = 0; i < n; ++i) sum[i] += sum[i + n];
  }
  return sum[0];
}

// The sum over n < `count` of term(n, number of lanes that count). Lanes beyond must give 0.
template <class Term> INLINE float sum_over(long count, const Term &term) {
  Lanes sum = {};
  long n = 0;
  for (; n + LANES <= count; n += LANES) sum += term(n, LANES);
  if (n < count) sum += term(n, count - n);
  return total(sum);
}

INLINE float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// e^x for x <= 0; 0 below -86.6; NaN stays NaN. x = n ln 2 + f with n whole and |f| <= ln(2) / 2; n times the upper part of ln 2 is
// exact. The polynomial is that of exp2_of in inner.cpp.
INLINE float exp_of(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the last bits now hold n
  const float n = shifted - 12582912.0f;
  const float f = ((x - n * 0.693359375f) + n * 2.12194440e-4f) * 1.44269504f;
  float y = f * 1.534581824671477e-4f + 1.3399934396147728e-3f;
  y = y * f + 9.618489071726799e-3f;
  y = y * f + 0.05550328642129898f;
  y = y * f + 0.24022646248340607f;
  y = y * f + 0.6931471824645996f;
  y = y * f + 1.0f;
  y *= from_bits((bits_of(shifted) << 23) + 0x3f800000u);
  return x < -86.6f ? 0.0f : y;
}

// sigmoid(x) and 1 - sigmoid(x), each to the last bits also where it is small.
struct Sigmoid {
  float of, less;
};

INLINE Sigmoid sigmoid(float x) {
  const float e = exp_of(-__builtin_fabsf(x)), large = 1.0f / (1.0f + e), small = e * large;
  return {x < 0 ? small : large, x < 0 ? large : small};
}

void norm_forward(const Norm &call, long first, long last) {
  const long C = call.C;
  const float *__restrict weight = call.weight, *__restrict bias = call.bias;
  for (long row = first; row < last; ++row) {
    const float *__restrict x = call.x + row * C;
    float *__restrict out = call.out + row * C;
    float mean = 0.0f;
    if (bias) {
      mean = sum_over(C, [&](long n, long count) { return get(x + n, count); }) / (float)C;
      call.mean[row] = mean;
    }
    const float squares = sum_over(C, [&](long n, long count) {
      const Lanes centred = get(x + n, count, mean) - mean;
      return centred * centred;
    });
    const float scale = 1.0f / __builtin_sqrtf(squares / (float)C + call.eps);
    call.scale[row] = scale;
    if (bias) for (long n = 0; n < C; ++n) out[n] = (x[n] - mean) * scale * weight[n] + bias[n];
    else for (long n = 0; n < C; ++n) out[n] = x[n] * scale * weight[n];
  }
}

// With g = dout * weight and y = (x - mean) * scale: dx = scale * (g - mean(g) - y * mean(g * y)), without mean(g) for an RMS
// norm; dweight = sum of dout * y, dbias = sum of dout over the rows.
void norm_backward(const Norm &call, long first, long last, float *__restrict dweight, float *__restrict dbias) {
  const long C = call.C;
  const float *__restrict weight = call.weight;
  for (long n = 0; n < C; ++n) dweight[n] = 0.0f;
  if (dbias) for (long n = 0; n < C; ++n) dbias[n] = 0.0f;
  for (long row = first; row < last; ++row) {
    const float *__restrict x = call.x + row * C, *__restrict dout = call.dout + row * C;
    float *__restrict dx = call.dx + row * C;
    const float mean = dbias ? call.mean[row] : 0.0f, scale = call.scale[row];
    const float along = sum_over(C, [&](long n, long count) {
      return get(dout + n, count) * get(weight + n, count) * (get(x + n, count) - mean);
    }) * scale / (float)C;
    const float level = dbias ? sum_over(C, [&](long n, long count) {
      return get(dout + n, count) * get(weight + n, count);
    }) / (float)C : 0.0f;
    for (long n = 0; n < C; ++n) {
      const float y = (x[n] - mean) * scale;
      dx[n] = scale * (dout[n] * weight[n] - level - y * along);
      dweight[n] += dout[n] * y;
    }
    if (dbias) for (long n = 0; n < C; ++n) dbias[n] += dout[n];
  }
}

void turn(const Turn &call, bool back, long first, long last) {
  const long half = call.D / 2;
  for (long row = first; row < last; ++row) {
    const long angle = (row / (call.H * call.S) * call.S + row % call.S) * call.D;
    const float *__restrict x = call.x + row * call.D, *__restrict cosine = call.cosine + angle, *__restrict sine = call.sine + angle;
    float *__restrict out = call.out + row * call.D;
    if (back)
      for (long i = 0; i < half; ++i) {
        out[i] = x[i] * cosine[i] + x[half + i] * sine[half + i];
        out[half + i] = x[half + i] * cosine[half + i] - x[i] * sine[i];
      }
    else
      for (long i = 0; i < half; ++i) {
        out[i] = x[i] * cosine[i] - x[half + i] * sine[i];
        out[half + i] = x[half + i] * cosine[half + i] + x[i] * sine[half + i];
      }
  }
}

void swiglu_forward(const float *__restrict gate, const float *__restrict up, float *__restrict out, long count) {
  for (long n = 0; n < count; ++n) out[n] = gate[n] * sigmoid(gate[n]).of * up[n];
}

void swiglu_backward(const float *__restrict dout, const float *__restrict gate, const float *__restrict up,
                     float *__restrict dgate, float *__restrict dup, long count) {
  for (long n = 0; n < count; ++n) {
    const Sigmoid s = sigmoid(gate[n]);
    dgate[n] = dout[n] * up[n] * (s.of * (1.0f + gate[n] * s.less));
    dup[n] = dout[n] * (gate[n] * s.of);
  }
}

// GELU in its tanh form: (1 + tanh u) / 2 = sigmoid(2 u) with 2 u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float TWICE = 1.5957691f, CUBIC = 0.044715f;

void gelu_forward(const float *__restrict x, float *__restrict out, long count) {
  for (long n = 0; n < count; ++n) out[n] = x[n] * sigmoid(TWICE * x[n] * (1.0f + CUBIC * (x[n] * x[n]))).of;
}

void gelu_backward(const float *__restrict dout, const float *__restrict x, float *__restrict dx, long count) {
  for (long n = 0; n < count; ++n) {
    const float square = x[n] * x[n];
    const Sigmoid s = sigmoid(TWICE * x[n] * (1.0f + CUBIC * square));
    const float slope = TWICE * (1.0f + 3.0f * CUBIC * square);
    const float bend = x[n] * s.of * (s.less * slope);
    dx[n] = dout[n] * (s.of * s.less == 0.0f ? s.of : s.of + bend);  // there the slope may be infinite
  }
}

void adamw(const AdamW &call, long first, long last) {
  float *__restrict parameter = call.parameter, *__restrict gradient = call.gradient, *__restrict first_moment = call.first,
        *__restrict second_moment = call.second;
  const float scale = call.factors[0], decay = call.factors[1], rate = call.factors[2], correction2 = call.factors[3],
              beta1 = call.factors[4], rest1 = call.factors[5], beta2 = call.factors[6], rest2 = call.factors[7],
              eps = call.factors[8];
  for (long n = first; n < last; ++n) {
    const float g = gradient[n] * scale;
    const float m = beta1 * first_moment[n] + rest1 * g;
    const float v = beta2 * second_moment[n] + rest2 * (g * g);
    first_moment[n] = m;
    second_moment[n] = v;
    parameter[n] = parameter[n] * decay - rate * m / (__builtin_sqrtf(v / correction2) + eps);
    gradient[n] = 0.0f;
  }
}

}  // namespace

extern const SmallLoops SMALL_LOOPS;
const SmallLoops SMALL_LOOPS = {norm_forward,  norm_backward, turn, swiglu_forward, swiglu_backward, gelu_forward, gelu_backward,
                                adamw};
