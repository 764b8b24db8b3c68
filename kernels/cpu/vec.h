// Vectors of floats by the compiler's vector extensions, at the width of the instruction set this file is compiled for,
// and what the kernels compute on them. Included by variant.cpp inside its own namespace: nothing here may be shared
// between instruction sets.

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UVec __attribute__((vector_size(4 * kWidth)));
typedef float UnalignedVec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

// A number that a generic lambda takes as a constant.
template <int64_t kValue>
struct Constant {
  static constexpr int64_t value = kValue;
};

constexpr float kInfinity = __builtin_inff();
constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

INLINE Vec load(const float* p) { return *(const UnalignedVec*)p; }
INLINE void store(float* p, Vec v) { *(UnalignedVec*)p = v; }
INLINE Vec splat(float x) { return x - (Vec){}; }

INLINE Vec vmax(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Where the mask's lanes are all ones, else zero.
INLINE Vec keep_where(IVec mask, Vec v) { return (Vec)(mask & (IVec)v); }

INLINE float sum_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int lane = 0; lane < kWidth; ++lane) total += v[lane];
  return total;
#endif
}

INLINE float max_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float highest = v[0];
  for (int lane = 1; lane < kWidth; ++lane) highest = v[lane] > highest ? v[lane] : highest;
  return highest;
#endif
}

template <class T>
INLINE T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
INLINE T most(T a, T b) {
  return b > a ? b : a;
}
template <class T>
INLINE T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}

// 2^x for x <= about 0, to 2 units in the last place; exactly 0 below 2^-125 (no subnormals: they are slow to
// multiply), NaN for NaN. The power is split by adding and subtracting 1.5 * 2^23, which rounds to an integer and
// leaves it in the low bits (-ffast-math would delete it), and the polynomial is the minimax one of degree 5 on [-1/2,
// 1/2] (relative error 7.5e-8).
INLINE Vec exp2_nonpositive(Vec x) {
  const Vec magic = splat(12582912.0f);
  const IVec too_low = x <= splat(-125.0f);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = splat(1.327647199e-03f) * f + splat(9.675541334e-03f);
  p = p * f + splat(5.550713273e-02f);
  p = p * f + splat(2.402211972e-01f);
  p = p * f + splat(6.931469671e-01f);
  p = p * f + splat(1.000000072e+00f);
  const UVec power = ((UVec)shifted << 23) + (UVec)splat(1.0f);  // the float 2^integer
  return keep_where(~too_low, p * (Vec)power);
}

INLINE float exp2_nonpositive(float x) { return exp2_nonpositive(splat(x))[0]; }

// Conversions of half precision: elements are read and written as 16-bit patterns.

typedef uint16_t Half;  // the bits of a bfloat16

INLINE float from_bfloat16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float result;
  __builtin_memcpy(&result, &wide, 4);
  return result;
}

