// Attention over a paged cache. Included by isa.cpp after bf16_kernels.h.
//
// The lanes of a vector are query rows (the heads that share a key/value head, of one or several tokens): keys and
// values are read once for all of them, nothing is summed across lanes, and a row's result does not depend on the rows
// beside it. Softmax is computed online, chunk by chunk (Milakov & Gimelshein, 2018).
#pragma once

constexpr int kRowVectors = 2;               // vectors of query rows in a tile, at most
constexpr int kRows = kRowVectors * kLanes;  // query rows of a tile, at most
constexpr int kChunk = 64;                   // positions whose keys and values are gathered at a time
constexpr float kUnseen = -1e30f;            // the score of a key that a row must not see

// Scalars that share a loaded vector: enough sums under way to hide an instruction's latency.
constexpr int unroll(int vectors) { return kUnroll * kRowVectors / vectors; }

inline VecF load_element(const int8_t *p) { return to_float(load_s8(p)); }

// The scratch of one task, in words.
template <class Numbers>
struct AttentionScratch {
    int32_t *queries;  // [head_dim / kPack, kRows]
    int32_t *keys;     // [kChunk, head_dim / kPack]
    int32_t *values;   // [kChunk / kPack, head_dim]
    int32_t *weights;  // [kChunk / kPack, kRows]
    float *scores;     // [kChunk, kRows]
    AttentionScratch(char *memory, int64_t dim) {
        queries = reinterpret_cast<int32_t *>(memory);
        keys = queries + dim / Numbers::kPack * kRows;
        values = keys + dim / Numbers::kPack * kChunk;
        weights = values + dim / Numbers::kPack * kChunk;
        scores = reinterpret_cast<float *>(weights + kChunk / Numbers::kPack * kRows);
    }
};

size_t attention_scratch_size(int64_t dim) {
    return static_cast<size_t>(dim * kRows + 2 * kChunk * dim + 2 * kChunk * kRows) * sizeof(float);
}

// One running softmax: [head_dim, kRows] weighted values, then the rows' largest scores and sums.
struct Partial {
    float *values, *largest, *sums;
    Partial(float *memory, int64_t dim) : values(memory), largest(memory + dim * kRows), sums(largest + kRows) {}
};

int64_t attention_partial_floats(int64_t dim) { return (dim + 2) * kRows; }

// The words of a row of numbers, as they are multiplied: `rows` of them side by side, zeros beyond the tile's own.
template <class Numbers, class Element>
inline void gather_queries(const Glm4Attention &a, const AttentionTile &tile, const Element *q, int rows, int32_t *to) {
    const int64_t group = a.heads / a.kv_heads, words = a.head_dim / Numbers::kPack;
    int32_t some[kMostHeadDim] = {};
    for (int r = 0; r < rows; ++r) {
        const int64_t row = tile.first_row + r, token = tile.first_token + row / group;
        const Element *from = q + token * a.q_stride + (tile.kv_head * group + row % group) * a.head_dim;
        if (r >= tile.rows)
            memset(some, 0, sizeof some);
        else if constexpr (Numbers::kPack * sizeof(Element) == sizeof(int32_t))  // they are words as they lie
            memcpy(some, from, static_cast<size_t>(words) * sizeof(int32_t));
        else
            for (int64_t d = 0; d < a.head_dim; d += kLanes) store_i(some + d, float_to_bits(load_element(from + d)));
        for (int64_t d = 0; d < words; ++d) to[d * kRows + r] = some[d];
    }
}

// Where a chunk's keys and values are in the cache.
struct Slots {
    int64_t count = 0, at[kChunk];
    Slots(const Glm4Attention &a, const AttentionTile &tile, int64_t first, int64_t end) {
        int64_t block = first / a.block_size, offset = first % a.block_size;
        for (; first < end && count < kChunk; ++first) {
            at[count++] = tile.table[block] * a.block_size + offset;
            if (++offset == a.block_size) offset = 0, ++block;
        }
    }
};

template <class Element>
inline const Element *row_of(const Glm4Attention &a, const AttentionTile &tile, const void *cache, int64_t slot) {
    return static_cast<const Element *>(cache) + slot * a.kv_stride + tile.kv_head * a.head_dim;
}

// A chunk lies in as many places as it has positions, which the hardware does not foresee: without this, half of the
// time is spent waiting for memory. Inlined by force: GCC 12 deletes the calls of a function that only prefetches.
template <class Element>
__attribute__((always_inline)) inline void prefetch_rows(const Glm4Attention &a, const AttentionTile &tile,
                                                         const void *cache, const Slots &slots, int64_t first,
                                                         int64_t end) {
    for (int64_t i = first; i < end && i < slots.count; ++i) {
        const char *row = reinterpret_cast<const char *>(row_of<Element>(a, tile, cache, slots.at[i]));
        for (int64_t line = 0; line < a.head_dim * static_cast<int64_t>(sizeof(Element)); line += 64)
            __builtin_prefetch(row + line);
    }
}

