// Products of a step's activations with quantised weights.
#pragma once
#include "glm4_cpu.h"

namespace glm4 {

struct Product {
    const Glm4Weight *weight;
    char *out;           // [tokens, weight rows]
    int64_t out_stride;  // elements between tokens
};

// glm4_linear for each of the products; where the weights are alike, the activations are rounded once for all of them.
void linear(const Product *products, int count, const void *x, int64_t tokens, int64_t x_stride, Glm4Dtype dtype,
            const float *largest);

}  // namespace glm4
