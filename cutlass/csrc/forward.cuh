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
// on beyond the tile; Rows: output rows per warp; Tiles: items in shared memory at a time, of which a CTA goes through many, if there are more
// than one;
// Staged: whether output is put together in shared memory, as rows that are too short to be written one by one are.
template <int Columns, int Reach, bool Halo, int Rows, int Warps, int CtasPerSm, int Tiles, bool Staged>
struct ForwardShape {
  static constexpr int kColumns = Columns, kReach = Reach, kRows = Rows, kWarps = Warps;
  static constexpr int kCtasPerSm = CtasPerSm, kTiles = Tiles;
  static constexpr bool kHalo = Halo, kStaged = Staged;
  static constexpr int kBlocks = Halo ? Columns + 2 * Reach : Columns;  // of input
  static constexpr int kDistances = 2 * Reach + 1;
  // Words of a kernel row in one of the two copies in shared memory, plus 8 where both would meet in the same banks.
  static constexpr int kTapRow = 8 * Reach + 8 + 8 * (Reach % 2);
  static constexpr int kZeroBytes = kBlocks * 16;
  static constexpr int kTasks = Tiles > 1 ? 28 : 2 * Warps;  // per item, at least
  static_assert(Halo || Reach < Columns || Columns == 1, "blocks further away than the map is wide");

  static __host__ __device__ int table_rows(int kernel_height) { return kernel_height + 2 * Rows; }
  static __host__ __device__ int table_bytes(int kernel_height) { return table_rows(kernel_height) * kTapRow * 16; }
};

