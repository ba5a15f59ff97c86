// What lies between the matrix products: tokens are handed to threads a few at a time.
#include <algorithm>

#include "kernels.h"
#include "thread_pool.h"

namespace glm4 {
namespace {

constexpr int64_t kTokensATask = 4;  // a token takes about a microsecond, and so does handing out a task

template <class Layer>
void for_tokens(const Layer &layer, void (*one)(const Layer &, int64_t)) {
    parallel_for(ceil_div(layer.tokens, kTokensATask), [&](int64_t i) {
        for (int64_t t = i * kTokensATask; t < std::min(layer.tokens, (i + 1) * kTokensATask); ++t) one(layer, t);
    });
}

}  // namespace
}  // namespace glm4

extern "C" {

void glm4_norm(const Glm4Norm *norm) { glm4::for_tokens(*norm, glm4::kernels().norm_token); }
void glm4_swiglu(const Glm4Swiglu *swiglu) { glm4::for_tokens(*swiglu, glm4::kernels().swiglu_token); }

void glm4_argmax(const Glm4Argmax *argmax) {
    const auto &argmax_row = glm4::kernels().argmax_row;
    glm4::parallel_for(argmax->rows, [&](int64_t row) { argmax->picked[row] = argmax_row(*argmax, row); });
}

int glm4_rotate_and_store(const Glm4KvWrite *write) {
    for (int64_t t = 0; t < write->tokens; ++t)
        if (write->places[t] < 0 || write->places[t] >= write->slots) return 1;
    glm4::for_tokens(*write, glm4::kernels().rotate_and_store_token);
    return 0;
}
}
