// The C interface of the CPU kernels. Pointers and sizes only, so that it is tied to no version of any tensor library.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GLM4_API __attribute__((visibility("default")))

// Raised whenever a signature or a layout below changes: Python refuses a library of another version.
#define GLM4_ABI_VERSION 3

typedef enum { GLM4_FLOAT32 = 0, GLM4_BFLOAT16 = 1 } Glm4Dtype;

// A quantised weight matrix [rows, inputs], repacked in panels of 32 rows (see pack.cpp for the order).
typedef struct {
    int64_t rows, inputs;
    int32_t bits;         // 4 or 8
    int32_t group_size;   // inputs that share a scale; a multiple of 4, or all inputs
    int32_t half_scales;  // 1: scales are IEEE half precision, 0: float
    int32_t reserved;
    uint8_t *values;    // unsigned: 0..15, or 0..255 with the zero point 128
    void *scales;       // [panels, groups, 32]
    uint8_t *zeros;     // [panels, groups, 32]; null: 8 (bits 4), 128 (bits 8)
    const float *bias;  // [rows] or null
} Glm4Weight;

GLM4_API int glm4_abi_version(void);

// Choose the instruction set: "plain", "avx2", "avx512vnni", "avx512bf16", or null for the best this CPU has.
// Returns its name; null when the name is unknown or the CPU lacks it.
GLM4_API const char *glm4_select_isa(const char *name);

// Threads of the pool, the caller included. Takes effect with the next parallel region.
GLM4_API void glm4_set_threads(int threads);
GLM4_API int glm4_threads(void);

// Memory on huge pages where the system grants them; null when there is none. Contents are zero.
GLM4_API void *glm4_allocate(size_t bytes);
GLM4_API void glm4_free(void *memory, size_t bytes);

// How many memory nodes this process may use, and deal the pages of memory from glm4_allocate, which holds nothing yet,
// out to them in turn; whether the system did.
GLM4_API int glm4_memory_nodes(void);
GLM4_API int glm4_spread(void *memory, size_t bytes);

// Have the pages of memory that is there at hand, on huge pages where that is possible; of a mapped file, read them.
GLM4_API void glm4_map_in(const void *memory, size_t bytes);

// Bytes that `values`, `scales` and `zeros` of a weight take, each a multiple of 64.
GLM4_API void glm4_weight_sizes(const Glm4Weight *weight, int64_t sizes[3]);

// Repack rows [first, first + rows) of a weight; first is a multiple of 32, and so is rows unless they are the last.
// values: uint8 [rows, inputs / 2], even input in the low nibble (bits 4), or int8 [rows, inputs] (bits 8);
// scales: float [rows, groups]; zeros: uint8 [rows, groups], read where weight->zeros is there.
GLM4_API void glm4_pack_rows(const Glm4Weight *weight, int64_t first, int64_t rows, const void *values,
                             const float *scales, const uint8_t *zeros);

// out[t, r] = sum over inputs of x[t, i] * w[r, i] + bias[r], with x rounded to 8 bits a token.
// x: [tokens, inputs], out: [tokens, rows], both of `dtype`; strides in elements between tokens. largest: [tokens] or
// null; a token is rounded as if its largest magnitude were at least that, for inputs that are a part of all there are.
GLM4_API void glm4_linear(const Glm4Weight *weight, const void *x, int64_t tokens, int64_t x_stride, Glm4Dtype dtype,
                          const float *largest, void *out, int64_t out_stride);

// The same in bfloat16, nothing rounded to 8 bits: weight [rows, inputs] as it is, with a stride between rows. For few
// tokens.
GLM4_API void glm4_linear_bf16(const uint16_t *weight, int64_t rows, int64_t inputs, int64_t weight_stride,
                               const float *bias, const uint16_t *x, int64_t tokens, int64_t x_stride, uint16_t *out,
                               int64_t out_stride);

typedef enum { GLM4_CACHE_FLOAT32 = 0, GLM4_CACHE_BFLOAT16 = 1, GLM4_CACHE_INT8 = 2 } Glm4CacheFormat;

// Attention of a step's tokens to their requests' past and themselves. Strides in elements between tokens or slots.
typedef struct {
    int64_t heads, kv_heads, head_dim;  // head_dim: a multiple of 16
    float scale;                        // of the scores
    int32_t dtype;                      // Glm4Dtype of q and out
    const void *q;                      // [tokens, heads, head_dim]
    void *out;                          // the same
    int64_t q_stride, out_stride;
    const void *k_cache, *v_cache;  // [slots, kv_heads, head_dim]
    int64_t slots, kv_stride;
    int64_t cache_format;              // Glm4CacheFormat
    const float *k_scales, *v_scales;  // [slots, kv_heads] for int8, else null
    int64_t requests, block_size;
    const int64_t *spans;   // [requests, 2]: first row and end in the step
    const int64_t *starts;  // [requests]: position of the first of them
    const int32_t *tables;  // [requests, table_stride]: blocks
    int64_t table_stride;
} Glm4Attention;

// Keys and values of the step must be in the cache. At most 262144 positions a request.
// Returns 0, or 1 where a block lies outside the cache, and then nothing was done.
GLM4_API int glm4_attention(const Glm4Attention *attention);

// What lies between two matrix products of a block: with n(x, w) = w * x / sqrt(mean(x^2) + eps),
//   hidden = residual + n(branch, branch_weight), or residual itself where branch is null;
//   out = n(hidden, weight), left out where out is null.
// Every intermediate result is rounded to `dtype`, as separate tensor operations would.
typedef struct {
    int64_t tokens, size;
    int32_t dtype;  // Glm4Dtype of everything
    float eps;
    const void *residual, *branch, *branch_weight, *weight;  // [tokens, size], the same, [size], [size]
    void *hidden, *out;                                      // [tokens, size]
} Glm4Norm;

