// What lies between the matrix products, one token at a time. Included by isa.cpp after attention_kernels.h.
#pragma once

// ---- Root-mean-square normalisation (Zhang & Sennrich, 2019) ----

template <class Element>
inline float inverse_rms(const Element *x, int64_t size, float eps) {
    VecF squares = zero_f();
    for (int64_t i = 0; i < size; i += kLanes) {
        const VecF some = load_some(x + i, size - i);
        squares = fma(some, some, squares);
    }
    return 1.0f / sqrtf(sum_lanes(squares) / static_cast<float>(size) + eps);
}

template <class Element>
inline VecF normalized(VecF x, float inverse, VecF weight) {
    return rounded<Element>(mul(weight, rounded<Element>(mul(x, set_f(inverse)))));
}

template <class Element>
inline void norm_one(const Glm4Norm &n, int64_t token) {
    const Element *hidden = static_cast<const Element *>(n.residual) + token * n.size;
    if (n.branch) {
        const Element *branch = static_cast<const Element *>(n.branch) + token * n.size;
        const Element *weight = static_cast<const Element *>(n.branch_weight);
        Element *sum = static_cast<Element *>(n.hidden) + token * n.size;
        const float inverse = inverse_rms(branch, n.size, n.eps);
        for (int64_t i = 0; i < n.size; i += kLanes) {
            const int64_t left = n.size - i;
            const VecF y = normalized<Element>(load_some(branch + i, left), inverse, load_some(weight + i, left));
            store_some(sum + i, add(load_some(hidden + i, left), y), left);
        }
        hidden = sum;
    }
    if (!n.out) return;
    const Element *weight = static_cast<const Element *>(n.weight);
    Element *out = static_cast<Element *>(n.out) + token * n.size;
    const float inverse = inverse_rms(hidden, n.size, n.eps);
    for (int64_t i = 0; i < n.size; i += kLanes) {
        const int64_t left = n.size - i;
        store_some(out + i, normalized<Element>(load_some(hidden + i, left), inverse, load_some(weight + i, left)),
                   left);
    }
}

void norm_token(const Glm4Norm &n, int64_t token) {
    n.dtype == GLM4_BFLOAT16 ? norm_one<uint16_t>(n, token) : norm_one<float>(n, token);
}

// ---- SwiGLU (Shazeer, 2020) ----

inline VecF silu(VecF x) {  // x / (1 + e^-x), with e^-|x| so that nothing overflows
    const VecI bits = float_to_bits(x), sign = and_i(bits, set_i(INT32_MIN));
    const VecF e = exp_negative(bits_to_float(or_i(bits, set_i(INT32_MIN))));
    const VecF numerator = bits_to_float(select_greater(zero_i(), sign, float_to_bits(mul(x, e)), bits));
    return div(numerator, add(e, set_f(1.0f)));
}

template <class Element>
inline void swiglu_one(const Glm4Swiglu &s, int64_t token) {
    const Element *gate = static_cast<const Element *>(s.gate_up) + token * s.gate_up_stride, *up = gate + s.size;
    Element *out = static_cast<Element *>(s.out) + token * s.size;
    for (int64_t i = 0; i < s.size; i += kLanes) {
        const int64_t left = s.size - i;
        store_some(out + i, mul(load_some(up + i, left), rounded<Element>(silu(load_some(gate + i, left)))), left);
    }
}

void swiglu_token(const Glm4Swiglu &s, int64_t token) {
    s.dtype == GLM4_BFLOAT16 ? swiglu_one<uint16_t>(s, token) : swiglu_one<float>(s, token);
}

// ---- Rotary embedding (Su et al., 2021) and the cache ----

