// SPDX-License-Identifier: Apache-2.0
#include "tests/kernels/cases_attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

namespace ds::test {

namespace {
/// The elements of pages are a format's.
WeightFormat format_of(KvDtype dtype) {
  if (dtype == KvDtype::kBF16) return WeightFormat::kBF16;
  return dtype == KvDtype::kF16 ? WeightFormat::kF16 : WeightFormat::kF32;
}
}  // namespace

bool selects(int64_t position, int64_t kv_head, int64_t key) {
  const auto mixed = static_cast<uint64_t>(position * 31 + kv_head * 17 + key * 101) * 2654435761u;
  return key == position || mixed / 65536 % 3 == 0;
}

AttentionProblem::AttentionProblem(const AttentionShape& s) : shape(s) {
  uint32_t seed = 77;
  int64_t rows = 0;
  for (const auto& [before, now] : s.sequences) rows += before + now;
  total = rows;
  q = random_floats(static_cast<size_t>(rows * s.n_heads * s.d), ++seed, 1.5f);
  k = random_floats(static_cast<size_t>(rows * s.n_kv_heads * s.d), ++seed, 1.5f);
  v = random_floats(static_cast<size_t>(rows * s.n_kv_heads * s.d), ++seed);
  cos.resize(static_cast<size_t>(4096 * s.d / 2));
  sin.resize(cos.size());
  for (int64_t p = 0; p < 4096; ++p) {
    for (int64_t i = 0; i < s.d / 2; ++i) {
      const double angle = static_cast<double>(p) *
                           std::pow(1e5, -2.0 * static_cast<double>(i) / static_cast<double>(s.d));
      cos[p * s.d / 2 + i] = static_cast<float>(std::cos(angle));
      sin[p * s.d / 2 + i] = static_cast<float>(std::sin(angle));
    }
  }
}

Vec AttentionProblem::expect() const {
  const AttentionShape& s = shape;
  reference::Heads heads{s.n_heads, s.n_kv_heads, s.d, 1.0 / std::sqrt(double(s.d))};
  if (s.selected) heads.reads = selects;
  Vec all;
  int64_t row0 = 0;
  for (const auto& [before, now] : s.sequences) {
    const int64_t n = before + now;
    const auto part = [&](const Floats& x, int64_t width, bool rotate, bool round) {
      Vec out(x.begin() + row0 * width, x.begin() + (row0 + n) * width);
      for (int64_t r = 0; rotate && r < n; ++r) {
        const int64_t at = r * s.d / 2;
        const Vec c(cos.begin() + at, cos.begin() + at + s.d / 2);
        const Vec t(sin.begin() + at, sin.begin() + at + s.d / 2);
        for (int64_t h = 0; h < width; h += s.d) {
          reference::rotate(s.d / 2, c.data(), t.data(), false, &out[r * width + h]);
        }
      }
      for (double& e : out) {
        const auto single = static_cast<float>(e);
        if (round && s.dtype == KvDtype::kBF16) e = double{as_bf16(single)};
        if (round && s.dtype == KvDtype::kF16) e = double{as_half(single)};
      }
      return out;
    };
    const Vec out = reference::attention(heads, n, 0, part(q, s.n_heads * s.d, true, false),
                                         part(k, s.n_kv_heads * s.d, true, true),
                                         part(v, s.n_kv_heads * s.d, false, true));
    all.insert(all.end(), out.begin() + before * s.n_heads * s.d, out.end());
    row0 += n;
  }
  return all;
}

namespace {

/// The lists of rows at given positions.
struct Lists {
  Ints keys, counts;
  KeySelection view;
  Lists(const Ints& positions, int64_t n_kv_heads) {
    view.stride = 1 + *std::max_element(positions.begin(), positions.end());
    for (const int32_t position : positions) {
      for (int64_t head = 0; head < n_kv_heads; ++head) {
        const auto begin = static_cast<int64_t>(keys.size());
        for (int64_t key = 0; key <= position; ++key) {
          if (selects(position, head, key)) keys.push_back(static_cast<int32_t>(key));
        }
        counts.push_back(static_cast<int32_t>(static_cast<int64_t>(keys.size()) - begin));
        keys.resize(static_cast<size_t>(begin + view.stride), -1);
      }
    }
    view.keys = keys.data();
    view.counts = counts.data();
  }
  Lists(const Lists&) = delete;
};

}  // namespace

AttentionProblem::Cache::Cache(const AttentionProblem& p) : problem(p) {
  const AttentionShape& s = p.shape;
  int32_t n_pages = 0;
  for (const auto& [before, now] : s.sequences) {
    pages.emplace_back();
    for (int64_t i = 0; i * kKvPageTokens < before + now; ++i) pages.back().push_back(n_pages++);
  }
  for (auto& list : pages) {
    for (int32_t& id : list) id = n_pages - 1 - id;  // not in the order of the tokens
  }
  const int64_t bytes = n_pages * s.n_kv_heads * kKvPageTokens * s.d * 4;
  memory_k = aligned(bytes);
  memory_v = aligned(bytes);
  // What was never written must not matter: bytes of 0xff are NaN in both types.
  std::fill(memory_k.get(), memory_k.get() + bytes, char(-1));
  std::fill(memory_v.get(), memory_v.get() + bytes, char(-1));
  kv = {s.dtype, s.n_kv_heads, s.d, memory_k.get(), memory_v.get()};
}

/// What `run` leaves in 16 bits is `out`, rounded: else the case shall fail.
static void expect_rounded(const Ops& ops, const OpContext& context, AttentionArgs& args,
                           const std::function<void()>& run, Floats& out) {
  const int64_t width = args.n_heads * args.kv.head_dim;
  Floats fp32(out.size()), narrow(out.size());
  args.out = fp32.data();
  for (const WeightFormat format : {WeightFormat::kF16, WeightFormat::kBF16}) {
    const auto memory = aligned(ops.packed_bytes(format, args.rows, width));
    args.out_16 = {.data = memory.get(), .format = format};
    run();
    ops.unpack(context, {format, args.rows, width, memory.get()}, narrow.data());
    ops.finish(context);
    const Floats want = rounded_to(format, out);
    for (size_t i = 0; i < want.size(); ++i) {
      if (narrow[i] != want[i]) out[i] = NAN;
    }
  }
}

void AttentionProblem::Cache::step(const Ops& ops, const OpContext& context,
                                   const std::vector<Part>& parts, Floats* out) {
  const AttentionShape& s = problem.shape;
  const int64_t width = s.n_heads * s.d, kv_width = s.n_kv_heads * s.d;
  Floats q, k, v;
  Ints positions, slots, lengths, table, starts{0};
  AttentionArgs args;
  for (const auto& list : pages) args.table_width = std::max(args.table_width, std::ssize(list));
  for (const Part& part : parts) {
    int64_t row = part.begin;
    for (size_t i = 0; i < part.sequence; ++i) {
      row += s.sequences[i].first + s.sequences[i].second;
    }
    const int64_t n = part.end - part.begin;
    const std::vector<int32_t>& list = pages[part.sequence];
    for (int64_t p = part.begin; p < part.end; ++p) {
      positions.push_back(static_cast<int32_t>(p));
      slots.push_back(
          static_cast<int32_t>(list[p / kKvPageTokens] * kKvPageTokens + p % kKvPageTokens));
    }
    starts.push_back(static_cast<int32_t>(positions.size()));
    lengths.push_back(static_cast<int32_t>(part.end));
    table.insert(table.end(), list.begin(), list.end());
    table.resize(lengths.size() * static_cast<size_t>(args.table_width), -1);
    args.max_rows = std::max(args.max_rows, n);
    args.max_keys = std::max(args.max_keys, part.end);
    q.insert(q.end(), problem.q.begin() + row * width, problem.q.begin() + (row + n) * width);
    k.insert(k.end(), problem.k.begin() + row * kv_width, problem.k.begin() + (row + n) * kv_width);
    v.insert(v.end(), problem.v.begin() + row * kv_width, problem.v.begin() + (row + n) * kv_width);
  }
  ops.rope_append(
      context, {std::ssize(positions), s.n_heads, q.data(), k.data(), v.data(), problem.cos.data(),
                problem.sin.data(), positions.data(), slots.data(), kv});
  out->resize(q.size());
  args.n_heads = s.n_heads;
  args.q = q.data();
  args.out = out->data();
  args.scale = 1.0f / std::sqrt(static_cast<float>(s.d));
  args.batch = std::ssize(lengths);
  args.starts = starts.data();
  args.lengths = lengths.data();
  args.table = table.data();
  args.kv = kv;
  args.rows = std::ssize(positions);
  std::optional<Lists> lists;
  if (s.selected) lists.emplace(positions, s.n_kv_heads);
  const auto run = [&] {
    if (s.selected) {
      ops.attention_selected(context, args, lists->view);
    } else {
      ops.attention(context, args);
    }
    ops.finish(context);
  };
  run();
  if (ops.rows_side_by_side && width % 8 == 0) expect_rounded(ops, context, args, run, *out);
}

Case attention_case(const AttentionShape& s) {
  auto problem = std::make_shared<AttentionProblem>(s);
  Case c;
  c.name = std::string(s.selected ? "attention_selected d" : "rope_append+attention d") +
           std::to_string(s.d) + " heads" + std::to_string(s.n_heads) + "/" +
           std::to_string(s.n_kv_heads) + " " + format_name(format_of(s.dtype));
  c.gpu_alone = s.dtype == KvDtype::kF16;
  // Rotated keys near a rounding boundary may fall on the other side in FP32: one BF16 step of a
  // few.
  c.tolerance = c.tolerance_bf16 = s.dtype == KvDtype::kF32 ? 2e-5 : 2e-3;
  // Where a prompt's products round q and the factors of values too (2^-9 of each, at most): a
  // score, of deviation 2.3 here, is off by 0.003 and up to five times that, its key's share of the
  // result by as much; values reach four times the result's mean.
  const bool prompt = std::any_of(s.sequences.begin(), s.sequences.end(),
                                  [](const auto& sequence) { return sequence.second > 1; });
  if (s.dtype != KvDtype::kF32 && prompt) c.tolerance_bf16 = rounding_tolerance(format_of(s.dtype));
  for (const auto& [before, now] : s.sequences) {
    c.name += " " + std::to_string(before) + "+" + std::to_string(now);
    for (int64_t r = before; r < before + now; ++r) {
      c.flops += 4.0 * static_cast<double>((r + 1) * s.n_heads * s.d);
    }
    c.bytes += 4.0 * static_cast<double>((before + now) * s.n_kv_heads * s.d);
  }
  c.expect = [problem] { return problem->expect(); };
  c.bind = [problem](const Ops& ops, const OpContext& context, Floats* out) {
    auto cache = std::make_shared<AttentionProblem::Cache>(*problem);
    std::vector<AttentionProblem::Part> earlier, now;
    for (size_t i = 0; i < problem->shape.sequences.size(); ++i) {
      const auto& [before, rows] = problem->shape.sequences[i];
      if (before > 0) earlier.push_back({i, 0, before});
      now.push_back({i, before, before + rows});
    }
    Floats ignored;
    if (!earlier.empty()) cache->step(ops, context, earlier, &ignored);
    return [=, &ops] { cache->step(ops, context, now, out); };
  };
  return c;
}

TrainProblem::TrainProblem(const TrainShape& s) : shape(s) {
  rows = std::accumulate(s.rows.begin(), s.rows.end(), int64_t{0});
  const auto width = static_cast<size_t>(s.n_heads * s.d);
  const auto kv = static_cast<size_t>(s.n_kv_heads * s.d);
  const auto n = static_cast<size_t>(rows);
  q = random_floats(n * width, 11, 1.5f);
  k = random_floats(n * kv, 12, 1.5f);
  v = random_floats(n * kv, 13);
  dout = random_floats(n * width, 14);
  prefix_k = random_floats(static_cast<size_t>(s.prefix) * kv, 15, 1.5f);
  prefix_v = random_floats(static_cast<size_t>(s.prefix) * kv, 16);
  if (!s.rounds()) return;
  for (Floats* x : {&q, &k, &v, &dout, &prefix_k, &prefix_v}) *x = as_bf16(std::move(*x));
}

Vec TrainProblem::expect(bool backward) const {
  const TrainShape& s = shape;
  reference::Heads heads{s.n_heads, s.n_kv_heads, s.d, 1.0 / std::sqrt(double(s.d))};
  if (s.selected) heads.reads = selects;
  const int64_t width = s.n_heads * s.d, kv_width = s.n_kv_heads * s.d;
  Vec first, second, third;
  int64_t row0 = 0;
  for (int64_t n : s.rows) {
    const auto part = [&](const Floats& x, int64_t w, const Floats* before) {
      Vec out(x.begin() + row0 * w, x.begin() + (row0 + n) * w);
      if (before != nullptr) out.insert(out.begin(), before->begin(), before->end());
      return out;
    };
    const Vec pq = part(q, width, nullptr), pd = part(dout, width, nullptr);
    const Vec pk = part(k, kv_width, &prefix_k), pv = part(v, kv_width, &prefix_v);
    if (backward) {
      const auto g = reference::attention_backward(heads, n, s.prefix, pq, pk, pv, pd);
      first.insert(first.end(), g.dq.begin(), g.dq.end());
      second.insert(second.end(), g.dk.begin() + s.prefix * kv_width, g.dk.end());
      third.insert(third.end(), g.dv.begin() + s.prefix * kv_width, g.dv.end());
    } else {
      const Vec out = reference::attention(heads, n, s.prefix, pq, pk, pv, &second);
      first.insert(first.end(), out.begin(), out.end());
    }
    row0 += n;
  }
  first.insert(first.end(), second.begin(), second.end());
  first.insert(first.end(), third.begin(), third.end());
  return first;
}

Case train_attention_case(const TrainShape& s, bool backward) {
  auto p = std::make_shared<TrainProblem>(s);
  Case c;
  c.name = std::string(s.selected ? "attention_selected_train" : "attention_train") +
           (backward ? "_backward d" : " d") + std::to_string(s.d) + " prefix" +
           std::to_string(s.prefix) + " " + format_name(s.operands);
  for (int64_t n : s.rows) {
    c.name += " " + std::to_string(n);
    c.flops += (backward ? 14.0 : 4.0) * static_cast<double>(s.n_heads * s.d * n) *
               (static_cast<double>(n) / 2 + static_cast<double>(s.prefix));
  }
  c.tolerance = c.tolerance_bf16 = 3e-5;
  // The inputs are BF16 then, so only factors are rounded: p by 2^-9 of itself at most, and in the
  // backward p (dout . v - D), whose D saw the forward's roundings already: its error is a few
  // times that, where terms of 64 products cancel. The largest of thousands is five deviations off.
  if (s.rounds()) c.tolerance_bf16 = backward ? 5e-2 : 1e-2;
  if (s.operands == WeightFormat::kF16 && !backward) c.tolerance_bf16 = 2.5e-3;
  c.expect = [p, backward] { return p->expect(backward); };
  c.bind = [p, backward](const Ops& ops, const OpContext& context, Floats* out) {
    const TrainShape& s = p->shape;
    const auto width = static_cast<size_t>(p->rows * s.n_heads * s.d);
    const auto kv = static_cast<size_t>(p->rows * s.n_kv_heads * s.d);
    const auto stats = static_cast<size_t>(p->rows * s.n_heads);
    auto saved = std::make_shared<Floats>(width + stats);
    auto sequences = std::make_shared<std::vector<TrainSequence>>();
    int64_t row0 = 0;
    for (int64_t n : s.rows) {
      sequences->push_back({row0, n, s.prefix, p->prefix_k.data(), p->prefix_v.data()});
      row0 += n;
    }
    out->assign(backward ? width + 2 * kv : width + stats, 0.0f);
    TrainAttentionArgs a;
    a.n_heads = s.n_heads;
    a.n_kv_heads = s.n_kv_heads;
    a.head_dim = s.d;
    a.scale = 1.0f / std::sqrt(static_cast<float>(s.d));
    a.q = p->q.data();
    a.k = p->k.data();
    a.v = p->v.data();
    a.out = backward ? saved->data() : out->data();
    a.lse = a.out + width;
    a.sequences = sequences->data();
    a.n_sequences = static_cast<int64_t>(sequences->size());
    a.operands = s.operands;
    if (backward) {
      a.dout = p->dout.data();
      a.dq = out->data();
      a.dk = a.dq + width;
      a.dv = a.dk + kv;
    }
    Ints positions;
    for (int64_t n : s.rows) {
      for (int64_t r = 0; r < n; ++r) positions.push_back(static_cast<int32_t>(s.prefix + r));
    }
    auto lists = std::make_shared<Lists>(positions, s.n_kv_heads);
    const auto run = [=, &ops](bool back) {
      if (!s.selected)
        return (back ? ops.attention_train_backward : ops.attention_train)(context, a);
      (back ? ops.attention_selected_train_backward : ops.attention_selected_train)(context, a,
                                                                                    lists->view);
    };
    if (backward) run(false);
    return [=] {
      (void)saved;
      (void)sequences;
      run(backward);
    };
  };
  return c;
}

std::vector<Case> tensor_core_attention_cases() {
  std::vector<Case> all;
  std::vector<std::pair<int64_t, int64_t>> many(32, {5, 2});
  many[7] = {150, 3};
  const auto prompts = [&](int64_t n_heads, int64_t n_kv_heads, int64_t d, const auto& sequences) {
    for (const KvDtype dtype : {KvDtype::kBF16, KvDtype::kF16})
      all.push_back(attention_case({n_heads, n_kv_heads, d, dtype, sequences}));
  };
  using Sequences = std::vector<std::pair<int64_t, int64_t>>;
  prompts(3, 1, 64, Sequences{{500, 300}, {33, 1}, {5, 65}});
  prompts(4, 4, 48, Sequences{{70, 130}, {32, 32}});
  prompts(4, 1, 80, Sequences{{5, 130}, {0, 17}, {64, 64}});
  prompts(3, 1, 128, Sequences{{77, 201}, {0, 63}});
  prompts(17, 17, 16, many);
  many.resize(8);
  many[5] = {70, 130};
  prompts(17, 17, 16, many);
  const auto chosen = [&](int64_t n_heads, int64_t n_kv_heads, int64_t d, const auto& sequences) {
    for (const KvDtype dtype : {KvDtype::kBF16, KvDtype::kF16})
      all.push_back(attention_case({n_heads, n_kv_heads, d, dtype, sequences, true}));
  };
  chosen(3, 1, 64, Sequences{{500, 300}, {33, 1}, {5, 65}});
  chosen(1, 1, 48, Sequences{{1100, 130}, {32, 32}});
  chosen(4, 1, 128, Sequences{{77, 201}, {0, 17}});
  chosen(9, 3, 64, Sequences{{300, 1}, {0, 1}, {40, 1}});  // one row each
  chosen(16, 2, 128, Sequences{{129, 1}});
  std::vector<int64_t> rows(33, 3);
  rows[20] = 70;
  for (const bool backward : {false, true}) {
    const auto train = [&](int64_t n_heads, int64_t n_kv_heads, int64_t d, int64_t prefix,
                           const std::vector<int64_t>& rows, bool selected = false) {
      for (const WeightFormat operands : {WeightFormat::kBF16, WeightFormat::kF16})
        all.push_back(train_attention_case(
            {n_heads, n_kv_heads, d, prefix, rows, selected, operands}, backward));
    };
    train(9, 3, 64, 5, {130, 65, 63}, true);
    train(3, 1, 64, 0, {300, 129}, true);
    train(4, 1, 80, 70, {65, 17, 1}, true);
    train(8, 8, 16, 64, {3, 3, 3, 130, 3, 3, 3, 3}, true);
    train(9, 3, 64, 0, {20, 1, 70});
    train(3, 1, 64, 0, {300, 129});
    train(9, 3, 64, 5, {130, 65, 63});
    train(4, 2, 16, 37, {33, 5});
    train(3, 3, 48, 70, {130, 1});
    train(4, 1, 80, 32, {65, 17, 1});
    train(3, 1, 128, 70, {150, 64});
    train(17, 17, 16, 70, rows);
    train(8, 8, 16, 70, {3, 3, 3, 130, 3, 3, 3, 3});
    train(2, 1, 20, 3, {40});  // rounds nothing: no kernel for such heads
  }
  return all;
}

}  // namespace ds::test
