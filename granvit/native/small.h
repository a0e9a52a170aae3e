// What small_kernels.cpp (threads, entry points) and small.cpp (loops, compiled once for each instruction set) say to each other.
// No header of the C++ library here or in small.cpp, for the reason that inner.h gives.
#pragma once
#include <stdint.h>

// Rows [rows, C] of a norm. In the forward pass `out`, `mean` (null: RMS norm) and `scale` are written.
struct Norm {
  const float *x, *weight, *bias;  // bias is null for an RMS norm
  float *out, *mean, *scale;       // [rows, C], [rows] twice; scale = 1 / sqrt(variance + eps)
  const float *dout;
  float *dx;
  long C;
  float eps;
};

// Rows [B, H, S, D] that are turned by [B, S, D] cosines and sines.
struct Turn {
  const float *x, *cosine, *sine;
  float *out;
  long H, S, D;
};

struct AdamW {
  float *parameter, *gradient, *first, *second;
  // The gradient's factor; 1 - learning rate * weight decay; learning rate / (1 - beta1^t); 1 - beta2^t; beta1; 1 - beta1; beta2;
  // 1 - beta2; eps.
  const float *factors;
};

struct SmallLoops {
  // Rows first <= row < last.
  void (*norm_forward)(const Norm &, long first, long last);
  // Writes this block's share of the gradients of weight and bias, [C] each (dbias null: RMS norm).
  void (*norm_backward)(const Norm &, long first, long last, float *dweight, float *dbias);
  // Rows of D numbers, first <= row < last; `back` turns by the opposite angle, which is the gradient.
  void (*turn)(const Turn &, bool back, long first, long last);
  // `count` numbers.
  void (*swiglu_forward)(const float *gate, const float *up, float *out, long count);
  void (*swiglu_backward)(const float *dout, const float *gate, const float *up, float *dgate, float *dup, long count);
  void (*gelu_forward)(const float *x, float *out, long count);
  void (*gelu_backward)(const float *dout, const float *x, float *dx, long count);
  void (*adamw)(const AdamW &, long first, long last);
};
