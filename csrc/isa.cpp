// Compiled once per instruction set, with GLM4_ISA naming it and the flags that belong to it. Nothing here may use
// templates or inline functions of the standard library: the linker could keep this file's copy for all CPUs.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#define GLM4_TEXT_(x) #x
#define GLM4_TEXT(x) GLM4_TEXT_(x)
#define GLM4_JOIN_(a, b) a##b
#define GLM4_JOIN(a, b) GLM4_JOIN_(a, b)

namespace glm4 {
namespace {

#include GLM4_SIMD_HEADER

#include "linear_kernels.h"

#include "numbers.h"

#include "bf16_kernels.h"

#include "attention_kernels.h"

#include "layer_kernels.h"

uint64_t read_stream(const void *memory, size_t bytes) {
    const uint8_t *p = static_cast<const uint8_t *>(memory);
    VecI sums[4] = {zero_i(), zero_i(), zero_i(), zero_i()};
    const size_t stride = sizeof sums;
    size_t at = 0;
    for (; at + stride <= bytes; at += stride)
        for (int v = 0; v < 4; ++v) {
            __builtin_prefetch(p + at + 2048 + v * sizeof(VecI));
            sums[v] = add_i(sums[v], load_i(reinterpret_cast<const int32_t *>(p + at) + v * kLanes));
        }
    uint64_t total = static_cast<uint32_t>(sum_lanes(add_i(add_i(sums[0], sums[1]), add_i(sums[2], sums[3]))));
    for (; at < bytes; ++at) total += p[at];
    return total;
}

int64_t multiply(int64_t rounds) {
    constexpr int kSums = 12;  // enough that none waits for itself
    VecI sums[kSums] = {};
    const int8_t ones[4] = {1, 1, 1, 1};
    const Four x = load_four(ones);
    const VecB w = low_nibbles(VecB(zero_i()));
    for (int64_t i = 0; i < rounds; ++i)
        for (VecI &sum : sums) sum = dot<8>(sum, w, x);
    int32_t total = 0;
    for (const VecI &sum : sums) total += sum_lanes(sum);
    return total + rounds * kSums * kLanes * 4 * 2;  // the total is zero, which the compiler does not know
}

}  // namespace

extern const Kernels GLM4_JOIN(kernels_, GLM4_ISA);
const Kernels GLM4_JOIN(kernels_, GLM4_ISA) = {
    GLM4_TEXT(GLM4_ISA), kTile,           kRows,      quantize_token,         linear_tile,
    bf16_words,          bf16_prepare,    bf16_rows,  attention_scratch_size, attention_partial_floats,
    attention_partial,   attention_merge, norm_token, swiglu_token,           rotate_and_store_token,
    argmax_row,          read_stream,     multiply,
};

}  // namespace glm4
