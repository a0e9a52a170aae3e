// The inner loops, compiled once for each instruction set (LOOPS names the table that a compilation fills).
//
// Attention: queries lie in the lanes of the vectors and keys run along the rows, so maxima and sums over keys need no
// reduction within a vector, keys and values are read where they lie (one number at a time, broadcast), and any head width
// fills the vectors. Scores are kept in units of log 2: the scale and log2(e) are multiplied into the queries.
#include "inner.h"

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 12;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, ROWS = 6;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, ROWS = 8;
#else
constexpr int WIDTH = 4, ROWS = 6;
#endif
constexpr int HALF = WIDTH > 4 ? WIDTH / 2 : WIDTH;
static_assert(KEYS % ROWS == 0 && QUERIES % (2 * WIDTH) == 0, "blocks hold whole tiles");

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef float HalfVector __attribute__((vector_size(4 * HALF)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));

template <class V> struct Unaligned { typedef V type __attribute__((aligned(4), may_alias)); };
template <class V> INLINE V load(const float *from) { return *(const typename Unaligned<V>::type *)from; }
template <class V> INLINE void store(float *to, V x) { *(typename Unaligned<V>::type *)to = x; }
INLINE Integers load_integers(const int32_t *from) { return *(const Unaligned<Integers>::type *)from; }

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr float LOWEST = -1e30f;  // below any score, and finite, so that a masked score of -inf less this is -inf

// 2^x for x <= 0 or about; 0 below 2^-125; NaN stays NaN. x = n + f with n whole and |f| <= 1/2; the polynomial is the one of
// degree 6 with the least relative error (1.9e-9) for 2^f.
INLINE Vector exp2_of(Vector x) {
  const Vector shifted = x + 12582912.0f;  // 1.5 * 2^23: the last bits now hold n
  const Vector f = x - (shifted - 12582912.0f);
  Vector y = f * 1.534581824671477e-4f + 1.3399934396147728e-3f;
  y = y * f + 9.618489071726799e-3f;
  y = y * f + 0.05550328642129898f;
  y = y * f + 0.24022646248340607f;
  y = y * f + 0.6931471824645996f;
  y = y * f + 1.0f;
  const Vector power = (Vector)(((Bits)shifted << 23) + 0x3f800000u);
  return x < -125.0f ? Vector{} : y * power;
}

INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

enum Start { ZERO, ADD, SCALED };

// c[r, v] = start + sum over t of a[r * lda + t * inc] * b[t * ldb + v] for R rows and NV vectors. The start is 0, c, or
// c[r, v] * factor[v].
template <class V, int R, int NV, Start START>
INLINE void tile(const float *a, long lda, long inc, long n, const float *b, long ldb, float *c, long ldc, const float *factor) {
  constexpr int w = sizeof(V) / 4;
  V sum[R][NV];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < NV; ++v) {
      if (START == ZERO) sum[r][v] = V{};
      else sum[r][v] = load<V>(c + r * ldc + v * w);
      if (START == SCALED) sum[r][v] *= load<V>(factor + v * w);
    }
  }
  for (long t = 0; t < n; ++t) {
    V x[NV];
    UNROLL for (int v = 0; v < NV; ++v) x[v] = load<V>(b + t * ldb + v * w);
    UNROLL for (int r = 0; r < R; ++r) {
      const float s = a[r * lda + t * inc];
      UNROLL for (int v = 0; v < NV; ++v) sum[r][v] += s * x[v];
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < NV; ++v) store<V>(c + r * ldc + v * w, sum[r][v]);
  }
}

// `tile` for m rows.
template <class V, int NV, Start START>
INLINE void tiles(long m, const float *a, long lda, long inc, long n, const float *b, long ldb, float *c, long ldc,
                  const float *factor) {
  for (; m >= ROWS; m -= ROWS, a += ROWS * lda, c += ROWS * ldc)
    tile<V, ROWS, NV, START>(a, lda, inc, n, b, ldb, c, ldc, factor);
  for (; m >= 4; m -= 4, a += 4 * lda, c += 4 * ldc) tile<V, 4, NV, START>(a, lda, inc, n, b, ldb, c, ldc, factor);
  for (; m > 0; --m, a += lda, c += ldc) tile<V, 1, NV, START>(a, lda, inc, n, b, ldb, c, ldc, factor);
}