// A chunk's keys, as words; rows of zeros up to `padded`.
template <class Numbers, class Element>
inline void gather_keys(const Glm4Attention &a, const AttentionTile &tile, const Slots &slots, int64_t padded,
                        int32_t *to) {
    const int64_t words = a.head_dim / Numbers::kPack, count = slots.count;
    for (int64_t i = 0; i < count; ++i) {
        const Element *from = row_of<Element>(a, tile, a.k_cache, slots.at[i]);
        int64_t d = 0;
        if constexpr (Numbers::kPack == 2 && sizeof(Element) == sizeof(uint16_t)) {  // words as they lie
            memcpy(to + i * words, from, static_cast<size_t>(words) * sizeof(int32_t));
            continue;
        }
        if constexpr (Numbers::kPack == 2)
            for (; d + 2 * kLanes <= a.head_dim; d += 2 * kLanes)
                store_i(to + i * words + d / 2, neighbours(load_element(from + d), load_element(from + d + kLanes)));
        for (; d < a.head_dim; d += kLanes) {
            if constexpr (Numbers::kPack == 1)
                store_i(to + i * words + d, float_to_bits(load_element(from + d)));
            else
                store_low16(reinterpret_cast<uint16_t *>(to + i * words) + d,
                            shift_right<16>(float_to_bits(load_element(from + d))));
        }
    }
    memset(to + count * words, 0, static_cast<size_t>((padded - count) * words) * sizeof(int32_t));
}

// A chunk's values; a pair holds two positions of one dimension.
template <class Numbers, class Element>
inline void gather_values(const Glm4Attention &a, const AttentionTile &tile, const Slots &slots, int64_t padded,
                          int32_t *to) {
    const auto row = [&](int64_t i) {
        return i < slots.count ? row_of<Element>(a, tile, a.v_cache, slots.at[i]) : nullptr;
    };
    for (int64_t i = 0; i < padded; i += Numbers::kPack, to += a.head_dim) {
        const Element *low = row(i), *high = Numbers::kPack == 2 ? row(i + 1) : nullptr;
        for (int64_t d = 0; d < a.head_dim; d += kLanes) {
            const VecF x = low ? load_element(low + d) : zero_f();
            store_i(to + d,
                    Numbers::kPack == 1 ? float_to_bits(x) : pair_up(x, high ? load_element(high + d) : zero_f()));
        }
    }
}

// out[j][v] += sum over i of the word a[i · step + j · next] times the vector b[i][v].
template <class Numbers, int Vectors>
inline void multiply(const int32_t *a, int64_t step, int64_t next, const int32_t *b, int64_t count,
                     VecF (&out)[unroll(Vectors)][Vectors]) {
    for (int64_t i = 0; i < count; ++i) {
        VecI row[Vectors];
        for (int v = 0; v < Vectors; ++v) row[v] = load_i(b + i * kRows + v * kLanes);
        for (int j = 0; j < unroll(Vectors); ++j) {
            const VecI x = set_i(a[i * step + j * next]);
            for (int v = 0; v < Vectors; ++v) out[j][v] = Numbers::multiply_add(x, row[v], out[j][v]);
        }
    }
}

// Scores of `count` positions, masked, into s.scores; `largest` rises with them. scales: one for each position.
// between(first, end) is called for all of the positions, a few at a time.
template <class Numbers, int Vectors, class Between>
inline void score_chunk(const Glm4Attention &a, const AttentionScratch<Numbers> &s, const VecI (&limits)[Vectors],
                        const float *scales, int64_t first, int64_t count, VecF (&largest)[Vectors],
                        const Between &between) {
    const int64_t words = a.head_dim / Numbers::kPack;
    for (int64_t c = 0; c < count; c += unroll(Vectors)) {
        between(c, c + unroll(Vectors));
        VecF dots[unroll(Vectors)][Vectors];
        for (auto &row : dots)
            for (VecF &x : row) x = zero_f();
        multiply<Numbers, Vectors>(s.keys + c * words, 1, words, s.queries, words, dots);
        for (int j = 0; j < unroll(Vectors); ++j)
            for (int v = 0; v < Vectors; ++v) {
                const VecI score = float_to_bits(mul(dots[j][v], set_f(scales[c + j])));
                const VecI position = set_i(static_cast<int32_t>(first + c + j));
                const VecF seen =
                    bits_to_float(select_greater(position, limits[v], float_to_bits(set_f(kUnseen)), score));
                store_f(s.scores + (c + j) * kRows + v * kLanes, seen);
                largest[v] = max_f(largest[v], seen);
            }
    }
}

