// Runs calls of the native library that tests/foreign.py sends: on another architecture, in an emulator.
// A request: which function, the sizes of what follows; the Call; the numbers before the addresses; for every address its
// region and the place in it; every region's size and bytes. The answer: the status, and all regions' bytes.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <dlfcn.h>

using Function = int (*)(const void* call, const int64_t* numbers);

static bool get(void* data, size_t bytes) { return bytes == 0 || fread(data, bytes, 1, stdin) == 1; }
static void put(const void* data, size_t bytes) {
  if (bytes != 0 && fwrite(data, bytes, 1, stdout) != 1) exit(1);
}

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  const Function functions[] = {(Function)dlsym(library, "relattn_forward"), (Function)dlsym(library, "relattn_backward")};
  for (int64_t head[5]; get(head, sizeof head);) {
    const auto [function, call_bytes, plain, addresses, regions] = head;
    std::vector<char> call((size_t)call_bytes);
    std::vector<int64_t> numbers((size_t)(plain + addresses)), places((size_t)(2 * addresses)), sizes((size_t)regions);
    std::vector<char*> data((size_t)regions);
    bool whole = get(call.data(), call.size()) && get(numbers.data(), 8 * (size_t)plain) && get(places.data(), 8 * places.size());
    for (size_t region = 0; whole && region < data.size(); ++region) {
      whole = get(&sizes[region], 8);
      data[region] = (char*)aligned_alloc(64, ((size_t)sizes[region] + 64) / 64 * 64);
      whole = whole && data[region] && get(data[region], (size_t)sizes[region]);
    }
    if (!whole) return 1;
    for (size_t index = 0; index < (size_t)addresses; ++index)
      numbers[(size_t)plain + index] = (int64_t)(data[(size_t)places[2 * index]] + places[2 * index + 1]);
    const int64_t status = functions[function](call.data(), numbers.data());
    put(&status, sizeof status);
    for (size_t region = 0; region < data.size(); ++region) {
      put(data[region], (size_t)sizes[region]);
      free(data[region]);
    }
    fflush(stdout);
  }
}
