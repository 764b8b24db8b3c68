// AMX's tile instructions in software, for processors that have AVX-512's bfloat16 but no tiles: the compiler reads this
// before the native kernels' sources, with -include. See test_software_amx.py.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace software_amx {

struct Tile {
  alignas(64) uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];

inline float widened(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline void load(int tile, const void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(tiles[tile].bytes[row], (const char*)base + row * stride, 64);
}

inline void store(int tile, void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy((char*)base + row * stride, tiles[tile].bytes[row], 64);
}

// sum += left * right, both rows of pairs of bfloat16
inline void multiply(int sum, int left, int right) {
  for (int row = 0; row < 16; ++row) {
    float total[16];
    uint16_t pairs[32], others[32];
    std::memcpy(total, tiles[sum].bytes[row], 64);
    std::memcpy(pairs, tiles[left].bytes[row], 64);
    for (int pair = 0; pair < 16; ++pair) {
      std::memcpy(others, tiles[right].bytes[pair], 64);
      for (int column = 0; column < 16; ++column)
        for (int part = 0; part < 2; ++part)
          total[column] += widened(pairs[2 * pair + part]) * widened(others[2 * column + part]);
    }
    std::memcpy(tiles[sum].bytes[row], total, 64);
  }
}

}  // namespace software_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(tile) std::memset(software_amx::tiles[tile].bytes, 0, sizeof(software_amx::Tile))
#define _tile_loadd(tile, base, stride) software_amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) software_amx::store(tile, base, stride)
#define _tile_dpbf16ps(sum, left, right) software_amx::multiply(sum, left, right)
