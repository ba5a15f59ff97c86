// Sums over processes of one machine that map the same memory.
//
// A tensor goes through it in chunks. Each rank copies its chunk into its own part of the memory and arrives; when all
// have, every rank adds up all parts in rank order, so that all get the same bits. Where that would read too much, each
// adds up one slice of the chunk, all arrive once more, and each copies the slices of the others. Chunks alternate
// between two halves of a part: who has seen all others arrive for a chunk knows that they are done with the one before
// the last, and may write over it.
#include <limits.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "glm4_cpu.h"

namespace glm4 {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::nanoseconds;

constexpr int64_t kChunk = 256 << 10;       // bytes: some chunks of some ranks fit a core's cache
constexpr int64_t kDirectReads = 64 << 10;  // bytes that a rank reads rather than wait a second time
constexpr int64_t kBlock = 512;             // numbers added up at a time
constexpr nanoseconds kSpinTime{3000};      // about what an exchange takes when all are there
constexpr nanoseconds kYieldTime{50000};    // about what waking a sleeping process takes
constexpr int kMostRanks = 64;

// What a rank tells the others, on cache lines of its own.
struct alignas(128) Seat {
    std::atomic<uint32_t> arrivals;  // times that it has arrived
    std::atomic<uint32_t> sleepers;  // ranks that sleep until it does
    uint64_t calls[2];               // what it computes in either half, to tell a mix-up
};
static_assert(sizeof(std::atomic<uint32_t>) == 4, "a futex is a word of 32 bits");

// One process's end of a group, and how far the call in progress is.
struct Group {
    Seat *seats;
    char *parts;
    size_t mapped;
    int ranks, rank;
    bool spin;  // every rank has a core to itself
    uint32_t arrivals = 0;
    int half = 0;
    int stage = 0;     // times that this rank has arrived for the chunk
    int64_t done = 0;  // bytes of the chunks before

