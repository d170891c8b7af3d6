#include "weight.cuh"

#include <algorithm>

#include "geometry.h"
#include "launch.h"

namespace smpconv {
namespace {

// CTAs that keep a large GPU busy; a fixed number, so that sums do not depend on the GPU.
constexpr int64_t kWantedCtas = 768;

template <typename Shape>
int64_t memory_of(const WeightParams& p) {
  const int64_t tile = Shape::kZeroBytes + 2 * (int64_t{p.groups} << p.group_log2) * (p.image_stride + p.dy_image_stride);
  const int64_t blocks = int64_t{p.kernel_groups} * 2 * Shape::kPairs * Shape::kDistances * 64 * 4;
  return std::max(tile, blocks);
}

template <typename Shape>
bool plan(WeightParams& p) {
  const int64_t budget = shared_memory_per_sm() / Shape::kCtasPerSm - 1024 - 128;
  p.column_tiles = cdiv(p.width, 8 * Shape::kColumns);
  p.kernel_groups = cdiv(p.kernel_height, 2 * Shape::kPairs);
  p.row_splits = std::max(1, Shape::kMaxThreads / 32 / p.kernel_groups);
  p.group_log2 = std::min(4, log2_ceil(p.images));
  p.tile_rows = p.height;
  p.groups = 1;
  for (;; next_smaller(p)) {
    set_strides(p, Shape::kBlocks);
    p.dy_rows = p.tile_rows;
    p.dy_pitch = padded_pitch(Shape::kColumns, p.group_log2);
    p.dy_image_stride = padded_stride(int64_t{p.dy_rows} * p.dy_pitch, p.group_log2);
    if (memory_of<Shape>(p) <= budget) {
      break;
    }
    if (!can_shrink(p, 2)) {
      return false;
    }
  }
  p.row_tiles = cdiv(p.height, p.tile_rows);
  const int64_t groups_in_all = cdiv(p.images, int64_t{1} << p.group_log2);
  const int64_t tiles = int64_t{p.channels} * p.row_tiles * p.column_tiles;
  const int64_t wanted = std::max<int64_t>(1, cdiv(kWantedCtas, tiles));
  while (p.groups < cdiv(groups_in_all, wanted)) {
    ++p.groups;
    if (memory_of<Shape>(p) > budget) {
      --p.groups;
      break;
    }
  }
  // Equally many for every CTA, and equally many at a time.
  const int64_t per_cta = cdiv(groups_in_all, wanted);
  p.groups = static_cast<int>(cdiv(per_cta, cdiv(per_cta, int64_t{p.groups})));
  p.splits = static_cast<int>(cdiv(groups_in_all, per_cta));
  return true;
}

template <Scalar S, typename Shape>
std::string launch(WeightParams p, void* out, cudaStream_t stream) {
  plan<Shape>(p);
  const int64_t parts = int64_t{p.splits} * p.row_tiles * p.column_tiles;
  const int64_t blocks = parts * p.channels;
  if (blocks > 0x7fffffff) {
    return "more blocks than a launch can have";
  }
  const auto kernel = weight_kernel<S, Shape>;
  const int bytes = static_cast<int>(memory_of<Shape>(p));
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), 32 * p.kernel_groups * p.row_splits, bytes, stream>>>(p);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) {
    const int64_t size = int64_t{p.channels} * p.kernel_height * p.kernel_width;
    sum_partials<S><<<static_cast<unsigned>(cdiv(size, int64_t{256})), 256, 0, stream>>>(p.partial, out, size,
                                                                                    static_cast<int>(parts));
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

template <typename F>
auto with_shape(const WeightParams& p, F f) {
  const int reach = (p.kernel_width / 2 + 7) / 8;
  if (p.width <= 8) {
    return f(WeightShape<1, 0, false, 4, 3>{});
  }
  if (p.width <= 16) {
    return f(WeightShape<2, 1, false, 4, 3>{});
  }
  if (p.width <= 32 && reach <= 2) {
    return f(WeightShape<4, 2, false, 4, 2>{});
  }
  if (p.width <= 56 && reach <= 2) {
    return f(WeightShape<7, 2, false, 4, 2>{});
  }
  if (reach <= 2) {
    return f(WeightShape<4, 2, true, 4, 2>{});
  }
  return f(WeightShape<4, 4, true, 2, 1>{});
}

}  // namespace

int64_t weight_parts(const WeightParams& p) {
  return with_shape(p, [&](auto shape) -> int64_t {
    WeightParams q = p;
    return plan<decltype(shape)>(q) ? int64_t{q.splits} * q.row_tiles * q.column_tiles : 0;
  });
}

std::string launch_weight(Scalar scalar, WeightParams p, void* out, cudaStream_t stream) {
  return with_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    return scalar == Scalar::bfloat16 ? launch<Scalar::bfloat16, Shape>(p, out, stream)
                                      : launch<Scalar::float16, Shape>(p, out, stream);
  });
}

}  // namespace smpconv