// Scores to weights, and their sums; then the weights times their values' scales, as words.
template <class Numbers, int Vectors>
inline void weigh_chunk(const AttentionScratch<Numbers> &s, const float *scales, int64_t count,
                        const VecF (&largest)[Vectors], VecF (&sums)[Vectors]) {
    for (int64_t c = 0; c < count; c += Numbers::kPack)
        for (int v = 0; v < Vectors; ++v) {
            VecF scaled[Numbers::kPack];
            for (int i = 0; i < Numbers::kPack; ++i) {
                const VecF score = load_f(s.scores + (c + i) * kRows + v * kLanes);
                const VecF weight = exp_negative(sub(score, largest[v]));
                sums[v] = add(sums[v], weight);
                scaled[i] = scales ? mul(weight, set_f(scales[c + i])) : weight;
            }
            int32_t *to = s.weights + c / Numbers::kPack * kRows + v * kLanes;
            if constexpr (Numbers::kPack == 1)
                store_i(to, float_to_bits(scaled[0]));
            else
                store_i(to, or_i(to_bf16(scaled[0]), shift_left<16>(to_bf16(scaled[1]))));
        }
}

// between(first, end) as above, for all of a chunk.
template <class Numbers, int Vectors, class Between>
inline void add_values(const Glm4Attention &a, const AttentionScratch<Numbers> &s, int64_t count,
                       const VecF (&fade)[Vectors], float *values, const Between &between) {
    for (int64_t d = 0; d < a.head_dim; d += unroll(Vectors)) {
        between(d * kChunk / a.head_dim, (d + unroll(Vectors)) * kChunk / a.head_dim);
        VecF out[unroll(Vectors)][Vectors];
        for (int j = 0; j < unroll(Vectors); ++j)
            for (int v = 0; v < Vectors; ++v) out[j][v] = mul(load_f(values + (d + j) * kRows + v * kLanes), fade[v]);
        multiply<Numbers, Vectors>(s.values + d, a.head_dim, 1, s.weights, count / Numbers::kPack, out);
        for (int j = 0; j < unroll(Vectors); ++j)
            for (int v = 0; v < Vectors; ++v) store_f(values + (d + j) * kRows + v * kLanes, out[j][v]);
    }
}

// The numbers that scores and weights are multiplied by: the keys' and values' scales where there are any.
inline void gather_scales(const Glm4Attention &a, const AttentionTile &tile, const float *scales, float factor,
                          const Slots &slots, float (&to)[kChunk]) {
    for (int64_t i = 0; i < kChunk; ++i)
        to[i] = !scales || i >= slots.count ? factor : factor * scales[slots.at[i] * a.kv_heads + tile.kv_head];
}

// Positions [first, end) for one tile of query rows.
template <class Numbers, int Vectors, class Element>
inline void attend(const Glm4Attention &a, const AttentionTile &tile, int64_t first, int64_t end, char *scratch,
                   float *partial) {
    const AttentionScratch<Numbers> s(scratch, a.head_dim);
    const Partial p(partial, a.head_dim);
    Slots slots(a, tile, first, end);
    prefetch_rows<Element>(a, tile, a.k_cache, slots, 0, kChunk);
    prefetch_rows<Element>(a, tile, a.v_cache, slots, 0, kChunk);
    if (Numbers::kPack == 2 || a.dtype == GLM4_BFLOAT16)  // pairs are made of nothing else
        gather_queries<Numbers>(a, tile, static_cast<const uint16_t *>(a.q), Vectors * kLanes, s.queries);
    else
        gather_queries<Floats>(a, tile, static_cast<const float *>(a.q), Vectors * kLanes, s.queries);
    VecI limits[Vectors];
    VecF largest[Vectors], sums[Vectors];
    int32_t last_seen[kRows];
    for (int r = 0; r < kRows; ++r)
        last_seen[r] = static_cast<int32_t>(tile.start + (tile.first_row + r) / (a.heads / a.kv_heads));
    for (int v = 0; v < Vectors; ++v)
        limits[v] = load_i(last_seen + v * kLanes), largest[v] = set_f(kUnseen), sums[v] = zero_f();
    memset(p.values, 0, static_cast<size_t>(a.head_dim * kRows) * sizeof(float));
    for (int64_t c = first; c < end; c += kChunk) {
        const Slots next(a, tile, c + kChunk, end);
        const int64_t padded = ceil_div(slots.count, unroll(Vectors)) * unroll(Vectors);
        float k_scales[kChunk], v_scales[kChunk];
        gather_scales(a, tile, a.k_scales, a.scale, slots, k_scales);
        gather_scales(a, tile, a.v_scales, 1.0f, slots, v_scales);
        gather_keys<Numbers, Element>(a, tile, slots, padded, s.keys);
        gather_values<Numbers, Element>(a, tile, slots, padded, s.values);
        VecF fade[Vectors];
        for (int v = 0; v < Vectors; ++v) fade[v] = largest[v];
        score_chunk<Numbers, Vectors>(a, s, limits, k_scales, c, padded, largest, [&](int64_t from, int64_t to) {
            prefetch_rows<Element>(a, tile, a.k_cache, next, from, to);
        });
        for (int v = 0; v < Vectors; ++v) {
            fade[v] = exp_negative(sub(fade[v], largest[v]));
            sums[v] = mul(sums[v], fade[v]);
        }
        weigh_chunk<Numbers, Vectors>(s, a.v_scales ? v_scales : nullptr, padded, largest, sums);
        add_values<Numbers, Vectors>(a, s, padded, fade, p.values, [&](int64_t from, int64_t to) {
            prefetch_rows<Element>(a, tile, a.v_cache, next, from, to);
        });
        slots = next;
    }
    for (int v = 0; v < Vectors; ++v)
        store_f(p.largest + v * kLanes, largest[v]), store_f(p.sums + v * kLanes, sums[v]);
}

