// Linear layers on quantised weights. Included by isa.cpp after a simd_*.h, once per instruction set.
#pragma once

constexpr int kParts = kPanelRows / kLanes;  // vectors that hold a panel's rows

inline VecF load_element(const float *p) { return load_f(p); }
inline VecF load_element(const uint16_t *p) { return bits_to_float(shift_left<16>(load_u16(p))); }

// Each lane as bfloat16 in the low half: nearest, ties to even; NaN stays NaN.
inline VecI to_bf16(VecF x) {
    const VecI bits = float_to_bits(x);
    const VecI odd = and_i(shift_right<16>(bits), set_i(1));
    const VecI rounded = shift_right<16>(add_i(bits, add_i(odd, set_i(0x7fff))));
    const VecI magnitude = and_i(bits, set_i(0x7fffffff));
    return select_greater(magnitude, set_i(0x7f800000), set_i(0x7fc0), rounded);
}
inline void store_element(float *p, VecF x) { store_f(p, x); }
inline void store_element(uint16_t *p, VecF x) { store_low16(p, to_bf16(x)); }

template <class Element>
inline void store_some(Element *p, VecF x, int64_t count) {
    if (count >= kLanes) return store_element(p, x);
    Element whole[kLanes];
    store_element(whole, x);
    for (int64_t i = 0; i < count; ++i) p[i] = whole[i];
}

template <class Element>
inline VecF load_some(const Element *p, int64_t count) {
    if (count >= kLanes) return load_element(p);
    Element whole[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
    return load_element(whole);
}

inline int32_t sum_lanes(VecI x) {
    int32_t lanes[kLanes], sum = 0;
    store_i(lanes, x);
    for (int32_t lane : lanes) sum += lane;
    return sum;
}

// The largest magnitude; as whole numbers, bit patterns order like the floats, and NaN is above infinity.
template <class Element>
inline float largest_magnitude(const Element *x, int64_t count) {
    VecI largest = zero_i();
    for (int64_t i = 0; i < count; i += kLanes)
        largest = max_i(largest, and_i(float_to_bits(load_some(x + i, count - i)), set_i(0x7fffffff)));
    int32_t lanes[kLanes], best = 0;
    store_i(lanes, largest);
    for (int32_t lane : lanes) best = lane > best ? lane : best;
    float magnitude;
    memcpy(&magnitude, &best, sizeof magnitude);
    return magnitude;
}

// By what to multiply numbers no larger than `largest` so that they fit -127 .. 127, and what undoes it. Numbers that
// are not finite count as zeros, with the scale NaN; those too small to be turned over count as zeros too.
inline float eight_bit_factor(float largest, float *scale) {
    const bool finite = largest <= 3.402823466e38f;
    *scale = finite ? largest / 127.0f : __builtin_nanf("");
    return finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
}

inline VecI to_eight_bits(VecF x, float factor) { return factor > 0 ? round_to_int(mul(x, set_f(factor))) : zero_i(); }

template <class Element>
inline void quantize_row(const Glm4Weight &w, const Element *x, float largest, const ActivationTile &tile, int token) {
    const float own = largest_magnitude(x, w.inputs);
    const float factor = eight_bit_factor(own < largest || largest != largest ? largest : own, tile.scales + token);
    const int32_t zero_point = w.zeros ? 1 : w.bits == 4 ? 8 : 128;
    const int64_t groups = group_count(w), steps = group_steps(w);
    for (int64_t g = 0; g < groups; ++g) {
        VecI sum = zero_i();
        for (int64_t i = 0; i < w.group_size; i += kLanes) {
            const VecI whole = to_eight_bits(load_some(x + g * w.group_size + i, w.group_size - i), factor);
            sum = add_i(sum, whole);
            int8_t bytes[kLanes];
            store_low8(bytes, whole);
            int8_t *to = tile.values + ((g * steps + i / 4) * tile.tokens + token) * 4;
            for (int64_t j = 0; j < kLanes && i + j < steps * 4; j += 4, to += tile.tokens * 4)
                memcpy(to, bytes + j, 4);
        }
        tile.corrections[g * tile.tokens + token] = -zero_point * sum_lanes(sum);
    }
}

void quantize_token(const Glm4Weight &w, const void *x, Glm4Dtype dtype, float largest, const ActivationTile &tile,
                    int token) {
    if (dtype == GLM4_BFLOAT16)
        quantize_row(w, static_cast<const uint16_t *>(x), largest, tile, token);
    else
        quantize_row(w, static_cast<const float *>(x), largest, tile, token);
}

// The weights of 4 inputs of a panel as unsigned bytes, rows in order.
template <int Bits>
inline void load_weights(const uint8_t *p, VecB (&w)[kParts]) {
    if (Bits == 8) {
        for (int v = 0; v < kParts; ++v) w[v] = load_bytes(p + v * sizeof(VecB));
    } else {
        for (int v = 0; v < kParts / 2; ++v) {
            const VecB both = load_bytes(p + v * sizeof(VecB));
            w[v] = low_nibbles(both), w[v + kParts / 2] = high_nibbles(both);
        }
    }
}

template <bool HalfScales>
inline VecF load_scales(const void *scales, int64_t at) {
    return HalfScales ? load_half(static_cast<const uint16_t *>(scales) + at)
                      : load_f(static_cast<const float *>(scales) + at);
}

// Sums of one panel for Tokens tokens. Each sum takes its groups in order, whatever the tile: a token's result does
// not depend on the tokens beside it, and no thread shares a sum.
template <int Bits, bool Zeros, bool HalfScales, int Tokens>
inline void sum_panel(const Glm4Weight &w, int64_t panel, const ActivationTile &tile, VecF (&sums)[Tokens][kParts]) {
    constexpr int kStepBytes = 4 * kPanelRows * Bits / 8;
    constexpr int kAhead = 8192;  // bytes: what a step of eight tokens takes is short beside a read of memory
    const int64_t groups = group_count(w), steps = group_steps(w);
    const uint8_t *values = w.values + panel * panel_bytes(w);
    const int8_t *x = tile.values;
    for (int t = 0; t < Tokens; ++t)
        for (int v = 0; v < kParts; ++v) sums[t][v] = zero_f();
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = (panel * groups + g) * kPanelRows;
        VecI dots[Tokens][kParts];
        for (int t = 0; t < Tokens; ++t) {
            const VecI correction = set_i(tile.corrections[g * Tokens + t]);
            for (int v = 0; v < kParts; ++v)
                dots[t][v] = Zeros ? mul16(load_u8(w.zeros + at + v * kLanes), correction) : correction;
        }
        for (int64_t step = 0; step < steps; ++step, values += kStepBytes, x += 4 * Tokens) {
            VecB weights[kParts];
            load_weights<Bits>(values, weights);
            for (int line = 0; line < kStepBytes; line += 64) __builtin_prefetch(values + kAhead + line);
            for (int t = 0; t < Tokens; ++t) {
                const Four four = load_four(x + 4 * t);
                for (int v = 0; v < kParts; ++v) dots[t][v] = dot<Bits>(dots[t][v], weights[v], four);
            }
        }
        for (int v = 0; v < kParts; ++v) {
            const VecF scale = load_scales<HalfScales>(w.scales, at + v * kLanes);
            for (int t = 0; t < Tokens; ++t) sums[t][v] = fma(to_float(dots[t][v]), scale, sums[t][v]);
        }
    }
}

