// SPDX-License-Identifier: Apache-2.0
// Linear layers on codes, few rows: memory-bound, so every code is read once in 16-byte loads and
// meets all rows. A block takes half a panel (8 outputs) at a time; a warp reads 512 neighbouring
// bytes: a lane's 16 are four outputs at four (8 bits) or eight k. Order of an output: a lane's
// groups ascending, then the lanes as a tree, then the warps; so a row's bits do not see how many
// rows there are.
#include "kernels/cuda/quant.h"
#include "kernels/cuda/rope.cuh"

namespace ds::cuda {
namespace {

constexpr int kWarps = 8;    // of a block at most
constexpr int kOutputs = 8;  // of a block at a time
// Shared memory of a block beside its input rows, at most.
constexpr int64_t kFewQuantStatic = (2 * kOutputs + 2) * kGemvRows * kWarps * 4;

/// What a block computes.
enum class Outputs : uint8_t {
  kOne,     ///< outputs of one weight
  kSwiglu,  ///< the same outputs of both weights
  kRope,    ///< outputs and their partners, half a head on, of q, k or v
};

struct QuantGemvArgs {
  QuantWeights w;
  InputRows in;
  int rows = 0;
  int units = 0;  ///< halves of panels, or pairs of them
  Outputs outputs = Outputs::kOne;
  bool low_f32 = false;  ///< low-rank parts are FP32, else BF16
  float* y[kMaxFusedWeights];
  int64_t y_stride[kMaxFusedWeights];
  const float* residual = nullptr;
  Additions add;
  RopeAppendArgs rope;
};

/// Outputs i0 .. i0 + 7 of weight w0 and, if there are two, i1 .. i1 + 7 of w1.
struct Unit {
  int w0 = 0, w1 = 0;
  int64_t i0 = 0, i1 = 0;
  int64_t head = 0, pair = 0;  ///< kRope: of the weight's heads, and the first i of the pairs

  __device__ static Unit of(const QuantGemvArgs& a, int unit) {
    Unit u;
    if (a.outputs == Outputs::kRope) {
      const auto half = static_cast<int>(a.rope.kv.head_dim / 2);
      const auto heads = static_cast<int>(a.rope.n_heads);
      const auto n_kv = static_cast<int>(a.rope.kv.n_kv_heads);
      int head = unit / (half / kOutputs);
      u.pair = unit % (half / kOutputs) * kOutputs;
      while (head >= (u.w0 == 0 ? heads : n_kv)) head -= u.w0++ == 0 ? heads : n_kv;
      u.w1 = u.w0;
      u.head = head;
      u.i0 = head * 2 * half + u.pair;
      u.i1 = u.i0 + half;
      return u;
    }
    u.i0 = unit * kOutputs;
    if (a.outputs == Outputs::kSwiglu) {
      u.w1 = 1;
    } else {
      while (u.i0 >= a.w.n[u.w0]) u.i0 -= ceil_div(a.w.n[u.w0++], kOutputs) * kOutputs;
    }
    u.i1 = u.i0;
    return u;
  }
};

/// The input rows in 8 bits in shared memory. A norm's factor is left for the sums.
template <int kRows>
struct CodedRows {
  uint32_t* codes;  ///< [kRows][groups][8]
  float2* steps;    ///< [kRows][groups] scale and sum of a QuantInput
  float* squares;   ///< [kRows][kWarps] of the row's warps: what norm_factor() wants

  __device__ CodedRows(int groups, void* shared, float* for_squares)
      : codes(static_cast<uint32_t*>(shared)),
        steps(reinterpret_cast<float2*>(codes + kRows * groups * 8)),
        squares(for_squares) {}

