// Runs the kernels of src/kernels/cuda on a CPU, to test their arithmetic and indexing without a GPU: what
// primitives.cu has, in plain C++, and the names of CUDA C++ that kernels use.
//
// Every thread of a block is a fiber that runs until it waits: at a barrier, or for the other lanes of its
// warp. The blocks of a grid run one after another. What is wrong with a kernel aborts the program and names
// the thread: lanes that wait in vain, addresses out of bounds or not aligned, writes beside a buffer, copies
// that nobody waits for.
//
// Not emulated: plain accesses that race (but for what another order of threads shows), bank conflicts, the
// memory model, and how approximate instructions round.
#pragma once

// Its check of longjmp would take a change of stacks for an error.
#undef _FORTIFY_SOURCE

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include <csetjmp>
#include <csignal>
#include <sys/mman.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Static, and may be declared `extern` in a kernel.
#define __shared__ thread_local

typedef unsigned int u32;
typedef unsigned char u8;
typedef long long i64;

const u32 ALL = 0xffffffffu;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct uint3 { u32 x, y, z; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }

// Of the fiber that runs.
inline uint3 threadIdx, blockIdx, blockDim;

namespace emulator {

// In which order threads and blocks take turns: a missing barrier is seen in one of them.
enum class Order { ASCENDING, DESCENDING, SHUFFLED };
inline Order order = Order::ASCENDING;

// Numbers from a seed (Steele, Lea and Flood 2014: splitmix64), the same everywhere.
struct Numbers {
  uint64_t state;

  u32 next() {
    state += 0x9e3779b97f4a7c15;
    uint64_t mixed = (state ^ state >> 30) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111eb;
    return (u32)(mixed >> 32);
  }
  u32 below(u32 end) { return (u32)((uint64_t)next() * end >> 32); }
  float between(float low, float high) { return low + (high - low) * (float)(next() >> 8) * 0x1p-24f; }

  template <class T>
  void shuffle(std::vector<T>& of) {
    for (size_t i = of.size(); i > 1; i--) std::swap(of[i - 1], of[below((u32)i)]);
  }
};

const int LANES = 32;
const u32 MAX_THREADS = 1024;
const size_t STACK = 128 << 10, PAGE = 64 << 10; // bytes; pages are at most that large
const size_t MAX_SHARED_BYTES = 99 << 10;        // of the smallest of the GPUs
const size_t SHARED_ALIGNMENT = 128;            // as primitives.cu asks for
const u8 UNTOUCHED = 0xCD;                       // a byte that nobody has written

// What a lane takes part in, run for all lanes of a warp at once; every one has arguments of its own.
typedef void (*Exchange)(void* const (&arguments)[LANES]);

enum class State { READY, IN_EXCHANGE, AT_BARRIER, EXITED };

// Of 16 bytes.
struct Copy {
  u32 to;
  const u8* from;
  bool inside;
};

struct Fiber {
  ucontext_t beginning;
  jmp_buf place;
  bool has_begun;
  u32 id;
  State state;
  const char* waits_in;
  Exchange exchange;
  void* arguments;
  std::vector<std::vector<Copy>> copies; // under way, by group; those of the last are not committed
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  u32 threads = 0, running = 0, arrived = 0;
  int waiting[MAX_THREADS / LANES] = {}; // lanes of a warp, for an exchange
  void (*run)(const void* launch) = nullptr;
  const void* launch = nullptr;
  u8* shared = nullptr;
  size_t shared_bytes = 0;
};
inline Machine machine;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  printf("FAILED: ");
  va_list list;
  va_start(list, format);
  vprintf(format, list);
  va_end(list);
  if (const Fiber* fiber = machine.current)
    printf(" (block %u, %u, %u, thread %u)", blockIdx.x, blockIdx.y, blockIdx.z, fiber->id);
  printf("\n");
  fflush(stdout);
  abort();
}

// ---- Memory

