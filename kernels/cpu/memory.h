// A call's memory and its work in parallel.

// task(index, thread) for index 0 ... count - 1, in parallel.
template <class Task>
static void parallel(const Team& team, int64_t count, const Task& task) {
  if (count <= 1 || team.threads == 1) {
    for (int64_t index = 0; index < count; ++index) task(index, 0);
    return;
  }
  auto call = [](void* context, int64_t index, int64_t thread) { (*(const Task*)context)(index, thread); };
  team.run(team, count, call, (void*)&task);
}

// Something kept for each of some heads, or once for all of them: then the stride is 0.
template <class T>
struct PerHead {
  T* data;
  int64_t stride;

  T* of(int64_t head) const { return data ? data + head * stride : nullptr; }
};

// What a call's memory is taken from; remembers whether some was refused, so that it is enough to ask once, at the end.
struct Memory {
  const Team& team;
  bool enough = true;

  float* floats(bool needed, int64_t count) {
    if (!needed || !enough) return nullptr;
    float* memory = (float*)team.allocate(team, round_up(most<int64_t>(count, 1) * 4, 64));
    enough = memory != nullptr;
    return memory;
  }
  Half* halves(bool needed, int64_t count) { return (Half*)floats(needed, (count + 1) / 2); }
  float* zeros(bool needed, int64_t count) {
    float* memory = floats(needed, count);
    if (memory) fill(memory, 0.0f, count);
    return memory;
  }
  template <class T>
  T* array(int64_t count) {
    return (T*)floats(true, (count * (int64_t)sizeof(T) + 3) / 4);
  }
};

// One thread's memory, handed out in 64-byte steps; from a null pointer on to learn how much is needed.
struct Carver {
  char* base;
  int64_t used;

  float* floats(int64_t count) {
    float* result = base ? (float*)(base + used) : nullptr;
    used += round_up(count * 4, 64);
#if defined(__SANITIZE_ADDRESS__)
    if (base) ASAN_POISON_MEMORY_REGION(base + used, 64);
    used += 64;
#endif
    return result;
  }
  // So many behind the place that is returned, and some before it.
  float* floats_after(int64_t before, int64_t count) {
    float* result = floats(before + count);
    return result ? result + before : nullptr;
  }
  Half* halves(int64_t count) { return (Half*)floats((count + 1) / 2); }
};

// A workspace for each thread. carve(memory, workspace) lays one out and returns its bytes.
template <class Space, class Carve>
static Space* carve_for_threads(Memory& memory, const Carve& carve) {
  Space* all = memory.array<Space>(memory.team.threads);
  Space probe;
  const int64_t floats = carve(nullptr, probe) / 4;
  for (int64_t thread = 0; memory.enough && thread < memory.team.threads; ++thread)
    if (float* space = memory.floats(true, floats)) carve((char*)space, all[thread]);
  return all;
}
