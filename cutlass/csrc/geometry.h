// How a tile lies in shared memory.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace smpconv {

inline int log2_ceil(int64_t n) {
  int log2 = 0;
  while ((int64_t{1} << log2) < n) {
    ++log2;
  }
  return log2;
}

inline int64_t shared_memory_per_sm() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) != cudaSuccess) {
    return 0;
  }
  return bytes;
}

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return count;
}

// Eight addresses of one ldmatrix are those of eight images, or of fewer images and some rows each: strides that put
// them into eight different groups of four banks.
inline int padded_stride(int64_t bytes, int group_log2) {
  const int want = group_log2 >= 3 ? 1 : 8 >> group_log2;
  const int modulus = group_log2 >= 3 ? 2 : 8;
  int64_t units = cdiv(bytes, int64_t{16});
  while (units % modulus != want % modulus) {
    ++units;
  }
  return static_cast<int>(units * 16);
}

inline int padded_pitch(int blocks, int group_log2) {
  return (group_log2 >= 3 ? blocks : blocks | 1) * 16;
}

inline int loaded_rows(const Geometry& g, int tile_rows) {
  return std::min(g.height, tile_rows + 2 * (g.kernel_height / 2));
}

inline void set_strides(Geometry& g, int blocks) {
  g.pitch = padded_pitch(blocks, g.group_log2);
  g.loaded_rows = loaded_rows(g, g.tile_rows);
  g.image_stride = padded_stride(int64_t{g.loaded_rows} * g.pitch, g.group_log2);
}

// Fewer images share a tile, down to two; then fewer rows of the map do; then a single image is left.
inline bool can_shrink(const Geometry& g, int rows) { return g.group_log2 > 0 || g.tile_rows > rows; }

inline void next_smaller(Geometry& g) {
  if (g.group_log2 > 1) {
    --g.group_log2;
  } else if (g.tile_rows > 16) {
    g.tile_rows = std::max(16, cdiv(g.tile_rows, 2));
  } else if (g.group_log2 > 0) {
    --g.group_log2;
  } else {
    g.tile_rows = cdiv(g.tile_rows, 2);
  }
}

}  // namespace smpconv
