// The kernels for one instruction set. Compiled once for each (RELATTN_VARIANT is its name), everything in a namespace
// of its own: functions shared between objects would be merged, and run instructions that an older processor lacks.
#include "call.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own headers of intrinsics, up to version 12
#pragma GCC diagnostic ignored "-Wpsabi"                // vectors are passed within this file only
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define RELATTN_PASTE2(a, b) a##b
#define RELATTN_PASTE(a, b) RELATTN_PASTE2(a, b)

namespace relattn {
namespace RELATTN_VARIANT {
namespace {

// Each file builds on those before it.
#include "vec.h"        // vectors of floats, half precision
#include "tiles.h"      // products of tiles
#include "pack.h"       // tensors, and their panels
#include "memory.h"     // a call's memory, work in parallel
#include "philox.h"     // dropout
#include "visible.h"    // which keys a query sees
#include "relative.h"   // where a table meets a tile: skew and unskew
#include "scores.h"     // a call's sizes, blocks, tiles of scores
#include "operands.h"   // tables, keys and values as they are packed
#include "forward.h"    // the running softmax
#include "decoding.h"   // the same for few queries, nothing packed
#include "backward.h"   // what one tile adds to every gradient
#include "gradients.h"  // who computes which of them
#include "packed.h"     // sequences that lie one after the other
#if defined(__AMX_BF16__)
#include "amx.h"           // products of bfloat16 tiles
#include "operands_amx.h"  // operands.h in bfloat16, and so on
#include "relative_amx.h"
#include "forward_amx.h"
#include "backward_amx.h"
#include "gradients_amx.h"

int forward_one(const Call& call, const Team& team) {
  return takes_few(call) ? forward_few(call, team) : takes_amx(call) ? forward_amx(call, team) : forward(call, team);
}
int backward_one(const Call& call, const Team& team) {
  return takes_amx(call) ? backward_amx(call, team) : backward(call, team);
}
#else
int forward_one(const Call& call, const Team& team) {
  return takes_few(call) ? forward_few(call, team) : forward(call, team);
}
int backward_one(const Call& call, const Team& team) { return backward(call, team); }
#endif

int forward_any(const Call& call, const Team& team) {
  return call.cu_seqlens_q.data ? forward_packed(call, team, forward_one) : forward_one(call, team);
}
int backward_any(const Call& call, const Team& team) {
  return call.cu_seqlens_q.data ? backward_packed(call, team, backward_one) : backward_one(call, team);
}

}  // namespace
}  // namespace RELATTN_VARIANT

extern const Variant RELATTN_PASTE(kernels_, RELATTN_VARIANT);
const Variant RELATTN_PASTE(kernels_, RELATTN_VARIANT) = {RELATTN_VARIANT::forward_any, RELATTN_VARIANT::backward_any};

}  // namespace relattn
