// Products of bfloat16 tiles on AMX: C (rows, columns) float32 = or += A (rows, k) B (k, columns).
//
// A's rows are bfloat16, zero beyond k up to a multiple of 32. B's columns come in panels of 16: for each pair of k
// steps 16 pairs, so that a panel of keys is their rows' 32-bit words transposed. As with the register tiles (tiles.h),
// C's rows may each begin one element further right, which skews for free: the tile store takes any stride.

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = 32;    // k steps of one instruction
constexpr int64_t kTileHalves = 512;  // of an A or B tile
constexpr int64_t kGroupRows = 32;    // rows of a group: two tiles
constexpr int64_t kWideSlack = 64;    // elements, zero, on both sides of what is read skewed in steps of 32

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC's tile loads do not say that they read memory: what was stored must not be moved past them.
INLINE void memory_is_read() { asm volatile("" ::: "memory"); }

// The thread's tile registers are ours for as long as this lives.
struct TileRegisters {
  TileRegisters() {
    const TileConfig config;
    memory_is_read();
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
};

struct HalfLeft {
  const Half* data;
  int64_t row;  // stride in elements
};
struct HalfRight {
  const Half* data;
  int64_t panel;                                 // strides in elements: of panels of columns,
  int64_t row = 2 * kPanel, step = kTileHalves;  // of pairs of k, and of whole tiles
};

// RowTiles x 16 rows and Panels x 16 columns.
template <int RowTiles, int Panels, bool Accumulate>
static void amx_tile(const HalfLeft& a, const HalfRight& b, int64_t steps, const Result& c) {
  memory_is_read();
  const int64_t c_bytes = c.row * 4, a_bytes = a.row * 2, b_bytes = b.row * 2;
  float* lower = c.data + kTileRows * c.row;
  if constexpr (Accumulate) {
    _tile_loadd(0, c.data, c_bytes);
    if constexpr (Panels == 2) _tile_loadd(1, c.data + kPanel, c_bytes);
    if constexpr (RowTiles == 2) _tile_loadd(2, lower, c_bytes);
    if constexpr (RowTiles == 2 && Panels == 2) _tile_loadd(3, lower + kPanel, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (Panels == 2) _tile_zero(1);
    if constexpr (RowTiles == 2) _tile_zero(2);
    if constexpr (RowTiles == 2 && Panels == 2) _tile_zero(3);
  }
  const Half *left = a.data, *right = b.data;
  for (int64_t step = 0; step < steps; ++step, left += kTileDepth, right += b.step) {
    _tile_loadd(6, right, b_bytes);
    _tile_loadd(4, left, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Panels == 2) {
      _tile_loadd(7, right + b.panel, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (RowTiles == 2) {
      _tile_loadd(5, left + kTileRows * a.row, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Panels == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c.data, c_bytes);
  if constexpr (Panels == 2) _tile_stored(1, c.data + kPanel, c_bytes);
  if constexpr (RowTiles == 2) _tile_stored(2, lower, c_bytes);
  if constexpr (RowTiles == 2 && Panels == 2) _tile_stored(3, lower + kPanel, c_bytes);
  memory_is_read();
}

// Up to 32 rows (of which whole tiles of 16 are computed) and any number of panels.
template <bool Accumulate>
static void amx_multiply(int rows, int64_t panels, HalfLeft a, HalfRight b, int64_t steps, Result c) {
  for (; panels > 0; panels -= 2) {
    if (rows > kTileRows) {
      panels >= 2 ? amx_tile<2, 2, Accumulate>(a, b, steps, c) : amx_tile<2, 1, Accumulate>(a, b, steps, c);
    } else {
      panels >= 2 ? amx_tile<1, 2, Accumulate>(a, b, steps, c) : amx_tile<1, 1, Accumulate>(a, b, steps, c);
    }
    b.data += 2 * b.panel;
    c.data += 2 * kPanel;
  }
}

INLINE void store_half(Half* to, Vec v) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }

// Infinities and NaN become zero: their exponent is all ones. `count` is a multiple of 16.
INLINE void drop_nonfinite(Half* row, int64_t count) {
  const __m256i exponent = _mm256_set1_epi16(0x7F80);
  for (int64_t column = 0; column < count; column += kPanel) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)(row + column));
    const __mmask16 finite = _mm256_cmpneq_epi16_mask(_mm256_and_si256(bits, exponent), exponent);
    _mm256_storeu_si256((__m256i*)(row + column), _mm256_maskz_mov_epi16(finite, bits));
  }
}

INLINE bool all_finite(const Half* row, int64_t count) {  // the same
  const __m256i exponent = _mm256_set1_epi16(0x7F80);
  __mmask16 found = 0;
  for (int64_t column = 0; column < count; column += kPanel)
    found |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)(row + column)), exponent),
                                     exponent);
  return found == 0;
}

INLINE bool any_nonzero(const Half* row, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi16(0x7FFF);
  __mmask16 found = 0;
  for (int64_t column = 0; column < count; column += kPanel)
    found |= _mm256_test_epi16_mask(_mm256_loadu_si256((const __m256i*)(row + column)), magnitude);
  return found != 0;
}

INLINE Vec widen(__m256i halves) {
  return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