// For m keys: scores[m][QUERIES] = rows[m][D] . columns[D][QUERIES].
__attribute__((noinline)) void dot(long m, const float *rows, long D, const float *columns, float *scores) {
  for (long v = 0; v < QUERIES; v += 2 * WIDTH)
    tiles<Vector, 2, ZERO>(m, rows, D, 1, D, columns + v, QUERIES, scores + v, QUERIES, nullptr);
}

// sums[D][QUERIES] = sums * factor[QUERIES] + rows[m][D]^T . weights[m][QUERIES].
__attribute__((noinline)) void weigh(long m, const float *rows, long D, const float *weights, float *sums, const float *factor) {
  for (long v = 0; v < QUERIES; v += 2 * WIDTH)
    tiles<Vector, 2, SCALED>(D, rows, 1, D, m, weights + v, QUERIES, sums + v, QUERIES, factor + v);
}

// sums[m][width] += weights[m][QUERIES] . rows[QUERIES][width].
__attribute__((noinline)) void spread(long m, const float *weights, const float *rows, float *sums, long width) {
  long d = 0;
  for (; d + 2 * WIDTH <= width; d += 2 * WIDTH)
    tiles<Vector, 2, ADD>(m, weights, QUERIES, 1, QUERIES, rows + d, width, sums + d, width, nullptr);
  for (; d + WIDTH <= width; d += WIDTH)
    tiles<Vector, 1, ADD>(m, weights, QUERIES, 1, QUERIES, rows + d, width, sums + d, width, nullptr);
  for (; d < width; d += HALF)
    tiles<HalfVector, 1, ADD>(m, weights, QUERIES, 1, QUERIES, rows + d, width, sums + d, width, nullptr);
}

// to[D][QUERIES] = from[count][D]^T * factor, zero beyond `count`.
void turn_in(const float *from, long count, long D, float factor, float *to) {
  for (long d = 0; d < D; ++d) {
    UNROLL for (long i = 0; i < QUERIES; ++i) to[d * QUERIES + i] = i < count ? from[i * D + d] * factor : 0.0f;
  }
}

// to[count][D] = from[D][QUERIES]^T * factor[QUERIES].
void turn_out(const float *from, long count, long D, const float *factor, float *to) {
  for (long i = 0; i < count; ++i)
    for (long d = 0; d < D; ++d) to[i * D + d] = from[d * QUERIES + i] * factor[i];
}

// to[QUERIES][width] = from[count][D] * factor, zero elsewhere.
void pad(const float *from, long count, long D, float factor, float *to, long width) {
  for (long i = 0; i < QUERIES; ++i)
    for (long d = 0; d < width; ++d) to[i * width + d] = i < count && d < D ? from[i * D + d] * factor : 0.0f;
}

// The queries of one block, as the mask sees them: query i sees key j iff j <= i and (segment[j] == 0 or segment[j] ==
// segment[i]).
struct Mask {
  const int32_t *segments;
  long last;         // the last query of the block
  int32_t low, high;  // the range of the queries' segments
  int32_t number[QUERIES], segment[QUERIES];

  Mask(const int32_t *row, long first, long count) : segments(row), last(first + count - 1), low(0), high(0) {
    if (!row) return;
    low = high = row[first];
    for (long i = 0; i < QUERIES; ++i) {
      const long query = i < count ? first + i : last;  // unused lanes repeat the last query
      number[i] = (int32_t)query;
      segment[i] = row[query];
      if (segment[i] < low) low = segment[i];
      if (segment[i] > high) high = segment[i];
    }
  }

  // Whether a query of the block may see key j: false is certain.
  bool may_see(long j) const { return j <= last && (segments[j] == 0 || (segments[j] >= low && segments[j] <= high)); }

