// The compiler's own vectors: any little-endian CPU.
#pragma once

constexpr int kLanes = 8;   // 32-bit lanes of a vector
constexpr int kTile = 2;    // tokens whose sums stay in registers
constexpr int kUnroll = 4;  // scalars that share a loaded vector in attention
typedef float VecF __attribute__((vector_size(32)));
typedef int32_t VecI __attribute__((vector_size(32)));
typedef uint32_t VecU __attribute__((vector_size(32)));
using VecB = VecU;  // bytes, four to a lane
typedef int16_t VecH __attribute__((vector_size(32)));
struct Four {  // four signed bytes, the same in every lane: the first and third, the second and fourth
    VecH even, odd;
};

template <class Vec>
inline Vec load_vector(const void *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline VecF zero_f() { return VecF{}; }
inline VecF set_f(float x) { return x - VecF{}; }
inline VecF load_f(const float *p) { return load_vector<VecF>(p); }
inline void store_f(float *p, VecF x) { memcpy(p, &x, sizeof x); }
inline VecF mul(VecF a, VecF b) { return a * b; }
inline VecF div(VecF a, VecF b) { return a / b; }
inline VecF add(VecF a, VecF b) { return a + b; }
inline VecF sub(VecF a, VecF b) { return a - b; }
inline VecF max_f(VecF a, VecF b) { return a > b ? a : b; }  // b where either is NaN
inline VecF fma(VecF a, VecF b, VecF c) {
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}

inline VecI zero_i() { return VecI{}; }
inline VecI set_i(int32_t x) { return x - VecI{}; }
inline VecI load_i(const int32_t *p) { return load_vector<VecI>(p); }
inline void store_i(int32_t *p, VecI x) { memcpy(p, &x, sizeof x); }
template <class T>
inline VecI widen(const T *p) {
    VecI v;
    for (int i = 0; i < kLanes; ++i) v[i] = p[i];
    return v;
}
inline VecI load_u8(const uint8_t *p) { return widen(p); }
inline VecI load_s8(const int8_t *p) { return widen(p); }
inline VecI load_u16(const uint16_t *p) { return widen(p); }
inline void store_low16(uint16_t *p, VecI x) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(x[i]);
}
inline void store_low8(int8_t *p, VecI x) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x[i]);
}
inline VecI and_i(VecI a, VecI b) { return a & b; }
inline VecI or_i(VecI a, VecI b) { return a | b; }
inline VecI add_i(VecI a, VecI b) { return a + b; }
inline VecI max_i(VecI a, VecI b) { return a > b ? a : b; }
template <int N>
inline VecI shift_left(VecI a) {
    return reinterpret_cast<VecI>(reinterpret_cast<VecU>(a) << N);
}
template <int N>
inline VecI shift_right(VecI a) {
    return reinterpret_cast<VecI>(reinterpret_cast<VecU>(a) >> N);
}
inline VecI mul16(VecI a, VecI b) { return a * b; }
inline VecF bits_to_float(VecI a) { return reinterpret_cast<VecF>(a); }
inline VecI float_to_bits(VecF a) { return reinterpret_cast<VecI>(a); }
inline VecF to_float(VecI a) { return __builtin_convertvector(a, VecF); }
inline VecI round_to_int(VecF a) {  // nearest, ties to even
    VecI v;
    for (int i = 0; i < kLanes; ++i) v[i] = a[i] == a[i] ? static_cast<int32_t>(nearbyintf(a[i])) : 0;
    return v;
}
inline VecI select_greater(VecI a, VecI b, VecI yes, VecI no) { return a > b ? yes : no; }
inline VecF load_half(const uint16_t *p) {
    const VecI half = load_u16(p), exponent = half & 0x7c00, fraction = half & 0x3ff;
    const VecI sign = shift_left<16>(half & 0x8000);
    const VecI normal = shift_left<13>(half & 0x7fff) + (112 << 23);
    const VecI subnormal = float_to_bits(to_float(fraction) * set_f(0x1p-24f));
    return bits_to_float(sign | (exponent > 0 ? normal : subnormal));  // scales are finite
}

inline VecB load_bytes(const uint8_t *p) { return load_vector<VecB>(p); }
inline VecB low_nibbles(VecB b) { return b & 0x0f0f0f0f; }
inline VecB high_nibbles(VecB b) { return (b >> 4) & 0x0f0f0f0f; }
inline VecH two_halves(int8_t low, int8_t high) {
    const uint32_t both = static_cast<uint16_t>(low) | static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16;
    return reinterpret_cast<VecH>(set_i(static_cast<int32_t>(both)));
}
inline Four load_four(const int8_t *p) { return {two_halves(p[0], p[2]), two_halves(p[1], p[3])}; }
inline VecI sum_halves(VecH x) {
    const VecI both = reinterpret_cast<VecI>(x);
    return (shift_left<16>(both) >> 16) + (both >> 16);
}
// sum += the dot product of each lane's four unsigned bytes with `x`. Products stay in 16 bits: 255 · 127 < 2^15.
template <int Bits>
inline VecI dot(VecI sum, VecB w, Four x) {
    return sum + sum_halves(reinterpret_cast<VecH>(w & 0x00ff00ff) * x.even) +
           sum_halves(reinterpret_cast<VecH>((w >> 8) & 0x00ff00ff) * x.odd);
}

constexpr bool kHasPairs = false;  // no product of two bfloat16 numbers in one instruction