inline void* map(size_t bytes) {
  void* const at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) fail("no memory");
  return at;
}

// `count` values of T between pages that cannot be accessed: the end is as close to the last of these as
// the alignment lets it, and what is left beside the values must not change.
template <class T>
class Buffer {
  const char* name;
  size_t count, inner; // inner: bytes between the two pages
  u8* first;           // of them
  u8* values;

 public:
  Buffer(size_t count, const char* name, size_t alignment = 16) : name(name), count(count) {
    const size_t bytes = count * sizeof(T);
    inner = (bytes + alignment + PAGE - 1) / PAGE * PAGE;
    first = (u8*)map(inner + 2 * PAGE) + PAGE;
    mprotect(first - PAGE, PAGE, PROT_NONE), mprotect(first + inner, PAGE, PROT_NONE);
    values = first + (inner - bytes) / alignment * alignment;
    memset(first, UNTOUCHED, inner);
  }
  ~Buffer() {
    check();
    munmap(first - PAGE, inner + 2 * PAGE);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void check() const {
    const u8* const end = (const u8*)(begin() + count);
    for (const u8* at = first; at < first + inner; at++)
      if ((at < values || at >= end) && *at != UNTOUCHED)
        fail("a write %td bytes behind the beginning of %s, which has %zu", at - values, name, count * sizeof(T));
  }
  T* begin() const { return (T*)values; }
  T* end() const { return begin() + count; }
  size_t size() const { return count; }
  T& operator[](size_t i) const {
    if (i >= count) fail("a test reads %s at %zu of %zu", name, i, count);
    return begin()[i];
  }
};

inline void catch_bad_addresses() {
  const auto report = [](int) { fail("an access out of bounds"); };
  std::signal(SIGSEGV, report), std::signal(SIGBUS, report);
}

// ---- Fibers

// From a fiber to the scheduler.
inline void pause() {
  if (!_setjmp(machine.current->place)) _longjmp(machine.scheduler, 1);
}

// From the scheduler to a fiber.
inline void resume(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = {fiber.id, 0, 0};
  if (!_setjmp(machine.scheduler)) {
    if (fiber.has_begun) _longjmp(fiber.place, 1);
    fiber.has_begun = true;
    setcontext(&fiber.beginning);
  }
  machine.current = nullptr;
}

// Lets all go on once all have arrived; those that have exited are not waited for.
inline void open_barrier() {
  if (machine.arrived < machine.running) return;
  machine.arrived = 0;
  for (u32 i = 0; i < machine.threads; i++)
    if (machine.fibers[i]->state == State::AT_BARRIER) machine.fibers[i]->state = State::READY;
}

// What a fiber runs: one block after another.
inline void live() {
  for (;;) {
    machine.run(machine.launch);
    Fiber& self = *machine.current;
    for (const auto& group : self.copies)
      if (!group.empty()) fail("the thread ends before its copies");
    self.state = State::EXITED;
    machine.running--;
    open_barrier();
    pause();
  }
}

inline std::unique_ptr<Fiber> new_fiber(u32 id) {
  auto fiber = std::make_unique<Fiber>();
  fiber->id = id;
  getcontext(&fiber->beginning);
  u8* const stack = (u8*)map(STACK + PAGE);
  mprotect(stack, PAGE, PROT_NONE);
  fiber->beginning.uc_stack.ss_sp = stack + PAGE;
  fiber->beginning.uc_stack.ss_size = STACK;
  fiber->beginning.uc_link = nullptr;
  makecontext(&fiber->beginning, live, 0);
  return fiber;
}

inline void barrier() {
  Fiber& self = *machine.current;
  self.state = State::AT_BARRIER, self.waits_in = "__syncthreads";
  machine.arrived++;
  open_barrier();
  pause();
}

// Waits for all lanes of the warp; the last to come runs the exchange.
inline void exchange(const char* name, Exchange what, void* arguments) {
  Fiber& self = *machine.current;
  self.state = State::IN_EXCHANGE, self.waits_in = name, self.exchange = what, self.arguments = arguments;
  const u32 warp = self.id / LANES;
  if (++machine.waiting[warp] < LANES) return pause();
  void* all[LANES];
  for (int i = 0; i < LANES; i++) {
    const Fiber& lane = *machine.fibers[warp * LANES + i];
    if (lane.exchange != what) fail("%s, but lane %d is in %s", name, i, lane.waits_in);
    all[i] = lane.arguments;
  }
  machine.waiting[warp] = 0;
  what(all);
  for (int i = 0; i < LANES; i++) machine.fibers[warp * LANES + i]->state = State::READY;
  if (order != Order::ASCENDING) pause();
}

[[noreturn]] inline void report_deadlock() {
  for (u32 i = 0; i < machine.threads; i++) {
    const Fiber& fiber = *machine.fibers[i];
    const auto place = [](const Fiber& of) { return of.state == State::EXITED ? "its end" : of.waits_in; };
    if (i && !strcmp(place(fiber), place(*machine.fibers[i - 1]))) continue;
    printf("from thread %u on: %s\n", i, place(fiber));
  }
  fail("block %u, %u, %u: threads wait for each other", blockIdx.x, blockIdx.y, blockIdx.z);
}

inline std::vector<u32> turns(u32 count, Numbers& numbers) {
  std::vector<u32> all(count);
  for (u32 i = 0; i < count; i++) all[i] = order == Order::DESCENDING ? count - 1 - i : i;
  if (order == Order::SHUFFLED) numbers.shuffle(all);
  return all;
}

inline void run_block(Numbers& numbers) {
  machine.running = machine.threads, machine.arrived = 0;
  while (machine.running) {
    bool has_progress = false;
    for (u32 warp : turns(machine.threads / LANES, numbers)) {
      for (bool goes_on = true; goes_on;) {
        goes_on = false;
        for (u32 lane : turns(LANES, numbers)) {
          Fiber& fiber = *machine.fibers[warp * LANES + lane];
          if (fiber.state != State::READY) continue;
          has_progress = true;
          if (order == Order::SHUFFLED && numbers.below(4) == 0) continue;
          goes_on = true;
          resume(fiber);
        }
        if (order == Order::SHUFFLED && numbers.below(2) == 0) break;
      }
    }
    if (!has_progress) report_deadlock();
  }
}

// Runs a kernel on a grid of blocks of `threads` threads with `shared_bytes` of dynamic shared memory.
template <class Arguments>
void launch(uint3 grid, u32 threads, size_t shared_bytes, void (*kernel)(Arguments), const Arguments& arguments) {
  struct Launch {
    void (*kernel)(Arguments);
    const Arguments& arguments;
  };
  const Launch launch{kernel, arguments};
  if (threads == 0 || threads % LANES || threads > MAX_THREADS) fail("a block of %u threads", threads);
  if (shared_bytes > MAX_SHARED_BYTES) fail("%zu bytes of shared memory", shared_bytes);
  while (machine.fibers.size() < threads) machine.fibers.push_back(new_fiber((u32)machine.fibers.size()));
  machine.threads = threads;
  machine.run = [](const void* of) { ((const Launch*)of)->kernel(((const Launch*)of)->arguments); };
  machine.launch = &launch;
  blockDim = {threads, 1, 1};
  Buffer<u8> shared(shared_bytes, "shared memory", SHARED_ALIGNMENT);
  machine.shared = shared.begin(), machine.shared_bytes = shared_bytes;
  Numbers numbers{1};
  for (u32 block : turns(grid.x * grid.y * grid.z, numbers)) {
    blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    std::fill(shared.begin(), shared.end(), UNTOUCHED);
    for (u32 i = 0; i < threads; i++) {
      machine.fibers[i]->state = State::READY;
      machine.fibers[i]->copies.assign(1, {});
    }
    run_block(numbers);
  }
  shared.check();
  machine.shared = nullptr, machine.shared_bytes = 0;
}

// ---- What lanes exchange

inline u8* shared_at(u32 address, const char* name) {
  if (address % 16) fail("%s: shared address %u is not a multiple of 16", name, address);
  if ((size_t)address + 16 > machine.shared_bytes) fail("%s: shared address %u is out of bounds", name, address);
  return machine.shared + address;
}

template <class T>
struct Shuffle {
  T value;
  int bits;
  T result;
};

template <class T>
T shuffle_xor(T value, int bits) {
  Shuffle<T> own{value, bits, value};
  const Exchange swap = [](void* const(&all)[LANES]) {
    for (int i = 0; i < LANES; i++) {
      Shuffle<T>& shuffle = *(Shuffle<T>*)all[i];
      shuffle.result = ((Shuffle<T>*)all[i ^ shuffle.bits])->value;
    }
  };
  exchange("__shfl_xor_sync", swap, &own);
  return own.result;
}

struct Load {
  const u8* from;
  u32 (&to)[4];
};

// The layout that PTX describes for ldmatrix: lane i gets the pair i % 4 of row i / 4.
template <bool TRANSPOSED>
void load_matrices(void* const (&all)[LANES]) {
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t pairs[8][8];
    for (int row = 0; row < 8; row++) memcpy(pairs[row], ((Load*)all[matrix * 8 + row])->from, 16);
    for (int i = 0; i < LANES; i++) {
      const int row = i / 4, column = i % 4 * 2;
      const u32 low = TRANSPOSED ? pairs[column][row] : pairs[row][column];
      const u32 high = TRANSPOSED ? pairs[column + 1][row] : pairs[row][column + 1];
      ((Load*)all[i])->to[matrix] = low | high << 16;
    }
  }
}

