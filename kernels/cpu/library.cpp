// The library's entry points, and what the kernels ask of the machine: its instruction set, its threads, memory.
// Baseline instructions only.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#else
#include <dlfcn.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "call.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#ifdef __linux__
// Found by the loader, or null. Not with dlsym: glibc 2.34 moved that, and a library that asks for it there runs on no
// older one.
extern "C" __attribute__((weak, visibility("default"))) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
#endif

namespace relattn {

extern const Variant kernels_portable;
#ifdef RELATTN_HAVE_AVX2
extern const Variant kernels_avx2;
#endif
#ifdef RELATTN_HAVE_AVX512
extern const Variant kernels_avx512;
#endif
#ifdef RELATTN_HAVE_AMX
extern const Variant kernels_amx;
#endif

namespace {

// ---- Instruction sets, best first ----

struct Named {
  const char* name;
  const Variant* variant;
  bool (*usable)();
};

#if defined(__x86_64__)
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_avx2();
}
#endif

#ifdef RELATTN_HAVE_AMX
// The kernel lets a process use the tile registers, which are large, only when asked.
bool has_amx() {
#ifdef RELATTN_SOFTWARE_AMX  // tests/kernels/software_amx.h
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24))
    return false;                                                                // amx-bf16, amx-tile
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false;  // avx512-bf16
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
#endif
}
#endif

const Named kVariants[] = {
#ifdef RELATTN_HAVE_AMX
    {"amx", &kernels_amx, has_amx},
#endif
#ifdef RELATTN_HAVE_AVX512
    {"avx512", &kernels_avx512, has_avx512},
#endif
#ifdef RELATTN_HAVE_AVX2
    {"avx2", &kernels_avx2, has_avx2},
#endif
    {"portable", &kernels_portable, [] { return true; }},
};

std::atomic<const Named*> chosen{nullptr};

const Named* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Named& named : kVariants)
    if (named.usable()) return &named;
  return nullptr;
}

const Named* current() {
  const Named* named = chosen.load(std::memory_order_relaxed);
  if (!named) chosen.store(named = best(), std::memory_order_relaxed);
  return named;
}

// ---- Threads ----
// Those of the OpenMP runtime that torch has loaded, so that there is one pool and it never waits for another.

// GOMP_parallel: GCC's runtime, and LLVM's on Linux.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel openmp_parallel() {
#ifdef __linux__
  return GOMP_parallel;
#else
  static const Parallel found = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
  return found;
#endif
}

// In a forked child the parent's pool is gone but its records are not: entering it would wait for ever.
const pid_t loaded_in = getpid();

struct Loop {
  void (*task)(void*, int64_t, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0}, thread{0};

  void work() {
    const int64_t mine = thread.fetch_add(1);
    for (int64_t index; (index = next.fetch_add(1)) < count;) task(context, index, mine);
  }
};

void run(const Team& team, int64_t count, void (*task)(void*, int64_t, int64_t), void* context) {
  Loop loop{task, context, count};
  const int64_t threads = team.threads < count ? team.threads : count;
  if (threads <= 1) return loop.work();
  if (const Parallel parallel = openmp_parallel()) {
    return parallel([](void* data) { ((Loop*)data)->work(); }, &loop, (unsigned)threads, 0);
  }
  std::vector<std::thread> others;
  try {
    for (int64_t other = 1; other < threads; ++other) others.emplace_back([&loop] { loop.work(); });
  } catch (...) {  // no more threads to be had: those that started, and this one, do the work
  }
  loop.work();
  for (std::thread& other : others) other.join();
}

// ---- Memory: blocks that are handed out piece by piece during a call ----

// Some blocks are kept for the next call: fresh pages are zeroed by the system, which takes as long as the work on them
// where sequences are short or only decoded.

constexpr int64_t kBlock = (int64_t)4 << 20;      // bytes of a block, at least
constexpr int64_t kMostKept = (int64_t)32 << 20;  // bytes of all blocks that are kept
constexpr int64_t kHugePage = (int64_t)2 << 20;

struct MemoryBlock {
  char* data;
  int64_t size, used;
};

struct Arena {
  std::vector<MemoryBlock> blocks;
};