template <int Bits, bool Zeros, bool HalfScales, int Tokens, class Element>
void panel_times_tile(const Glm4Weight &w, int64_t panel, const ActivationTile &tile, Element *out,
                      int64_t out_stride) {
    VecF sums[Tokens][kParts];
    sum_panel<Bits, Zeros, HalfScales, Tokens>(w, panel, tile, sums);
    const int64_t row = panel * kPanelRows;
    for (int v = 0; v < kParts; ++v) {
        const int64_t left = w.rows - row - v * kLanes;
        if (left <= 0) break;
        const VecF bias = w.bias ? load_some(w.bias + row + v * kLanes, left) : zero_f();
        for (int t = 0; t < Tokens; ++t) {
            const VecF scale = set_f(tile.scales[t]);
            const VecF y = w.bias ? fma(sums[t][v], scale, bias) : mul(sums[t][v], scale);
            store_some(out + t * out_stride + v * kLanes, y, left);
        }
    }
}

// Turn the numbers that are known when a kernel is called into those that it is compiled for.
template <int Bits, bool Zeros, bool HalfScales, class Element, int Tokens = 1>
inline void choose_tokens(const Glm4Weight &w, int64_t panel, const ActivationTile &tile, Element *out,
                          int64_t stride) {
    if (tile.tokens == Tokens) return panel_times_tile<Bits, Zeros, HalfScales, Tokens>(w, panel, tile, out, stride);
    if constexpr (Tokens < kTile)
        choose_tokens<Bits, Zeros, HalfScales, Element, Tokens + 1>(w, panel, tile, out, stride);
}

template <int Bits, bool Zeros, class Element>
inline void choose_scales(const Glm4Weight &w, int64_t panel, const ActivationTile &tile, Element *out,
                          int64_t stride) {
    if (w.half_scales)
        choose_tokens<Bits, Zeros, true>(w, panel, tile, out, stride);
    else
        choose_tokens<Bits, Zeros, false>(w, panel, tile, out, stride);
}

template <class Element>
inline void choose_bits(const Glm4Weight &w, int64_t panel, const ActivationTile &tile, Element *out, int64_t stride) {
    if (w.bits == 8)
        choose_scales<8, false>(w, panel, tile, out, stride);
    else if (w.zeros)
        choose_scales<4, true>(w, panel, tile, out, stride);
    else
        choose_scales<4, false>(w, panel, tile, out, stride);
}

void linear_tile(const Glm4Weight &w, int64_t panel, const ActivationTile &tile, Glm4Dtype dtype, void *out,
                 int64_t out_stride) {
    if (dtype == GLM4_BFLOAT16)
        choose_bits(w, panel, tile, static_cast<uint16_t *>(out), out_stride);
    else
        choose_bits(w, panel, tile, static_cast<float *>(out), out_stride);
}