inline float number(const float *p) { return *p; }
inline float number(const uint16_t *p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// A head's pairs turned by their angles: (even · cos - odd · sin, odd · cos + even · sin). out may be x.
template <class Element>
inline void rotate_head(const Element *x, const Element *cosines, const Element *sines, int64_t dim, int64_t rotary_dim,
                        Element *out) {
    for (int64_t i = 0; i < dim; i += kLanes) {
        const VecF some = load_element(x + i);
        if (i >= rotary_dim) {
            store_element(out + i, some);
            continue;
        }
        float lanes[kLanes], swapped[kLanes], turns[kLanes], signed_turns[kLanes];
        store_f(lanes, some);
        for (int j = 0; j < kLanes; ++j) {
            const int64_t pair = (i + j) / 2;
            const bool turned = i + j < rotary_dim;
            swapped[j] = lanes[j ^ 1];
            turns[j] = turned ? number(cosines + pair) : 1.0f;
            signed_turns[j] = turned ? (j % 2 ? number(sines + pair) : -number(sines + pair)) : 0.0f;
        }
        const VecF straight = rounded<Element>(mul(some, load_f(turns)));
        store_element(out + i, add(straight, rounded<Element>(mul(load_f(swapped), load_f(signed_turns)))));
    }
}

template <class Element, class Cached>
inline void store_head(const Element *x, int64_t dim, Cached *cache, float *) {
    for (int64_t d = 0; d < dim; d += kLanes) store_element(cache + d, load_element(x + d));
}

template <class Element>
inline void store_head(const Element *x, int64_t dim, int8_t *cache, float *scale) {
    const float factor = eight_bit_factor(largest_magnitude(x, dim), scale);
    for (int64_t d = 0; d < dim; d += kLanes) store_low8(cache + d, to_eight_bits(load_element(x + d), factor));
}

template <class Element, class Cached>
inline void rotate_and_store_one(const Glm4KvWrite &w, int64_t token) {
    const Element *cosines = static_cast<const Element *>(w.cosines) + token * w.rotary_dim / 2;
    const Element *sines = static_cast<const Element *>(w.sines) + token * w.rotary_dim / 2;
    Element *q = static_cast<Element *>(w.q) + token * w.q_stride;
    for (int64_t h = 0; h < w.heads; ++h, q += w.head_dim) rotate_head(q, cosines, sines, w.head_dim, w.rotary_dim, q);
    const Element *k = static_cast<const Element *>(w.k) + token * w.k_stride;
    const Element *v = static_cast<const Element *>(w.v) + token * w.v_stride;
    for (int64_t h = 0; h < w.kv_heads; ++h, k += w.head_dim, v += w.head_dim) {
        const int64_t at = w.places[token] * w.kv_stride + h * w.head_dim, scale = w.places[token] * w.kv_heads + h;
        Element turned[kMostHeadDim];
        rotate_head(k, cosines, sines, w.head_dim, w.rotary_dim, turned);
        store_head(turned, w.head_dim, static_cast<Cached *>(w.k_cache) + at,
                   w.k_scales ? w.k_scales + scale : nullptr);
        store_head(v, w.head_dim, static_cast<Cached *>(w.v_cache) + at, w.v_scales ? w.v_scales + scale : nullptr);
    }
}

template <class Element>
inline void rotate_and_store_as(const Glm4KvWrite &w, int64_t token) {
    if (w.cache_format == GLM4_CACHE_FLOAT32) rotate_and_store_one<Element, float>(w, token);
    if (w.cache_format == GLM4_CACHE_BFLOAT16) rotate_and_store_one<Element, uint16_t>(w, token);
    if (w.cache_format == GLM4_CACHE_INT8) rotate_and_store_one<Element, int8_t>(w, token);
}

void rotate_and_store_token(const Glm4KvWrite &w, int64_t token) {
    w.dtype == GLM4_BFLOAT16 ? rotate_and_store_as<uint16_t>(w, token) : rotate_and_store_as<float>(w, token);
}

// ---- The likeliest token ----

template <class Element>
inline int64_t argmax_one(const Element *x, int64_t size, int64_t known) {
    VecF largest = set_f(-INFINITY), finite = zero_f();
    const int64_t whole = known / kLanes * kLanes;
    for (int64_t i = 0; i < size; i += kLanes) {
        const VecF some = load_some(x + i, size - i);
        finite = fma(some, zero_f(), finite);  // NaN from the first number on that is not finite
        if (i < whole) largest = max_f(largest, some);
    }
    if (sum_lanes(finite) != 0.0f) return -1;
    float lanes[kLanes], best = -INFINITY;
    store_f(lanes, largest);
    for (float lane : lanes) best = lane > best ? lane : best;
    for (int64_t i = whole; i < known; ++i) best = number(x + i) > best ? number(x + i) : best;
    for (int64_t i = 0; i < known; ++i)
        if (number(x + i) == best) return i;
    return -1;
}

int64_t argmax_row(const Glm4Argmax &a, int64_t row) {
    if (a.dtype == GLM4_BFLOAT16)
        return argmax_one(static_cast<const uint16_t *>(a.logits) + row * a.stride, a.size, a.known);
    return argmax_one(static_cast<const float *>(a.logits) + row * a.stride, a.size, a.known);
}
