// One attention.
#pragma once

#include <cstdint>

// y = softmax(q·kᵀ·scale)·v of every head. A token is one row, of which head h has the halves from h·width on; rows lie
// `*_stride` halves apart, multiples of 8, so that Q, K and V may lie side by side in the output of one matrix product.
struct CannyAttention {
    const void* q;  // (query_batch, tokens, heads, width): batch b has the queries of b % query_batch
    const void* k;  // (B, keys, heads, width)
    const void* v;
    void* y;  // (B, tokens, heads, width)
    int32_t batch, query_batch, heads, tokens, keys, width;
    int32_t q_stride, kv_stride, y_stride;
    float scale;
    // How a block is cut; 0: chosen from the shape. With `groups` -1 no kernel for compute capability 9.0 alone is
    // taken, with `warps` -1 to -3 no other: of as many warpgroups, and `groups` blocks of a cluster.
    int32_t warps, groups;
    int32_t causal;  // 0, or 1: query i has keys 0 to i alone; heads 64 wide, as many keys as tokens
};
