// Linear layers on bfloat16 weights for few tokens. Included by isa.cpp after numbers.h.
#pragma once

using Bf16Numbers = BestNumbers;
constexpr int kBf16Step = kLanes * Bf16Numbers::kPack;  // inputs multiplied at a time
constexpr int kBf16Ahead = 1024;                        // inputs that memory is asked for in advance

// Vectors of words a token takes: its inputs, padded with zeros.
int64_t bf16_words(int64_t inputs) { return ceil_div(inputs, kBf16Step) * kLanes; }

inline VecI load_words(const uint16_t *p) {
    if constexpr (Bf16Numbers::kPack == 2) return load_i(reinterpret_cast<const int32_t *>(p));
    return shift_left<16>(load_u16(p));
}

inline VecI load_some_words(const uint16_t *p, int64_t count) {
    if (count >= kBf16Step) return load_words(p);
    uint16_t whole[kBf16Step] = {};
    memcpy(whole, p, static_cast<size_t>(count) * sizeof *p);
    return load_words(whole);
}

void bf16_prepare(const uint16_t *x, int64_t inputs, int32_t *words) {
    for (int64_t i = 0; i < inputs; i += kBf16Step, words += kLanes) store_i(words, load_some_words(x + i, inputs - i));
}

// Each sum adds its inputs in order, however many rows and tokens are taken side by side. Few rows: each is a stream of
// memory of its own, and the hardware follows one or two best.
template <int Rows, int Tokens>
inline void rows_times_tokens(const Bf16Linear &l, int64_t row, int64_t token) {
    const int64_t words = bf16_words(l.inputs), whole = l.inputs / kBf16Step * kBf16Step;
    const uint16_t *weight = l.weight + row * l.weight_stride;
    const int32_t *x = l.x + token * words;
    VecF sums[Rows][Tokens];
    for (auto &of_row : sums)
        for (VecF &sum : of_row) sum = zero_f();
    const auto step = [&](const VecI(&w)[Rows]) {
        for (int t = 0; t < Tokens; ++t) {
            const VecI some = load_i(x + t * words);
            for (int r = 0; r < Rows; ++r) sums[r][t] = Bf16Numbers::multiply_add(w[r], some, sums[r][t]);
        }
        x += kLanes;
    };
    VecI w[Rows];
    for (int64_t i = 0; i < whole; i += kBf16Step) {
        for (int r = 0; r < Rows; ++r) {
            w[r] = load_words(weight + r * l.weight_stride + i);
            __builtin_prefetch(weight + r * l.weight_stride + i + kBf16Ahead);
        }
        step(w);
    }
    if (whole < l.inputs) {
        for (int r = 0; r < Rows; ++r) w[r] = load_some_words(weight + r * l.weight_stride + whole, l.inputs - whole);
        step(w);
    }
    for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) {
            const float sum = sum_lanes(sums[r][t]) + (l.bias ? l.bias[row + r] : 0.0f);
            store_some(l.out + (token + t) * l.out_stride + row + r, set_f(sum), 1);
        }
}

template <int Rows>
inline void rows_times_all(const Bf16Linear &l, int64_t row) {
    int64_t t = 0;
    if constexpr (kLanes == 16)  // enough registers
        for (; t + 8 <= l.tokens; t += 8) rows_times_tokens<Rows, 8>(l, row, t);
    for (; t + 4 <= l.tokens; t += 4) rows_times_tokens<Rows, 4>(l, row, t);
    for (; t + 2 <= l.tokens; t += 2) rows_times_tokens<Rows, 2>(l, row, t);
    for (; t < l.tokens; ++t) rows_times_tokens<Rows, 1>(l, row, t);
}

void bf16_rows(const Bf16Linear &l, int64_t first, int64_t end) {
    int64_t row = first;
    for (; row + 2 <= end; row += 2) rows_times_all<2>(l, row);
    if (row < end) rows_times_all<1>(l, row);
}
