// Weights into the order the kernels read: panels of 32 rows, and in a panel four inputs of all rows after another.
// Bits 4: byte 4·l + j of a step's 64 holds input j of row l (low nibble) and of row l + 16 (high nibble).
// Bits 8: byte 4·l + j of a step's 128 holds input j of row l, plus 128.
// Rows that pad the last panel are zeros with scale 0.
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>

#include "kernels.h"
#include "thread_pool.h"

namespace glm4 {
namespace {

// Eight nibbles of a little-endian word, one to a byte.
uint64_t spread(uint32_t nibbles) {
    uint64_t x = nibbles;
    x = (x | (x << 16)) & 0x0000ffff0000ffff;
    x = (x | (x << 8)) & 0x00ff00ff00ff00ff;
    return (x | (x << 4)) & 0x0f0f0f0f0f0f0f0f;
}

uint64_t eight_nibbles(const uint8_t *row, int64_t input) {
    if (!row) return 0;
    uint32_t word;
    memcpy(&word, row + input / 2, sizeof word);
    return spread(word);
}

// A cache line of each row at a time: rows that lie a power of two apart would push each other's lines out otherwise.
constexpr int64_t kLine = 64;

// Eight inputs of rows l and l + 16: two steps.
void pack_eight(const uint8_t *const *rows, int l, int64_t input, uint8_t *to) {
    const uint64_t both = eight_nibbles(rows[l], input) | eight_nibbles(rows[l + 16], input) << 4;
    uint8_t *step = to + input * 16 + 4 * l;
    memcpy(step, &both, 4);
    memcpy(step + 64, reinterpret_cast<const char *>(&both) + 4, 4);
}

#if defined(__SSE2__)
constexpr int64_t kSome = 32;  // inputs packed at a time

__m128i load_some(const uint8_t *row, int64_t input) {
    return row ? _mm_loadu_si128(reinterpret_cast<const __m128i *>(row + input / 2)) : _mm_setzero_si128();
}

// Those inputs of rows l .. l + 3 and of the rows 16 below: a quarter of eight steps.
void pack_some(const uint8_t *const *rows, int l, int64_t input, uint8_t *to) {
    const __m128i low = _mm_set1_epi8(15);
    __m128i x[2][4];  // of each row, inputs 0 .. 15 and 16 .. 31
    for (int r = 0; r < 4; ++r) {
        const __m128i a = load_some(rows[l + r], input), b = load_some(rows[l + r + 16], input);
        const __m128i even = _mm_or_si128(_mm_and_si128(a, low), _mm_slli_epi16(_mm_and_si128(b, low), 4));
        const __m128i odd = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(a, 4), low), _mm_andnot_si128(low, b));
        x[0][r] = _mm_unpacklo_epi8(even, odd);
        x[1][r] = _mm_unpackhi_epi8(even, odd);
    }
    for (int half = 0; half < 2; ++half) {  // words of four inputs, transposed
        const __m128i *v = x[half];
        const __m128i a = _mm_unpacklo_epi32(v[0], v[1]), b = _mm_unpackhi_epi32(v[0], v[1]);
        const __m128i c = _mm_unpacklo_epi32(v[2], v[3]), d = _mm_unpackhi_epi32(v[2], v[3]);
        const __m128i steps[] = {_mm_unpacklo_epi64(a, c), _mm_unpackhi_epi64(a, c), _mm_unpacklo_epi64(b, d),
                                 _mm_unpackhi_epi64(b, d)};
        for (int s = 0; s < 4; ++s)
            _mm_storeu_si128(reinterpret_cast<__m128i *>(to + (input / 4 + half * 4 + s) * 64 + 4 * l), steps[s]);
    }
}
#else
constexpr int64_t kSome = 8;

void pack_some(const uint8_t *const *rows, int l, int64_t input, uint8_t *to) {
    for (int r = 0; r < 4; ++r) pack_eight(rows, l + r, input, to);
}
#endif

