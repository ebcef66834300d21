// SPDX-License-Identifier: Apache-2.0
// KeyChoice on the GPU. First a warp for each key and kv head: its norm, and its row's window. Then
// a block for each page of keys that leave the window of a row in this call: what was chosen of all
// keys before the page, then for each of those and of the page's own how many of the page's may
// leave until there are enough better ones. From that follow the lists of all rows at which the
// page's keys leave, and what is chosen up to the page's end, which is kept beside it. So a row of
// decode looks at 32 + globals keys, and no block of a prompt waits for another.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/state.h"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPage = kKvPageTokens;
constexpr int kSequences = 32;         // of training, in one launch: they travel in its parameters
constexpr int64_t kMostBlocks = 1024;  // of a sequence and kv head: each takes several pages then
constexpr int kDigit = 11, kBins = 1 << kDigit;

/// A sequence's rows in the call; `first` is the position of row row0.
struct Rows {
  int64_t row0, count, first;
  __device__ int64_t end() const { return first + count; }
};

/// Sum of squares of d elements, in every lane of the warp.
template <typename T>
__device__ inline float squared_norm(const T* key, int64_t d) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < d; i += 32) {
    const float x = to_float(key[i]);
    sum = fmaf(x, x, sum);
  }
  return warp_sum(sum);
}

/// What is served: norms are kept beside the pages, and behind them the positions that are chosen
/// up to the page's end.
struct Paged {
  static constexpr bool kKept = true;
  KeyChoice c;
  AttentionArgs a;

  __device__ int64_t n_kv_heads() const { return a.kv.n_kv_heads; }
  __device__ Rows rows(int sequence) const {
    const int64_t row0 = a.starts[sequence], count = a.starts[sequence + 1] - row0;
    return {row0, count, a.lengths[sequence] - count};
  }
  __device__ char* beside(int sequence, int head, int64_t page) const {
    return static_cast<char*>(c.kept) + a.table[sequence * a.table_width + page] * c.kept_stride +
           head * (kPage + c.globals) * 4;
  }
  __device__ float* norm(int sequence, int head, int64_t position) const {
    return reinterpret_cast<float*>(beside(sequence, head, position / kPage)) + position % kPage;
  }
  __device__ int32_t* chosen(int sequence, int head, int64_t page) const {
    return reinterpret_cast<int32_t*>(beside(sequence, head, page)) + kPage;
  }
  __device__ float measure(int sequence, int head, int64_t position) const {
    const int64_t page = a.table[sequence * a.table_width + position / kPage], d = a.kv.head_dim;
    const int64_t at = ((page * a.kv.n_kv_heads + head) * kPage + position % kPage) * d;
    switch (a.kv.dtype) {
      case KvDtype::kF32:
        return squared_norm(static_cast<const float*>(a.kv.k) + at, d);
      case KvDtype::kF16:
        return squared_norm(static_cast<const Half*>(a.kv.k) + at, d);
      default:
        return squared_norm(static_cast<const Bf16*>(a.kv.k) + at, d);
    }
  }
};

/// What is trained: norms of all keys are made anew, nothing is kept.
struct Trained {
  static constexpr bool kKept = false;
  KeyChoice c;
  const float* k;
  int64_t heads, d;
  TrainSequence sequences[kSequences];

  __device__ int64_t n_kv_heads() const { return heads; }
  __device__ Rows rows(int sequence) const {
    const TrainSequence& s = sequences[sequence];
    return {s.row0, s.n_rows, s.prefix};
  }
  __device__ float* norm(int sequence, int head, int64_t position) const {
    const TrainSequence& s = sequences[sequence];
    return reinterpret_cast<float*>(static_cast<char*>(c.kept) + sequence * c.kept_stride) +
           head * (s.prefix + s.n_rows) + position;
  }
  __device__ int32_t* chosen(int, int, int64_t) const { return nullptr; }
  __device__ float measure(int sequence, int head, int64_t position) const {
    const TrainSequence& s = sequences[sequence];
    const float* key = position < s.prefix ? s.prefix_k + position * heads * d
                                           : k + (s.row0 + position - s.prefix) * heads * d;
    return squared_norm(key + head * d, d);
  }
};

