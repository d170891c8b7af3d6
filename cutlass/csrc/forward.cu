#include "forward.cuh"

#include <algorithm>

#include "geometry.h"
#include "launch.h"

namespace smpconv {
namespace {

template <Scalar S, typename Shape>
std::string launch(ForwardParams p, cudaStream_t stream) {
  const auto memory = [&](const ForwardParams& q) {
    return Shape::kZeroBytes + (int64_t{q.groups} << q.group_log2) * q.image_stride + Shape::table_bytes(q.kernel_height);
  };
  p.column_tiles = cdiv(p.width, 8 * Shape::kColumns);
  const int64_t budget = shared_memory_per_sm() / Shape::kCtasPerSm - 1024;
  // The most images that leave room for every CTA of a multiprocessor; of taller maps, the most rows.
  p.group_log2 = std::min(4, log2_ceil(p.images));
  p.tile_rows = p.height;
  for (;; next_smaller(p)) {
    set_strides(p, Shape::kBlocks);
    p.groups = 1;
    if (memory(p) <= budget) {
      break;
    }
    if (!can_shrink(p, Shape::kRows)) {
      return "the kernel and its rows of the map need more shared memory than the GPU has";
    }
  }
  const int row_blocks = cdiv(p.tile_rows, Shape::kRows * (16 >> p.group_log2));
  const int64_t groups_in_all = cdiv(p.images, int64_t{1} << p.group_log2);
  while (p.groups < groups_in_all && row_blocks * p.groups < 3 * Shape::kWarps) {
    ++p.groups;
    if (memory(p) > budget) {
      --p.groups;
      break;
    }
  }
  p.row_tiles = cdiv(p.height, p.tile_rows);
  const int64_t blocks = cdiv(groups_in_all, p.groups) * p.row_tiles * p.column_tiles * p.channels;
  if (blocks > 0x7fffffff) {
    return "more blocks than a launch can have";
  }
  const auto kernel = forward_kernel<S, Shape>;
  const int bytes = static_cast<int>(memory(p));
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), Shape::kWarps * 32, bytes, stream>>>(p);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

template <Scalar S>
std::string choose(const ForwardParams& p, cudaStream_t stream) {
  // Blocks of 8 columns that a kernel reaches beyond its own.
  const int reach = (p.kernel_width / 2 + 7) / 8;
  if (p.width <= 8) {
    return launch<S, ForwardShape<1, 0, false, 7, 4, 4>>(p, stream);
  }
  if (p.width <= 16) {
    return launch<S, ForwardShape<2, 1, false, 7, 4, 4>>(p, stream);
  }
  if (p.width <= 32 && reach <= 2) {
    return launch<S, ForwardShape<4, 2, false, 2, 8, 3>>(p, stream);
  }
  if (p.width <= 56 && reach <= 2) {
    return launch<S, ForwardShape<7, 2, false, 2, 8, 2>>(p, stream);
  }
  if (reach <= 2) {
    return launch<S, ForwardShape<4, 2, true, 2, 8, 2>>(p, stream);
  }
  return launch<S, ForwardShape<4, 4, true, 2, 8, 2>>(p, stream);
}

}  // namespace

std::string launch_forward(Scalar scalar, ForwardParams p, cudaStream_t stream) {
  return scalar == Scalar::bfloat16 ? choose<Scalar::bfloat16>(p, stream) : choose<Scalar::float16>(p, stream);
}

}  // namespace smpconv
