// What each instruction set provides: one table of functions, made from the same sources (see isa.cpp).
#pragma once
#include <stdint.h>

#include "glm4_cpu.h"

namespace glm4 {

constexpr int kPanelRows = 32;  // rows whose weights are interleaved: a cache line of 4-bit weights feeds them all

// Some tokens' activations in 8 bits, as the kernels read them.
struct ActivationTile {
    int tokens;
    int8_t *values;        // [inputs / 4, tokens, 4]: what one instruction multiplies lies together
    int32_t *corrections;  // [groups, tokens]: -zero point · the group's sum, or -sum where the weight has zero points
    float *scales;         // [tokens]
};

// Some query rows of one request that share a key/value head. Row t · group + h is head h of the group at the
// request's new token t.
struct AttentionTile {
    int64_t first_token;  // of the request in the step
    int64_t start;        // that token's position
    int64_t kv_head;
    int64_t first_row;
    int rows;
    const int32_t *table;  // the request's blocks
};

// A linear layer in bfloat16, its activations prepared.
struct Bf16Linear {
    const uint16_t *weight;  // [rows, inputs]
    int64_t weight_stride;   // from row to row
    int64_t inputs;
    const float *bias;  // [rows] or null
    const int32_t *x;   // [tokens, words]
    int64_t tokens;
    uint16_t *out;
    int64_t out_stride;
};

constexpr int64_t kSplit = 1024;  // positions that one task attends to
constexpr int64_t kMostSplits = 256;
constexpr int64_t kMostHeadDim = 512;

struct Kernels {
    const char *name;
    int tile;  // tokens of a full activation tile
    int rows;  // query rows of a full attention tile

    // Round one token, x: [inputs], to 8 bits, into place `token` of a tile; its largest magnitude counts as at least
    // `largest`.
    void (*quantize_token)(const Glm4Weight &weight, const void *x, Glm4Dtype dtype, float largest,
                           const ActivationTile &tile, int token);
    // One panel times one tile; out points at the tile's first token and the panel's first row.
    void (*linear_tile)(const Glm4Weight &weight, int64_t panel, const ActivationTile &tile, Glm4Dtype dtype, void *out,
                        int64_t out_stride);
    // Words that a token's inputs take, those words, and rows [first, end) of a bfloat16 layer.
    int64_t (*bf16_words)(int64_t inputs);
    void (*bf16_prepare)(const uint16_t *x, int64_t inputs, int32_t *words);
    void (*bf16_rows)(const Bf16Linear &linear, int64_t first, int64_t end);
    // Attention of one tile to positions [first, end): an unfinished result, of attention_partial_floats numbers.
    size_t (*attention_scratch_size)(int64_t head_dim);
    int64_t (*attention_partial_floats)(int64_t head_dim);
    void (*attention_partial)(const Glm4Attention &attention, const AttentionTile &tile, int64_t first, int64_t end,
                              char *scratch, float *partial);
    // The unfinished results of a tile, in order of their positions, into the tokens' outputs.
    void (*attention_merge)(const Glm4Attention &attention, const AttentionTile &tile, const float *partials,
                            int64_t count);
    // One token of each.
    void (*norm_token)(const Glm4Norm &norm, int64_t token);
    void (*swiglu_token)(const Glm4Swiglu &swiglu, int64_t token);
    void (*rotate_and_store_token)(const Glm4KvWrite &write, int64_t token);
    int64_t (*argmax_row)(const Glm4Argmax &argmax, int64_t row);
    // The ceilings, for benchmarks.
    uint64_t (*read_stream)(const void *memory, size_t bytes);
    int64_t (*multiply)(int64_t rounds);
};

// The table that glm4_select_isa chose.
const Kernels &kernels();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t group_count(const Glm4Weight &w) { return w.inputs / w.group_size; }
inline int64_t panel_count(const Glm4Weight &w) { return ceil_div(w.rows, kPanelRows); }
// Steps of four inputs in a group; the last one is padded where a single group holds all inputs.
inline int64_t group_steps(const Glm4Weight &w) { return ceil_div(w.group_size, 4); }
inline int64_t panel_bytes(const Glm4Weight &w) {
    return group_count(w) * group_steps(w) * 4 * kPanelRows * w.bits / 8;
}

}  // namespace glm4
