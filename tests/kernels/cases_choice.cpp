// SPDX-License-Identifier: Apache-2.0
// choose_keys and choose_train_keys: lists of keys, exactly, out of keys whose norms are exact on
// every backend and often equal.
#include <algorithm>
#include <bit>

#include "tests/kernels/cases_attention.h"

namespace ds::test {
namespace {

struct ChoiceShape {
  int64_t window = 32, globals = 32, sinks = 4;
  std::vector<int64_t> lengths;  ///< of each sequence
  std::vector<int64_t> steps;    ///< rows of a sequence per call, in turn; in training its prefix
  KvDtype dtype = KvDtype::kBF16;
  int64_t n_kv_heads = 2, d = 16;
  bool given = false;
};

constexpr int64_t kGiven = 20;

struct ChoiceProblem {
  ChoiceShape shape;
  int64_t total = 0;
  Floats keys;  ///< of all tokens of all sequences [total, n_kv_heads, d]: small whole numbers
  Ints given;   ///< [sequences, kGiven]

  explicit ChoiceProblem(const ChoiceShape& s) : shape(s) {
    for (const int64_t n : s.lengths) total += n;
    std::mt19937 rng(41);
    for (int64_t i = 0; i < total * s.n_kv_heads; ++i) {
      // Some are all zero, most have one of a few norms.
      const auto size = static_cast<float>(rng() % 4);
      for (int64_t e = 0; e < s.d; ++e) keys.push_back(e % 3 == 0 ? size : e < 2 ? size / 2 : 0.0f);
      keys.back() = static_cast<float>(rng() % 3);
    }
    for (size_t i = 0; i < s.lengths.size() * kGiven; ++i)
      given.push_back(static_cast<int32_t>(rng() % 60) - 3);
  }

  int64_t stride() const { return shape.window + shape.globals; }
  int64_t row0(size_t sequence) const {
    int64_t at = 0;
    for (size_t i = 0; i < sequence; ++i) at += shape.lengths[i];
    return at;
  }
  KeyChoice choice() const {
    KeyChoice c;
    c.window = shape.window, c.globals = shape.globals, c.sinks = shape.sinks;
    c.stride = stride();
    if (shape.given) c.given = given.data(), c.n_given = kGiven;
    return c;
  }

  std::vector<int64_t> chosen(size_t sequence, int64_t head, int64_t left) const {
    std::vector<int64_t> all;
    if (shape.given) {
      for (int64_t i = 0; i < kGiven && std::ssize(all) < shape.globals; ++i) {
        const int64_t p = given[sequence * kGiven + static_cast<size_t>(i)];
        if (p >= 0 && p < left && std::find(all.begin(), all.end(), p) == all.end())
          all.push_back(p);
      }
    } else {
      std::vector<std::pair<double, int64_t>> ranked;
      for (int64_t p = 0; p < left; ++p) {
        const float* key = &keys[((row0(sequence) + p) * shape.n_kv_heads + head) * shape.d];
        double norm = p < shape.sinks ? -1.0 : 0.0;
        for (int64_t i = 0; i < shape.d && p >= shape.sinks; ++i) norm += double{key[i]} * key[i];
        ranked.emplace_back(norm, p);
      }
      std::sort(ranked.begin(), ranked.end());
      ranked.resize(std::min(ranked.size(), static_cast<size_t>(shape.globals)));
      for (const auto& [norm, p] : ranked) all.push_back(p);
    }
    std::sort(all.begin(), all.end());
    return all;
  }
  /// For each row and kv head how many keys it reads, then which; -1 behind them.
  Vec expect(int64_t first_row) const {
    Vec out;
    for (size_t s = 0; s < shape.lengths.size(); ++s) {
      for (int64_t t = first_row; t < shape.lengths[s]; ++t) {
        for (int64_t head = 0; head < shape.n_kv_heads; ++head) {
          const int64_t left = std::max<int64_t>(0, t - shape.window + 1);
          std::vector<int64_t> list = chosen(s, head, left);
          for (int64_t p = left; p <= t; ++p) list.push_back(p);
          out.push_back(static_cast<double>(list.size()));
          list.resize(static_cast<size_t>(stride()), -1);
          out.insert(out.end(), list.begin(), list.end());
        }
      }
    }
    return out;
  }
  void put(const Ints& lists, const Ints& counts, int64_t list, int64_t row, Floats* out) const {
    float* to = out->data() + row * (1 + stride());
    *to++ = static_cast<float>(counts[static_cast<size_t>(list)]);
    for (int64_t i = 0; i < stride(); ++i)
      to[i] = static_cast<float>(lists[static_cast<size_t>(list * stride() + i)]);
  }
};

std::string name_of(const char* op, const ChoiceShape& s) {
  std::string name = op;
  for (const int64_t x : {s.window, s.globals, s.sinks}) name += " " + std::to_string(x);
  for (const int64_t n : s.lengths) name += " +" + std::to_string(n);
  return name + (s.given ? " given" : "") + (s.dtype == KvDtype::kF32 ? " f32" : " bf16");
}

/// Pages in reverse order, and what is kept beside them, which nobody cleared.
struct ChoiceCache {
  const ChoiceProblem& p;
  std::vector<Ints> pages;
  std::shared_ptr<char> k, kept;
  int64_t kept_stride = 0;

