// Memory for weights: anonymous mappings that ask for huge pages. With 4 KB pages a streaming read here loses up to
// a third to address translation, and many systems grant huge pages to those who ask only. Where there are several
// memory nodes, pages are dealt out to them in turn: any thread may read any weight, so all of them use all channels.
#include <sys/mman.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#endif

#include <algorithm>

#include "glm4_cpu.h"
#include "thread_pool.h"

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// The memory nodes that this process may use, a bit each; 0 where the system does not say.
uint64_t allowed_nodes() {
#if defined(SYS_get_mempolicy)
    unsigned long nodes[16] = {};  // as many as any system has, though only the first 64 are used
    if (syscall(SYS_get_mempolicy, nullptr, nodes, sizeof nodes * 8, nullptr, MPOL_F_MEMS_ALLOWED) == 0)
        return nodes[0];
#endif
    return 0;
}

void set_policy(int policy, unsigned long nodes) {
#if defined(SYS_set_mempolicy)
    syscall(SYS_set_mempolicy, policy, nodes ? &nodes : nullptr, nodes ? sizeof nodes * 8 : 0);
#endif
}

size_t mapped(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

extern "C" {

void *glm4_allocate(size_t bytes) {
    // One huge page more than needed, so that a part of it starts on a border; the rest is given back.
    const size_t size = mapped(bytes);
    void *raw = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return nullptr;
    char *start = static_cast<char *>(raw);
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(raw) % kHugePage) % kHugePage;
    if (before) munmap(start, before);
    if (before != kHugePage) munmap(start + before + size, kHugePage - before);
#if defined(MADV_HUGEPAGE)
    madvise(start + before, size, MADV_HUGEPAGE);  // a kernel without them still works
#endif
    return start + before;
}

int glm4_memory_nodes(void) {
    const int count = __builtin_popcountll(allowed_nodes());
    return count ? count : 1;
}

int glm4_spread(void *memory, size_t bytes) {
#if defined(SYS_mbind)
    const unsigned long nodes = allowed_nodes();
    return syscall(SYS_mbind, memory, mapped(bytes), MPOL_INTERLEAVE, &nodes, sizeof nodes * 8, 0) == 0;
#else
    return memory && bytes ? 0 : 1;
#endif
}

void glm4_map_in(const void *memory, size_t bytes) {
#if defined(MADV_POPULATE_READ)  // Linux 5.14; elsewhere the first use does it
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t first = address / page * page, size = address + bytes - first;
    constexpr uintptr_t kPiece = uintptr_t{16} << 20;
    madvise(reinterpret_cast<void *>(first), size, MADV_HUGEPAGE);
    const bool several = glm4_memory_nodes() > 1;
    glm4::parallel_for(static_cast<int64_t>((size + kPiece - 1) / kPiece), [&](int64_t i) {
        const uintptr_t begin = static_cast<uintptr_t>(i) * kPiece;
        // A file's pages lie where the thread that first reads them wants its own.
        if (several) set_policy(MPOL_INTERLEAVE, allowed_nodes());
        madvise(reinterpret_cast<void *>(first + begin), std::min(kPiece, size - begin), MADV_POPULATE_READ);
        if (several) set_policy(MPOL_DEFAULT, 0);
    });
#endif
}

void glm4_free(void *memory, size_t bytes) {
    if (memory) munmap(memory, mapped(bytes));
}
}
