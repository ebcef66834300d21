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
constexpr int kFewThreads =
    96;  // for one row that chooses among few: two warps, and one for its key
constexpr int kFewGlobals = 32;
constexpr int kPage = kKvPageTokens;
constexpr int kSequences = 32;         // of training, in one launch: they travel in its parameters
constexpr int64_t kMostBlocks = 1024;  // of a sequence and kv head: each takes several pages then
constexpr int kDigit = 11, kBins = 1 << kDigit;
constexpr int kRanks = 4096;  // of keys before a page, that are in shared memory

/// A sequence's rows in the call; `first` is the position of row row0.
struct Rows {
  int row0, count, first;
  __device__ int end() const { return first + count; }
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

/// Keys of one sequence and kv head that is served: norms are kept beside the pages, and behind
/// them the positions that are chosen up to the page's end.
struct PagedKeys {
  const KvView& kv;
  const int32_t* pages;
  char* kept;  ///< of the kv head beside page 0
  int64_t stride;
  int head;

  __device__ float* norm(int position) const {
    return reinterpret_cast<float*>(kept + pages[position / kPage] * stride) + position % kPage;
  }
  __device__ int32_t* chosen(int page) const {
    return reinterpret_cast<int32_t*>(kept + pages[page] * stride) + kPage;
  }
  __device__ float measure(int position) const {
    const int64_t row = (pages[position / kPage] * kv.n_kv_heads + head) * kPage + position % kPage;
    const int64_t d = kv.head_dim;
    switch (kv.dtype) {
      case KvDtype::kF32:
        return squared_norm(static_cast<const float*>(kv.k) + row * d, d);
      case KvDtype::kF16:
        return squared_norm(static_cast<const Half*>(kv.k) + row * d, d);
      default:
        return squared_norm(static_cast<const Bf16*>(kv.k) + row * d, d);
    }
  }
};
struct Paged {
  static constexpr bool kKept = true;
  KeyChoice c;
  AttentionArgs a;

  __device__ int64_t n_kv_heads() const { return a.kv.n_kv_heads; }
  __device__ Rows rows(int sequence) const {
    const int row0 = a.starts[sequence], count = a.starts[sequence + 1] - row0;
    return {row0, count, a.lengths[sequence] - count};
  }
  __device__ PagedKeys keys(int sequence, int head) const {
    return {a.kv, a.table + sequence * a.table_width,
            static_cast<char*>(c.kept) + head * (kPage + c.globals) * 4, c.kept_stride, head};
  }
};

/// The same of one that is trained: norms of all keys are made anew, nothing is kept.
struct TrainedKeys {
  const float *own, *prefix_k;  ///< of the kv head
  float* norms;
  int64_t step, d;
  int prefix;

  __device__ float* norm(int position) const { return norms + position; }
  __device__ int32_t* chosen(int) const { return nullptr; }
  __device__ float measure(int position) const {
    return squared_norm(
        position < prefix ? prefix_k + position * step : own + (position - prefix) * step, d);
  }
};
struct Trained {
  static constexpr bool kKept = false;
  KeyChoice c;
  const float* k;
  int64_t heads, d;
  TrainSequence sequences[kSequences];