INLINE uint16_t to_bfloat16(float x) {  // to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return 0x7FC0;
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_float16(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7FFF;
  uint32_t bits;
  if (magnitude >= 0x7C00) {
    bits = 0x7F800000 | (magnitude & 0x3FF) << 13;
  } else if (magnitude >= 0x0400) {
    bits = (magnitude << 13) + (112u << 23);
  } else {  // zero and subnormals: an integer times 2^-24
    const float value = (float)magnitude * 0x1p-24f;
    __builtin_memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

INLINE uint16_t to_float16(float x) {  // to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return (uint16_t)(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return (uint16_t)(sign | 0x7C00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                                   // below 2^-14: a multiple of 2^-24
    float value;
    __builtin_memcpy(&value, &magnitude, 4);
    const float rounded = value + 0.5f;  // 0.5 has its last place at 2^-24
    uint32_t rounded_bits;
    __builtin_memcpy(&rounded_bits, &rounded, 4);
    return (uint16_t)(sign | (rounded_bits - 0x3F000000));
  }
  return (uint16_t)(sign | ((magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13));
}

INLINE float read_element(const char* data, int64_t dtype, int64_t index) {
  switch (dtype) {
    case kFloat32:
      return ((const float*)data)[index];
    case kBFloat16:
      return from_bfloat16(((const uint16_t*)data)[index]);
    default:
      return from_float16(((const uint16_t*)data)[index]);
  }
}

INLINE void write_element(char* data, int64_t dtype, int64_t index, float value) {
  switch (dtype) {
    case kFloat32:
      ((float*)data)[index] = value;
      break;
    case kBFloat16:
      ((uint16_t*)data)[index] = to_bfloat16(value);
      break;
    default:
      ((uint16_t*)data)[index] = to_float16(value);
  }
}

// `count` elements from `first` on, `stride` apart, as floats.
static void read_row(const char* data, int64_t dtype, int64_t first, int64_t stride, int64_t count, float* to) {
  int64_t done = 0;
  if (stride == 1) {
    if (dtype == kFloat32) {
      const float* from = (const float*)data + first;
      for (; done + kWidth <= count; done += kWidth) store(to + done, load(from + done));
    } else {
      const uint16_t* from = (const uint16_t*)data + first;
#if defined(__AVX512F__)
      for (; done + 16 <= count; done += 16) {
        const __m256i bits = _mm256_loadu_si256((const __m256i*)(from + done));
        const __m512 wide = dtype == kBFloat16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))
                                               : _mm512_cvtph_ps(bits);
        store(to + done, (Vec)wide);
      }
#elif defined(__AVX2__)
      for (; done + 8 <= count; done += 8) {
        const __m128i bits = _mm_loadu_si128((const __m128i*)(from + done));
        const __m256 wide = dtype == kBFloat16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))
                                               : _mm256_cvtph_ps(bits);
        store(to + done, (Vec)wide);
      }
#else
      (void)from;
#endif
    }
  }
  for (; done < count; ++done) to[done] = read_element(data, dtype, first + done * stride);
}

// factor * from[...] to `count` elements from `first` on, `stride` apart.
static void write_row(char* data, int64_t dtype, int64_t first, int64_t stride, int64_t count, const float* from,
                      float factor) {
  int64_t done = 0;
  if (stride == 1 && dtype == kFloat32) {
    float* to = (float*)data + first;
    for (; done + kWidth <= count; done += kWidth) store(to + done, load(from + done) * factor);
  }
  for (; done < count; ++done) write_element(data, dtype, first + done * stride, from[done] * factor);
}

static float sum_row(const float* row, int64_t count) {
  Vec total = {};
  int64_t done = 0;
  for (; done + kWidth <= count; done += kWidth) total += load(row + done);
  float sum = sum_lanes(total);
  for (; done < count; ++done) sum += row[done];
  return sum;
}

// Whether no element is an infinity or NaN: times zero these are NaN, everything else zero.
static bool all_finite(const float* row, int64_t count) {
  Vec total[4] = {};
  int64_t done = 0;
  for (; done + 4 * kWidth <= count; done += 4 * kWidth)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) total[v] += load(row + done + v * kWidth) * splat(0.0f);
  for (; done + kWidth <= count; done += kWidth) total[0] += load(row + done) * splat(0.0f);
  float sum = sum_lanes(total[0] + total[1] + total[2] + total[3]);
  for (; done < count; ++done) sum += row[done] * 0.0f;
  return sum == 0.0f;
}

static bool any_nonzero(const float* row, int64_t count) {
  if (count > 0 && row[0] != 0.0f) return true;
  IVec found = {};
  int64_t done = 0;
  for (; done + kWidth <= count; done += kWidth) found |= load(row + done) != Vec{};
  bool any = sum_lanes(keep_where(found, splat(1.0f))) != 0.0f;
  for (; done < count; ++done) any |= row[done] != 0.0f;
  return any;
}

// Infinities and NaN become zero.
static void drop_nonfinite(float* row, int64_t count) {
  for (int64_t done = 0; done < count; ++done) row[done] = row[done] * 0.0f == 0.0f ? row[done] : 0.0f;
}

static float max_row(const float* row, int64_t count) {
  Vec highest = splat(-kInfinity);
  int64_t done = 0;
  for (; done + kWidth <= count; done += kWidth) highest = vmax(highest, load(row + done));
  float result = max_lanes(highest);
  for (; done < count; ++done) result = most(result, row[done]);
  return result;
}