/// The keys of a row's window behind the `before` others of its list. A warp.
template <typename Source>
__device__ inline void list_window(const Source& source, const Rows& rows, int head,
                                   int64_t position, int64_t before) {
  const int64_t list = (rows.row0 + position - rows.first) * source.n_kv_heads() + head;
  const int64_t left = larger(0, position - source.c.window + 1);
  int32_t* to = source.c.keys + list * source.c.stride + before;
  for (int64_t i = threadIdx.x % 32; left + i <= position; i += 32) {
    to[i] = static_cast<int32_t>(left + i);
  }
  if (threadIdx.x % 32 == 0) {
    source.c.counts[list] = static_cast<int32_t>(before + position - left + 1);
  }
}

/// A key's norm and, where it is a row's, the row's window. A warp.
template <typename Source>
__device__ inline void take_key(const Source& source, const Rows& rows, int sequence, int head,
                                int64_t position) {
  const float norm = source.measure(sequence, head, position);
  if (threadIdx.x % 32 == 0) *source.norm(sequence, head, position) = norm;
  if (position < rows.first || source.c.given != nullptr) return;
  const int64_t left = larger(0, position - source.c.window + 1);
  list_window(source, rows, head, position, smaller(left, source.c.globals));
}

/// Grid: keys by kWarps, kv heads, sequences.
template <typename Source>
__global__ void __launch_bounds__(kThreads) take_keys(const __grid_constant__ Source source) {
  begin_after_previous();
  const int sequence = blockIdx.z;
  const Rows rows = source.rows(sequence);
  const int64_t position = (Source::kKept ? rows.first : 0) +
                           static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (position < rows.end()) take_key(source, rows, sequence, blockIdx.y, position);
}

/// Keys in the order in which they are chosen: sinks, then by norm, of equals the earlier. A norm's
/// bits are in the order of the norms.
__device__ inline uint32_t rank_of(const KeyChoice& c, int64_t position, float norm) {
  return position < c.sinks ? 0u : (__float_as_uint(norm) & 0x7fffffffu) + 1;
}
__device__ inline uint64_t ordered(uint32_t rank, int64_t position) {
  return static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(position);
}

/// Shared memory of a block of choose_globals().
struct Memory {
  uint64_t* keys;   ///< [globals + kPage]
  int32_t* until;   ///< [globals + kPage]
  uint32_t* bins;   ///< [kBins]
  uint32_t* words;  ///< [2 kWarps + 2]

  __host__ __device__ static int64_t bytes(int64_t globals) {
    return (globals + kPage) * 12 + (kBins + 2 * kWarps + 2) * 4;
  }
  __device__ Memory(void* at, int64_t globals) {
    keys = static_cast<uint64_t*>(at);
    until = reinterpret_cast<int32_t*>(keys + globals + kPage);
    bins = reinterpret_cast<uint32_t*>(until + globals + kPage);
    words = bins + kBins;
  }
};

/// Of a number of ranks those to be taken: all below `rank`, and the first `equal` of it.
struct Threshold {
  uint32_t rank;
  int equal;
};

/// The bin in which the count of all bins so far reaches `wanted`, to words[0], and how many are
/// still wanted of it, to words[1]. All threads.
__device__ inline void find_bin(const Memory& m, uint32_t wanted) {
  constexpr int kEach = kBins / kThreads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  uint32_t mine = 0;
  for (int i = 0; i < kEach; ++i) mine += m.bins[thread * kEach + i];
  uint32_t up_to = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, up_to, step);
    if (lane >= step) up_to += other;
  }
  if (lane == 31) m.words[2 + warp] = up_to;
  __syncthreads();
  for (int w = 0; w < warp; ++w) up_to += m.words[2 + w];
  uint32_t before = up_to - mine;
  if (before < wanted && wanted <= up_to) {
    int bin = thread * kEach;
    for (; before + m.bins[bin] < wanted; ++bin) before += m.bins[bin];
    m.words[0] = static_cast<uint32_t>(bin);
    m.words[1] = wanted - before;
  }
  __syncthreads();
}

