// Attention: the work is cut into tiles of query rows and splits of the context, always at the same places, so that the
// result does not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "scratch.h"
#include "thread_pool.h"

namespace glm4 {
namespace {

// Unfinished results that wait to be merged.
constexpr int64_t kMostPartialBytes = int64_t{8} << 20;

thread_local Scratch partial_scratch, task_scratch;

std::vector<AttentionTile> make_tiles(const Glm4Attention &a) {
    const int64_t group = a.heads / a.kv_heads;
    std::vector<AttentionTile> tiles;
    for (int64_t i = 0; i < a.requests; ++i) {
        const int64_t first = a.spans[2 * i], rows = (a.spans[2 * i + 1] - first) * group;
        for (int64_t row = 0; row < rows; row += kernels().rows)
            for (int64_t head = 0; head < a.kv_heads; ++head)
                tiles.push_back({first, a.starts[i], head, row,
                                 static_cast<int>(std::min<int64_t>(kernels().rows, rows - row)),
                                 a.tables + i * a.table_stride});
    }
    return tiles;
}

// One past the last position that a row of the tile sees.
int64_t context_end(const Glm4Attention &a, const AttentionTile &tile) {
    return tile.start + (tile.first_row + tile.rows - 1) / (a.heads / a.kv_heads) + 1;
}

bool blocks_are_inside(const Glm4Attention &a) {
    for (int64_t i = 0; i < a.requests; ++i) {
        const int64_t context = a.starts[i] + a.spans[2 * i + 1] - a.spans[2 * i];
        for (int64_t block = 0; block < ceil_div(context, a.block_size); ++block) {
            const int64_t id = a.tables[i * a.table_stride + block];
            if (id < 0 || (id + 1) * a.block_size > a.slots) return false;
        }
    }
    return true;
}

struct Piece {
    const AttentionTile *tile;
    int64_t first, end;
};

// Tiles [begin, end) whose partial results fit into memory together, and the pieces they are made of.
size_t take_tiles(const Glm4Attention &a, const std::vector<AttentionTile> &tiles, size_t begin, int64_t most_pieces,
                  std::vector<Piece> &pieces) {
    pieces.clear();
    size_t end = begin;
    for (; end < tiles.size(); ++end) {
        const int64_t context = context_end(a, tiles[end]);
        if (end > begin && static_cast<int64_t>(pieces.size()) + ceil_div(context, kSplit) > most_pieces) break;
        for (int64_t first = 0; first < context; first += kSplit)
            pieces.push_back({&tiles[end], first, std::min(context, first + kSplit)});
    }
    return end;
}

void attention(const Glm4Attention &a) {
    const Kernels &k = kernels();
    const std::vector<AttentionTile> tiles = make_tiles(a);
    const int64_t floats = k.attention_partial_floats(a.head_dim);
    const int64_t most_pieces = std::max<int64_t>(1, kMostPartialBytes / (floats * 4));
    std::vector<Piece> pieces;
    for (size_t begin = 0, end; begin < tiles.size(); begin = end) {
        end = take_tiles(a, tiles, begin, most_pieces, pieces);
        float *partials =
            reinterpret_cast<float *>(partial_scratch.need(pieces.size() * static_cast<size_t>(floats) * 4));
        parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
            const Piece &piece = pieces[static_cast<size_t>(i)];
            k.attention_partial(a, *piece.tile, piece.first, piece.end,
                                task_scratch.need(k.attention_scratch_size(a.head_dim)), partials + i * floats);
        });
        std::vector<int64_t> starts;
        for (size_t i = 0; i < pieces.size(); ++i)
            if (pieces[i].first == 0) starts.push_back(static_cast<int64_t>(i));
        starts.push_back(static_cast<int64_t>(pieces.size()));
        parallel_for(static_cast<int64_t>(end - begin), [&](int64_t i) {
            const int64_t at = starts[static_cast<size_t>(i)];
            k.attention_merge(a, tiles[begin + static_cast<size_t>(i)], partials + at * floats,
                              starts[static_cast<size_t>(i) + 1] - at);
        });
    }
}

}  // namespace
}  // namespace glm4

extern "C" int glm4_attention(const Glm4Attention *attention) {
    if (!glm4::blocks_are_inside(*attention)) return 1;
    glm4::attention(*attention);
    return 0;
}