  explicit ChoiceCache(const ChoiceProblem& problem) : p(problem) {
    int32_t n_pages = 0;
    for (const int64_t n : p.shape.lengths) {
      pages.emplace_back();
      for (int64_t at = 0; at < n; at += kKvPageTokens) pages.back().push_back(n_pages++);
    }
    for (Ints& list : pages) {
      for (int32_t& id : list) id = n_pages - 1 - id;
    }
    kept_stride = p.choice().kept_bytes(p.shape.n_kv_heads) + 8;
    const int64_t bytes = n_pages * p.shape.n_kv_heads * kKvPageTokens * p.shape.d * 4;
    k = aligned(bytes);
    kept = aligned(n_pages * kept_stride);
    std::fill_n(k.get(), bytes, char(-1));
    std::fill_n(kept.get(), n_pages * kept_stride, char(-1));
  }

  void append(size_t sequence, int64_t position) const {
    const ChoiceShape& s = p.shape;
    const int64_t page = pages[sequence][static_cast<size_t>(position / kKvPageTokens)];
    for (int64_t head = 0; head < s.n_kv_heads; ++head) {
      const float* from = &p.keys[((p.row0(sequence) + position) * s.n_kv_heads + head) * s.d];
      const int64_t to =
          ((page * s.n_kv_heads + head) * kKvPageTokens + position % kKvPageTokens) * s.d;
      for (int64_t i = 0; i < s.d; ++i) {
        if (s.dtype == KvDtype::kF32) {
          reinterpret_cast<float*>(k.get())[to + i] = from[i];
        } else {
          reinterpret_cast<uint16_t*>(k.get())[to + i] =
              static_cast<uint16_t>(std::bit_cast<uint32_t>(from[i]) >> 16);  // exact
        }
      }
    }
  }