template <class Numbers, class Element>
inline void attend_any_rows(const Glm4Attention &a, const AttentionTile &tile, int64_t first, int64_t end,
                            char *scratch, float *partial) {
    if (tile.rows <= kLanes)
        attend<Numbers, 1, Element>(a, tile, first, end, scratch, partial);
    else
        attend<Numbers, kRowVectors, Element>(a, tile, first, end, scratch, partial);
}

void attention_partial(const Glm4Attention &a, const AttentionTile &tile, int64_t first, int64_t end, char *scratch,
                       float *partial) {
    const auto attend_to = [&](auto element) {
        using Element = decltype(element);
        if constexpr (sizeof(Element) < sizeof(float))
            if (a.dtype == GLM4_BFLOAT16)
                return attend_any_rows<BestNumbers, Element>(a, tile, first, end, scratch, partial);
        attend_any_rows<Floats, Element>(a, tile, first, end, scratch, partial);
    };
    if (a.cache_format == GLM4_CACHE_FLOAT32) attend_to(float());
    if (a.cache_format == GLM4_CACHE_BFLOAT16) attend_to(uint16_t());
    if (a.cache_format == GLM4_CACHE_INT8) attend_to(int8_t());
}

// The partial results of a tile, in order, into one; then out to its tokens. Lanes are rows until the last moment.
template <class Element>
inline void merge(const Glm4Attention &a, const AttentionTile &tile, const float *partials, int64_t count,
                  Element *out) {
    const int64_t dim = a.head_dim, floats = attention_partial_floats(dim), group = a.heads / a.kv_heads;
    for (int first = 0; first < tile.rows; first += kLanes) {
        const float *largest_of = partials + dim * kRows + first, *sum_of = largest_of + kRows;
        VecF largest = set_f(kUnseen), sum = zero_f();
        for (int64_t i = 0; i < count; ++i) largest = max_f(largest, load_f(largest_of + i * floats));
        float weights[kMostSplits * kLanes];
        for (int64_t i = 0; i < count; ++i) {
            const VecF weight = exp_negative(sub(load_f(largest_of + i * floats), largest));
            store_f(weights + i * kLanes, weight);
            sum = add(sum, mul(weight, load_f(sum_of + i * floats)));
        }
        const VecF share = div(set_f(1.0f), sum);
        for (int64_t d = 0; d < dim; d += kLanes) {
            float some[kLanes][kLanes];
            for (int j = 0; j < kLanes; ++j) {
                VecF value = zero_f();
                for (int64_t i = 0; i < count; ++i)
                    value = add(value, mul(load_f(weights + i * kLanes),
                                           load_f(partials + i * floats + (d + j) * kRows + first)));
                store_f(some[j], mul(value, share));
            }
            for (int r = 0; r < kLanes && first + r < tile.rows; ++r) {
                const int64_t row = tile.first_row + first + r;
                float turned[kLanes];
                for (int j = 0; j < kLanes; ++j) turned[j] = some[j][r];
                store_element(out + (tile.first_token + row / group) * a.out_stride +
                                  (tile.kv_head * group + row % group) * dim + d,
                              load_f(turned));
            }
        }
    }
}

void attention_merge(const Glm4Attention &a, const AttentionTile &tile, const float *partials, int64_t count) {
    if (a.dtype == GLM4_BFLOAT16)
        merge(a, tile, partials, count, static_cast<uint16_t *>(a.out));
    else
        merge(a, tile, partials, count, static_cast<float *>(a.out));
}
