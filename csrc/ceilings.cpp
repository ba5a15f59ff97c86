// What the machine can do at best, for benchmarks: plain reads, and products in registers.
#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "thread_pool.h"

extern "C" {

uint64_t glm4_read_stream(const void *memory, size_t bytes) {
    constexpr size_t kChunk = size_t{1} << 21;
    std::atomic<uint64_t> total{0};
    glm4::parallel_for(glm4::ceil_div(static_cast<int64_t>(bytes), kChunk), [&](int64_t i) {
        const size_t first = static_cast<size_t>(i) * kChunk;
        const char *from = static_cast<const char *>(memory) + first;
        total += glm4::kernels().read_stream(from, std::min(kChunk, bytes - first));
    });
    return total;
}

int64_t glm4_multiply(int64_t rounds) {
    std::atomic<int64_t> total{0};
    glm4::parallel_for(glm4::threads(), [&](int64_t) { total += glm4::kernels().multiply(rounds); });
    return total;
}
}