  /// All threads of the block, as many to a row, whole warps; rows beyond a.rows repeat the last.
  __device__ void fill(const QuantGemvArgs& a) {
    constexpr int kEach = kRows < 3 ? kRows : 3;  // eights of a thread under way
    const int groups = static_cast<int>(a.w.groups), eights = groups * 4;
    const int team = blockDim.x / kRows, r = threadIdx.x / team, row = r < a.rows ? r : a.rows - 1;
    const float* x = a.in.x + row * a.in.stride;
    float square = 0.0f;
    for (int first = threadIdx.x % team; first < eights; first += kEach * team) {
      float v[kEach][8], weight[kEach][8];
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int i = first + e * team;
        if (i >= eights) break;
        load_eight(x, i, a.in.k, a.in.whole, v[e]);
        if (a.in.norm != nullptr) load_eight(a.in.norm, i, a.in.k, a.in.whole, weight[e]);
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int i = first + e * team;
        if (i >= eights) break;
        if (a.in.norm != nullptr) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            square = fmaf(v[e][j], v[e][j], square);
            v[e][j] *= weight[e][j];
          }
        }
        const CodedEight eight = code_eight(v[e]);
        reinterpret_cast<uint2*>(codes)[r * eights + i] = eight.codes;
        if (i % 4 == 0) steps[r * groups + i / 4] = make_float2(eight.scale, eight.sum);
      }
    }
    if (a.in.norm != nullptr) {
      square = warp_sum(square);
      if (threadIdx.x % 32 == 0) squares[r * kWarps + threadIdx.x % team / 32] = square;
    }
    __syncthreads();
  }
  /// After fill(): what the sums of row r are multiplied by.
  __device__ float factor(const QuantGemvArgs& a, int r) const {
    if (a.in.norm == nullptr) return 1.0f;
    const int warps = static_cast<int>(blockDim.x) / kRows / 32;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps / kRows; ++w) {
      if (w < warps) sum += squares[r * kWarps + w];
    }
    return norm_factor<float>(sum, static_cast<float>(a.in.k), a.in.eps);
  }
};

/// Scales and lows of a lane's four outputs.
struct Steps {
  float scale[4], low[4];
};

/// This lane's part of half a panel's products with kRows input rows.
template <int kBits, bool kGrouped, int kRows>
struct LaneSums {
  static constexpr int kAhead = kRows < 4 ? 4 : 2;         // 16-byte loads of codes under way
  static constexpr int kChunkGroups = kBits == 8 ? 2 : 4;  // that a warp reads at once
  static constexpr int kBlocks = kBits == 8 ? 8 : 4;       // of four (or 2 x four) k in a group
  static constexpr int kGroupCodes = 64 * kBits, kGroupScales = kBits == 8 ? 32 : 64;
  const char *codes, *scales;  ///< of this lane, at group 0
  int block, group;            ///< which k of a chunk this lane has
  float sum[4 * kRows] = {};   ///< [output][row]
  uint4 raw[kAhead], raw_steps[kAhead];
  Steps channel;

  __device__ LaneSums(const QuantWeights& w, int weight, int64_t i) {
    const int lane = threadIdx.x % 32;
    block = lane / 2 % kBlocks;
    group = lane / (2 * kBlocks);
    const int first = static_cast<int>(i % 16) + lane % 2 * 4;  // output in the panel
    codes = w.codes[weight] + i / 16 * w.panel_bytes + block * 64 + first * 4;
    scales = w.scales[weight] + i / 16 * w.scale_panel_bytes;
    scales += kGrouped ? first * (kGroupScales / 16) : 0;
    if constexpr (!kGrouped) {
      const float4 s = reinterpret_cast<const float4*>(scales)[first / 4];
      channel.scale[0] = s.x, channel.scale[1] = s.y;
      channel.scale[2] = s.z, channel.scale[3] = s.w;
      if constexpr (kBits == 4) {
        const float4 l = reinterpret_cast<const float4*>(scales)[4 + first / 4];
        channel.low[0] = l.x, channel.low[1] = l.y, channel.low[2] = l.z, channel.low[3] = l.w;
      }
    }
  }

