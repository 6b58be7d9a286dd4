// Products of tensor cores, and the numbers of half precision that they take, two in a word.
//
// `multiply` adds the product of 16 x 16 and 16 x 8 numbers to 16 x 8 sums in fp32. Of a warp, the thread 4 g + t has
// the numbers (g, 2t), (g, 2t + 1) in a[0], (g + 8, ...) in a[1], and those of the columns 2t + 8, 2t + 9 in a[2] and
// a[3]; of the other factor (2t, g), (2t + 1, g) in b0 and (2t + 8, g), (2t + 9, g) in b1; and of the sums (g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). (PTX ISA, "Matrix Fragments for mma.m16n8k16".)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <class T> struct Half;  // ONES: two numbers of which the lowest bit is 1, so that integers can be put there

template <> struct Half<__nv_bfloat16> {
  static constexpr int MANTISSA = 7;
  static constexpr unsigned ONES = 0x43004300;  // 128
  static __device__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ unsigned subtract(unsigned x, unsigned y) {
    __nv_bfloat162 difference = __hsub2(*(__nv_bfloat162*)&x, *(__nv_bfloat162*)&y);
    return *(unsigned*)&difference;
  }
  static __device__ unsigned sixteenfold(unsigned x, unsigned y) {  // 16 x + y
    const unsigned factor = 0x41804180;
    __nv_bfloat162 sum = __hfma2(*(__nv_bfloat162*)&x, *(const __nv_bfloat162*)&factor, *(__nv_bfloat162*)&y);
    return *(unsigned*)&sum;
  }
};

template <> struct Half<__half> {
  static constexpr int MANTISSA = 10;
  static constexpr unsigned ONES = 0x64006400;  // 1024
  static __device__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ unsigned subtract(unsigned x, unsigned y) {
    __half2 difference = __hsub2(*(__half2*)&x, *(__half2*)&y);
    return *(unsigned*)&difference;
  }
  static __device__ unsigned sixteenfold(unsigned x, unsigned y) {
    const unsigned factor = 0x4c004c00;
    __half2 sum = __hfma2(*(__half2*)&x, *(const __half2*)&factor, *(__half2*)&y);
    return *(unsigned*)&sum;
  }
};

// word & mask | ones in one instruction. The compiler takes two, each of which has one of the constants.
static __device__ unsigned masked(unsigned word, unsigned mask, unsigned ones) {
  unsigned found;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(found) : "r"(word), "r"(mask), "r"(ones));
  return found;
}

// Copies from the device's memory to that of a block without registers; both addresses are multiples of 16.
static __device__ void copy_16_bytes(void* shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(from));
}
static __device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// MLX writes the signature of the kernel. Without this limit, the compiler takes so many registers (132 to 152) that
// one block of 256 threads runs on a multiprocessor where two fit.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(256, 2)