struct Product {
  int (&sum)[4];
  const u32 (&a)[4];
  const u32 (&b)[2];
};

// The layouts that PTX describes for m16n8k32: a lane has words of rows i / 4 and i / 4 + 8 of a, of
// column i / 4 of b, and columns 2 · (i % 4) and the next of the sums.
inline void multiply_matrices(void* const (&all)[LANES]) {
  u8 a[16][32], b[8][32];
  for (int i = 0; i < LANES; i++) {
    const Product& own = *(Product*)all[i];
    for (int word = 0; word < 4; word++) memcpy(&a[i / 4 + word % 2 * 8][i % 4 * 4 + word / 2 * 16], &own.a[word], 4);
    for (int word = 0; word < 2; word++) memcpy(&b[i / 4][i % 4 * 4 + word * 16], &own.b[word], 4);
  }
  // Numbers that are exact in float32, four at once.
  typedef float Four __attribute__((vector_size(16)));
  Four columns[2][32], sums[16][2];
  for (int k = 0; k < 32; k++)
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 4; i++) columns[half][k][i] = b[half * 4 + i][k];
  for (int row = 0; row < 16; row++) {
    Four left = {}, right = {};
    for (int k = 0; k < 32; k++) {
      const float x = a[row][k];
      left += x * columns[0][k], right += x * columns[1][k];
    }
    sums[row][0] = left, sums[row][1] = right;
  }
  for (int i = 0; i < LANES; i++)
    for (int e = 0; e < 4; e++) {
      int& total = ((Product*)all[i])->sum[e];
      total = (int)((u32)total + (u32)sums[i / 4 + e / 2 * 8][i % 4 / 2][i % 2 * 2 + e % 2]);
    }
}