// rows: the panel's 32 rows, null where there is none; group sizes of 4-bit weights are multiples of 8.
void pack_panel_4(const Glm4Weight &w, const uint8_t *const *rows, uint8_t *to) {
    for (int64_t block = 0; block < w.inputs; block += 2 * kLine) {
        const int64_t end = std::min(w.inputs, block + 2 * kLine), whole = block + (end - block) / kSome * kSome;
        for (int l = 0; l < 16; l += 4) {
            for (int64_t i = block; i < whole; i += kSome) pack_some(rows, l, i, to);
            for (int64_t i = whole; i < end; i += 8)
                for (int r = 0; r < 4; ++r) pack_eight(rows, l + r, i, to);
        }
    }
}

void pack_panel_8(const Glm4Weight &w, const uint8_t *const *rows, uint8_t *to) {
    for (int64_t block = 0; block < w.inputs; block += kLine)
        for (int l = 0; l < kPanelRows; ++l)
            for (int64_t i = block; i < std::min(w.inputs, block + kLine); i += 4) {
                uint32_t four = 0;
                if (rows[l] && i + 4 <= w.inputs)
                    memcpy(&four, rows[l] + i, 4);
                else if (rows[l])
                    memcpy(&four, rows[l] + i, static_cast<size_t>(w.inputs - i));
                four ^= 0x80808080;
                memcpy(to + i * kPanelRows + 4 * l, &four, 4);
            }
}

uint16_t to_half(float x) {  // for values that a half holds exactly
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 113u << 23) return static_cast<uint16_t>(sign | ((magnitude - (112u << 23)) >> 13));
    return static_cast<uint16_t>(sign | static_cast<uint32_t>((x < 0 ? -x : x) * 0x1p24f));
}

void pack_groups(const Glm4Weight &w, int64_t panel, int64_t rows, const float *scales, const uint8_t *zeros) {
    const int64_t groups = group_count(w), base = panel * groups * kPanelRows;
    for (int64_t r = 0; r < kPanelRows; ++r)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t to = base + g * kPanelRows + r;
            const float scale = r < rows ? scales[r * groups + g] : 0.0f;
            if (w.half_scales)
                static_cast<uint16_t *>(w.scales)[to] = to_half(scale);
            else
                static_cast<float *>(w.scales)[to] = scale;
            if (w.zeros) w.zeros[to] = r < rows ? zeros[r * groups + g] : 0;
        }
}

}  // namespace
}  // namespace glm4

extern "C" {

void glm4_weight_sizes(const Glm4Weight *w, int64_t sizes[3]) {
    const int64_t entries = glm4::panel_count(*w) * glm4::group_count(*w) * glm4::kPanelRows;
    sizes[0] = glm4::panel_count(*w) * glm4::panel_bytes(*w);
    sizes[1] = glm4::ceil_div(entries * (w->half_scales ? 2 : 4), 64) * 64;
    sizes[2] = glm4::ceil_div(entries, 64) * 64;
}

void glm4_pack_rows(const Glm4Weight *weight, int64_t first, int64_t rows, const void *values, const float *scales,
                    const uint8_t *zeros) {
    const Glm4Weight &w = *weight;
    const int64_t row_bytes = w.inputs * w.bits / 8, groups = glm4::group_count(w);
    glm4::parallel_for(glm4::ceil_div(rows, glm4::kPanelRows), [&](int64_t i) {
        const int64_t start = i * glm4::kPanelRows, panel = first / glm4::kPanelRows + i;
        const uint8_t *panel_rows[glm4::kPanelRows];
        for (int r = 0; r < glm4::kPanelRows; ++r)
            panel_rows[r] = start + r < rows ? static_cast<const uint8_t *>(values) + (start + r) * row_bytes : nullptr;
        uint8_t *to = w.values + panel * glm4::panel_bytes(w);
        w.bits == 4 ? glm4::pack_panel_4(w, panel_rows, to) : glm4::pack_panel_8(w, panel_rows, to);
        glm4::pack_groups(w, panel, rows - start, scales + start * groups, zeros ? zeros + start * groups : nullptr);
    });
}
}