  __device__ int64_t n_kv_heads() const { return heads; }
  __device__ Rows rows(int sequence) const {
    const TrainSequence& s = sequences[sequence];
    return {static_cast<int>(s.row0), static_cast<int>(s.n_rows), static_cast<int>(s.prefix)};
  }
  __device__ TrainedKeys keys(int sequence, int head) const {
    const TrainSequence& s = sequences[sequence];
    char* room = static_cast<char*>(c.kept) + sequence * c.kept_stride;
    return {k + (s.row0 * heads + head) * d,
            s.prefix_k + head * d,
            reinterpret_cast<float*>(room) + head * (s.prefix + s.n_rows),
            heads * d,
            d,
            static_cast<int>(s.prefix)};
  }
};

/// How many keys are before the window of a row.
__device__ inline int left_of(const KeyChoice& c, int position) {
  return static_cast<int>(larger(0, position - c.window + 1));
}

template <typename Source>
__device__ inline int64_t list_of(const Source& source, const Rows& rows, int head, int position) {
  return (rows.row0 + position - rows.first) * source.n_kv_heads() + head;
}

/// The keys of a row's window behind the `before` others of its list. A warp.
template <typename Source>
__device__ inline void list_window(const Source& source, const Rows& rows, int head, int position,
                                   int before) {
  const int64_t list = list_of(source, rows, head, position);
  const int left = left_of(source.c, position);
  int32_t* to = source.c.keys + list * source.c.stride + before;
  for (int i = threadIdx.x % 32; left + i <= position; i += 32) to[i] = left + i;
  if (threadIdx.x % 32 == 0) source.c.counts[list] = before + position - left + 1;
}

/// A key's norm and, where it is a row's, the row's window. A warp.
template <typename Source, typename Keys>
__device__ inline void take_key(const Source& source, const Rows& rows, const Keys& keys, int head,
                                int position) {
  const float norm = keys.measure(position);
  if (threadIdx.x % 32 == 0) *keys.norm(position) = norm;
  if (position < rows.first || source.c.given != nullptr) return;
  const int64_t left = left_of(source.c, position);
  list_window(source, rows, head, position, static_cast<int>(smaller(left, source.c.globals)));
}

/// Grid: keys by kWarps, kv heads, sequences.
template <typename Source>
__global__ void __launch_bounds__(kThreads) take_keys(const __grid_constant__ Source source) {
  begin_after_previous();
  const int sequence = blockIdx.z, head = blockIdx.y;
  const Rows rows = source.rows(sequence);
  const int position =
      (Source::kKept ? rows.first : 0) + static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
  if (position < rows.end()) {
    take_key(source, rows, source.keys(sequence, head), head, position);
  }
}

/// Keys in the order in which they are chosen: sinks, then by norm, of equals the earlier. A norm's
/// bits are in the order of the norms.
__device__ inline uint32_t rank_of(const KeyChoice& c, int position, float norm) {
  return position < c.sinks ? 0u : (__float_as_uint(norm) & 0x7fffffffu) + 1;
}
__device__ inline uint64_t ordered(uint32_t rank, int position) {
  return static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(position);
}

/// Shared memory of a block of choose_globals().
struct Memory {
  uint64_t* keys;   ///< [globals + kPage]
  int32_t* until;   ///< [globals + kPage]
  uint32_t* words;  ///< [3 kWarps + 2]
  uint32_t* bins;   ///< [kBins]
  uint32_t* ranks;  ///< [kRanks]