// Results and operands of approximate instructions that are flushed to zero.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? 0.0f : x; }

} // namespace emulator

// ---- primitives.cu

inline u8* shared_memory() { return emulator::machine.shared; }

inline u32 shared_address(const void* p) {
  const auto& machine = emulator::machine;
  const u8* const at = (const u8*)p;
  if (at < machine.shared || at > machine.shared + machine.shared_bytes) emulator::fail("no address in shared memory");
  return (u32)(at - machine.shared);
}

// What was there is gone at once; what is copied comes when the thread waits for it.
inline void copy16(u32 to, const u8* from, bool inside) {
  memset(emulator::shared_at(to, "copy16"), emulator::UNTOUCHED, 16);
  if (inside && (uintptr_t)from % 16) emulator::fail("copy16: address %p is not a multiple of 16", (const void*)from);
  emulator::machine.current->copies.back().push_back({to, from, inside});
}

inline void commit_copies() { emulator::machine.current->copies.emplace_back(); }

template <int N>
void wait_for_copies() {
  auto& groups = emulator::machine.current->copies;
  const int finished = std::max((int)groups.size() - 1 - N, 0);
  for (int group = 0; group < finished; group++)
    for (const auto& copy : groups[group]) {
      u8* const to = emulator::machine.shared + copy.to;
      if (copy.inside) memcpy(to, copy.from, 16);
      else memset(to, 0, 16);
    }
  groups.erase(groups.begin(), groups.begin() + finished);
}