template <int Threads>
__device__ __forceinline__ void clear(void* from, int bytes, int thread) {
  for (int i = thread; i < bytes / 16; i += Threads) {
    static_cast<uint4*>(from)[i] = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ int take_task(int* next, int lane) {
  int task = 0;
  if (lane == 0) {
    asm volatile("atom.relaxed.cta.shared.add.s32 %0, [%1], 1;" : "=r"(task) : "r"(shared_address(next)) : "memory");
  }
  return __shfl_sync(0xffffffff, task, 0);
}

// What was counted before; orders what the caller did before it, and what it does after.
__device__ __forceinline__ int count_up(int* counter) {
  int before = 0;
  asm volatile("atom.acq_rel.cta.shared.add.s32 %0, [%1], 1;" : "=r"(before) : "r"(shared_address(counter)) : "memory");
  return before;
}

template <typename Shape>
__host__ __device__ __forceinline__ int rows_to_blocks(const ForwardParams& p, int rows) {
  const int together = Shape::kRows * (16 >> p.group_log2);
  return (rows + together - 1) / together;
}

// One item of work: the images and the tile of the map that lie in shared memory together.
template <typename Shape>
struct Item {
  int channel;
  int64_t first_image;
  int images;  // that there are
  int first_row, end_row, first_column;
  int load_first, load_end;
  int row_blocks;
  int64_t y;  // elements from the start of y to the first image, at the first row and column of the map

  Item() = default;
  __device__ __forceinline__ Item(const ForwardParams& p, uint32_t number) {
    // Neighbouring items take neighbouring channels of the same images.
    uint32_t rest = number / p.channels;
    channel = static_cast<int>(number - rest * p.channels);
    const uint32_t tiles = rest / p.column_tiles;
    first_column = static_cast<int>(rest - tiles * p.column_tiles) * (Shape::kColumns * 8);
    rest = tiles / p.row_tiles;
    first_row = static_cast<int>(tiles - rest * p.row_tiles) * p.tile_rows;
    end_row = min(p.height, first_row + p.tile_rows);
    first_image = static_cast<int64_t>(rest) * (p.groups << p.group_log2);
    load_first = max(0, first_row - p.kernel_height / 2);
    load_end = min(p.height, end_row + p.kernel_height / 2);
    images = static_cast<int>(min(static_cast<int64_t>(p.groups << p.group_log2), p.images - first_image));
    row_blocks = rows_to_blocks<Shape>(p, end_row - first_row);
    y = (first_image * p.channels + channel) * (int64_t{p.height} * p.width);
  }

  __device__ __forceinline__ Rectangle rectangle(const ForwardParams& p) const {
    return {first_image, p.images, p.groups << p.group_log2, channel, load_first, load_end - load_first,
            first_column - (Shape::kHalo ? 8 * Shape::kReach : 0)};
  }
};

// Write the kernel of a channel into the table. A matrix instruction takes pairs of neighbouring taps of two neighbouring
// kernel rows: (taps c and c + 1 of row r, the same of row r + 1) are eight bytes of the table, for every r, and for
// every even c in one copy, every odd c in the other. So every tap stands in four places. The table was cleared before:
// there are rows of zeros before and after, and columns.
template <typename Shape, int kAhead>
__device__ __forceinline__ void write_table(uint16_t* table, const ForwardParams& p, int channel, int thread, int threads) {
  constexpr int kRow = Shape::kTapRow * 8;  // elements: two copies of words for two rows
  const int taps = p.kernel_height * p.kernel_width;
  const auto* weight = static_cast<const uint16_t*>(p.weight) + static_cast<int64_t>(channel) * taps;
  const int shift = 8 * Shape::kReach + 8 - p.kernel_width / 2;
  for (int first = thread; first < taps; first += kAhead * threads) {
    uint16_t values[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int tap = first + k * threads;
      values[k] = tap < taps ? __ldg(weight + (p.flip ? taps - 1 - tap : tap)) : uint16_t{0};
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int tap = first + k * threads;
      const int row = tap / p.kernel_width, column = tap - row * p.kernel_width + shift;
      if (tap < taps && column > 0 && column < 2 * Shape::kTapRow) {
        uint16_t* place = table + (row + Shape::kRows - 1) * kRow;
        uint16_t* even = place + column / 2 * 4 + column % 2;
        uint16_t* odd = place + kRow / 2 + (column - 1) / 2 * 4 + (column - 1) % 2;
        even[0] = odd[0] = values[k];
        even[2 - kRow] = odd[2 - kRow] = values[k];
      }
    }
  }
}

// What a warp does: kRows output rows of each row of its matrix tile, all columns of the tile. `task` counts groups of
// images first, then rows from the middle of the map outwards, since those in the middle meet most kernel rows.
template <Scalar S, typename Shape>
__device__ __forceinline__ void convolve_rows(const ForwardParams& p, const Item<Shape>& item, int task, uint32_t zeros,
                                              uint32_t images, const uint16_t* table, uint16_t* staged, int lane) {
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kReach = Shape::kReach;
  constexpr int kDistances = Shape::kDistances, kTapRow = Shape::kTapRow, kShift = Shape::kHalo ? kReach : 0;
  const int reach_h = p.kernel_height / 2;
  const int group = 1 << p.group_log2, shared_rows = 16 >> p.group_log2;
  // A lane's row of the two 16 x 8 matrices: the upper half of the warp loads from the next row of the map.
  const int m = lane & 15, later = lane >> 4;
  const int m_image = m & (group - 1), m_row = (m >> p.group_log2) * kRows;
  const int quad = lane >> 2, pair = lane & 3;

  int turn = task, image_group = 0;
  if (p.groups > 1) {
    turn = static_cast<int>(static_cast<unsigned>(task) / static_cast<unsigned>(p.groups));
    image_group = task - turn * p.groups;
  }
  const int block = (item.row_blocks >> 1) + ((turn & 1) ? -((turn + 1) >> 1) : turn >> 1);
  const int h0 = item.first_row + block * kRows * shared_rows;

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
  const int from = max(-reach_h, item.load_first - (h0 + kRows * (shared_rows - 1)));
  const int to = min(reach_h + kRows - 1, item.load_end - 1 - h0);
  const uint32_t lane_image = images + (image_group * group + m_image) * p.image_stride;
  int row = h0 + m_row + later - item.load_first + from;
  const int loaded = item.load_end - item.load_first;

  // Output rows 2 q and 2 q + 1 take the kernel rows that 2 q - 2 and 2 q - 1 took a step before. The taps of a step
  // stay in one place of a ring while output rows pass over them.
  constexpr int kRing = (kRows + 1) / 2;
  uint2 taps[kRing][2][kDistances];
  const uint2* kernel_row = reinterpret_cast<const uint2*>(table) + ((quad & 1) ? kTapRow : 0) +
                            (8 + 2 * pair - quad - (quad & 1)) / 2 + (from + reach_h + kRows - 1) * (2 * kTapRow);
#pragma unroll
  for (int i = 2; i < kRows; ++i) {
#pragma unroll
    for (int d = 0; d < kDistances; ++d) {
      taps[i / 2][i % 2][d] = kernel_row[4 * d - i * (2 * kTapRow)];
    }
  }
#pragma unroll 1
  for (int offset = from; offset <= to;) {
#pragma unroll
    for (int phase = 0; phase < kRing; ++phase) {
      constexpr auto place = [](int q, int f) { return (q - f + kRing) % kRing; };
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int d = 0; d < kDistances; ++d) {
          taps[place(0, phase)][i][d] = kernel_row[4 * d - i * (2 * kTapRow)];
        }
      }
      kernel_row += 4 * kTapRow;
      const uint32_t address =
          static_cast<uint32_t>(row) < static_cast<uint32_t>(loaded) ? lane_image + row * p.pitch : zeros;
      row += 2;
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
              const uint2& both = taps[place(i / 2, phase)][i % 2][d];
              multiply_add<S>(sums[i][j], a, both.x, both.y);
            }
          }
        }
      }
      offset += 2;
      if (offset > to) {
        break;
      }
    }
  }

  if constexpr (Shape::kStaged) {
    // In shared memory rows are as long as the tile is wide, and nothing has to be asked.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile_row = quad + 8 * half;
      const int h = h0 - item.first_row + (tile_row >> p.group_log2) * kRows;
      uint16_t* place = staged + (image_group * group + (tile_row & (group - 1))) * p.staged_stride + h * (8 * kColumns) + 2 * pair;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          *reinterpret_cast<uint32_t*>(place + (8 * kColumns) * i + 8 * j) = pack<S>(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
    return;
  }
  // Pairs of columns end where the map ends, unless its width is odd.
  const bool pairs = p.vector > 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int tile_row = quad + 8 * half;
    const int image_in_item = image_group * group + (tile_row & (group - 1));
    if (image_in_item >= item.images) {
      continue;
    }
    const int h = h0 + (tile_row >> p.group_log2) * kRows, w = item.first_column + 2 * pair;
    uint16_t* place = static_cast<uint16_t*>(p.y) + item.y + image_in_item * (p.channels * (int64_t{p.height} * p.width)) + static_cast<int64_t>(h) * p.width + w;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (h + i < item.end_row) {
        if (pairs) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            if (w + 8 * j < p.width) {
              *reinterpret_cast<uint32_t*>(place + 8 * j) = pack<S>(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
            }
          }
        } else {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            const uint32_t two = pack<S>(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
            if (w + 8 * j < p.width) {
              place[8 * j] = static_cast<uint16_t>(two);
            }
            if (w + 8 * j + 1 < p.width) {
              place[8 * j + 1] = static_cast<uint16_t>(two >> 16);
            }
          }
        }
      }
      place += p.width;
    }
  }
}

