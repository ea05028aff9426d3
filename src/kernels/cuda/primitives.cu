// What every kernel is made of: instructions without a name in CUDA C++, and reductions over a warp.

typedef unsigned int u32;
typedef unsigned char u8;
typedef long long i64;

const u32 ALL = 0xffffffffu; // lanes

// The memory of a block whose size a launch gives.
__device__ __forceinline__ u8* shared_memory() {
  extern __shared__ __align__(128) u8 memory[];
  return memory;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Begins to copy 16 bytes, or to fill as many with zeros.
__device__ __forceinline__ void copy16(u32 to, const u8* from, bool inside) {
  const int bytes = inside ? 16 : 0; // the rest is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes));
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::); }

// Waits until at most N of a thread's groups are under way.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N));
}

// Four matrices of 8 × 16 bytes; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load4(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

// The same, transposed in pairs of bytes.
__device__ __forceinline__ void load4_transposed(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

// sum [16, 8] += a [16, 32] · b [32, 8].
__device__ __forceinline__ void multiply(int (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 1 / x to a unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(inverse) : "f"(x));
  return inverse;
}

// 2^x to two units in the last place.
__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(x));
  return power;
}

// a + b, but at least 0 and at most `most`: one instruction of compute capability 9.0.
__device__ __forceinline__ u32 clamped_sum(int a, int b, int most) { return (u32)__viaddmin_s32_relu(a, b, most); }

__device__ __forceinline__ float warp_max(float x) {
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, offset));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
  return x;
}
