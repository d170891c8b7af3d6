// dweight[kh, kw] = sum_{n, h, w} grad[n, h, w] x[n, h + kh - Rh, w + kw - Rw].
//
// For one kernel row that is G[w, u] = sum over (n, h) of grad[(n, h), w] x[(n, h + kh - Rh), u], summed along its
// diagonals u - w = kw - Rw. So every 8 x 8 block of G at the same distance from the diagonal goes into the same
// accumulators. One mma.m16n8k16 sums over 16 (image, row) pairs; its 16 rows are eight columns of grad in row h, for
// kernel row kh, above the same columns in row h + 1, for kernel row kh - 1: both meet the same row of x.
// Every sum has a fixed order: equal inputs give equal bits.
#pragma once
#include "tile.cuh"

namespace smpconv {

template <int Columns, int Reach, bool Halo, int Pairs, int CtasPerSm>
struct WeightShape {
  static constexpr int kColumns = Columns, kReach = Reach, kPairs = Pairs, kCtasPerSm = CtasPerSm;
  static constexpr bool kHalo = Halo;
  static constexpr int kBlocks = Halo ? Columns + 2 * Reach : Columns;  // of x
  static constexpr int kDistances = 2 * Reach + 1;
  static constexpr int kZeroBytes = kBlocks * 16;
  static constexpr int kMaxThreads = CtasPerSm == 1 ? 512 : 256;
};

template <Scalar S, typename Shape>
__global__ void __launch_bounds__(Shape::kMaxThreads, Shape::kCtasPerSm) weight_kernel(const WeightParams p) {
  constexpr int kPairs = Shape::kPairs, kColumns = Shape::kColumns, kBlocks = Shape::kBlocks, kReach = Shape::kReach;
  constexpr int kDistances = Shape::kDistances, kShift = Shape::kHalo ? kReach : 0;
  extern __shared__ __align__(128) unsigned char memory[];
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread & 31, warp = thread >> 5;
  const int reach_h = p.kernel_height / 2, reach_w = p.kernel_width / 2;

  const int channel = blockIdx.x % p.channels;
  const int part = blockIdx.x / p.channels;
  int rest = part;
  const int column_tile = rest % p.column_tiles;
  rest /= p.column_tiles;
  const int row_tile = rest % p.row_tiles;
  const int split = rest / p.row_tiles;
  const int first_row = row_tile * p.tile_rows, end_row = min(p.height, first_row + p.tile_rows);
  const int load_first = max(0, first_row - reach_h), load_end = min(p.height, end_row + reach_h);
  const int first_column = column_tile * kColumns * 8;
  const int rows = end_row - first_row, loaded = load_end - load_first;

  const uint32_t zeros = shared_address(memory);
  const int images_per_cta = p.groups << p.group_log2;
  const uint32_t x_at = zeros + Shape::kZeroBytes;
  const uint32_t grad_at = x_at + images_per_cta * p.image_stride;
  for (int i = thread; i < Shape::kZeroBytes / 4; i += threads) {
    reinterpret_cast<uint32_t*>(memory)[i] = 0;
  }

  const int group = 1 << p.group_log2, shared_rows = 16 >> p.group_log2;
  const int kernel_group = warp % p.kernel_groups, row_split = warp / p.kernel_groups;
  // Pair i of a warp is kernel_group + i * kernel_groups: rows from the rim and from the middle of the kernel, which
  // meets more rows of the map.
  const auto kernel_row_of = [&](int i) { return 2 * (kernel_group + i * p.kernel_groups); };
  // Where a lane loads from: matrices of grad are (k low, row h), (k low, row h + 1), (k high, h), (k high, h + 1), those
  // of x (k low, u), (k high, u), (k low, u + 1), (k high, u + 1); k counts the images of the group, then rows.
  const int grad_k = (lane & 7) + 8 * (lane >> 4), grad_later = (lane >> 3) & 1;
  const int x_k = (lane & 7) + 8 * ((lane >> 3) & 1), x_next = lane >> 4;
  const int grad_row = (grad_k >> p.group_log2) + grad_later, x_row = (x_k >> p.group_log2);

  float sums[kPairs][kDistances][4];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
#pragma unroll
    for (int d = 0; d < kDistances; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[i][d][e] = 0.f;
      }
    }
  }

  // While one tile is worked on, the next one is copied.
  const int64_t share = cdiv(cdiv(p.images, int64_t{1} << p.group_log2), int64_t{p.splits}) << p.group_log2;
  const int64_t begin = split * share, end = min(p.images, begin + share);
  const int tile_bytes = images_per_cta * (p.image_stride + p.dy_image_stride);
  const auto copy = [&](int64_t first_image, int which) {
    if (first_image < end) {
      const Rectangle of_x{first_image, end, images_per_cta, channel, load_first, loaded, first_column - 8 * kShift};
      const Rectangle of_grad{first_image, end, images_per_cta, channel, first_row, rows, first_column};
      copy_rectangle<kBlocks>(x_at + which * tile_bytes, p.x, p, of_x, p.pitch, p.image_stride, thread, threads);
      copy_rectangle<kColumns>(grad_at + which * tile_bytes, p.grad, p, of_grad, p.dy_pitch, p.dy_image_stride, thread, threads);
    }
    commit_copies();
  };
  copy(begin, 0);
  int which = 0;
  for (int64_t first_image = begin; first_image < end; first_image += images_per_cta, which ^= 1) {
    copy(first_image + images_per_cta, which ^ 1);
    wait_for_earlier_copies();
    __syncthreads();
    const uint32_t grad_tile = grad_at + which * tile_bytes, x_tile = x_at + which * tile_bytes;
    for (int image_group = 0; image_group < p.groups; ++image_group) {
      const uint32_t grad_image = grad_tile + (image_group * group + (grad_k & (group - 1))) * p.dy_image_stride;
      const uint32_t x_image = x_tile + (image_group * group + (x_k & (group - 1))) * p.image_stride;
#pragma unroll 1
      for (int h = -1 + row_split * shared_rows; h < rows; h += shared_rows * p.row_splits) {
        const int gr = h + grad_row;
        const uint32_t grad_address = static_cast<uint32_t>(gr) < static_cast<uint32_t>(rows) ? grad_image + gr * p.dy_pitch : zeros;
        uint32_t a[kColumns][4];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          ldmatrix4_transposed(a[j], grad_address + j * 16);
        }
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          // Rows of x, counted from the first that is loaded, that row h of grad meets in the upper kernel row.
          const int meets = h + first_row + kernel_row_of(i) + 1 - reach_h - load_first;
          if (meets + shared_rows <= 0 || meets >= loaded) {
            continue;
          }
          const int xr = meets + x_row;
          const uint32_t address = static_cast<uint32_t>(xr) < static_cast<uint32_t>(loaded) ? x_image + xr * p.pitch : zeros;
#pragma unroll
          for (int u = 0; u < kBlocks; u += 2) {
            uint32_t b[4];
            if (u + 1 < kBlocks) {
              ldmatrix4_transposed(b, address + (u + x_next) * 16);
            } else {
              ldmatrix2_transposed(b[0], b[1], address + u * 16);
            }
#pragma unroll
            for (int v = 0; v < 2; ++v) {
#pragma unroll
              for (int j = 0; j < kColumns; ++j) {
                const int d = u + v - kShift - j + kReach;
                if (u + v < kBlocks && d >= 0 && d < kDistances) {
                  multiply_add<S>(sums[i][d], a[j], b[2 * v], b[2 * v + 1]);
                }
              }
            }
          }
        }
      }
    }
    __syncthreads();
  }

  // [kernel row][distance][8 columns of grad][8 columns of x]; warps of different rows of the map one after another.
  auto* blocks = reinterpret_cast<float*>(memory);
  const int quad = lane >> 2, pair = lane & 3;
  for (int turn = 0; turn < p.row_splits; ++turn) {
    __syncthreads();
    if (row_split != turn) {
      continue;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int d = 0; d < kDistances; ++d) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int kernel_row = kernel_row_of(i) + 1 - half;
          auto* place = reinterpret_cast<float2*>(blocks + (kernel_row * kDistances + d) * 64 + quad * 8 + 2 * pair);
          float2 sum = make_float2(sums[i][d][2 * half], sums[i][d][2 * half + 1]);
          if (turn > 0) {
            sum.x += place->x;
            sum.y += place->y;
          }
          *place = sum;
        }
      }
    }
  }
  __syncthreads();
  const int taps = p.kernel_height * p.kernel_width;
  float* out = p.partial + (static_cast<int64_t>(part) * p.channels + channel) * taps;
  for (int tap = thread; tap < taps; tap += threads) {
    const int kh = tap / p.kernel_width, offset = tap % p.kernel_width - reach_w;
    float sum = 0.f;
    for (int d = 0; d < kDistances; ++d) {
      const int n_minus_m = offset - 8 * (d - kReach);
      if (n_minus_m <= -8 || n_minus_m >= 8) {
        continue;
      }
      const float* block = blocks + (kh * kDistances + d) * 64;
      for (int m = max(0, -n_minus_m); m < min(8, 8 - n_minus_m); ++m) {
        sum += block[m * 8 + m + n_minus_m];
      }
    }
    out[tap] = sum;
  }
}

template <Scalar S>
__global__ void sum_partials(const float* partial, void* out, int64_t size, int parts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) {
    return;
  }
  float sum = 0.f;
  for (int part = 0; part < parts; ++part) {
    sum += partial[part * size + i];
  }
  static_cast<uint16_t*>(out)[i] = static_cast<uint16_t>(pack<S>(sum, 0.f));
}

}  // namespace smpconv