    char *part(int of) const { return parts + (2 * of + half) * kChunk; }
};

size_t seats_bytes(int ranks) { return (ranks * sizeof(Seat) + 4095) / 4096 * 4096; }
size_t group_bytes(int ranks) { return seats_bytes(ranks) + size_t(ranks) * 2 * kChunk; }

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

bool has_arrived(const Group &group, int rank) {
    const uint32_t theirs = group.seats[rank].arrivals.load(std::memory_order_acquire);
    return static_cast<int32_t>(theirs - group.arrivals) >= 0;  // they count round past 2^32
}

#if defined(__linux__)
void sleep_while(std::atomic<uint32_t> &word, uint32_t value, nanoseconds at_most) {
    timespec timeout{};
    timeout.tv_sec = at_most.count() / 1000000000;
    timeout.tv_nsec = at_most.count() % 1000000000;
    syscall(SYS_futex, &word, FUTEX_WAIT, value, &timeout, nullptr, 0);
}
void wake_all(std::atomic<uint32_t> &word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }
#else
void sleep_while(std::atomic<uint32_t> &, uint32_t, nanoseconds) { std::this_thread::sleep_for(kYieldTime); }
void wake_all(std::atomic<uint32_t> &) {}
#endif

void arrive(Group &group, uint64_t call) {
    Seat &seat = group.seats[group.rank];
    seat.calls[group.half] = call;
    seat.arrivals.store(++group.arrivals);  // before the sleepers are read: they count themselves, then look at this
    if (seat.sleepers.load() > 0) wake_all(seat.arrivals);
    ++group.stage;
}

// Whether all have arrived before `deadline`. Who is missing may need this core, so it is offered early on.
bool wait_for_all(const Group &group, Clock::time_point deadline) {
    const Clock::time_point start = Clock::now();
    for (int rank = 0; rank < group.ranks;) {
        const nanoseconds waited = Clock::now() - start;
        Seat &seat = group.seats[rank];
        if (has_arrived(group, rank)) {
            ++rank;
        } else if (start + waited >= deadline) {
            return false;
        } else if (group.spin && waited < kSpinTime) {
            for (int i = 0; i < 32 && !has_arrived(group, rank); ++i) relax();
        } else if (group.spin && waited < kYieldTime) {
            sched_yield();
        } else {
            seat.sleepers.fetch_add(1);
            const uint32_t seen = seat.arrivals.load();
            if (!has_arrived(group, rank)) sleep_while(seat.arrivals, seen, deadline - start - waited);
            seat.sleepers.fetch_sub(1);
        }
    }
    return true;
}

bool all_call(const Group &group, uint64_t call) {
    for (int rank = 0; rank < group.ranks; ++rank)
        if (group.seats[rank].calls[group.half] != call) return false;
    return true;
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {
    const uint32_t bits = uint32_t{x} << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float x, float &out) { out = x; }
inline void store(float x, uint16_t &out) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    out = static_cast<uint16_t>(x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0);
}

struct Sum {
    static float join(float a, float b) { return a + b; }
};
struct Max {
    static float join(float a, float b) { return a > b || a != a ? a : b; }  // b, where b is not a number
};

// Numbers [first, end) of all parts, joined in rank order. `out` may lie in a part.
template <class Join, class Element>
void join_parts(const Group &group, int64_t first, int64_t end, Element *out) {
    float joined[kBlock];
    for (; first < end; first += kBlock, out += kBlock) {
        const int64_t count = std::min(kBlock, end - first);
        const auto part = [&](int rank) { return reinterpret_cast<const Element *>(group.part(rank)) + first; };
        const Element *x = part(0);
        for (int64_t i = 0; i < count; ++i) joined[i] = to_float(x[i]);
        for (int rank = 1; rank < group.ranks; ++rank) {
            x = part(rank);
            for (int64_t i = 0; i < count; ++i) joined[i] = Join::join(joined[i], to_float(x[i]));
        }
        for (int64_t i = 0; i < count; ++i) store(joined[i], out[i]);
    }
}

// The slice of a chunk that a rank adds up; slices begin on cache lines.
int64_t slice_start(const Group &group, int64_t count, int rank) {
    const int64_t length = (count + group.ranks * 32 - 1) / (group.ranks * 32) * 32;
    return std::min(count, length * rank);
}

void end_chunk(Group &group, int64_t bytes) {
    group.done += bytes;
    group.half ^= 1;
    group.stage = 0;
}

template <class Join, class Element>
Glm4Progress all_reduce(Group &group, Element *data, int64_t count, uint64_t call, Clock::time_point deadline) {
    const int64_t size = sizeof(Element);
    while (group.done < count * size) {
        Element *chunk = data + group.done / size;
        const int64_t here = std::min(kChunk / size, count - group.done / size);
        const bool direct = (group.ranks - 2) * here * size <= kDirectReads;
        if (group.stage == 0) {
            memcpy(group.part(group.rank), chunk, here * size);
            arrive(group, call);
        }
        if (group.stage == 1) {
            if (!wait_for_all(group, deadline)) return GLM4_NOT_YET;
            if (!all_call(group, call)) return GLM4_MIXED_UP;
            if (direct) {
                join_parts<Join>(group, 0, here, chunk);
            } else {
                const int64_t first = slice_start(group, here, group.rank);
                Element *own = reinterpret_cast<Element *>(group.part(group.rank)) + first;
                join_parts<Join>(group, first, slice_start(group, here, group.rank + 1), own);
                arrive(group, call);
            }
        }
        if (!direct) {
            if (!wait_for_all(group, deadline)) return GLM4_NOT_YET;
            for (int rank = 0; rank < group.ranks; ++rank) {
                const int64_t first = slice_start(group, here, rank);
                const Element *slice = reinterpret_cast<const Element *>(group.part(rank)) + first;
                memcpy(chunk + first, slice, (slice_start(group, here, rank + 1) - first) * size);
            }
        }
        end_chunk(group, here * size);
    }
    group.done = 0;
    return GLM4_DONE;
}

// Bytes [first, end) of a rank's rows into the columns that are its own in `out`.
void place_rows(const char *part, int64_t first, int64_t end, int64_t row_bytes, char *out, int64_t out_row_bytes) {
    while (first < end) {
        const int64_t row = first / row_bytes, column = first % row_bytes;
        const int64_t length = std::min(row_bytes - column, end - first);
        memcpy(out + row * out_row_bytes + column, part, length);
        part += length;
        first += length;
    }
}

// For the arguments that must be alike on all ranks.
uint64_t call_of(int kind, int64_t size) { return static_cast<uint64_t>(size) << 3 | kind; }

}  // namespace
}  // namespace glm4