  // Leaves out keys at both ends of [start, end) that no query sees. Returns whether every query sees all that are left.
  bool trim(long &start, long &end) const {
    if (!segments) return true;
    while (start < end && !may_see(start)) ++start;
    while (start < end && !may_see(end - 1)) --end;
    bool all = end - 1 <= number[0];
    for (long j = start; j < end; ++j) all &= segments[j] == 0 || (segments[j] == low && low == high);
    return all;
  }

  // Scores that are masked become `hidden`.
  void hide(long start, long end, float *scores, float hidden) const {
    for (long v = 0; v < QUERIES; v += WIDTH) {
      const Integers numbers = load_integers(number + v), own = load_integers(segment + v);
      for (long j = start; j < end; ++j) {
        const int32_t key = segments[j];
        float *score = scores + (j - start) * QUERIES + v;
        const Integers sees = key == 0 ? numbers >= (int32_t)j : (numbers >= (int32_t)j) & (own == key);
        store<Vector>(score, sees ? load<Vector>(score) : Vector{} + hidden);
      }
    }
  }
};

long padded(long D) { return (D + HALF - 1) / HALF * HALF; }

long forward_scratch(const Attention &x) { return (KEYS + 2 * x.D) * QUERIES; }

void forward(const Attention &x, long b, long h, long block, float *scratch) {
  const long first = block * QUERIES, count = x.S - first < QUERIES ? x.S - first : QUERIES, D = x.D;
  const long g = h / (x.H / x.G);
  const float *k = x.k + (b * x.G + g) * x.L * D, *v = x.v + (b * x.G + g) * x.L * D;
  float *scores = scratch, *q_DQ = scores + KEYS * QUERIES, *sums_DQ = q_DQ + D * QUERIES;
  float most[QUERIES], total[QUERIES], factor[QUERIES];
  const Mask mask(x.segments ? x.segments + b * x.S : nullptr, first, count);

  turn_in(x.q + ((b * x.H + h) * x.S + first) * D, count, D, LOG2_E / __builtin_sqrtf((float)D), q_DQ);
  for (long i = 0; i < D * QUERIES; ++i) sums_DQ[i] = 0.0f;
  for (long i = 0; i < QUERIES; ++i) most[i] = LOWEST, total[i] = 0.0f;

  for (long at = 0; at < x.L; at += KEYS) {
    long start = at, end = at + KEYS < x.L ? at + KEYS : x.L;
    const bool all = mask.trim(start, end);
    if (start == end) continue;
    dot(end - start, k + start * D, D, q_DQ, scores);
    if (!all) mask.hide(start, end, scores, -__builtin_inff());
    for (long lane = 0; lane < QUERIES; lane += 2 * WIDTH) {
      float *column = scores + lane, *const stop = column + (end - start) * QUERIES;
      const Vector before[2] = {load<Vector>(most + lane), load<Vector>(most + lane + WIDTH)};
      Vector now[2] = {before[0], before[1]}, sum[2] = {};
      for (float *s = column; s < stop; s += QUERIES) {
        UNROLL for (int i = 0; i < 2; ++i) now[i] = larger(load<Vector>(s + i * WIDTH), now[i]);
      }
      for (float *s = column; s < stop; s += QUERIES) {
        UNROLL for (int i = 0; i < 2; ++i) {
          const Vector p = exp2_of(load<Vector>(s + i * WIDTH) - now[i]);
          store<Vector>(s + i * WIDTH, p);
          sum[i] += p;
        }
      }
      UNROLL for (int i = 0; i < 2; ++i) {
        const Vector shrink = exp2_of(before[i] - now[i]);
        store<Vector>(factor + lane + i * WIDTH, shrink);
        store<Vector>(most + lane + i * WIDTH, now[i]);
        store<Vector>(total + lane + i * WIDTH, load<Vector>(total + lane + i * WIDTH) * shrink + sum[i]);
      }
    }
    weigh(end - start, v + start * D, D, scores, sums_DQ, factor);
  }
  for (long i = 0; i < QUERIES; ++i) factor[i] = 1.0f / total[i];
  turn_out(sums_DQ, count, D, factor, x.out + ((b * x.H + h) * x.S + first) * D);
  float *lse = x.lse + (b * x.H + h) * x.S + first;
  for (long i = 0; i < count; ++i) lse[i] = most[i] * LN_2 + __builtin_logf(total[i]);
}

