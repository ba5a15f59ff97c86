// 256-bit vectors: AVX2, FMA and F16C.
#pragma once

constexpr int kLanes = 8;   // 32-bit lanes of a vector
constexpr int kTile = 2;    // tokens whose sums stay in registers
constexpr int kUnroll = 4;  // scalars that share a loaded vector in attention
using VecF = __m256;
using VecI = __m256i;
using VecB = __m256i;  // bytes
using Four = __m256i;  // four signed bytes, the same in every lane

inline VecF zero_f() { return _mm256_setzero_ps(); }
inline VecF set_f(float x) { return _mm256_set1_ps(x); }
inline VecF load_f(const float *p) { return _mm256_loadu_ps(p); }
inline void store_f(float *p, VecF x) { _mm256_storeu_ps(p, x); }
inline VecF load_half(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline VecF mul(VecF a, VecF b) { return _mm256_mul_ps(a, b); }
inline VecF div(VecF a, VecF b) { return _mm256_div_ps(a, b); }
inline VecF add(VecF a, VecF b) { return _mm256_add_ps(a, b); }
inline VecF sub(VecF a, VecF b) { return _mm256_sub_ps(a, b); }
inline VecF max_f(VecF a, VecF b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }

inline VecI zero_i() { return _mm256_setzero_si256(); }
inline VecI set_i(int32_t x) { return _mm256_set1_epi32(x); }
inline VecI load_i(const int32_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
inline void store_i(int32_t *p, VecI x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), x); }
inline VecI load_u8(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
}
inline VecI load_s8(const int8_t *p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
}
inline VecI load_u16(const uint16_t *p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline void store_low8(int8_t *p, VecI x) {  // for values that fit
    const VecI pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 0x08);
    const __m128i low = _mm256_castsi256_si128(pairs);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(low, low));
}
inline VecI and_i(VecI a, VecI b) { return _mm256_and_si256(a, b); }
inline void store_low16(uint16_t *p, VecI x) {
    const VecI low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    const VecI packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_castsi256_si128(packed));
}
inline VecI or_i(VecI a, VecI b) { return _mm256_or_si256(a, b); }
inline VecI add_i(VecI a, VecI b) { return _mm256_add_epi32(a, b); }
inline VecI max_i(VecI a, VecI b) { return _mm256_max_epi32(a, b); }
template <int N>
inline VecI shift_left(VecI a) {
    return _mm256_slli_epi32(a, N);
}
template <int N>
inline VecI shift_right(VecI a) {
    return _mm256_srli_epi32(a, N);
}
inline VecI mul16(VecI a, VecI b) { return _mm256_madd_epi16(a, b); }  // 0 <= a < 2^15, -2^15 <= b < 2^15
inline VecF bits_to_float(VecI a) { return _mm256_castsi256_ps(a); }
inline VecI float_to_bits(VecF a) { return _mm256_castps_si256(a); }
inline VecF to_float(VecI a) { return _mm256_cvtepi32_ps(a); }
inline VecI round_to_int(VecF a) { return _mm256_cvtps_epi32(a); }  // nearest, ties to even
inline VecI select_greater(VecI a, VecI b, VecI yes, VecI no) {     // a > b ? yes : no
    return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(a, b));
}

inline VecB load_bytes(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
inline VecB low_nibbles(VecB b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
inline VecB high_nibbles(VecB b) { return _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(15)); }
inline Four load_four(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}
// sum += the dot product of each lane's four unsigned bytes with `x`. Bits: how many of a byte are in use.
template <int Bits>
inline VecI dot(VecI sum, VecB w, Four x) {
    if (Bits <= 6)  // the 16-bit sum of two products cannot saturate: 2 · 63 · 127 < 2^15
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
    const VecI even =
        _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const VecI odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

constexpr bool kHasPairs = false;  // no product of two bfloat16 numbers in one instruction
