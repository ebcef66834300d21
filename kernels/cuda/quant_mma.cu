// SPDX-License-Identifier: Apache-2.0
// Linear layers on codes, many rows, on the tensor cores' integer products: a group of 32 k is one
// instruction, whose exact sums are then scaled and added up in FP32, groups ascending: the CPU's
// order. As kernels/cuda/mma.cuh has it (m16n8k32: four bytes take the place of two BF16), A is a
// panel's group, B eight rows of the input. Row g of A is output 2 g of the panel, row g + 8 output
// 2 g + 1: a lane then finds both side by side, and stores them so.
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/quant.h"

namespace ds::cuda {
namespace {

constexpr int kWarps = 4;   // of a block: each takes two panels, all take the same rows
constexpr int kPanels = 2;  // of a warp: with swiglu the same one of both weights
constexpr int kStages = 3;  // of groups on their way to shared memory

struct QuantTileArgs {
  QuantWeights w;
  const char* x = nullptr;  ///< [rows][row_bytes] QuantInput
  int64_t rows = 0, row_bytes = 0;
  int64_t panels = 0;  ///< of all weights; with swiglu of one
  bool swiglu = false;
  bool low_f32 = false;  ///< low-rank parts are FP32, else BF16
  float* y[kMaxFusedWeights];
  int64_t y_stride[kMaxFusedWeights];
  const float* residual = nullptr;
  Additions add;
};

/// sum = A B + c, bytes as signed numbers.
__device__ inline void multiply_codes(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int c,
                                      int (&sum)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %10, %10, %10};"
      : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c));
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until at most kLater groups of the thread's copies are under way.
template <int kLater>
__device__ inline void wait_for_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

/// One of a warp's panels.
struct Panel {
  int w;
  int64_t i0;   ///< its first output in the weight
  bool inside;  ///< else a copy of the last one, not to be written

  __device__ static Panel of(const QuantTileArgs& a, int64_t index) {
    Panel p{0, 0, index < a.panels};
    int64_t at = p.inside ? index : a.panels - 1;
    if (!a.swiglu) {
      while (at >= ceil_div(a.w.n[p.w], 16)) at -= ceil_div(a.w.n[p.w++], 16);
    }
    p.i0 = at * 16;
    return p;
  }
};

/// Shared memory of a stage of kGroups groups: per row and per panel they lie one behind the other.
/// A row's padding keeps lanes that read eight rows at once off each other's banks, and so does the
/// place of a panel's 16-byte chunks: chunk c of block b of four k is at c ^ (b & 2).
template <int kBits, int kTiles>
struct Stage {
  static constexpr int kGroups = kTiles >= 4 ? 3 : 6;
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kInput = static_cast<int>(sizeof(QuantInput));
  static constexpr int kRowBytes = kGroups * kInput + (kGroups % 2 == 0 ? 16 : 0);
  static constexpr int kGroupCodes = 64 * kBits, kGroupScales = kBits == 8 ? 32 : 64;
  static constexpr int kCodes = kGroups * kGroupCodes, kScales = kGroups * kGroupScales;
  static constexpr int kX = kRows * kRowBytes;
  static constexpr int kBytes = kX + kWarps * kPanels * (kCodes + kScales);

  char* x;
  __device__ char* codes_of(int warp, int panel) const {
    return x + kX + (warp * kPanels + panel) * (kCodes + kScales);
  }
  __device__ char* scales_of(int warp, int panel) const { return codes_of(warp, panel) + kCodes; }
};

/// Groups g0 .. of this warp's panel, zeros beyond the last.
template <int kBits, bool kGrouped, int kTiles>
__device__ inline void copy_panel(const QuantTileArgs& a, const Stage<kBits, kTiles>& to, int g0,
                                  int warp, int slot, const Panel& p) {
  using S = Stage<kBits, kTiles>;
  const int lane = threadIdx.x % 32;
  const int64_t panel = p.i0 / 16;
  const char* codes = a.w.codes[p.w] + panel * a.w.panel_bytes + int64_t{g0} * S::kGroupCodes;
#pragma unroll
  for (int c = lane; c < S::kCodes / 16; c += 32) {
    const int at = c ^ (c / 4 & 2);
    copy_16(to.codes_of(warp, slot) + at * 16, codes + c * 16,
            g0 + c * 16 / S::kGroupCodes < a.w.groups);
  }
  if constexpr (!kGrouped) return;
  const char* scales =
      a.w.scales[p.w] + panel * a.w.scale_panel_bytes + int64_t{g0} * S::kGroupScales;
#pragma unroll
  for (int c = lane; c < S::kScales / 16; c += 32) {
    copy_16(to.scales_of(warp, slot) + c * 16, scales + c * 16,
            g0 + c * 16 / S::kGroupScales < a.w.groups);
  }
}

