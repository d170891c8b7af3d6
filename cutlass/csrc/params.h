// What a launch is told. Plain data: passed to the kernels by value.
#pragma once
#include <cstdint>

namespace smpconv {

#ifdef __CUDACC__
#define SMPCONV_BOTH __host__ __device__
#else
#define SMPCONV_BOTH
#endif

template <typename A, typename B>
SMPCONV_BOTH constexpr auto cdiv(A a, B b) {
  return (a + b - 1) / b;
}

enum class Scalar { bfloat16, float16 };

// Geometry shared by the two kernels. A CTA works on one channel, on `groups` times `group_images` images, and on one tile
// of the map; the tile's input, with the kernel's reach around it, lies in shared memory.
struct Geometry {
  int64_t images;   // N
  int channels;     // C
  int height, width;
  int kernel_height, kernel_width;
  int group_log2;   // log2 of the images that share a 16-row matrix tile; 16 >> group_log2 rows of the map share it, too
  int groups;       // groups of images in shared memory
  int tile_rows;    // rows of the map per CTA
  int row_tiles, column_tiles;
  int loaded_rows;  // rows of shared memory per image
  int pitch;        // bytes from row to row in shared memory
  int image_stride; // bytes from image to image in shared memory
  int vector;       // elements per copy from global to shared memory: 8, 4, 2 or 1
};

struct ForwardParams : Geometry {
  const void* x;       // (N, C, H, W)
  const void* weight;  // (C, 1, Kh, Kw)
  void* y;             // (N, C, H, W)
  bool flip;           // taps in reverse order: the adjoint in x
  int staged_stride;   // elements from image to image where output is put together in shared memory
};

struct WeightParams : Geometry {
  const void* grad;    // (N, C, H, W)
  const void* x;       // (N, C, H, W)
  float* partial;      // (splits, C, Kh, Kw)
  int dy_rows;         // rows of shared memory per image of grad
  int dy_pitch;
  int dy_image_stride;
  int splits;          // CTAs that share the images of one channel and tile
  int kernel_groups;   // warps beside each other, for different kernel rows
  int row_splits;      // warps beside each other, for different rows of the map
};

}  // namespace smpconv
