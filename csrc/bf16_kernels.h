// Linear layers on bfloat16 weights for few tokens. Included by isa.cpp after linear_kernels.h.
#pragma once

constexpr int kBf16Rows = 4;    // weight rows read side by side
constexpr int kBf16Tokens = 4;  // tokens that share what was read

void widen(const void *x, Glm4Dtype dtype, int64_t count, float *out) {
    if (dtype == GLM4_FLOAT32) {
        memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    const uint16_t *from = static_cast<const uint16_t *>(x);
    for (int64_t i = 0; i < count; i += kLanes) store_some(out + i, load_some(from + i, count - i), count - i);
}

inline float sum_lanes(VecF x) {
    float lanes[kLanes];
    store_f(lanes, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

template <int Rows, int Tokens>
inline void sum_rows(const uint16_t *weight, int64_t inputs, const float *x, float (&sums)[Rows][Tokens]) {
    VecF wide[Rows][Tokens];
    for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) wide[r][t] = zero_f();
    const auto step = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        VecF some[Tokens];
        for (int t = 0; t < Tokens; ++t) some[t] = load_some(x + t * inputs + i, count);
        for (int r = 0; r < Rows; ++r) {
            const VecF row = load_some(weight + r * inputs + i, count);
            for (int t = 0; t < Tokens; ++t) wide[r][t] = fma(row, some[t], wide[r][t]);
        }
    };
    int64_t i = 0;
    for (; i + kLanes <= inputs; i += kLanes) step(i, kLanes);
    if (i < inputs) step(i, inputs - i);
    for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) sums[r][t] = sum_lanes(wide[r][t]);
}

template <int Rows, int Tokens, class Element>
inline void rows_times_tokens(const uint16_t *weight, int64_t inputs, const float *bias, const float *x, Element *out,
                              int64_t out_stride) {
    float sums[Rows][Tokens];
    sum_rows(weight, inputs, x, sums);
    for (int t = 0; t < Tokens; ++t)
        for (int r = 0; r < Rows; ++r)
            store_some(out + t * out_stride + r, set_f(sums[r][t] + (bias ? bias[r] : 0.0f)), 1);
}

template <int Rows, class Element>
inline void rows_times_all(const uint16_t *weight, int64_t inputs, const float *bias, const float *x, int64_t tokens,
                           Element *out, int64_t out_stride) {
    int64_t t = 0;
    for (; t + kBf16Tokens <= tokens; t += kBf16Tokens)
        rows_times_tokens<Rows, kBf16Tokens>(weight, inputs, bias, x + t * inputs, out + t * out_stride, out_stride);
    for (; t + 2 <= tokens; t += 2)
        rows_times_tokens<Rows, 2>(weight, inputs, bias, x + t * inputs, out + t * out_stride, out_stride);
    if (t < tokens) rows_times_tokens<Rows, 1>(weight, inputs, bias, x + t * inputs, out + t * out_stride, out_stride);
}

template <class Element>
inline void bf16_rows(const uint16_t *weight, int64_t first, int64_t rows, int64_t inputs, const float *bias,
                      const float *x, int64_t tokens, Element *out, int64_t out_stride) {
    int64_t r = first;
    const auto bias_at = [&](int64_t row) { return bias ? bias + row : nullptr; };
    for (; r + kBf16Rows <= first + rows; r += kBf16Rows)
        rows_times_all<kBf16Rows>(weight + r * inputs, inputs, bias_at(r), x, tokens, out + r, out_stride);
    for (; r < first + rows; ++r)
        rows_times_all<1>(weight + r * inputs, inputs, bias_at(r), x, tokens, out + r, out_stride);
}

void linear_bf16(const uint16_t *weight, int64_t first, int64_t rows, int64_t inputs, const float *bias, const float *x,
                 int64_t tokens, Glm4Dtype dtype, void *out, int64_t out_stride) {
    if (dtype == GLM4_BFLOAT16)
        bf16_rows(weight, first, rows, inputs, bias, x, tokens, static_cast<uint16_t *>(out), out_stride);
    else
        bf16_rows(weight, first, rows, inputs, bias, x, tokens, static_cast<float *>(out), out_stride);
}