/// Which are the `wanted` least of n ranks, more than `wanted`: by digits, from the highest.
template <typename RankOf>
__device__ inline Threshold find_threshold(const Memory& m, int64_t n, int64_t wanted,
                                           const RankOf& rank_of) {
  uint32_t prefix = 0, missing = static_cast<uint32_t>(wanted);
  int shift = 32;
  while (shift > 0) {
    const int above = shift, digit = shift > kDigit ? kDigit : shift;
    shift -= digit;
    for (int i = threadIdx.x; i < kBins; i += kThreads) m.bins[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t rank = rank_of(i);
      if (above < 32 && rank >> above != prefix) continue;
      atomicAdd(&m.bins[(rank >> shift) & ((1u << digit) - 1)], 1u);
    }
    __syncthreads();
    find_bin(m, missing);
    const uint32_t bin = m.words[0];
    missing = m.words[1];
    prefix = above < 32 ? prefix << digit | bin : bin;
    const bool whole_bin = missing == m.bins[bin];
    __syncthreads();  // all have read it
    if (whole_bin) return {(prefix + 1) << shift, 0};
  }
  return {prefix, static_cast<int>(missing)};
}

/// Positions of the lanes' set bits below this lane's.
__device__ inline int set_below(uint32_t lanes) {
  return __popc(lanes & ((1u << threadIdx.x % 32) - 1));
}

/// Those of n keys that the threshold takes to m.keys, in their order: each warp has a run of them.
template <typename RankOf, typename PositionOf>
__device__ inline void take_best(const Memory& m, int64_t n, const Threshold& t,
                                 const RankOf& rank_of, const PositionOf& position_of) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t each = ceil_div(ceil_div(n, kWarps), 32) * 32;
  const int64_t begin = warp * each, end = smaller(n, begin + each);
  int below = 0, equal = 0;
  for (int64_t i = begin + lane; i < end; i += 32) {
    const uint32_t rank = rank_of(i);
    below += rank < t.rank;
    equal += rank == t.rank;
  }
  below = warp_sum(below);
  equal = warp_sum(equal);
  if (lane == 0) {
    m.words[2 * warp] = static_cast<uint32_t>(below);
    m.words[2 * warp + 1] = static_cast<uint32_t>(equal);
  }
  __syncthreads();
  int taken = 0, equals = 0;  // by the warps before
  for (int w = 0; w < warp; ++w) {
    taken += static_cast<int>(m.words[2 * w]);
    equals += static_cast<int>(m.words[2 * w + 1]);
  }
  taken += static_cast<int>(smaller(equals, t.equal));
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t i = first + lane;
    const uint32_t rank = i < end ? rank_of(i) : 0u;
    const bool same = i < end && rank == t.rank;
    const uint32_t all_same = __ballot_sync(kAllLanes, same);
    const bool take =
        i < end && (rank < t.rank || (same && equals + set_below(all_same) < t.equal));
    const uint32_t all = __ballot_sync(kAllLanes, take);
    if (take) m.keys[taken + set_below(all)] = ordered(rank, position_of(i));
    taken += __popc(all);
    equals += __popc(all_same);
  }
}

/// What is chosen of all keys before a page, to m.keys in their order; returns how many. Out of
/// what is kept up to an earlier call's last whole page, and of the keys since.
template <typename Source>
__device__ inline int choose_before(const Source& source, const Memory& m, const Rows& rows,
                                    int sequence, int head, int64_t page) {
  const KeyChoice& c = source.c;
  const int64_t known = Source::kKept ? smaller(page, rows.first / kPage) : 0;
  const int64_t listed = smaller(known * kPage, c.globals);
  const int64_t n = listed + (page - known) * kPage;
  const int32_t* list = known > 0 ? source.chosen(sequence, head, known - 1) : nullptr;
  const auto position_of = [&](int64_t i) {
    return i < listed ? int64_t{list[i]} : known * kPage + i - listed;
  };
  const auto rank_at = [&](int64_t i) {
    const int64_t position = position_of(i);
    return rank_of(c, position, *source.norm(sequence, head, position));
  };
  if (n <= c.globals) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      m.keys[i] = ordered(rank_at(i), position_of(i));
    }
    return static_cast<int>(n);
  }
  take_best(m, n, find_threshold(m, n, c.globals, rank_at), rank_at, position_of);
  return static_cast<int>(c.globals);
}

