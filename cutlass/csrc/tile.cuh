// Matrix instructions, shared-memory loads and the copy of a tile of the map, for both kernels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace smpconv {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void ldmatrix4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void ldmatrix2_transposed(uint32_t& r0, uint32_t& r1, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r0), "=r"(r1) : "r"(address));
}

template <Scalar S>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (S == Scalar::bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <Scalar S>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (S == Scalar::bfloat16) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  } else {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  }
}

template <int Bytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
  // With a source size of 0 nothing is read and zeros are written.
  const int size = there ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(Bytes), "r"(size) : "memory");
  }
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Copy rows [first_row, first_row + rows) and columns [first_column, first_column + 8 * Blocks) of `images` planes to
// shared memory; what lies outside the map, or after the last image, is zero. Vector elements at a time.
template <int Blocks, int Vector>
__device__ __forceinline__ void copy_tile(uint32_t to, const uint16_t* from, const Geometry& g, int64_t first_image,
                                          int images, int channel, int first_row, int rows, int first_column, int pitch,
                                          int image_stride, int thread, int threads) {
  constexpr int kPerRow = Blocks * 8 / Vector;
  const int64_t plane = static_cast<int64_t>(g.height) * g.width;
  const int per_image = rows * kPerRow;
  // A thread's next place is `threads` further: it carries (image, row, piece) along and divides only here.
  int image = thread / per_image, row = thread % per_image / kPerRow, piece = thread % kPerRow;
  const int step_row = threads / kPerRow, step_piece = threads % kPerRow;
  while (image < images) {
    const int y = first_row + row, x = first_column + piece * Vector;
    const bool there = first_image + image < g.images && x >= 0 && x < g.width;
    const uint16_t* source = there ? from + ((first_image + image) * g.channels + channel) * plane + y * g.width + x : from;
    const uint32_t target = to + image * image_stride + row * pitch + piece * Vector * 2;
    if constexpr (Vector == 1) {
      const uint16_t value = there ? __ldg(source) : uint16_t{0};
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(target), "h"(value) : "memory");
    } else {
      copy_async<Vector * 2>(target, source, there);
    }
    piece += step_piece;
    row += step_row;
    if (piece >= kPerRow) {
      piece -= kPerRow;
      ++row;
    }
    while (row >= rows) {
      row -= rows;
      ++image;
    }
  }
}

template <int Blocks>
__device__ __forceinline__ void copy_tile(uint32_t to, const void* from, const Geometry& g, int64_t first_image,
                                          int images, int channel, int first_row, int rows, int first_column, int pitch,
                                          int image_stride, int thread, int threads) {
  const auto* source = static_cast<const uint16_t*>(from);
  if (g.vector == 8) {
    copy_tile<Blocks, 8>(to, source, g, first_image, images, channel, first_row, rows, first_column, pitch, image_stride, thread, threads);
  } else if (g.vector == 4) {
    copy_tile<Blocks, 4>(to, source, g, first_image, images, channel, first_row, rows, first_column, pitch, image_stride, thread, threads);
  } else if (g.vector == 2) {
    copy_tile<Blocks, 2>(to, source, g, first_image, images, channel, first_row, rows, first_column, pitch, image_stride, thread, threads);
  } else {
    copy_tile<Blocks, 1>(to, source, g, first_image, images, channel, first_row, rows, first_column, pitch, image_stride, thread, threads);
  }
}

}  // namespace smpconv