// Write the rows that were put together in shared memory: of every image one run of elements without a gap.
template <typename Word, typename Shape>
__device__ __forceinline__ void write_staged(const ForwardParams& p, const Item<Shape>& item, const uint16_t* staged, int thread,
                                             int threads) {
  constexpr int kVector = sizeof(Word) / 2;
  const int per_row = p.width / kVector, pieces = (item.end_row - item.first_row) * per_row;
  const int slots = max(1, threads / pieces);
  const int64_t step = int64_t{p.height} * p.width * p.channels * slots;
  for (int piece = slots > 1 ? thread % pieces : thread; piece < pieces; piece += threads) {
    int image = slots > 1 ? thread / pieces : 0;
    if (image >= slots) {
      break;
    }
    const int row = piece / per_row;
    const uint16_t* from = staged + image * p.staged_stride + row * (8 * Shape::kColumns) + (piece - row * per_row) * kVector;
    uint16_t* to = static_cast<uint16_t*>(p.y) + item.y + image * (int64_t{p.height} * p.width * p.channels) + static_cast<int64_t>(item.first_row) * p.width +
                   piece * kVector;
#pragma unroll 8
    for (; image < item.images; image += slots) {
      *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(from);
      from += slots * p.staged_stride;
      to += step;
    }
  }
}

// One item per CTA: maps that are small enough for many CTAs to be on a multiprocessor at a time.
template <Scalar S, typename Shape>
__global__ void __launch_bounds__(Shape::kWarps * 32, Shape::kCtasPerSm) forward_kernel(const ForwardParams p) {
  constexpr int kThreads = Shape::kWarps * 32;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ int next_task;
  const int thread = threadIdx.x, lane = thread & 31;
  const Item<Shape> item(p, blockIdx.x);
  const uint32_t zeros = shared_address(memory), images = zeros + Shape::kZeroBytes;
  auto* table = reinterpret_cast<uint16_t*>(memory + Shape::kZeroBytes + (p.groups << p.group_log2) * p.image_stride);
  uint16_t* staged = table + Shape::table_bytes(p.kernel_height) / 2;
  copy_rectangle<Shape::kBlocks>(images, p.x, p, item.rectangle(p), p.pitch, p.image_stride, thread, kThreads);
  clear<kThreads>(memory, Shape::kZeroBytes, thread);
  clear<kThreads>(table, Shape::table_bytes(p.kernel_height), thread);
  if (thread == 0) {
    next_task = 0;
  }
  __syncthreads();
  write_table<Shape, 2>(table, p, item.channel, thread, kThreads);
  wait_for_copies();
  __syncthreads();
  const int tasks = item.row_blocks * p.groups;
  while (true) {
    const int task = take_task(&next_task, lane);
    if (task >= tasks) {
      break;
    }
    convolve_rows<S, Shape>(p, item, task, zeros, images, table, staged, lane);
  }
  if constexpr (Shape::kStaged) {
    __syncthreads();
    if (p.vector > 1) {
      write_staged<uint32_t, Shape>(p, item, staged, thread, kThreads);
    } else {
      write_staged<uint16_t, Shape>(p, item, staged, thread, kThreads);
    }
  }
}