/// m.until of the `before` keys and the `entering` behind them: so many of the latter may have
/// entered before there are `limit` better ones.
__device__ inline void find_ends(const Memory& m, int before, int entering, int64_t limit) {
  for (int i = threadIdx.x; i < before + entering; i += kThreads) {
    int until = kPage + 1;
    if (before + entering > limit) {
      const uint64_t mine = m.keys[i];
      int better = 0;
      for (int j = 0; j < before; ++j) better += m.keys[j] < mine;
      for (int j = 0; j < entering && until > kPage; ++j) {
        better += m.keys[before + j] < mine;
        if (better >= limit) until = j + 1;
      }
    }
    m.until[i] = until;
  }
}

/// The positions that are chosen when `entered` of a page have entered. A warp.
__device__ inline void write_chosen(const Memory& m, int before, int entered, int32_t* to) {
  for (int first = 0; first < before + entered; first += 32) {
    const int i = first + static_cast<int>(threadIdx.x) % 32;
    const bool chosen = i < before + entered && m.until[i] > entered;
    const uint32_t all = __ballot_sync(kAllLanes, chosen);
    if (chosen) to[set_below(all)] = static_cast<int32_t>(m.keys[i]);
    to += __popc(all);
  }
}

/// A page's part of a call: lists of the rows whose window one of its keys was the last to leave,
/// and what is chosen up to its end, if the call completes it. All threads.
template <typename Source>
__device__ inline void choose_of_page(const Source& source, const Memory& m, const Rows& rows,
                                      int sequence, int head, int64_t page) {
  const KeyChoice& c = source.c;
  const int64_t first = page * kPage, next = first + kPage;
  const int64_t begin = larger(rows.first, first + c.window);
  const int64_t end = c.given == nullptr ? smaller(rows.end(), next + c.window) : begin;
  const bool completed = Source::kKept && next > rows.first && next <= rows.end();
  if (begin >= end && !completed) return;
  const int warp = threadIdx.x / 32;
  const int before = choose_before(source, m, rows, sequence, head, page);
  const auto entering = static_cast<int>(smaller(kPage, rows.end() - first));
  for (int i = threadIdx.x; i < entering; i += kThreads) {
    const int64_t position = first + i;
    m.keys[before + i] =
        ordered(rank_of(c, position, *source.norm(sequence, head, position)), position);
  }
  __syncthreads();
  find_ends(m, before, entering, c.globals);
  __syncthreads();
  for (int64_t position = begin + warp; position < end; position += kWarps) {
    const int64_t list = (rows.row0 + position - rows.first) * source.n_kv_heads() + head;
    write_chosen(m, before, static_cast<int>(position - c.window + 1 - first),
                 c.keys + list * c.stride);
  }
  if (completed && warp == kWarps - 1) {
    write_chosen(m, before, kPage, source.chosen(sequence, head, page));
  }
  __syncthreads();  // before memory is used for the next page
}

/// Grid: pages in turn, kv heads, sequences. `alone`: there is one row each, whose key this kernel
/// takes; no other row reads it.
template <typename Source>
__global__ void __launch_bounds__(kThreads)
    choose_globals(const __grid_constant__ Source source, bool alone) {
  begin_after_previous();
  extern __shared__ uint64_t shared[];
  const int sequence = blockIdx.z, head = blockIdx.y;
  const Rows rows = source.rows(sequence);
  if (rows.count <= 0) return;
  if (alone) {
    if (threadIdx.x < 32) take_key(source, rows, sequence, head, rows.first);
    __syncthreads();
  }
  const Memory m(shared, source.c.globals);
  const int64_t first = larger(0, rows.first - source.c.window) / kPage;
  for (int64_t page = first + blockIdx.x; page * kPage < rows.end(); page += gridDim.x) {
    choose_of_page(source, m, rows, sequence, head, page);
  }
}

