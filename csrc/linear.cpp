// Linear layers: activations are rounded once, then panels of rows are handed to threads.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "scratch.h"
#include "thread_pool.h"

namespace glm4 {
namespace {

// Tokens handled at a time: their activations stay in the second and third cache while the weights pass by.
constexpr int64_t kTokenBlock = 480;
constexpr int64_t kChunksAThread = 8;

thread_local Scratch scratch;

// Cuts tokens into tiles of nearly equal size and lays them out in one piece of memory.
class Tiles {
  public:
    Tiles(const Glm4Weight &w, int64_t tokens)
        : tokens_(tokens),
          count_(ceil_div(tokens, kernels().tile)),
          values_size_(ceil_div(group_count(w) * group_steps(w) * 4, 64) * 64),
          groups_(group_count(w)) {
        memory_ = scratch.need(static_cast<size_t>(tokens * (values_size_ + 4 * groups_ + 4)));
    }
    int64_t count() const { return count_; }
    int64_t first(int64_t tile) const { return tile * tokens_ / count_; }
    ActivationTile tile(int64_t i) const {
        const int64_t start = first(i);
        char *sums = memory_ + tokens_ * values_size_;
        return {static_cast<int>(first(i + 1) - start), reinterpret_cast<int8_t *>(memory_ + start * values_size_),
                reinterpret_cast<int32_t *>(sums) + start * groups_,
                reinterpret_cast<float *>(sums + tokens_ * groups_ * 4) + start};
    }

  private:
    int64_t tokens_, count_, values_size_, groups_;
    char *memory_;
};

size_t element_size(Glm4Dtype dtype) { return dtype == GLM4_BFLOAT16 ? 2 : 4; }

// Products of the same activations, rounded once: the weights are alike but for their rows.
void linear_block(const Product *products, int count, const char *x, int64_t tokens, size_t x_stride, Glm4Dtype dtype,
                  const float *largest) {
    const Kernels &k = kernels();
    const Glm4Weight &alike = *products[0].weight;
    const Tiles tiles(alike, tokens);
    parallel_for(tiles.count(), [&](int64_t i) {
        const ActivationTile tile = tiles.tile(i);
        for (int t = 0; t < tile.tokens; ++t) {
            const int64_t at = tiles.first(i) + t;
            k.quantize_token(alike, x + static_cast<size_t>(at) * x_stride, dtype, largest ? largest[at] : 0.0f, tile,
                             t);
        }
    });
    int64_t panels = 0;
    for (int i = 0; i < count; ++i) panels += panel_count(*products[i].weight);
    // Neighbouring panels go to one thread, so that it reads one stream, in enough pieces that a slow core holds up
    // little.
    const int64_t chunk = std::max<int64_t>(1, panels / (threads() * kChunksAThread));
    parallel_for(ceil_div(panels, chunk), [&](int64_t i) {
        const Product *product = products;
        int64_t before = 0;  // panels of the products before this one
        for (int64_t at = i * chunk; at < std::min(panels, (i + 1) * chunk); ++at) {
            while (at - before >= panel_count(*product->weight)) before += panel_count(*product++->weight);
            const int64_t panel = at - before;
            for (int64_t j = 0; j < tiles.count(); ++j) {
                const int64_t first = tiles.first(j) * product->out_stride + panel * kPanelRows;
                k.linear_tile(*product->weight, panel, tiles.tile(j), dtype,
                              product->out + static_cast<size_t>(first) * element_size(dtype), product->out_stride);
            }
        }
    });
}

bool alike(const Glm4Weight &a, const Glm4Weight &b) {
    return a.inputs == b.inputs && a.bits == b.bits && a.group_size == b.group_size && !a.zeros == !b.zeros;
}

}  // namespace

void linear(const Product *products, int count, const void *x, int64_t tokens, int64_t x_stride, Glm4Dtype dtype,
            const float *largest) {
    for (int i = 1; i < count; ++i)
        if (!alike(*products[0].weight, *products[i].weight)) {
            for (int each = 0; each < count; ++each) linear(products + each, 1, x, tokens, x_stride, dtype, largest);
            return;
        }
    const size_t size = element_size(dtype), x_bytes = static_cast<size_t>(x_stride) * size;
    std::vector<Product> block(products, products + count);
    for (int64_t first = 0; first < tokens; first += kTokenBlock) {
        linear_block(block.data(), count, static_cast<const char *>(x) + static_cast<size_t>(first) * x_bytes,
                     std::min(kTokenBlock, tokens - first), x_bytes, dtype, largest ? largest + first : nullptr);
        for (Product &product : block) product.out += static_cast<size_t>(kTokenBlock * product.out_stride) * size;
    }
}

}  // namespace glm4

extern "C" {

void glm4_linear(const Glm4Weight *weight, const void *x, int64_t tokens, int64_t x_stride, Glm4Dtype dtype,
                 const float *largest, void *out, int64_t out_stride) {
    const glm4::Product product = {weight, static_cast<char *>(out), out_stride};
    glm4::linear(&product, 1, x, tokens, x_stride, dtype, largest);
}

void glm4_linear_bf16(const uint16_t *weight, int64_t rows, int64_t inputs, int64_t weight_stride, const float *bias,
                      const uint16_t *x, int64_t tokens, int64_t x_stride, uint16_t *out, int64_t out_stride) {
    const glm4::Kernels &k = glm4::kernels();
    const int64_t words = k.bf16_words(inputs), chunk = std::max<int64_t>(16, rows / (glm4::threads() * 8) / 8 * 8);
    int32_t *prepared =
        reinterpret_cast<int32_t *>(glm4::scratch.need(static_cast<size_t>(tokens * words) * sizeof(int32_t)));
    for (int64_t t = 0; t < tokens; ++t) k.bf16_prepare(x + t * x_stride, inputs, prepared + t * words);
    const glm4::Bf16Linear linear = {weight, weight_stride, inputs, bias, prepared, tokens, out, out_stride};
    glm4::parallel_for(glm4::ceil_div(rows, chunk),
                       [&](int64_t i) { k.bf16_rows(linear, i * chunk, std::min(rows, (i + 1) * chunk)); });
}
}
