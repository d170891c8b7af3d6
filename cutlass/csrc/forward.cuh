// y[n, h, w] = sum_kh sum_u x[n, h + kh - Rh, u] T_kh[u, w] with the Toeplitz matrix T_kh[u, w] = weight[kh, u - w + Rw].
//
// One mma.m16n8k16 multiplies 16 rows (images of a group, and rows of the map where there are fewer than 16 images) of
// eight columns in two neighbouring input rows with an 8 x 8 block of T_kh above the same block of T_{kh+1}. A block
// depends only on its distance from the diagonal: 2 * Reach + 1 registers hold a row of the kernel. A warp computes
// kRows neighbouring output rows: an input row that was loaded once meets another kernel row for each of them.
#pragma once
#include "tile.cuh"

namespace smpconv {

// Columns: 8-column blocks of output; Reach: blocks to either side that the kernel reaches; Halo: whether the map goes
// on beyond the tile; Rows: output rows per warp.
template <int Columns, int Reach, bool Halo, int Rows, int Warps, int CtasPerSm>
struct ForwardShape {
  static constexpr int kColumns = Columns, kReach = Reach, kRows = Rows, kWarps = Warps, kCtasPerSm = CtasPerSm;
  static constexpr bool kHalo = Halo;
  static constexpr int kBlocks = Halo ? Columns + 2 * Reach : Columns;  // of input
  static constexpr int kDistances = 2 * Reach + 1;
  static constexpr int kTapRow = 16 * Reach + 16;  // elements of a kernel row in shared memory, of which there are two copies
  static constexpr int kZeroBytes = kBlocks * 16;
  static_assert(Halo || Reach < Columns || Columns == 1, "blocks further away than the map is wide");

  static __host__ __device__ int table_rows(int kernel_height) { return kernel_height + 2 * Rows; }
  static __host__ __device__ int table_bytes(int kernel_height) { return table_rows(kernel_height) * kTapRow * 4; }
};

template <Scalar S, typename Shape>
__global__ void __launch_bounds__(Shape::kWarps * 32, Shape::kCtasPerSm) forward_kernel(const ForwardParams p) {
  constexpr int kThreads = Shape::kWarps * 32, kRows = Shape::kRows, kColumns = Shape::kColumns, kReach = Shape::kReach;
  constexpr int kDistances = Shape::kDistances, kTapRow = Shape::kTapRow, kShift = Shape::kHalo ? kReach : 0;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ int next_task;
  const int thread = threadIdx.x, lane = thread & 31;
  const int reach_h = p.kernel_height / 2, reach_w = p.kernel_width / 2;

  // Neighbouring CTAs take neighbouring channels of the same images.
  const int channel = blockIdx.x % p.channels;
  int rest = blockIdx.x / p.channels;
  const int column_tile = rest % p.column_tiles;
  rest /= p.column_tiles;
  const int row_tile = rest % p.row_tiles;
  const int images_per_cta = p.groups << p.group_log2;
  const int64_t first_image = static_cast<int64_t>(rest / p.row_tiles) * images_per_cta;
  const int first_row = row_tile * p.tile_rows, end_row = min(p.height, first_row + p.tile_rows);
  const int load_first = max(0, first_row - reach_h), load_end = min(p.height, end_row + reach_h);
  const int first_column = column_tile * kColumns * 8;

  const uint32_t zeros = shared_address(memory);
  const uint32_t images = zeros + Shape::kZeroBytes;
  const int table_offset = Shape::kZeroBytes + images_per_cta * p.image_stride;
  auto* table = reinterpret_cast<uint16_t*>(memory + table_offset);
  copy_tile<Shape::kBlocks>(images, p.x, p, first_image, images_per_cta, channel, load_first, load_end - load_first,
                            first_column - 8 * kShift, p.pitch, p.image_stride, thread, kThreads);

  // The kernel, twice: element i of the second copy is element i + 1 of the first, so that any two neighbouring taps
  // are one aligned word in one of the two. Rows of zeros before and after.
  const int taps = p.kernel_height * p.kernel_width;
  const uint16_t* weight = static_cast<const uint16_t*>(p.weight) + static_cast<int64_t>(channel) * taps;
  const int table_rows = Shape::table_rows(p.kernel_height);
  for (int i = thread; i < table_rows * kTapRow; i += kThreads) {
    const int row = i / kTapRow - (kRows - 1), column = i % kTapRow - (8 * kReach + 8 - reach_w);
    uint16_t value = 0;
    if (row >= 0 && row < p.kernel_height && column >= 0 && column < p.kernel_width) {
      const int tap = row * p.kernel_width + column;
      value = __ldg(weight + (p.flip ? taps - 1 - tap : tap));
    }
    uint16_t* place = table + i / kTapRow * (2 * kTapRow) + i % kTapRow;
    place[0] = value;
    if (i % kTapRow > 0) {
      place[kTapRow - 1] = value;
    }
    if (i % kTapRow == kTapRow - 1) {
      place[kTapRow] = 0;
    }
  }
  for (int i = thread; i < Shape::kZeroBytes / 4; i += kThreads) {
    reinterpret_cast<uint32_t*>(memory)[i] = 0;
  }
  if (thread == 0) {
    next_task = 0;
  }
  wait_for_copies();
  __syncthreads();

  const int group = 1 << p.group_log2, shared_rows = 16 >> p.group_log2;
  const int row_blocks = (end_row - first_row + kRows * shared_rows - 1) / (kRows * shared_rows);
  const int tasks = row_blocks * p.groups;
  // A lane's row of the two 16 x 8 matrices: the upper half of the warp loads from the next row of the map.
  const int m = lane & 15, later = lane >> 4;
  const int m_image = m & (group - 1), m_row = (m >> p.group_log2) * kRows;
  const int quad = lane >> 2, pair = lane & 3;
  const uint32_t* taps_of_lane =
      reinterpret_cast<const uint32_t*>(table) + ((quad & 1) ? kTapRow / 2 : 0) + (8 + 2 * pair - quad - (quad & 1)) / 2;

  while (true) {
    int task = 0;
    if (lane == 0) {
      task = atomicAdd(&next_task, 1);
    }
    task = __shfl_sync(0xffffffff, task, 0);
    if (task >= tasks) {
      break;
    }
    // From the middle of the map outwards: the rows that meet most kernel rows first.
    const int image_group = task % p.groups, turn = task / p.groups;
    const int block = row_blocks / 2 + ((turn & 1) ? -(turn + 1) / 2 : turn / 2);
    const int h0 = first_row + block * kRows * shared_rows;

    float sums[kRows][kColumns][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[i][j][e] = 0.f;
        }
      }
    }
    // Output row i of the warp and the input rows at `offset` meet in kernel row offset - i + reach_h.
    const int from = max(-reach_h, load_first - (h0 + kRows * (shared_rows - 1)));
    const int to = min(reach_h + kRows - 1, load_end - 1 - h0);
    const uint32_t lane_image = images + (image_group * group + m_image) * p.image_stride;
    const int lane_row = h0 + m_row + later - load_first;
    const int loaded = load_end - load_first;