// Nobody waits for it: who finds it taken goes without what it guards. (A child forked while another thread held it
// finds it taken for ever. std::mutex has a try_lock too, but glibc 2.34 moved it, and a library that asks for it there
// runs on no older one.)
class Turn {
 public:
  explicit Turn(std::atomic_flag& taken) : taken_(taken), mine_(!taken.test_and_set(std::memory_order_acquire)) {}
  ~Turn() {
    if (mine_) taken_.clear(std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  explicit operator bool() const { return mine_; }

 private:
  std::atomic_flag& taken_;
  const bool mine_;
};

struct Kept {
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  std::vector<MemoryBlock> blocks;
  int64_t bytes = 0;
};

Kept& kept() {  // never destroyed: threads may still run when the process exits
  static Kept* blocks = [] {
    Kept* result = new Kept;
    result->blocks.reserve((size_t)(kMostKept / kBlock) + 1);
    return result;
  }();
  return *blocks;
}

MemoryBlock new_block(int64_t bytes) {
  void* data = nullptr;
  const bool huge = bytes >= kHugePage;
  if (posix_memalign(&data, huge ? (size_t)kHugePage : 64, (size_t)bytes) != 0) return {nullptr, 0, 0};
#ifdef MADV_HUGEPAGE
  if (huge)
    madvise(data, (size_t)bytes, MADV_HUGEPAGE);  // packed operands are read at many strides: fewer misses of the TLB
#endif
  return {(char*)data, bytes, 0};
}

MemoryBlock take_block(int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  // A block for each piece, so that what is written past its end is noticed; full of NaN, so that what is read too
  // early is.
  MemoryBlock block = new_block(bytes);
  if (block.data) std::memset(block.data, 0xFF, (size_t)bytes);
  return block;
#endif
  if (bytes <= kMostKept) {
    const Turn turn(kept().taken);
    if (turn) {
      std::vector<MemoryBlock>& blocks = kept().blocks;
      size_t best = blocks.size();
      for (size_t index = 0; index < blocks.size(); ++index)
        if (blocks[index].size >= bytes && (best == blocks.size() || blocks[index].size < blocks[best].size))
          best = index;
      if (best < blocks.size()) {
        MemoryBlock block = blocks[best];
        blocks[best] = blocks.back();
        blocks.pop_back();
        kept().bytes -= block.size;
        block.used = 0;
        return block;
      }
    }
  }
  return new_block(bytes < kBlock ? kBlock : bytes);
}

void return_block(const MemoryBlock& block) {
#if !defined(__SANITIZE_ADDRESS__)
  const Turn turn(kept().taken);
  if (turn && kept().bytes + block.size <= kMostKept) {
    kept().blocks.push_back(block);  // within what was reserved
    kept().bytes += block.size;
    return;
  }
#endif
  free(block.data);
}

void* allocate(const Team& team, int64_t bytes) {
  Arena& arena = *(Arena*)team.arena;
  bytes = (bytes + 63) / 64 * 64;
  for (MemoryBlock& block : arena.blocks)
    if (block.size - block.used >= bytes) {
      char* data = block.data + block.used;
      block.used += bytes;
      return data;
    }
  try {
    arena.blocks.reserve(arena.blocks.size() + 1);
  } catch (...) {
    return nullptr;
  }
  MemoryBlock block = take_block(bytes);
  if (!block.data) return nullptr;
  block.used = bytes;
  arena.blocks.push_back(block);
  return block.data;
}

// Of a packed call, which has one for each thread; they follow the call's own.
void* arena_of(const Team& team, int64_t thread) { return (Arena*)team.arena + 1 + thread; }

void clear(const Team& team) {
  std::vector<MemoryBlock>& blocks = ((Arena*)team.arena)->blocks;
#if defined(__SANITIZE_ADDRESS__)
  for (MemoryBlock& block : blocks) free(block.data);  // with what was poisoned in it
  blocks.clear();
#endif
  for (MemoryBlock& block : blocks) block.used = 0;
}

int64_t cache_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return found;
#endif
  return (int64_t)1 << 20;
}

// The call of these numbers: the seed, threads, the tile's two bounds; how many keys there are, the offset, and strides
// of keys, values and their mask (of its batch elements and keys), which differ from step to step in decoding; then
// addresses. What is handed over is the same for all calls of one signature, and holds each tensor's place among the
// numbers in place of an address.
Call filled_in(const Call& described, const int64_t* numbers) {
  Call call = described;
  call.seed = numbers[0];
  call.threads = numbers[1];
  call.block_queries = numbers[2];
  call.block_keys = numbers[3];
  call.keys = numbers[4];
  call.query_offset = numbers[5];
  for (int dim = 0; dim < 4; ++dim) {
    call.key.stride[dim] = numbers[6 + dim];
    call.value.stride[dim] = numbers[10 + dim];
  }
  call.key_mask.stride[0] = numbers[14];
  call.key_mask.stride[2] = numbers[15];
  for (Tensor* tensor = &call.query; tensor <= &call.grad_pos_bias_v; ++tensor)
    if (tensor->data) tensor->data = (char*)numbers[(intptr_t)tensor->data];
  return call;
}

int dispatch(const Call& described, const int64_t* numbers, int (*entry)(const Call&, const Team&)) {
  const Call call = filled_in(described, numbers);
  const int64_t threads = getpid() != loaded_in || call.threads < 1 ? 1 : call.threads;
  Arena arena;
  std::vector<Arena> arenas;
  if (call.cu_seqlens_q.data) try {
      arenas.resize((size_t)threads + 1);
    } catch (...) {
      return 1;
    }
  const Team team{threads, cache_bytes(), run, allocate, arenas.empty() ? &arena : arenas.data(), arena_of, clear};
  const int status = entry(call, team);
  for (const MemoryBlock& block : arena.blocks) return_block(block);
  for (const Arena& of : arenas)
    for (const MemoryBlock& block : of.blocks) return_block(block);
  return status;
}

}  // namespace
}  // namespace relattn

// Changes whenever Call does: the Python side refuses a library of another version.
EXPORT int64_t relattn_abi_version() { return 5; }
EXPORT int64_t relattn_call_size() { return (int64_t)sizeof(relattn::Call); }

EXPORT const char* relattn_variant() { return relattn::current()->name; }

// Use the named instruction set from now on. 0: done; 1: not built, or this machine lacks it.
EXPORT int relattn_use_variant(const char* name) {
  for (const relattn::Named& named : relattn::kVariants)
    if (std::strcmp(named.name, name) == 0 && named.usable()) {
      relattn::chosen.store(&named);
      return 0;
    }
  return 1;
}

// 0: done; 1: out of memory.
EXPORT int relattn_forward(const relattn::Call* call, const int64_t* numbers) {
  return relattn::dispatch(*call, numbers, relattn::current()->variant->forward);
}
EXPORT int relattn_backward(const relattn::Call* call, const int64_t* numbers) {
  return relattn::dispatch(*call, numbers, relattn::current()->variant->backward);
}
