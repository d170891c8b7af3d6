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

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait for all but the last group of copies.
__device__ __forceinline__ void wait_for_earlier_copies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

// Arrive once the copies that this thread started have ended.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Whether the phase of this parity has ended.
__device__ __forceinline__ bool barrier_passed(uint32_t barrier, int parity) {
  int done = 0;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.s32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  while (!barrier_passed(barrier, parity)) {
  }
}

// A rectangle of planes: rows [first_row, first_row + rows) and columns [first_column, first_column + 8 * Blocks) of
// `images` planes of one channel from `first_image` on, of which those from `end_image` on are zero.
struct Rectangle {
  int64_t first_image, end_image;
  int images, channel;
  int first_row, rows, first_column;
};

// Copy a rectangle to shared memory, Vector elements at a time; what lies outside the map, or after the last image, is
// zero. A piece has the same place in every image: a thread divides once per piece, and then only steps from plane to
// plane.
template <int Blocks, int Vector>
__device__ __forceinline__ void copy_pieces(uint32_t to, const uint16_t* from, const Geometry& g, const Rectangle& r,
                                            int pitch, int image_stride, int thread, int threads) {
  constexpr int kPerRow = Blocks * 8 / Vector, kAhead = 16;
  const int pieces = r.rows * kPerRow;
  const int slots = max(1, threads / pieces);  // images that are copied beside each other
  const int64_t plane = static_cast<int64_t>(g.height) * g.width;
  const int64_t step = plane * g.channels * slots;
  const int there = static_cast<int>(min(static_cast<int64_t>(r.images), r.end_image - r.first_image));
  for (int piece = slots > 1 ? thread % pieces : thread; piece < pieces; piece += threads) {
    const int row = piece / kPerRow, x = r.first_column + piece % kPerRow * Vector;
    int image = slots > 1 ? thread / pieces : 0;
    if (image >= slots) {
      break;
    }
    const bool on_map = x >= 0 && x < g.width;
    const uint16_t* source = from + ((r.first_image + image) * g.channels + r.channel) * plane +
                             static_cast<int64_t>(r.first_row + row) * g.width + x;
    uint32_t target = to + image * image_stride + row * pitch + piece % kPerRow * (Vector * 2);
    if constexpr (Vector == 1) {
      // Loads in flight before the first one is used.
      for (; image < r.images; image += kAhead * slots) {
        uint16_t values[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          values[k] = on_map && image + k * slots < there ? __ldg(source + k * step) : uint16_t{0};
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (image + k * slots < r.images) {
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(target + k * slots * image_stride), "h"(values[k]) : "memory");
          }
        }
        source += kAhead * step;
        target += kAhead * slots * image_stride;
      }
    } else {
#pragma unroll 4
      for (; image < r.images; image += slots) {
        const bool read = on_map && image < there;
        copy_async<Vector * 2>(target, read ? source : from, read);
        source += step;
        target += slots * image_stride;
      }
    }
  }
}

template <int Blocks>
__device__ __forceinline__ void copy_rectangle(uint32_t to, const void* from, const Geometry& g, const Rectangle& r,
                                               int pitch, int image_stride, int thread, int threads) {
  const auto* source = static_cast<const uint16_t*>(from);
  if (g.vector == 8) {
    copy_pieces<Blocks, 8>(to, source, g, r, pitch, image_stride, thread, threads);
  } else if (g.vector == 4) {
    copy_pieces<Blocks, 4>(to, source, g, r, pitch, image_stride, thread, threads);
  } else if (g.vector == 2) {
    copy_pieces<Blocks, 2>(to, source, g, r, pitch, image_stride, thread, threads);
  } else {
    copy_pieces<Blocks, 1>(to, source, g, r, pitch, image_stride, thread, threads);
  }
}

}  // namespace smpconv
