// Arithmetic that several kernels share. Included by isa.cpp after linear_kernels.h.
#pragma once

// e^x for x <= 0, NaN for NaN, by 2^n · e^f with |f| <= ln 2 / 2 and Taylor's series to f^7 (relative error below
// 2e-7).
inline VecF exp_negative(VecF x) {
    x = max_f(set_f(-88.0f), x);  // n = -127 there: exactly zero
    const VecI n = round_to_int(mul(x, set_f(1.44269504f)));
    const VecF whole = to_float(n);
    const VecF f = fma(whole, set_f(-1.42860677e-6f), fma(whole, set_f(-0.693145752f), x));
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    VecF y = set_f(1.0f / 5040);
    for (float term : terms) y = fma(y, f, set_f(term));
    return mul(y, bits_to_float(shift_left<23>(add_i(n, set_i(127)))));
}

// As a tensor of this format holds it.
template <class Element>
inline VecF rounded(VecF x);
template <>
inline VecF rounded<float>(VecF x) {
    return x;
}
template <>
inline VecF rounded<uint16_t>(VecF x) {
    return bits_to_float(shift_left<16>(to_bf16(x)));
}

inline float sum_lanes(VecF x) {
    float lanes[kLanes];
    store_f(lanes, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// How numbers are multiplied: as floats, or as pairs of bfloat16 with float sums. A word of 32 bits holds either.
struct Floats {
    static constexpr int kPack = 1;  // numbers in a word
    static VecF multiply_add(VecI a, VecI b, VecF sum) { return fma(bits_to_float(a), bits_to_float(b), sum); }
};

struct Pairs {
    static constexpr int kPack = 2;
    template <class Words>
    static VecF multiply_add(Words a, Words b, VecF sum) {
        return dot_pairs(sum, a, b);
    }
};

// For numbers that are bfloat16 to begin with.
template <bool HasPairs>
struct Best {
    using Numbers = Floats;
};
template <>
struct Best<true> {
    using Numbers = Pairs;
};
using BestNumbers = Best<kHasPairs>::Numbers;

// Two vectors of numbers that are bfloat16 exactly, as pairs.
inline VecI pair_up(VecF low, VecF high) {
    return or_i(shift_right<16>(float_to_bits(low)), and_i(float_to_bits(high), set_i(~0xffff)));
}
