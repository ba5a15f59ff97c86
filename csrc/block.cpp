// A decoder block in one call, so that a step of one token does not spend its time between calls.
#include "glm4_cpu.h"
#include "linear.h"

namespace {

// A product into memory that what comes next only reads.
glm4::Product product(const Glm4Weight *weight, const void *out) {
    return {weight, static_cast<char *>(const_cast<void *>(out)), weight->rows};
}

void linear(const Glm4Weight *weight, const void *x, const Glm4Step &step, void *out) {
    glm4_linear(weight, x, step.write.tokens, weight->inputs, static_cast<Glm4Dtype>(step.attention.dtype), nullptr,
                out, weight->rows);
}

}  // namespace

extern "C" int glm4_block(const Glm4Block *block, const Glm4Step *step) {
    const int64_t tokens = step->write.tokens, size = block->q->inputs;
    Glm4KvWrite write = step->write;
    const glm4::Product products[] = {product(block->q, write.q), product(block->k, write.k),
                                      product(block->v, write.v)};
    glm4::linear(products, 3, step->normed, tokens, size, static_cast<Glm4Dtype>(step->attention.dtype), nullptr);
    write.k_cache = block->k_cache, write.v_cache = block->v_cache;
    write.k_scales = block->k_scales, write.v_scales = block->v_scales;
    if (glm4_rotate_and_store(&write)) return 1;

    Glm4Attention attention = step->attention;
    attention.k_cache = block->k_cache, attention.v_cache = block->v_cache;
    attention.k_scales = block->k_scales, attention.v_scales = block->v_scales;
    if (glm4_attention(&attention)) return 1;
    linear(block->o, attention.out, *step, step->branch);

    Glm4Norm norm = {tokens, size, attention.dtype, step->eps, step->hidden, step->branch, block->post_self_attn_norm,
                     block->post_attention_norm, step->hidden, step->normed};
    glm4_norm(&norm);
    linear(block->gate_up, step->normed, *step, step->gate_up);
    const Glm4Swiglu swiglu = {tokens, block->down->inputs, block->gate_up->rows, attention.dtype, step->gate_up,
                               step->gated};
    glm4_swiglu(&swiglu);
    linear(block->down, step->gated, *step, step->branch);
    norm.branch_weight = block->post_mlp_norm, norm.weight = block->next_norm;
    glm4_norm(&norm);
    return 0;
}
