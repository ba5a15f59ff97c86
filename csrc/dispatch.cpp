// Which instruction set runs: chosen once, from what the CPU has.
#include <string.h>

#include <atomic>

#include "kernels.h"

namespace glm4 {

extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512vnni, kernels_avx512bf16;
#endif

namespace {

struct Choice {
    const Kernels *kernels;
    bool supported;
};

#if defined(__x86_64__)
bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

// Best first.
const Choice *choices(int &count) {
    static const Choice all[] = {
#if defined(__x86_64__)
        {&kernels_avx512bf16, has_avx512vnni() && __builtin_cpu_supports("avx512bf16")},
        {&kernels_avx512vnni, has_avx512vnni()},
        {&kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {&kernels_plain, true},
    };
    count = static_cast<int>(sizeof all / sizeof *all);
    return all;
}

std::atomic<const Kernels *> chosen{nullptr};

}  // namespace

const Kernels &kernels() {
    if (!chosen.load(std::memory_order_acquire)) glm4_select_isa(nullptr);
    return *chosen.load(std::memory_order_acquire);
}

}  // namespace glm4

extern "C" {

int glm4_abi_version(void) { return GLM4_ABI_VERSION; }

const char *glm4_select_isa(const char *name) {
    int count;
    const glm4::Choice *all = glm4::choices(count);
    for (int i = 0; i < count; ++i) {
        if (!all[i].supported || (name && strcmp(name, all[i].kernels->name) != 0)) continue;
        glm4::chosen.store(all[i].kernels, std::memory_order_release);
        return all[i].kernels->name;
    }
    return nullptr;
}
}