/// The same groups of the block's rows, zeros beyond the last one.
template <int kBits, int kTiles>
__device__ inline void copy_rows(const QuantTileArgs& a, const Stage<kBits, kTiles>& to, int g0,
                                 int64_t row0) {
  using S = Stage<kBits, kTiles>;
  constexpr int kChunks = S::kGroups * S::kInput / 16;  // of a row
  for (int c = threadIdx.x; c < S::kRows * kChunks; c += kWarps * 32) {
    const int row = c / kChunks, at = c % kChunks;
    const bool there = row0 + row < a.rows && g0 + at * 16 / S::kInput < a.w.groups;
    const char* from = a.x + (row0 + row) * a.row_bytes + int64_t{g0} * S::kInput + at * 16;
    copy_16(to.x + row * S::kRowBytes + at * 16, from, there);
  }
}

/// A lane's operands of one panel and group: outputs 2 g and 2 g + 1.
struct PanelGroup {
  uint32_t a[4];
  float scale[2], low[2];
};

template <int kBits, bool kGrouped, int kTiles>
__device__ inline PanelGroup load_panel(const Stage<kBits, kTiles>& from, int warp, int slot, int u,
                                        const PanelGroup& channel) {
  using S = Stage<kBits, kTiles>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto* codes =
      reinterpret_cast<const uint2*>(from.codes_of(warp, slot) + u * S::kGroupCodes);
  const auto pair_at = [&](int block) {
    return codes[block * 8 + ((g / 2) ^ (block & 2)) * 2 + g % 2];
  };
  PanelGroup out = channel;
  const uint2 first = pair_at(t);
  if constexpr (kBits == 8) {
    const uint2 second = pair_at(t + 4);
    out.a[0] = signed_codes(first.x);
    out.a[1] = signed_codes(first.y);
    out.a[2] = signed_codes(second.x);
    out.a[3] = signed_codes(second.y);
  } else {
    out.a[0] = first.x & 0x0f0f0f0fu;
    out.a[1] = first.y & 0x0f0f0f0fu;
    out.a[2] = first.x >> 4 & 0x0f0f0f0fu;
    out.a[3] = first.y >> 4 & 0x0f0f0f0fu;
  }
  if constexpr (!kGrouped) return out;
  const char* scales = from.scales_of(warp, slot) + u * S::kGroupScales;
  if constexpr (kBits == 8) {
    const uint32_t both = reinterpret_cast<const uint32_t*>(scales)[g];
    out.scale[0] = low_half(both);
    out.scale[1] = high_half(both);
  } else {
    const uint2 both = reinterpret_cast<const uint2*>(scales)[g];
    out.scale[0] = low_half(both.x), out.low[0] = high_half(both.x);
    out.scale[1] = low_half(both.y), out.low[1] = high_half(both.y);
  }
  return out;
}

/// sum[panel][tile] += one group; element 2 h + e is output 2 g + h of row 2 t + e.
template <int kBits, int kTiles>
__device__ inline void add_group(const Stage<kBits, kTiles>& from, int u,
                                 const PanelGroup (&w)[kPanels], float (&sum)[kPanels][kTiles][4]) {
  using S = Stage<kBits, kTiles>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const char* tile = from.x + j * 8 * S::kRowBytes + u * S::kInput;
    const auto* q = reinterpret_cast<const uint32_t*>(tile + g * S::kRowBytes);
    const uint32_t b0 = q[t], b1 = q[t + 4];
    float2 x[2];  // scale and sum
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      x[e] = *reinterpret_cast<const float2*>(tile + (2 * t + e) * S::kRowBytes + kQuantGroup);
    }
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      int dot[4];
      multiply_codes(w[p].a, b0, b1, kCodeSumBits, dot);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& to = sum[p][j][i];
        to = fmaf(float_of_sum(dot[i]), w[p].scale[i / 2] * x[i % 2].x, to);
        if constexpr (kBits == 4) to = fmaf(w[p].low[i / 2], x[i % 2].y, to);
      }
    }
  }
}

template <int kBits>
__device__ inline PanelGroup channel_steps(const QuantTileArgs& a, const Panel& p) {
  PanelGroup out{};
  const auto* scales =
      reinterpret_cast<const float*>(a.w.scales[p.w] + p.i0 / 16 * a.w.scale_panel_bytes);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = threadIdx.x % 32 / 4 * 2 + h;
    out.scale[h] = scales[i];
    if constexpr (kBits == 4) out.low[h] = scales[16 + i];
  }
  return out;
}