    uint32_t window[kRows + 1][kDistances];  // kernel rows offset - (kRows - 1) + reach_h and on
    const uint32_t* kernel_row = taps_of_lane + (from + reach_h) * kTapRow;
#pragma unroll
    for (int i = 0; i < kRows - 1; ++i) {
#pragma unroll
      for (int d = 0; d < kDistances; ++d) {
        window[i][d] = kernel_row[i * kTapRow + 4 * d];
      }
    }
    kernel_row += (kRows - 1) * kTapRow;
#pragma unroll 1
    for (int offset = from; offset <= to; offset += 2) {
#pragma unroll
      for (int d = 0; d < kDistances; ++d) {
        window[kRows - 1][d] = kernel_row[4 * d];
        window[kRows][d] = kernel_row[kTapRow + 4 * d];
      }
      kernel_row += 2 * kTapRow;
      const int row = lane_row + offset;
      const uint32_t address = static_cast<uint32_t>(row) < static_cast<uint32_t>(loaded) ? lane_image + row * p.pitch : zeros;
#pragma unroll
      for (int u = 0; u < Shape::kBlocks; ++u) {
        uint32_t a[4];
        ldmatrix4(a, address + u * 16);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int d = u - kShift - j + kReach;
          if (d >= 0 && d < kDistances) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              multiply_add<S>(sums[i][j], a, window[kRows - 1 - i][d], window[kRows - i][d]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows - 1; ++i) {
#pragma unroll
        for (int d = 0; d < kDistances; ++d) {
          window[i][d] = window[i + 2][d];
        }
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = quad + 8 * half;
      const int64_t image = first_image + image_group * group + (row & (group - 1));
      if (image >= p.images) {
        continue;
      }
      uint16_t* plane = static_cast<uint16_t*>(p.y) + (image * p.channels + channel) * (static_cast<int64_t>(p.height) * p.width);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int h = h0 + (row >> p.group_log2) * kRows + i;
        if (h >= end_row) {
          continue;
        }
        uint16_t* line = plane + static_cast<int64_t>(h) * p.width;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int w = first_column + 8 * j + 2 * pair;
          const uint32_t two = pack<S>(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
          if (p.vector > 1) {
            if (w < p.width) {
              *reinterpret_cast<uint32_t*>(line + w) = two;
            }
          } else {
            if (w < p.width) {
              line[w] = static_cast<uint16_t>(two);
            }
            if (w + 1 < p.width) {
              line[w + 1] = static_cast<uint16_t>(two >> 16);
            }
          }
        }
      }
    }
  }
}

}  // namespace smpconv
