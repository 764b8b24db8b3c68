// The C interface: what Python hands over for one call. relattn/backends/cpu.py packs these fields in this order.
#pragma once
#include <cstdint>

namespace relattn {

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kBool = 3, kInt64 = 4 };

// A tensor: strides in elements, 0 for a broadcast dimension. data is null where the call has no such tensor; Python
// hands over its place among the addresses (see filled_in in library.cpp).
struct Tensor {
  char* data;
  int64_t dtype;
  int64_t stride[4];
};

// B batch, Hq / Hkv query / key heads, Lq / Lk lengths, D / Dv head sizes, R table rows.
struct Call {
  int64_t batch, heads, key_heads, queries, keys, size, value_size, rows;
  int64_t left, right;  // table row 0 is distance -left, the last +right
  int64_t has_window_left, window_left, has_window_right, window_right;  // causal calls have window_right = 0
  int64_t chunk_size, chunk_left;                                        // 0: no chunks; -1: all that are earlier
  int64_t query_offset;
  int64_t first_batch;                         // dropout counts batch elements from here on
  int64_t first_head, first_query, first_key;  // and these; chunks count keys from first_key on, a multiple of 4
  int64_t is_part;  // output is float32; backward: it and lse are of more keys than these, neither is to be found anew
  int64_t seed;
  int64_t threads;
  int64_t block_queries, block_keys;  // upper bounds of a tile's size; 0: the kernel's own
  double scale, dropout_p;
  // Strides: (B, H, L, D).
  Tensor query, key, value, output, lse;
  // Strides: (0, Hq, R, D); rel_bias (0, Hq, R, 0); pos_bias (0, Hq, 0, D).
  Tensor rel_k, rel_q, rel_v, rel_bias, pos_bias_u, pos_bias_v;
  Tensor attn_mask;      // (B, Hq, Lq, Lk): bool or floating
  Tensor key_mask;       // (B, 0, Lk, 0): bool
  Tensor key_lengths;    // (B, 0, 0, 0): int64
  Tensor query_offsets;  // (B, 0, 0, 0): int64, added to query_offset
  // (B + 1, 0, 0, 0): int64. A packed call: B sequences lie one after the other where others have lengths, and what has
  // both has stride 0 for B. See packed.h.
  Tensor cu_seqlens_q, cu_seqlens_k;
  // Backward only. Gradients that nobody needs have no data.
  Tensor grad_output, grad_lse;
  Tensor grad_query, grad_key, grad_value;
  Tensor grad_rel_k, grad_rel_q, grad_rel_v, grad_rel_bias, grad_pos_bias_u, grad_pos_bias_v;
};

// Runs task(context, index) for index 0 ... count - 1 on up to `threads` threads, and returns when all are done.
// Which thread takes which index is not fixed.
struct Team {
  int64_t threads;
  int64_t cache_bytes;  // of the second cache, which a core has to itself
  void (*run)(const Team&, int64_t count, void (*task)(void* context, int64_t index, int64_t thread), void* context);
  // Memory that lives as long as the call; 64-byte aligned, not initialised; null if there is none left.
  void* (*allocate)(const Team&, int64_t bytes);
  void* arena;
  // Of a packed call: more of them, one for each thread. clear: all memory of the team's is free again.
  void* (*arena_of)(const Team&, int64_t thread);
  void (*clear)(const Team&);
};

// One instruction set's code. 0 = done, 1 = out of memory.
struct Variant {
  int (*forward)(const Call&, const Team&);
  int (*backward)(const Call&, const Team&);
};

}  // namespace relattn