  /// The next rows of each sequence that has any; false: none has.
  bool call(const Ops& ops, const OpContext& context, size_t n, std::vector<int64_t>& done,
            Floats* out) const {
    const ChoiceShape& s = p.shape;
    Ints starts{0}, lengths, table;
    std::vector<int64_t> rows;  // of the call, as rows of the problem
    AttentionArgs a;
    for (const Ints& list : pages) a.table_width = std::max(a.table_width, std::ssize(list));
    for (size_t i = 0; i < done.size(); ++i) {
      const int64_t now = std::min(s.steps[(n + i) % s.steps.size()], s.lengths[i] - done[i]);
      if (now == 0) continue;
      for (int64_t at = 0; at < now; ++at, ++done[i]) {
        append(i, done[i]);
        rows.push_back(p.row0(i) + done[i]);
      }
      starts.push_back(static_cast<int32_t>(rows.size()));
      lengths.push_back(static_cast<int32_t>(done[i]));
      table.insert(table.end(), pages[i].begin(), pages[i].end());
      table.resize(lengths.size() * static_cast<size_t>(a.table_width), 0);
      a.max_rows = std::max(a.max_rows, now);
    }
    if (rows.empty()) return false;
    a.batch = std::ssize(lengths);
    a.max_keys = 4096;
    a.n_heads = s.n_kv_heads;
    a.starts = starts.data(), a.lengths = lengths.data(), a.table = table.data();
    a.kv = {s.dtype, s.n_kv_heads, s.d, k.get(), nullptr};
    Ints lists(rows.size() * static_cast<size_t>(s.n_kv_heads * p.stride()), -1);
    Ints counts(rows.size() * static_cast<size_t>(s.n_kv_heads), -1);
    KeyChoice c = p.choice();
    c.kept = kept.get(), c.kept_stride = kept_stride;
    c.keys = lists.data(), c.counts = counts.data();
    ops.choose_keys(context, a, c);
    ops.finish(context);
    for (int64_t r = 0; r < std::ssize(rows) * s.n_kv_heads; ++r)
      p.put(lists, counts, r,
            rows[static_cast<size_t>(r / s.n_kv_heads)] * s.n_kv_heads + r % s.n_kv_heads, out);
    return true;
  }
};

Case choice_case(const ChoiceShape& s) {
  auto problem = std::make_shared<ChoiceProblem>(s);
  Case c;
  c.name = name_of("choose_keys", s) + " by " + std::to_string(s.steps[0]);
  c.tolerance = c.tolerance_bf16 = 0;
  c.expect = [problem] { return problem->expect(0); };
  c.bind = [problem](const Ops& ops, const OpContext& context, Floats* out) {
    const ChoiceShape& s = problem->shape;
    out->assign(static_cast<size_t>(problem->total * s.n_kv_heads * (1 + problem->stride())), -2);
    return [=, &ops] {
      const ChoiceCache cache(*problem);
      std::vector<int64_t> done(problem->shape.lengths.size(), 0);
      for (size_t n = 0; cache.call(ops, context, n, done, out); ++n) continue;
    };
  };
  return c;
}

/// All sequences have a prefix of steps[0] keys.
Case train_choice_case(const ChoiceShape& s) {
  auto problem = std::make_shared<ChoiceProblem>(s);
  Case c;
  c.name = name_of("choose_train_keys", s) + " prefix" + std::to_string(s.steps[0]);
  c.tolerance = c.tolerance_bf16 = 0;
  c.expect = [problem] { return problem->expect(problem->shape.steps[0]); };
  c.bind = [problem](const Ops& ops, const OpContext& context, Floats* out) {
    const ChoiceShape& s = problem->shape;
    const int64_t prefix = s.steps[0], width = s.n_kv_heads * s.d;
    auto own = std::make_shared<Floats>();  // keys of the rows alone
    auto sequences = std::make_shared<std::vector<TrainSequence>>();
    int64_t longest = 0;
    for (size_t i = 0; i < s.lengths.size(); ++i) {
      const float* keys = problem->keys.data() + problem->row0(i) * width;
      sequences->push_back(
          {std::ssize(*own) / width, s.lengths[i] - prefix, prefix, keys, nullptr});
      own->insert(own->end(), keys + prefix * width, keys + s.lengths[i] * width);
      longest = std::max(longest, s.lengths[i]);
    }
    const auto lists = static_cast<size_t>(std::ssize(*own) / s.d);
    auto keys = std::make_shared<Ints>(lists * static_cast<size_t>(problem->stride()), -1);
    auto counts = std::make_shared<Ints>(lists, -1);
    TrainAttentionArgs a;
    a.n_heads = a.n_kv_heads = s.n_kv_heads;
    a.head_dim = s.d;
    a.k = own->data();
    a.sequences = sequences->data();
    a.n_sequences = std::ssize(*sequences);
    KeyChoice c = problem->choice();
    c.kept_stride = longest * s.n_kv_heads * 4;
    const auto room = aligned(c.kept_stride * a.n_sequences);
    c.kept = room.get();
    c.keys = keys->data(), c.counts = counts->data();
    out->assign(lists * static_cast<size_t>(1 + problem->stride()), -2);
    return [=, &ops] {
      (void)sequences, (void)own, (void)room;
      ops.choose_train_keys(context, a, c);
      ops.finish(context);
      for (size_t i = 0; i < counts->size(); ++i)
        problem->put(*keys, *counts, static_cast<int64_t>(i), static_cast<int64_t>(i), out);
    };
  };
  return c;
}

}  // namespace

std::vector<Case> key_choice_cases() {
  std::vector<Case> all;
  const std::vector<int64_t> ragged = {37, 1, 64, 5, 31};
  for (const KvDtype dtype : {KvDtype::kBF16, KvDtype::kF32}) {
    all.push_back(choice_case({8, 6, 2, {150, 1, 70}, ragged, dtype}));
    all.push_back(choice_case({8, 6, 2, {150, 40}, {1}, dtype}));
  }
  all.push_back(choice_case({32, 32, 4, {500, 97}, {1000}}));
  all.push_back(choice_case({32, 32, 4, {300, 97}, ragged}));
  all.push_back(choice_case({70, 40, 4, {300, 97}, ragged}));
  all.push_back(choice_case({1, 3, 0, {200}, {64, 1}, KvDtype::kBF16, 3, 20}));
  all.push_back(choice_case({16, 0, 0, {100}, {33}}));
  all.push_back(choice_case({16, 0, 0, {70}, {1}}));
  all.push_back(choice_case({5, 4, 9, {100}, {33, 1}}));  // more sinks than globals
  all.push_back(
      choice_case({8, 300, 4, {700}, {333, 1}}));  // more globals than a block has threads
  for (const int64_t step : {1, 40})
    all.push_back(choice_case({8, 6, 2, {90, 60}, {step}, KvDtype::kBF16, 2, 16, true}));
  for (const int64_t prefix : {0, 37}) {
    all.push_back(train_choice_case({32, 32, 4, {300, 40, 97}, {prefix}}));
    all.push_back(train_choice_case({8, 6, 2, {90, 60}, {prefix}, KvDtype::kF32, 2, 16, true}));
  }
  all.push_back(train_choice_case({4, 3, 1, std::vector<int64_t>(33, 20), {3}}));
  all.push_back(train_choice_case({4, 0, 0, {50}, {3}}));
  // More keys than a block of the GPU has room for.
  all.push_back(train_choice_case({32, 32, 4, {4630}, {4600}, KvDtype::kF32, 1, 4}));
  return all;
}

}  // namespace ds::test