constexpr int kTileStride = 36;  // floats of a row of finished products: no lanes meet in a bank

/// Adds low-rank part and bias to a warp's rows of products [rows][kTileStride], of which a lane
/// has one output. These are small loops: unrolled over what the lanes hold, their code would be
/// read from memory by each block.
template <typename T>
__device__ inline void add_additions(const QuantTileArgs& a, const Panel& p, int64_t row0, int rows,
                                     float* tile) {
  const int lane = threadIdx.x % 32;
  const int64_t i = p.i0 + lane % 16;
  if (i >= a.w.n[p.w]) return;
  const float bias = a.add.bias[p.w] == nullptr ? 0.0f : a.add.bias[p.w][i];
  LowRow<T> b;
  int32_t loaded = -1;
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    const int64_t row = row0 + r;
    float value = tile[r * kTileStride + lane];
    const int32_t slot = a.add.slot_of_row == nullptr ? -1 : a.add.slot_of_row[row];
    const LoraEntry low = slot < 0 ? LoraEntry{} : a.add.low.at(p.w, slot);
    if (low.b != nullptr) {
      if (slot != loaded) b.load(low.b, i);
      loaded = slot;
      const float* t = a.add.t + (p.w * a.add.t_rows + row) * kLoraRank;
      value = b.add_to(value, t, low.scale);
    }
    tile[r * kTileStride + lane] = value + bias;
  }
}

constexpr int kBatch =
    8;  // rows whose residuals a lane has under way: they may lie where results go

__device__ inline void write_rows(const QuantTileArgs& a, const Panel& p, int64_t row0, int rows,
                                  const float* tile) {
  const int lane = threadIdx.x % 32;
  const int64_t i = p.i0 + lane % 16, stride = a.y_stride[p.w];
  if (!p.inside || i >= a.w.n[p.w]) return;
  float* y = a.y[p.w] + row0 * stride + i;
  const float* residual = a.residual == nullptr ? nullptr : a.residual + row0 * stride + i;
#pragma unroll 1
  for (int first = 0; first < rows; first += kBatch) {
    float before[kBatch] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (residual != nullptr && first + b < rows) before[b] = residual[(first + b) * stride];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int r = first + b;
      if (r < rows) y[r * stride] = before[b] + tile[r * kTileStride + lane];
    }
  }
}
/// Of gate and up, half a warp to a row.
__device__ inline void write_pairs(const QuantTileArgs& a, const Panel& p, int64_t row0, int rows,
                                   const float* tile) {
  const int lane = threadIdx.x % 32, column = lane % 16;
  const int64_t i = p.i0 + column, stride = a.y_stride[0];
  if (!p.inside || i >= a.w.n[0]) return;
  float* y = a.y[0] + row0 * stride + i;
#pragma unroll 4
  for (int r = lane / 16; r < rows; r += 2) {
    const float* at = tile + r * kTileStride + column;
    y[r * stride] = silu_times(at[0], at[16]);
  }
}

/// What comes after the products, and where they go; `tile` is room of the warp's.
template <int kTiles>
__device__ inline void finish_tiles(const QuantTileArgs& a, const Panel (&panels)[kPanels],
                                    int64_t row0, const float (&sum)[kPanels][kTiles][4],
                                    float* tile) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float* to = tile + (j * 8 + 2 * t + e) * kTileStride + p * 16 + 2 * g;
        *reinterpret_cast<float2*>(to) = make_float2(sum[p][j][e], sum[p][j][2 + e]);
      }
    }
  }
  __syncwarp();
  const auto rows = static_cast<int>(smaller(8 * kTiles, a.rows - row0));
  const Panel own = lane < 16 ? panels[0] : panels[1];
  if (a.add.slot_of_row != nullptr || a.add.bias[own.w] != nullptr) {
    a.low_f32 ? add_additions<float>(a, own, row0, rows, tile)
              : add_additions<Bf16>(a, own, row0, rows, tile);
  }
  __syncwarp();
  a.swiglu ? write_pairs(a, panels[0], row0, rows, tile) : write_rows(a, own, row0, rows, tile);
}

