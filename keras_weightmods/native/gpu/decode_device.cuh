// The instructions of the GPU that decode.cu is made of, as functions. Shared
// memory is addressed by numbers of 32 bits.

static __device__ __forceinline__ uint32 shared_memory() {
  extern __shared__ __align__(128) byte shared_bytes[];
  return (uint32)__cvta_generic_to_shared(shared_bytes);
}

// The value, in a register: the compiler cannot see where it is from, and would
// else compute anew in each round what never changes. threadIdx.y is 0.
static __device__ __forceinline__ uint32 kept(uint32 value) {
  uint32 same;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=r"(same)
               : "r"(value + threadIdx.y), "r"(threadIdx.x % 32));
  return same;
}

// Begins to copy 16 bytes to shared memory, in the lanes where it is `wanted`;
// `size` of them, 16 or 0, are read, and zeros written for the others.
static __device__ __forceinline__ void copy16(uint32 to, const void* from,
                                              int size = 16,
                                              bool wanted = true) {
  if (wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(from), "r"(size));
  }
}

// Ends a group of copies.
static __device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;");
}

// Waits until all of this lane's groups are there but the last `kLeft`.
template <int kLeft>
static __device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kLeft) : "memory");
}

static __device__ __forceinline__ uint4 load4(uint32 from) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(from));
  return words;
}

static __device__ __forceinline__ uint2 load2(uint32 from) {
  uint2 words;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(words.x), "=r"(words.y)
               : "r"(from));
  return words;
}

static __device__ __forceinline__ float load_float(uint32 from) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from));
  return value;
}

static __device__ __forceinline__ void store(uint32 to, float value) {
  asm volatile("st.shared.f32 [%0], %1;" : : "r"(to), "f"(value) : "memory");
}

// Blocks of a cluster see each other's shared memory, from sm_90 on.
static __device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.aligned;\n"
      "barrier.cluster.wait.aligned;"
      :
      :
      : "memory");
#endif
}

// What the block `rank` of the cluster has at `from`.
static __device__ __forceinline__ float load_from_peer(uint32 from, int rank) {
#if __CUDA_ARCH__ >= 900
  float value;
  asm volatile(
      "{\n"
      ".reg .u32 peer;\n"
      "mapa.shared::cluster.u32 peer, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [peer];\n"
      "}"
      : "=f"(value)
      : "r"(from), "r"(rank));
  return value;
#else
  return load_float(from);
#endif
}

#if KWM_X != 0

static __device__ __forceinline__ void store(uint32 to, unsigned short value) {
  asm volatile("st.shared.u16 [%0], %1;" : : "r"(to), "h"(value) : "memory");
}

// Four matrices (8, 8) of 16 bits; lane L names row L % 8 of matrix L / 8.
static __device__ __forceinline__ void load_matrices(uint32 (&b)[4],
                                                     uint32 row) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
      : "r"(row));
}

// Two floats rounded to 16 bits, the first in the low half.
static __device__ __forceinline__ uint32 round_pair(float low, float high) {
  uint32 pair;
#if KWM_X == 2
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

// a - b in 16 bits, for two numbers.
static __device__ __forceinline__ uint32 subtract_pair(uint32 a, uint32 b) {
  uint32 difference;
#if KWM_X == 2
  asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(difference)
      : "r"(b), "r"(0xbf80bf80u), "r"(a));
#endif
  return difference;
}

// Rising indices, as ours are, have a faster form of the instruction.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define KWM_MMA "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define KWM_MMA "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif
#if KWM_X == 2
#define KWM_MMA_TYPES "f16.f16.f32 "
#else
#define KWM_MMA_TYPES "bf16.bf16.f32 "
#endif

// sums (16, 8) += A (16, 32) @ B (32, 8); the lanes with L % 4 / 2 == kSelector
// give `meta`.
template <int kSelector>
static __device__ __forceinline__ void sparse_mma(float (&sums)[4],
                                                  const uint32 (&a)[4],
                                                  const uint32 (&b)[4],
                                                  uint32 meta) {
  asm volatile(KWM_MMA KWM_MMA_TYPES
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "
               "{%0, %1, %2, %3}, %12, %13;"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
                 "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta), "n"(kSelector));
}

#endif  // KWM_X