  /// Volatile, as stream_chunk().
  __device__ static uint4 load_steps(const char* from) {
    if constexpr (kBits == 4) return stream_chunk(reinterpret_cast<const uint4*>(from));
    uint4 out{};
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(out.x), "=r"(out.y) : "l"(from));
    return out;
  }
  __device__ void load(int groups, int c0, int warps) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int g = (c0 + u * warps) * kChunkGroups + group;
      if (g >= groups) continue;
      raw[u] = stream_chunk(reinterpret_cast<const uint4*>(codes + g * kGroupCodes));
      if constexpr (kGrouped) raw_steps[u] = load_steps(scales + g * kGroupScales);
    }
  }
  __device__ Steps steps_of(uint4 raw_of) const {
    if constexpr (!kGrouped) return channel;
    Steps out;
    const uint32_t words[4] = {raw_of.x, raw_of.y, raw_of.z, raw_of.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBits == 4) {
        out.scale[i] = low_half(words[i]);
        out.low[i] = high_half(words[i]);
      } else {
        out.scale[i] = i % 2 == 0 ? low_half(words[i / 2]) : high_half(words[i / 2]);
      }
    }
    return out;
  }

  __device__ void add_chunk(const CodedRows<kRows>& x, int groups, int g, uint4 codes_of,
                            const Steps& w) {
    const uint32_t words[4] = {codes_of.x, codes_of.y, codes_of.z, codes_of.w};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint32_t* from = x.codes + (r * groups + g) * 8 + block;
      const float2 step = x.steps[r * groups + g];
      const auto low = static_cast<int>(from[0]);
      const auto high = kBits == 4 ? static_cast<int>(from[4]) : 0;
      const float lows_meet = block == 0 ? step.y : 0.0f;  // once for a group
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int dot;
        if constexpr (kBits == 8) {
          dot = __dp4a(static_cast<int>(signed_codes(words[i])), low, kCodeSumBits);
        } else {
          dot = __dp4a(static_cast<int>(words[i] & 0x0f0f0f0fu), low, kCodeSumBits);
          dot = __dp4a(static_cast<int>(words[i] >> 4 & 0x0f0f0f0fu), high, dot);
        }
        float& to = sum[i * kRows + r];
        to = fmaf(float_of_sum(dot), w.scale[i] * step.x, to);
        if constexpr (kBits == 4) to = fmaf(w.low[i], lows_meet, to);
      }
    }
  }
  /// After load() of the warp's first chunks.
  __device__ void multiply(const CodedRows<kRows>& x, int groups, int warp, int warps) {
    for (int c0 = warp; c0 * kChunkGroups < groups; c0 += kAhead * warps) {
      if (c0 != warp) load(groups, c0, warps);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int g = (c0 + u * warps) * kChunkGroups + group;
        if (g < groups) add_chunk(x, groups, g, raw[u], steps_of(raw_steps[u]));
      }
    }
  }

  /// The warp's sums [8][kRows]: lanes with the same outputs are added, each pair of them sharing
  /// the work by halves.
  __device__ void add_lanes(float* to) {
    const int lane = threadIdx.x % 32;
    int first = lane % 2 * 4 * kRows;
    constexpr int kSteps[] = {16, 8, 4, 2};
    int held = 4 * kRows;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const bool upper = (lane & kSteps[s]) != 0;
      if (held == 1) {
        sum[0] += __shfl_xor_sync(kAllLanes, sum[0], kSteps[s]);
        continue;
      }
      held /= 2;
      if (upper) first += held;
#pragma unroll
      for (int i = 0; i < 2 * kRows; ++i) {
        if (i >= held) break;
        const float mine = upper ? sum[i + held] : sum[i], other = upper ? sum[i] : sum[i + held];
        sum[i] = mine + __shfl_xor_sync(kAllLanes, other, kSteps[s]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {
      if (i < held) to[first + i] = sum[i];
    }
  }
};

/// What a thread's output needs beside its sums, asked for early. No kernel writes positions, slots
/// or angles, so they do not wait for the one before.
struct Ahead {
  PairPlace place;
  float residual = 0.0f;
};

/// What thread `out + 8 row` of a block ends with.
template <typename T>
__device__ inline void finish_outputs(const QuantGemvArgs& a, const Unit& u, int out, int row,
                                      float value, float other, const Ahead& ahead) {
  value = with_additions<T>(a.add, u.w0, u.i0 + out, row, value);
  if (a.outputs != Outputs::kOne) {
    other = with_additions<T>(a.add, u.w1, u.i1 + out, row, other);
  }
  const int64_t to = row * a.y_stride[u.w0] + u.i0 + out;
  if (a.outputs == Outputs::kRope) {
    return ahead.place.put(a.rope, u.w0, a.y[0] + to, value, other);
  }
  if (a.outputs == Outputs::kSwiglu) value = silu_times(value, other);
  a.y[u.w0][to] = ahead.residual + value;
}

template <int kBits, bool kGrouped, int kRows>
__global__ void __launch_bounds__(kWarps * 32) quant_gemv(const __grid_constant__ QuantGemvArgs a) {
  extern __shared__ uint4 room[];
  __shared__ float squares[kRows * kWarps], factors[kRows];
  __shared__ float part[2][kWarps][kOutputs * kRows];
  using Sums = LaneSums<kBits, kGrouped, kRows>;
  const bool two = a.outputs != Outputs::kOne;
  // Of two weights each has half of the warps.
  const int warps = static_cast<int>(blockDim.x) / (two ? 64 : 32), warp = threadIdx.x / 32 % warps;
  const bool second = threadIdx.x / 32 >= warps;
  const auto groups = static_cast<int>(a.w.groups), first = static_cast<int>(blockIdx.x);
  const int out = threadIdx.x % kOutputs, row = threadIdx.x / kOutputs;
  Unit u = Unit::of(a, first);
  // No kernel that launch_next() starts writes weights: the first are asked for before the wait.
  Sums sums(a.w, second ? u.w1 : u.w0, second ? u.i1 : u.i0);
  sums.load(groups, warp, warps);
  Ahead ahead;
  if (a.outputs == Outputs::kRope && row < a.rows)
    ahead.place.find(a.rope, u.w0, u.head, u.pair + out, row);
  begin_after_previous();
  CodedRows<kRows> x(groups, room, squares);
  x.fill(a);
  int turn = 0;
  for (int unit = first; unit < a.units; unit += static_cast<int>(gridDim.x), turn ^= 1) {
    if (unit != first) {
      u = Unit::of(a, unit);
      sums = Sums(a.w, second ? u.w1 : u.w0, second ? u.i1 : u.i0);
      sums.load(groups, warp, warps);
      if (a.outputs == Outputs::kRope && row < a.rows)
        ahead.place.find(a.rope, u.w0, u.head, u.pair + out, row);
    }
    const bool writes = row < a.rows && u.i0 + out < a.w.n[u.w0];
    if (writes && a.residual != nullptr)
      ahead.residual = a.residual[row * a.y_stride[0] + u.i0 + out];
    sums.multiply(x, groups, warp, warps);
    sums.add_lanes(part[turn][threadIdx.x / 32]);
    // By the warp that has the least to multiply.
    const int last = static_cast<int>(blockDim.x) - 32;
    if (unit == first && threadIdx.x >= last && threadIdx.x - last < kRows)
      factors[threadIdx.x - last] = x.factor(a, threadIdx.x - last);
    __syncthreads();
    if (!writes) continue;
    float value = 0.0f, other = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warps) value += part[turn][w][out * kRows + row];
      if (two && w >= warps) other += part[turn][w][out * kRows + row];
    }
    value *= factors[row];
    other *= factors[row];
    if (a.low_f32) {
      finish_outputs<float>(a, u, out, row, value, other, ahead);
    } else {
      finish_outputs<Bf16>(a, u, out, row, value, other, ahead);
    }
  }
}

