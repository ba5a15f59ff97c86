// 512-bit vectors: AVX-512 F, BW, VL, DQ and VNNI, and BF16 where it is compiled for.
#pragma once

constexpr int kLanes = 16;  // 32-bit lanes of a vector
constexpr int kTile = 8;    // tokens whose sums stay in registers
constexpr int kUnroll = 8;  // scalars that share a loaded vector in attention
using VecF = __m512;
using VecI = __m512i;
using VecB = __m512i;  // bytes
using Four = __m512i;  // four signed bytes, the same in every lane

inline VecF zero_f() { return _mm512_setzero_ps(); }
inline VecF set_f(float x) { return _mm512_set1_ps(x); }
inline VecF load_f(const float *p) { return _mm512_loadu_ps(p); }
inline void store_f(float *p, VecF x) { _mm512_storeu_ps(p, x); }
inline VecF load_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
inline VecF mul(VecF a, VecF b) { return _mm512_mul_ps(a, b); }
inline VecF div(VecF a, VecF b) { return _mm512_div_ps(a, b); }
inline VecF add(VecF a, VecF b) { return _mm512_add_ps(a, b); }
inline VecF sub(VecF a, VecF b) { return _mm512_sub_ps(a, b); }
inline VecF max_f(VecF a, VecF b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }

inline VecI zero_i() { return _mm512_setzero_si512(); }
inline VecI set_i(int32_t x) { return _mm512_set1_epi32(x); }
inline VecI load_i(const int32_t *p) { return _mm512_loadu_si512(p); }
inline void store_i(int32_t *p, VecI x) { _mm512_storeu_si512(p, x); }
inline VecI load_u8(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline VecI load_s8(const int8_t *p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline VecI load_u16(const uint16_t *p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
inline void store_low16(uint16_t *p, VecI x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(x));
}
inline void store_low8(int8_t *p, VecI x) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(x)); }
inline VecI and_i(VecI a, VecI b) { return _mm512_and_si512(a, b); }
inline VecI or_i(VecI a, VecI b) { return _mm512_or_si512(a, b); }
inline VecI add_i(VecI a, VecI b) { return _mm512_add_epi32(a, b); }
inline VecI max_i(VecI a, VecI b) { return _mm512_max_epi32(a, b); }
template <int N>
inline VecI shift_left(VecI a) {
    return _mm512_slli_epi32(a, N);
}
template <int N>
inline VecI shift_right(VecI a) {
    return _mm512_srli_epi32(a, N);
}
inline VecI mul16(VecI a, VecI b) { return _mm512_madd_epi16(a, b); }  // 0 <= a < 2^15, -2^15 <= b < 2^15
inline VecF bits_to_float(VecI a) { return _mm512_castsi512_ps(a); }
inline VecI float_to_bits(VecF a) { return _mm512_castps_si512(a); }
inline VecF to_float(VecI a) { return _mm512_cvtepi32_ps(a); }
inline VecI round_to_int(VecF a) { return _mm512_cvtps_epi32(a); }  // nearest, ties to even
inline VecI select_greater(VecI a, VecI b, VecI yes, VecI no) {     // a > b ? yes : no
    return _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a, b), no, yes);
}

inline VecB load_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
inline VecB low_nibbles(VecB b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline VecB high_nibbles(VecB b) { return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15)); }
inline Four load_four(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}
// sum += the dot product of each lane's four unsigned bytes with `x`. Bits: how many of a byte are in use.
// Written as assembly because GCC 12 copies each sum before and after its intrinsic: twice as slow.
template <int Bits>
inline VecI dot(VecI sum, VecB w, Four x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
// sum += a0 * b0 + a1 * b1 of the two bfloat16 numbers in each lane; as assembly for the same reason.
inline VecF dot_pairs(VecF sum, VecI a, VecI b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
// Numbers that are bfloat16 exactly, each beside the next: those of a, then those of b.
inline VecI neighbours(VecF a, VecF b) { return VecI(_mm512_cvtne2ps_pbh(b, a)); }
#else
constexpr bool kHasPairs = false;
#endif