template <int kBits, bool kGrouped, int kTiles>
__global__ void __launch_bounds__(kWarps * 32)
    quant_tiles(const __grid_constant__ QuantTileArgs a) {
  using S = Stage<kBits, kTiles>;
  extern __shared__ uint4 room[];
  const int warp = threadIdx.x / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * S::kRows;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  Panel panels[kPanels];
  PanelGroup channel[kPanels] = {};
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
    panels[p] = Panel::of(a, a.swiglu ? unit : unit * kPanels + p);
    if (a.swiglu) panels[p].w = p;
    if constexpr (!kGrouped) channel[p] = channel_steps<kBits>(a, panels[p]);
  }
  const auto stage_at = [&](int s) {
    return S{reinterpret_cast<char*>(room) + s % kStages * S::kBytes};
  };
  const auto copy_weights = [&](int s) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      copy_panel<kBits, kGrouped, kTiles>(a, stage_at(s), s * S::kGroups, warp, p, panels[p]);
    }
  };
  const auto stages = static_cast<int>(ceil_div(a.w.groups, S::kGroups));
  for (int s = 0; s < kStages - 1 && s < stages; ++s) copy_weights(s);  // ahead of the wait
  begin_after_previous();
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < stages) copy_rows<kBits, kTiles>(a, stage_at(s), s * S::kGroups, row0);
    commit_copies();
  }
  float sum[kPanels][kTiles][4] = {};
  for (int s = 0; s < stages; ++s) {
    wait_for_group<kStages - 2>();
    __syncthreads();
    if (const int next = s + kStages - 1; next < stages) {
      copy_weights(next);
      copy_rows<kBits, kTiles>(a, stage_at(next), next * S::kGroups, row0);
    }
    commit_copies();
    const S here = stage_at(s);
#pragma unroll
    for (int u = 0; u < S::kGroups; ++u) {
      if (s * S::kGroups + u >= a.w.groups) break;
      PanelGroup w[kPanels];
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        w[p] = load_panel<kBits, kGrouped, kTiles>(here, warp, p, u, channel[p]);
      }
      add_group<kBits, kTiles>(here, u, w, sum);
    }
  }
  __syncthreads();  // the stages are free
  finish_tiles<kTiles>(a, panels, row0, sum,
                       reinterpret_cast<float*>(room) + warp * S::kRows * kTileStride);
}

template <int kBits, bool kGrouped, int kTiles>
void launch_tiles(const StreamState& s, const QuantTileArgs& a, int64_t units) {
  using S = Stage<kBits, kTiles>;
  auto* kernel = quant_tiles<kBits, kGrouped, kTiles>;
  constexpr int kShared = kStages * S::kBytes;
  if (!allow_shared(kernel, kShared)) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(units, kWarps)),
                  static_cast<unsigned>(ceil_div(a.rows, S::kRows)));
  launch("linear of many rows on codes", Launching{.early = !s.take_weights_changed()}, kernel,
         grid, kWarps * 32, kShared, s.stream(), a);
}

/// The more rows meet a panel's codes at once the better, as long as all SMs have work.
template <int kBits, bool kGrouped>
void launch_tiles(const StreamState& s, const QuantTileArgs& a, int64_t units) {
  const int64_t tiles = units * ceil_div(a.rows, 8), enough = kSms * kWarps;
  if (tiles >= 8 * enough) return launch_tiles<kBits, kGrouped, 8>(s, a, units);
  if (tiles >= 4 * enough) return launch_tiles<kBits, kGrouped, 4>(s, a, units);
  if (tiles >= 2 * enough) return launch_tiles<kBits, kGrouped, 2>(s, a, units);
  launch_tiles<kBits, kGrouped, 1>(s, a, units);
}

}  // namespace

void many_quant_rows(const StreamState& s, const QuantLinearArgs& q) {
  const LinearArgs& a = q.linear;
  QuantTileArgs t{};
  t.w = quant_weights(q);
  t.x = static_cast<const char*>(a.x_prepared);
  t.rows = a.rows;
  t.row_bytes = quant_prepared_bytes(1, t.w.k);
  t.swiglu = a.epilogue == Epilogue::kSwiglu;
  t.low_f32 = is_f32(low_rank_format(a));
  for (int w = 0; w < a.n_weights; ++w) {
    t.y[w] = a.y[w];
    t.y_stride[w] = a.y_stride[w];
    if (w == 0 || !t.swiglu) t.panels += ceil_div(a.w[w].n, 16);
  }
  if (a.epilogue == Epilogue::kResidual) t.residual = a.residual;
  t.add = additions_of(a, 0);
  if (t.panels == 0) return;
  const int64_t units = t.swiglu ? t.panels : ceil_div(t.panels, kPanels);
  if (q.format.bits == 8) {
    q.format.group == 0 ? launch_tiles<8, false>(s, t, units) : launch_tiles<8, true>(s, t, units);
  } else {
    q.format.group == 0 ? launch_tiles<4, false>(s, t, units) : launch_tiles<4, true>(s, t, units);
  }
}

}  // namespace ds::cuda