using namespace glm4;

extern "C" {

int64_t glm4_group_bytes(int ranks) {
    return ranks < 1 || ranks > kMostRanks ? 0 : static_cast<int64_t>(group_bytes(ranks));
}

void *glm4_group_open(int file, int ranks, int rank) {
    const size_t bytes = group_bytes(ranks);
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return nullptr;
    Group *group = new (std::nothrow) Group;
    if (!group) {
        munmap(memory, bytes);
        return nullptr;
    }
    group->seats = static_cast<Seat *>(memory);
    group->parts = static_cast<char *>(memory) + seats_bytes(ranks);
    group->mapped = bytes;
    group->ranks = ranks;
    group->rank = rank;
    group->spin = static_cast<int>(std::thread::hardware_concurrency()) >= ranks;
    return group;
}

void glm4_group_close(void *handle) {
    Group *group = static_cast<Group *>(handle);
    munmap(group->seats, group->mapped);
    delete group;
}

uint64_t glm4_group_missing(const void *handle) {
    const Group &group = *static_cast<const Group *>(handle);
    uint64_t missing = 0;
    for (int rank = 0; rank < group.ranks; ++rank)
        if (!has_arrived(group, rank)) missing |= uint64_t{1} << rank;
    return missing;
}

Glm4Progress glm4_all_reduce(void *handle, void *data, int64_t count, Glm4Reduction reduction, int64_t patience) {
    Group &group = *static_cast<Group *>(handle);
    const Clock::time_point deadline = Clock::now() + nanoseconds(patience);
    const uint64_t call = call_of(reduction, count);
    switch (reduction) {
        case GLM4_SUM_BFLOAT16: return all_reduce<Sum>(group, static_cast<uint16_t *>(data), count, call, deadline);
        case GLM4_SUM_FLOAT32: return all_reduce<Sum>(group, static_cast<float *>(data), count, call, deadline);
        case GLM4_MAX_FLOAT32: return all_reduce<Max>(group, static_cast<float *>(data), count, call, deadline);
    }
    return GLM4_MIXED_UP;
}

Glm4Progress glm4_gather(void *handle, const void *data, int64_t rows, int64_t row_bytes, void *out, int64_t patience) {
    Group &group = *static_cast<Group *>(handle);
    const Clock::time_point deadline = Clock::now() + nanoseconds(patience);
    const uint64_t call = call_of(GLM4_MAX_FLOAT32 + 1, rows * row_bytes);
    while (group.done < rows * row_bytes) {
        const int64_t here = std::min(kChunk, rows * row_bytes - group.done);
        if (group.stage == 0) {
            memcpy(group.part(group.rank), static_cast<const char *>(data) + group.done, here);
            arrive(group, call);
        }
        if (!wait_for_all(group, deadline)) return GLM4_NOT_YET;
        if (!all_call(group, call)) return GLM4_MIXED_UP;
        for (int rank = 0; rank < group.ranks && group.rank == 0; ++rank)
            place_rows(group.part(rank), group.done, group.done + here, row_bytes,
                       static_cast<char *>(out) + rank * row_bytes, group.ranks * row_bytes);
        end_chunk(group, here);
    }
    group.done = 0;
    return GLM4_DONE;
}
}