inline void load4(u32 (&to)[4], u32 from) {
  emulator::Load load{emulator::shared_at(from, "load4"), to};
  emulator::exchange("load4", emulator::load_matrices<false>, &load);
}

inline void load4_transposed(u32 (&to)[4], u32 from) {
  emulator::Load load{emulator::shared_at(from, "load4_transposed"), to};
  emulator::exchange("load4_transposed", emulator::load_matrices<true>, &load);
}

inline void multiply(int (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  emulator::Product product{sum, a, b};
  emulator::exchange("multiply", emulator::multiply_matrices, &product);
}

inline float reciprocal(float x) { return emulator::flushed(1.0f / emulator::flushed(x)); }
inline float power_of_two(float x) { return emulator::flushed(exp2f(emulator::flushed(x))); }

inline u32 clamped_sum(int a, int b, int most) {
  const int sum = (int)((u32)a + (u32)b);
  return (u32)std::max(std::min(sum, most), 0);
}

inline float __shfl_xor_sync(u32, float value, int bits) { return emulator::shuffle_xor(value, bits); }
inline int __shfl_xor_sync(u32, int value, int bits) { return emulator::shuffle_xor(value, bits); }

inline float warp_max(float x) {
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, offset));
  return x;
}

inline float warp_sum(float x) {
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
  return x;
}

// ---- CUDA C++

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp() {
  emulator::exchange("__syncwarp", [](void* const(&)[emulator::LANES]) {}, nullptr);
}

inline int __reduce_add_sync(u32, int value) {
  emulator::exchange("__reduce_add_sync", [](void* const(&all)[emulator::LANES]) {
    u32 sum = 0;
    for (void* of : all) sum += (u32)*(int*)of;
    for (void* of : all) *(int*)of = (int)sum;
  }, &value);
  return value;
}

template <class T>
T __ldg(const T* p) { return *p; }

inline void atomicAdd(int* p, int value) { *p += value; }
inline void atomicMin(int* p, int value) { *p = std::min(*p, value); }
inline void atomicMax(u32* p, u32 value) { *p = std::max(*p, value); }

inline u32 __dp4a(u32 a, u32 b, u32 sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}

inline u32 __byte_perm(u32 low, u32 high, u32 selector) {
  if (selector & 0x8888) emulator::fail("__byte_perm: selector %04x", selector);
  const uint64_t both = (uint64_t)high << 32 | low;
  u32 result = 0;
  for (int i = 0; i < 4; i++) result |= (u32)(both >> (selector >> i * 4 & 7) * 8 & 255) << i * 8;
  return result;
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline u32 __float_as_uint(float x) { return std::bit_cast<u32>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(u32 x) { return std::bit_cast<float>(x); }

inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
