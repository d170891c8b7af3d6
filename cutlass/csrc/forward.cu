#include "forward.cuh"

#include <algorithm>

#include "geometry.h"
#include "launch.h"

namespace smpconv {
namespace {

template <Scalar S, typename Shape>
std::string launch(ForwardParams p, cudaStream_t stream) {
  const auto tile_bytes = [&] {
    const int64_t staged = Shape::kStaged ? p.staged_stride * 2 : 0;
    return (int64_t{p.groups} << p.group_log2) * (p.image_stride + staged) + Shape::table_bytes(p.kernel_height);
  };
  const auto memory = [&] { return Shape::kZeroBytes + Shape::kTiles * tile_bytes(); };
  p.column_tiles = cdiv(p.width, 8 * Shape::kColumns);
  // The driver keeps 1 KB per CTA for itself.
  const int64_t budget = shared_memory_per_sm() / Shape::kCtasPerSm - 1024 - 128;
  p.group_log2 = std::min(4, log2_ceil(p.images));
  p.tile_rows = p.height;
  p.groups = 1;
  for (;; next_smaller(p)) {
    set_strides(p, Shape::kBlocks);
    p.staged_stride = rows_to_blocks<Shape>(p, p.tile_rows) * Shape::kRows * (16 >> p.group_log2) * 8 * Shape::kColumns + 8;
    if (memory() <= budget) {
      break;
    }
    if (!can_shrink(p, Shape::kRows)) {
      return "the kernel and its rows of the map need more shared memory than the GPU has";
    }
  }
  const int row_blocks = rows_to_blocks<Shape>(p, p.tile_rows);
  const int64_t groups_in_all = cdiv(p.images, int64_t{1} << p.group_log2);
  while (p.groups < groups_in_all && row_blocks * p.groups < Shape::kTasks) {
    ++p.groups;
    if (memory() > budget) {
      --p.groups;
      break;
    }
  }
  // Equally many in every item.
  p.groups = static_cast<int>(cdiv(groups_in_all, cdiv(groups_in_all, int64_t{p.groups})));
  p.row_tiles = cdiv(p.height, p.tile_rows);
  const int64_t items = cdiv(groups_in_all, int64_t{p.groups}) * p.row_tiles * p.column_tiles * p.channels;
  if (items > 0x7fffffff) {
    return "more blocks than a launch can have";
  }
  const int bytes = static_cast<int>(memory()), threads = Shape::kWarps * 32;
  cudaError_t error;
  if constexpr (Shape::kTiles > 1) {
    const auto kernel = forward_stream_kernel<S, Shape>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
      const auto ctas = static_cast<unsigned>(std::min(items, int64_t{multiprocessors()}));
      kernel<<<ctas, threads, bytes, stream>>>(p, static_cast<uint32_t>(items), static_cast<int>(tile_bytes()));
      error = cudaGetLastError();
    }
  } else {
    const auto kernel = forward_kernel<S, Shape>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
      kernel<<<static_cast<unsigned>(items), threads, bytes, stream>>>(p);
      error = cudaGetLastError();
    }
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

template <Scalar S>
std::string choose(const ForwardParams& p, cudaStream_t stream) {
  // Blocks of 8 columns that a kernel reaches beyond its own.
  const int reach = (p.kernel_width / 2 + 7) / 8;
  if (p.width <= 8) {
    return launch<S, ForwardShape<1, 0, false, 7, 4, 6, 1, true>>(p, stream);
  }
  if (p.width <= 16) {
    return launch<S, ForwardShape<2, 1, false, 7, 4, 3, 1, true>>(p, stream);
  }
  if (p.width <= 32 && reach <= 2) {
    return launch<S, ForwardShape<4, 2, false, 2, 4, 6, 1, false>>(p, stream);
  }
  if (p.width <= 56 && reach <= 2) {
    return launch<S, ForwardShape<7, 2, false, 2, 16, 1, 2, false>>(p, stream);
  }
  if (reach <= 2) {
    return launch<S, ForwardShape<4, 2, true, 2, 16, 1, 2, false>>(p, stream);
  }
  return launch<S, ForwardShape<4, 4, true, 2, 16, 1, 2, false>>(p, stream);
}

}  // namespace

std::string use_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

std::string launch_forward(Scalar scalar, ForwardParams p, cudaStream_t stream) {
  return scalar == Scalar::bfloat16 ? choose<Scalar::bfloat16>(p, stream) : choose<Scalar::float16>(p, stream);
}

}  // namespace smpconv