GLM4_API void glm4_norm(const Glm4Norm *norm);

// out = up * silu(gate), silu rounded to `dtype` first; gate_up: [tokens, 2, size], out: [tokens, size].
typedef struct {
    int64_t tokens, size, gate_up_stride;
    int64_t dtype;
    const void *gate_up;
    void *out;
} Glm4Swiglu;

GLM4_API void glm4_swiglu(const Glm4Swiglu *swiglu);

// Rotate the pairs (2i, 2i + 1) of the first rotary_dim numbers of each head of q, in place, and of k; put k and v into
// the cache, for int8 with one scale for each token and head.
typedef struct {
    int64_t tokens, heads, kv_heads, head_dim, rotary_dim;
    int64_t dtype;                         // of q, k, v, cosines and sines
    void *q;                               // [tokens, heads, head_dim]
    const void *k, *v;                     // [tokens, kv_heads, head_dim]
    int64_t q_stride, k_stride, v_stride;  // elements between tokens
    const void *cosines, *sines;           // [tokens, rotary_dim / 2]
    const int64_t *places;                 // [tokens]: the slot of each
    void *k_cache, *v_cache;               // [slots, kv_heads, head_dim]
    int64_t slots, kv_stride, cache_format;
    float *k_scales, *v_scales;  // [slots, kv_heads] for int8, else null
} Glm4KvWrite;

// Returns 0, or 1 where a place lies outside the cache, and then nothing was done.
GLM4_API int glm4_rotate_and_store(const Glm4KvWrite *write);

// A decoder block's weights, and its part of the cache. Norms: [size], of the step's dtype; the last one is what the
// stream is normalised with for the block after.
typedef struct {
    const Glm4Weight *q, *k, *v, *o, *gate_up, *down;
    const void *post_self_attn_norm, *post_attention_norm, *post_mlp_norm, *next_norm;
    void *k_cache, *v_cache;
    float *k_scales, *v_scales;
} Glm4Block;

// What is the same for all blocks of a step. The caches and scales in `write` and `attention` are not read. All memory
// is of the same dtype, and dense: the strides are the rows of the weights.
typedef struct {
    Glm4KvWrite write;        // write.k and write.v are room, as all that follows the first two
    Glm4Attention attention;  // attention.q is write.q
    void *hidden, *normed;    // [tokens, size]: the residual stream, and normalised for the block; both are replaced
    void *branch;             // [tokens, size]
    void *gate_up, *gated;    // [tokens, 2, intermediate], [tokens, intermediate]
    float eps;
} Glm4Step;

// attended = attention of q, k, v; hidden += n(o(attended)); then hidden += n(down(swiglu(gate_up(n(hidden))))).
// Returns 0, or 1 where a slot or a block lies outside the cache.
GLM4_API int glm4_block(const Glm4Block *block, const Glm4Step *step);

// Where each row of logits is largest.
typedef struct {
    int64_t rows, size, known;  // only the first `known` of `size` numbers may be picked
    int64_t stride;             // elements between rows
    int64_t dtype;
    const void *logits;  // [rows, size]
    int64_t *picked;     // [rows]: the first of the largest; -1 for a row that holds NaN or infinity anywhere
} Glm4Argmax;

GLM4_API void glm4_argmax(const Glm4Argmax *argmax);

// Collectives of processes on one machine (collectives.cpp). All map the same file of glm4_group_bytes zeros.
typedef enum { GLM4_SUM_FLOAT32 = 0, GLM4_SUM_BFLOAT16 = 1, GLM4_MAX_FLOAT32 = 2 } Glm4Reduction;
// A call waits for `patience` nanoseconds at most. After NOT_YET, it goes on when made again with the same arguments.
// MIXED_UP: the ranks made different calls.
typedef enum { GLM4_DONE = 0, GLM4_NOT_YET = 1, GLM4_MIXED_UP = 2 } Glm4Progress;

// Size of the file; 0 where there cannot be so many ranks.
GLM4_API int64_t glm4_group_bytes(int ranks);

// One rank's end of the group; null, with errno, when the file cannot be mapped. Keeps no hold of the descriptor.
GLM4_API void *glm4_group_open(int file, int ranks, int rank);
GLM4_API void glm4_group_close(void *group);

// The ranks that the last call waits for, a bit each.
GLM4_API uint64_t glm4_group_missing(const void *group);

// data[i] of all ranks, joined in rank order, into data[i]: the same bits on every rank. Sums are added up in float and
// rounded once; the largest of numbers among which one is NaN is NaN.
GLM4_API Glm4Progress glm4_all_reduce(void *group, void *data, int64_t count, Glm4Reduction reduction,
                                      int64_t patience);

// The rows of all ranks side by side, on rank 0; data: [rows, row_bytes], out: [rows, ranks * row_bytes] there.
GLM4_API Glm4Progress glm4_gather(void *group, const void *data, int64_t rows, int64_t row_bytes, void *out,
                                  int64_t patience);

// Read `bytes` once with all threads, as fast as loads go; for benchmarks. Returns a checksum.
GLM4_API uint64_t glm4_read_stream(const void *memory, size_t bytes);

// Multiply and add 8-bit numbers in registers, on all threads; for benchmarks. Returns the operations, two a product.
GLM4_API int64_t glm4_multiply(int64_t rounds);

#ifdef __cplusplus
}
#endif