// Many items per CTA, of which two are in shared memory: while warps work on one, the other is being copied. Warps take
// tasks one by one across the border of two items and never wait for each other: the warp that ends the last task of
// an item starts the copy of the item after the next into its place.
template <Scalar S, typename Shape>
__global__ void __launch_bounds__(Shape::kWarps * 32, 1) forward_stream_kernel(const ForwardParams p, uint32_t items, int tile_bytes) {
  constexpr int kThreads = Shape::kWarps * 32;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ int next_task, ended[2];
  __shared__ Item<Shape> item_at[2];
  __shared__ uint64_t full[2];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const uint32_t zeros = shared_address(memory);
  const int image_bytes = (p.groups << p.group_log2) * p.image_stride;
  const auto tile_at = [&](int which) { return memory + Shape::kZeroBytes + which * tile_bytes; };
  const auto table_at = [&](int which) { return reinterpret_cast<uint16_t*>(tile_at(which) + image_bytes); };
  const auto copy = [&](uint32_t number, int which, int one, int all) {
    const Item<Shape> item(p, number);
    copy_rectangle<Shape::kBlocks>(shared_address(tile_at(which)), p.x, p, item.rectangle(p), p.pitch, p.image_stride, one, all);
    write_table<Shape, 8>(table_at(which), p, item.channel, one, all);
    if (one == 0) {
      item_at[which] = item;
    }
  };
  clear<kThreads>(memory, Shape::kZeroBytes, thread);
  clear<kThreads>(table_at(0), Shape::table_bytes(p.kernel_height), thread);
  clear<kThreads>(table_at(1), Shape::table_bytes(p.kernel_height), thread);
  if (thread == 0) {
    next_task = ended[0] = ended[1] = 0;
    barrier_init(shared_address(&full[0]), 64);
    barrier_init(shared_address(&full[1]), 64);
  }
  __syncthreads();
  // The first item is copied by all; then one warp each.
  copy(blockIdx.x, 0, thread, kThreads);
  wait_for_copies();
  __syncthreads();
  if (warp == 0) {
    barrier_arrive(shared_address(&full[0]));
    barrier_arrive(shared_address(&full[0]));
  }
  const auto start_copy = [&](uint32_t number, int which) {
    copy(number, which, lane, 32);
    barrier_arrive_after_copies(shared_address(&full[which]));
    barrier_arrive(shared_address(&full[which]));
  };
  if (warp == 1 && blockIdx.x + gridDim.x < items) {
    start_copy(blockIdx.x + gridDim.x, 1);
  }
  // Tiles at the lower border can have fewer rows; a task without rows ends at once.
  const int tasks = rows_to_blocks<Shape>(p, p.tile_rows) * p.groups;
  int turn = 0, before = 0;
  uint32_t number = blockIdx.x;
  while (true) {
    int task = take_task(&next_task, lane) - before;
    while (task >= tasks) {
      task -= tasks;
      before += tasks;
      number += gridDim.x;
      ++turn;
    }
    if (number >= items) {
      break;
    }
    const int which = turn & 1;
    barrier_wait(shared_address(&full[which]), (turn >> 1) & 1);
    const Item<Shape>& item = item_at[which];
    if (task < item.row_blocks * p.groups) {
      convolve_rows<S, Shape>(p, item, task, zeros, shared_address(tile_at(which)), table_at(which), nullptr, lane);
    }
    __syncwarp();
    int last = 0;
    if (lane == 0) {
      last = count_up(&ended[which]) == tasks - 1;
      if (last) {
        ended[which] = 0;
      }
    }
    last = __shfl_sync(0xffffffff, last, 0);
    if (last && number + 2 * gridDim.x < items) {
      start_copy(number + 2 * gridDim.x, which);
    }
  }
}

}  // namespace smpconv