long backward_scratch(const Attention &x) {
  return (2 * KEYS + 3 * x.D + 2 * padded(x.D)) * QUERIES + 2 * x.L * padded(x.D);
}

// Scores are computed again: p = 2^(s - lse), dv = p^T do, ds = p (do v^T - delta) with delta = sum(do * o) - dlse,
// dq = ds k, dk = ds^T q.
void backward(const Attention &x, long b, long h, float *scratch) {
  const long D = x.D, width = padded(D), g = h / (x.H / x.G), head = b * x.H + h;
  const float scale = 1.0f / __builtin_sqrtf((float)D);
  const float *k = x.k + (b * x.G + g) * x.L * D, *v = x.v + (b * x.G + g) * x.L * D;
  float *p = scratch, *ds = p + KEYS * QUERIES, *q_DQ = ds + KEYS * QUERIES, *dout_DQ = q_DQ + D * QUERIES,
        *dq_DQ = dout_DQ + D * QUERIES, *q_QD = dq_DQ + D * QUERIES, *dout_QD = q_QD + QUERIES * width,
        *dk = dout_QD + QUERIES * width, *dv = dk + x.L * width;
  float lse[QUERIES], delta[QUERIES], ones[QUERIES], scales[QUERIES];
  for (long i = 0; i < QUERIES; ++i) ones[i] = 1.0f, scales[i] = scale;
  for (long i = 0; i < 2 * x.L * width; ++i) dk[i] = 0.0f;

  for (long first = 0; first < x.S; first += QUERIES) {
    const long count = x.S - first < QUERIES ? x.S - first : QUERIES, row = head * x.S + first;
    const float *q = x.q + row * D, *dout = x.dout + row * D, *out = x.out + row * D;
    const Mask mask(x.segments ? x.segments + b * x.S : nullptr, first, count);
    turn_in(q, count, D, scale * LOG2_E, q_DQ);
    turn_in(dout, count, D, 1.0f, dout_DQ);
    pad(q, count, D, scale, q_QD, width);
    pad(dout, count, D, 1.0f, dout_QD, width);
    for (long i = 0; i < D * QUERIES; ++i) dq_DQ[i] = 0.0f;
    for (long i = 0; i < QUERIES; ++i) {
      lse[i] = delta[i] = 0.0f;
      if (i >= count) continue;
      lse[i] = x.lse[row + i] * LOG2_E;
      for (long d = 0; d < D; ++d) delta[i] += dout[i * D + d] * out[i * D + d];
      if (x.dlse) delta[i] -= x.dlse[row + i];
    }
    for (long at = 0; at < x.L; at += KEYS) {
      long start = at, end = at + KEYS < x.L ? at + KEYS : x.L;
      const bool all = mask.trim(start, end);
      if (start == end) continue;
      const long keys = end - start;
      dot(keys, k + start * D, D, q_DQ, p);
      dot(keys, v + start * D, D, dout_DQ, ds);
      if (!all) mask.hide(start, end, p, -__builtin_inff());
      for (long lane = 0; lane < QUERIES; lane += WIDTH) {
        const Vector less = load<Vector>(lse + lane), shift = load<Vector>(delta + lane);
        for (long i = lane; i < keys * QUERIES; i += QUERIES) {
          const Vector weight = exp2_of(load<Vector>(p + i) - less);
          store<Vector>(p + i, weight);
          store<Vector>(ds + i, weight * (load<Vector>(ds + i) - shift));
        }
      }
      spread(keys, p, dout_QD, dv + start * width, width);
      spread(keys, ds, q_QD, dk + start * width, width);
      weigh(keys, k + start * D, D, ds, dq_DQ, ones);
    }
    turn_out(dq_DQ, count, D, scales, x.dq + row * D);
  }
  for (long j = 0; j < x.L; ++j) {
    for (long d = 0; d < D; ++d) x.dk[(head * x.L + j) * D + d] = dk[j * width + d];
    for (long d = 0; d < D; ++d) x.dv[(head * x.L + j) * D + d] = dv[j * width + d];
  }
}