/// Bytes of shared memory of a row.
int64_t row_bytes(int64_t k) { return quant_groups(k) * (kQuantGroup + 8); }

template <int kBits, bool kGrouped, int kRows>
void launch_gemv(const StreamState& s, const QuantGemvArgs& a) {
  auto* kernel = quant_gemv<kBits, kGrouped, kRows>;
  const auto shared = kRows * row_bytes(a.w.k);
  if (!allow_shared(kernel, shared + kFewQuantStatic)) return;
  const int64_t chunks = ceil_div(a.w.groups, kBits == 8 ? 2 : 4);
  const bool most = a.outputs != Outputs::kOne || chunks > 12 || kRows == 8;
  const int threads = 32 * (most ? kWarps : kWarps / 2);
  constexpr int64_t kBlocksOfSm = 4;  // each rounds the input anew
  const auto blocks = static_cast<unsigned>(smaller(a.units, kSms * kBlocksOfSm));
  launch("linear of few rows on codes", Launching{.early = !s.take_weights_changed()}, kernel,
         dim3(blocks), threads, static_cast<size_t>(shared), s.stream(), a);
}

template <int kBits, bool kGrouped>
void launch_gemv(const StreamState& s, const QuantGemvArgs& a) {
  if (a.rows == 1) return launch_gemv<kBits, kGrouped, 1>(s, a);
  if constexpr (kGrouped) {  // the usual formats
    if (a.rows == 2) return launch_gemv<kBits, kGrouped, 2>(s, a);
    if (a.rows <= 4) return launch_gemv<kBits, kGrouped, 4>(s, a);
  }
  launch_gemv<kBits, kGrouped, 8>(s, a);
}

}  // namespace