/// The host's own choice. Which of its positions a row reads is decided in their order, then the
/// least of them are taken one after the other. Grid: rows by kWarps, kv heads, sequences.
template <typename Source>
__global__ void __launch_bounds__(kThreads) list_given(const __grid_constant__ Source source) {
  begin_after_previous();
  const KeyChoice& c = source.c;
  const int sequence = blockIdx.z, head = blockIdx.y, lane = threadIdx.x % 32;
  const Rows rows = source.rows(sequence);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows.count) return;
  const int64_t position = rows.first + row, left = larger(0, position - c.window + 1);
  const int32_t* given = c.given + sequence * c.n_given;
  int64_t read = 0, count = 0;  // entries that are looked at, different positions among them
  for (; read < c.n_given && count < c.globals; ++read) {
    bool before = false;
    for (int64_t i = lane; i < read; i += 32) before = before || given[i] == given[read];
    const bool seen = given[read] >= 0 && given[read] < left;
    if (!__any_sync(kAllLanes, before) && seen) ++count;
  }
  int32_t* to = c.keys + ((rows.row0 + row) * source.n_kv_heads() + head) * c.stride;
  for (int64_t n = 0, last = -1; n < count; ++n) {
    int64_t least = left;
    for (int64_t i = lane; i < read; i += 32) {
      if (given[i] > last && given[i] < least) least = given[i];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      least = smaller(least, __shfl_xor_sync(kAllLanes, least, step));
    }
    if (lane == 0) to[n] = static_cast<int32_t>(least);
    last = least;
  }
  list_window(source, rows, head, position, count);
}

/// max_keys: of a sequence that are measured in this call, rows among them.
template <typename Source>
void choose(const StreamState& s, const Source& source, int64_t n_kv_heads, int64_t sequences,
            int64_t max_rows, int64_t max_keys) {
  const KeyChoice& c = source.c;
  const auto grid = [&](int64_t x) {
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(n_kv_heads),
                static_cast<unsigned>(sequences));
  };
  const bool alone = Source::kKept && max_rows == 1 && c.globals > 0;
  if (!alone && !launch_next("norms of keys", take_keys<Source>, grid(ceil_div(max_keys, kWarps)),
                             kThreads, 0, s.stream(), source)) {
    return;
  }
  if (c.globals > 0 && (Source::kKept || c.given == nullptr)) {
    const int64_t bytes = Memory::bytes(c.globals);
    const int64_t pages = alone ? 1 : (max_rows + c.window) / kPage + 2;
    if (!allow_shared(choose_globals<Source>, bytes) ||
        !launch_next("choice of keys", choose_globals<Source>, grid(smaller(pages, kMostBlocks)),
                     kThreads, static_cast<size_t>(bytes), s.stream(), source, alone)) {
      return;
    }
  }
  if (c.given == nullptr) return;
  launch_next("given keys", list_given<Source>, grid(ceil_div(max_rows, kWarps)), kThreads, 0,
              s.stream(), source);
}

}  // namespace

void choose_keys(const OpContext& context, const AttentionArgs& a, const KeyChoice& c) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.batch == 0 || a.max_rows == 0) return;
  choose(*s, Paged{c, a}, a.kv.n_kv_heads, a.batch, a.max_rows, a.max_rows);
}

void choose_train_keys(const OpContext& context, const TrainAttentionArgs& a, const KeyChoice& c) {
  const StreamState* s = enter(context);
  if (s == nullptr) return;
  for (int64_t i = 0; i < a.n_sequences; i += kSequences) {
    const int64_t count = smaller(kSequences, a.n_sequences - i);
    Trained source{c, a.k, a.n_kv_heads, a.head_dim, {}};
    source.c.kept = static_cast<char*>(c.kept) + i * c.kept_stride;
    if (c.given != nullptr) source.c.given += i * c.n_given;
    int64_t rows = 0, keys = 0;
    for (int64_t n = 0; n < count; ++n) {
      source.sequences[n] = a.sequences[i + n];
      rows = larger(rows, a.sequences[i + n].n_rows);
      keys = larger(keys, a.sequences[i + n].prefix + a.sequences[i + n].n_rows);
    }
    if (rows > 0) choose(*s, source, a.n_kv_heads, count, rows, keys);
  }
}

}  // namespace ds::cuda