// to[n] = sum over a bin's cells of weight * from[cell * stride + n], for n < `count`.
INLINE void gather(const Bin &bin, const float *from, long stride, float *__restrict to, long count) {
  const float *a = from + bin.cell[0] * stride, *b = from + bin.cell[1] * stride, *c = from + bin.cell[2] * stride,
              *d = from + bin.cell[3] * stride;
  const float wa = bin.weight[0], wb = bin.weight[1], wc = bin.weight[2], wd = bin.weight[3];
  switch (bin.cells) {
    case 1: for (long n = 0; n < count; ++n) to[n] = wa * a[n]; break;
    case 2: for (long n = 0; n < count; ++n) to[n] = wa * a[n] + wb * b[n]; break;
    case 3: for (long n = 0; n < count; ++n) to[n] = wa * a[n] + wb * b[n] + wc * c[n]; break;
    default: for (long n = 0; n < count; ++n) to[n] = wa * a[n] + wb * b[n] + wc * c[n] + wd * d[n];
  }
}

// to[cell * stride + n] += weight * from[n] for a bin's cells and n < `count`.
INLINE void scatter(const Bin &bin, const float *__restrict from, float *to, long stride, long count) {
  for (int i = 0; i < bin.cells; ++i) {
    float *__restrict cell = to + bin.cell[i] * stride;
    const float weight = bin.weight[i];
    for (long n = 0; n < count; ++n) cell[n] += weight * from[n];
  }
}

void roi_align_forward(const RoiAlign &x, long b, long k, long slice, float *scratch) {
  const long first = slice * CHANNELS, count = x.C - first < CHANNELS ? x.C - first : CHANNELS, box = b * x.K + k;
  const Axis &rows = x.rows[box], &columns = x.columns[box];
  const float *features = x.features + b * x.H * x.W * x.C + first;
  float *out = x.out + box * x.g * x.g * x.C + first;
  if (rows.nan || columns.nan) {
    for (long cell = 0; cell < x.g * x.g; ++cell)
      for (long n = 0; n < count; ++n) out[cell * x.C + n] = __builtin_nanf("");
    return;
  }
  for (long i = 0; i < x.g; ++i) {
    for (long j = columns.low; j < columns.high; ++j)
      gather(rows.bins[i], features + j * x.C, x.W * x.C, scratch + j * CHANNELS, count);
    for (long j = 0; j < x.g; ++j) gather(columns.bins[j], scratch, CHANNELS, out + (i * x.g + j) * x.C, count);
  }
}

void roi_align_backward(const RoiAlign &x, long b, long slice, float *scratch) {
  const long first = slice * CHANNELS, count = x.C - first < CHANNELS ? x.C - first : CHANNELS;
  float *dfeatures = x.dfeatures + b * x.H * x.W * x.C + first;
  bool nan = false;
  for (long box = b * x.K; box < (b + 1) * x.K; ++box) nan |= x.rows[box].nan || x.columns[box].nan;
  for (long cell = 0; cell < x.H * x.W; ++cell)
    for (long n = 0; n < count; ++n) dfeatures[cell * x.C + n] = nan ? __builtin_nanf("") : 0.0f;
  if (nan) return;
  for (long box = b * x.K; box < (b + 1) * x.K; ++box) {
    const Axis &rows = x.rows[box], &columns = x.columns[box];
    const float *dout = x.dout + box * x.g * x.g * x.C + first;
    for (long i = 0; i < x.g; ++i) {
      for (long n = columns.low * CHANNELS; n < columns.high * CHANNELS; ++n) scratch[n] = 0.0f;
      for (long j = 0; j < x.g; ++j) scatter(columns.bins[j], dout + (i * x.g + j) * x.C, scratch, CHANNELS, count);
      for (long j = columns.low; j < columns.high; ++j)
        scatter(rows.bins[i], scratch + j * CHANNELS, dfeatures + j * x.C, x.W * x.C, count);
    }
  }
}

}  // namespace

extern const Loops LOOPS;
const Loops LOOPS = {forward_scratch, backward_scratch, forward, backward, roi_align_forward, roi_align_backward};