int64_t few_quant_rows_at_once(int64_t k) {
  int64_t rows = kGemvRows;
  while (rows > 0 && rows * row_bytes(k) > kMaxSharedBytes - kFewQuantStatic) rows /= 2;
  return rows;
}

void few_quant_rows(const StreamState& s, const QuantLinearArgs& q, int64_t row, int64_t rows) {
  const LinearArgs& a = q.linear;
  QuantGemvArgs g{};
  g.w = quant_weights(q);
  const bool whole =
      g.w.k % kQuantGroup == 0 && a.x_stride % 4 == 0 && is_aligned16(a.x) && is_aligned16(a.norm);
  g.in = {nullptr,
          a.x + row * a.x_stride,
          a.x_stride,
          g.w.k,
          g.w.groups * kQuantGroup,
          a.norm,
          a.norm_eps,
          whole,
          nullptr};
  g.rows = static_cast<int>(rows);
  g.low_f32 = is_f32(low_rank_format(a));
  for (int w = 0; w < a.n_weights; ++w) {
    g.y_stride[w] = a.y_stride[w];
    g.y[w] = a.y[w] == nullptr ? nullptr : a.y[w] + row * a.y_stride[w];
    g.units += static_cast<int>(ceil_div(a.w[w].n, kOutputs));
  }
  if (a.epilogue == Epilogue::kSwiglu) {
    g.outputs = Outputs::kSwiglu;
    g.units = static_cast<int>(ceil_div(a.w[0].n, kOutputs));
  }
  if (a.rope != nullptr) {
    g.outputs = Outputs::kRope;
    g.rope = from_row(*a.rope, row);
    g.units /= 2;
  }
  if (a.epilogue == Epilogue::kResidual) g.residual = a.residual + row * a.y_stride[0];
  g.add = additions_of(a, row);
  if (g.units == 0) return;
  if (q.format.bits == 8) {
    q.format.group == 0 ? launch_gemv<8, false>(s, g) : launch_gemv<8, true>(s, g);
  } else {
    q.format.group == 0 ? launch_gemv<4, false>(s, g) : launch_gemv<4, true>(s, g);
  }
}

}  // namespace ds::cuda