  /// `alone`: without those that are for many keys.
  static int64_t bytes(int64_t globals, bool alone) {
    return (globals + kPage) * 12 + (alone ? 0 : 3 * kWarps + 2 + kBins + kRanks) * 4;
  }
  __device__ Memory(void* at, int64_t globals) {
    keys = static_cast<uint64_t*>(at);
    until = reinterpret_cast<int32_t*>(keys + globals + kPage);
    words = reinterpret_cast<uint32_t*>(until + globals + kPage);
    bins = words + 3 * kWarps + 2;
    ranks = bins + kBins;
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
  uint32_t up_to = warp_sum_up_to(mine);
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

/// Which are the `wanted` least of n ranks, more than `wanted`: the range that they end in is
/// narrowed by a factor of kBins each time. low and high: this thread's least and largest of its
/// ranks, sinks apart, which are `sinks` altogether.
template <typename RankAt>
__device__ inline Threshold find_threshold(const Memory& m, int n, int wanted, uint32_t low,
                                           uint32_t high, int sinks, const RankAt& rank_at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (lane == 0) {
    m.words[2 * warp] = low;
    m.words[2 * warp + 1] = high;
  }
  __syncthreads();
  if (sinks >= wanted) return {0, wanted};
  for (int w = 0; w < kWarps; ++w) {
    low = min(low, m.words[2 * w]);
    high = max(high, m.words[2 * w + 1]);
  }
  auto missing = static_cast<uint32_t>(wanted - sinks);
  for (;;) {
    const int shift = max(0, 32 - __clz(static_cast<int>(high - low)) - kDigit);
    for (int i = threadIdx.x; i < kBins; i += kThreads) m.bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t rank = rank_at(i);
      if (rank >= low && rank <= high) atomicAdd(&m.bins[(rank - low) >> shift], 1u);
    }
    __syncthreads();
    find_bin(m, missing);
    const uint32_t bin = m.words[0];
    missing = m.words[1];
    const bool whole = missing == m.bins[bin];
    __syncthreads();  // all have read it
    low += bin << shift;
    if (whole) return {low + (1u << shift), 0};
    if (shift == 0) return {low, static_cast<int>(missing)};
    high = min(high, low + (1u << shift) - 1);
  }
}

/// How many of the lanes' set bits are below this lane's.
__device__ inline int set_below(uint32_t lanes) {
  return __popc(lanes & ((1u << threadIdx.x % 32) - 1));
}

/// Those of n keys that the threshold takes to m.keys, in their order: each warp has a run of them.
template <typename RankAt, typename PositionOf>
__device__ inline void take_best(const Memory& m, int n, const Threshold& t, const RankAt& rank_at,
                                 const PositionOf& position_of) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int each = (n + kThreads - 1) / kThreads * 32;
  const int begin = warp * each, end = min(n, begin + each);
  int below = 0, equal = 0;
  for (int i = begin + lane; i < end; i += 32) {
    const uint32_t rank = rank_at(i);
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
  taken += min(equals, t.equal);
  for (int first = begin; first < end; first += 32) {
    const int i = first + lane;
    const uint32_t rank = i < end ? rank_at(i) : 0u;
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
/// what is kept up to an earlier call's last whole page, `known` pages, and of the keys since.
template <bool kAlone, typename Keys>
__device__ inline int choose_before(const KeyChoice& c, const Memory& m, const Keys& keys, int page,
                                    int known) {
  const auto limit = static_cast<int>(c.globals), listed = min(known * kPage, limit);
  const int n = kAlone ? listed : listed + (page - known) * kPage;
  const int32_t* list = known > 0 ? keys.chosen(known - 1) : nullptr;
  const auto position_of = [&](int i) { return i < listed ? list[i] : known * kPage + i - listed; };
  if (n <= limit) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const int position = position_of(i);
      m.keys[i] = ordered(rank_of(c, position, *keys.norm(position)), position);
    }
    return n;
  }
  if constexpr (!kAlone) {
    const auto load_rank = [&](int i) {
      const int position = position_of(i);
      return rank_of(c, position, *keys.norm(position));
    };
    const auto rank_at = [&](int i) { return i < kRanks ? m.ranks[i] : load_rank(i); };
    uint32_t low = ~0u, high = 0;
    int sinks = 0;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t rank = load_rank(i);
      if (i < kRanks) m.ranks[i] = rank;
      sinks += rank == 0;
      if (rank > 0) low = min(low, rank), high = max(high, rank);
    }
    sinks = block_sum(sinks);
    take_best(m, n, find_threshold(m, n, limit, low, high, sinks, rank_at), rank_at, position_of);
  }
  return limit;
}

/// m.until of the `before` keys and the `entering` behind them: so many of the latter may have
/// entered before there are `limit` better ones.
__device__ inline void find_ends(const Memory& m, int before, int entering, int limit) {
  for (int i = threadIdx.x; i < before + entering; i += blockDim.x) {
    int until = kPage + 1;
    if (before + entering > limit) {
      const uint64_t mine = m.keys[i];
      int better = 0;
#pragma unroll 8
      for (int j = 0; j < before; ++j) better += m.keys[j] < mine;
      for (int j = 0; j < entering; ++j) {
        better += m.keys[before + j] < mine;
        if (better >= limit) until = min(until, j + 1);
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
template <bool kAlone, typename Source, typename Keys>
__device__ inline void choose_of_page(const Source& source, const Memory& m, const Rows& rows,
                                      const Keys& keys, int head, int page) {
  const KeyChoice& c = source.c;
  const int first = page * kPage, next = first + kPage;
  const auto begin = static_cast<int>(larger(rows.first, first + c.window));
  const int end =
      c.given == nullptr ? static_cast<int>(smaller(rows.end(), next + c.window)) : begin;
  const bool completed = Source::kKept && next > rows.first && next <= rows.end();
  if (begin >= end && !completed) return;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int known = Source::kKept ? min(page, rows.first / kPage) : 0;
  const int before = choose_before<kAlone>(c, m, keys, page, known);
  // At most those whose leaving some row sees.
  const int entering = completed ? kPage : static_cast<int>(end - c.window) - first;
  for (int i = threadIdx.x; i < entering; i += blockDim.x) {
    m.keys[before + i] = ordered(rank_of(c, first + i, *keys.norm(first + i)), first + i);
  }
  __syncthreads();
  find_ends(m, before, entering, static_cast<int>(c.globals));
  __syncthreads();
  for (int position = begin + warp; position < end; position += warps) {
    write_chosen(m, before, left_of(c, position) - first,
                 c.keys + list_of(source, rows, head, position) * c.stride);
  }
  if (completed && warp == warps - 1) write_chosen(m, before, kPage, keys.chosen(page));
  __syncthreads();  // before memory is used for the next page
}

/// Grid: pages in turn, kv heads, sequences. kAlone: there is one row each, whose key this kernel
/// takes: no list has it but as part of the window, only what is chosen up to the end of its page.
template <typename Source, bool kAlone>
__global__ void __launch_bounds__(kThreads, 4)
    choose_globals(const __grid_constant__ Source source) {
  begin_after_previous();
  extern __shared__ uint64_t shared[];
  const int sequence = blockIdx.z, head = blockIdx.y;
  const Rows rows = source.rows(sequence);
  if (rows.count <= 0) return;
  const auto keys = source.keys(sequence, head);
  if constexpr (kAlone) {
    if (threadIdx.x / 32 == blockDim.x / 32 - 1) take_key(source, rows, keys, head, rows.first);
    if (rows.end() % kPage == 0) __syncthreads();
  }
  const Memory m(shared, source.c.globals);
  const auto first = static_cast<int>(larger(0, rows.first - source.c.window) / kPage);
  for (int page = first + blockIdx.x; page * kPage < rows.end(); page += gridDim.x) {
    choose_of_page<kAlone>(source, m, rows, keys, head, page);
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
  const int row = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
  if (row >= rows.count) return;
  const int position = rows.first + row, left = left_of(c, position);
  const int32_t* given = c.given + sequence * c.n_given;
  int read = 0, count = 0;  // entries that are looked at, different positions among them
  for (; read < c.n_given && count < c.globals; ++read) {
    bool before = false;
    for (int i = lane; i < read; i += 32) before = before || given[i] == given[read];
    const bool seen = given[read] >= 0 && given[read] < left;
    if (!__any_sync(kAllLanes, before) && seen) ++count;
  }
  int32_t* to = c.keys + list_of(source, rows, head, position) * c.stride;
  for (int n = 0, last = -1; n < count; ++n) {
    int least = left;
    for (int i = lane; i < read; i += 32) {
      if (given[i] > last) least = min(least, given[i]);
    }
    last = __reduce_min_sync(kAllLanes, least);
    if (lane == 0) to[n] = last;
  }
  list_window(source, rows, head, position, count);
}

/// Blocks of choose_globals().
template <bool kAlone, typename Source>
bool launch_globals(const StreamState& s, const Source& source, dim3 grid, int threads) {
  const auto kernel = choose_globals<Source, kAlone>;
  const int64_t bytes = Memory::bytes(source.c.globals, kAlone);
  return allow_shared(kernel, bytes) && launch_next("choice of keys", kernel, grid, threads,
                                                    static_cast<size_t>(bytes), s.stream(), source);
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
  bool chosen = false;
  if constexpr (Source::kKept) {
    if (max_rows == 1 && c.globals > 0) {
      const int threads = c.globals <= kFewGlobals ? kFewThreads : kThreads;
      if (!launch_globals<true>(s, source, grid(1), threads)) return;
      chosen = true;
    }
  }
  if (!chosen) {
    if (!launch_next("norms of keys", take_keys<Source>, grid(ceil_div(max_keys, kWarps)), kThreads,
                     0, s.stream(), source)) {
      return;
    }
    const int64_t pages = smaller((max_rows + c.window) / kPage + 2, kMostBlocks);
    if (c.globals > 0 && (Source::kKept || c.given == nullptr) &&
        !launch_globals<false>(s, source, grid(pages), kThreads)) {
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
