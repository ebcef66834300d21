// SPDX-License-Identifier: Apache-2.0
// Level 2 for attention. The oracle is a softmax in double precision over the keys that the
// plugin's own explain() names, so a sparse attention is held to its own claim and to nothing else.
#include <algorithm>
#include <cmath>

#include "check/attention_case.h"

namespace ds::check {
namespace {

constexpr double kTolerance = 1e-4;  // of the largest expected value

using Read = std::vector<uint8_t>;  // [rows, heads, max_keys]

bool has_explain(const Bench& bench) {
  return table_of<ds_attention>(bench.component).explain != nullptr;
}

int64_t position(const AttentionCase::Sequence& s, int64_t row) { return s.keys - s.rows + row; }

/// Calls f(sequence, row within it, row of the call, its position).
template <class F>
void for_each_row(const AttentionCase& c, F&& f) {
  int64_t at = 0;
  for (size_t b = 0; b < c.sequences.size(); ++b) {
    for (int64_t r = 0; r < c.sequences[b].rows; ++r, ++at) f(b, at, position(c.sequences[b], r));
  }
}

Read dense_read(const AttentionCase& c) {
  Read out(static_cast<size_t>(c.rows() * c.heads * c.max_keys()));
  for_each_row(c, [&](size_t, int64_t row, int64_t at) {
    for (int64_t h = 0; h < c.heads; ++h)
      std::fill_n(out.begin() + (row * c.heads + h) * c.max_keys(), at + 1, uint8_t{1});
  });
  return out;
}

std::vector<double> oracle(const AttentionCase& c, const Read& read) {
  std::vector<double> out(c.q.size());
  const int64_t d = c.head_dim;
  for_each_row(c, [&](size_t b, int64_t row, int64_t) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const float* q = &c.q[static_cast<size_t>((row * c.heads + h) * d)];
      const auto key_at = [&](int64_t key) {
        return ((c.first_key(b) + key) * c.kv_heads + h / (c.heads / c.kv_heads)) * d;
      };
      std::vector<std::pair<int64_t, double>> scores;
      double top = -INFINITY, sum = 0;
      for (int64_t key = 0; key < c.sequences[b].keys; ++key) {
        if (read[static_cast<size_t>((row * c.heads + h) * c.max_keys() + key)] == 0) continue;
        double s = 0;
        for (int64_t i = 0; i < d; ++i)
          s += double{q[i]} * c.k[static_cast<size_t>(key_at(key) + i)];
        scores.emplace_back(key, s * c.scale);
        top = std::max(top, s * c.scale);
      }
      for (auto& [key, s] : scores) sum += s = std::exp(s - top);
      for (const auto& [key, p] : scores) {
        for (int64_t i = 0; i < d; ++i)
          out[static_cast<size_t>((row * c.heads + h) * d + i)] +=
              p / sum * c.v[static_cast<size_t>(key_at(key) + i)];
      }
    }
  });
  return out;
}

/// "" or how far `got` is from it.
std::string differs(const std::vector<float>& got, const std::vector<double>& want,
                    double tolerance) {
  if (got.size() != want.size()) return "no output";
  double largest = 1e-3, worst = 0;
  for (const double w : want) largest = std::max(largest, std::abs(w));
  for (size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(got[i])) return "element " + std::to_string(i) + " is not finite";
    worst = std::max(worst, std::abs(got[i] - want[i]));
  }
  if (worst <= tolerance * largest) return "";
  return "error " + std::to_string(worst) + " where the largest value is " +
         std::to_string(largest) + ", allowed " + std::to_string(tolerance) + " of it";
}

std::vector<float> served(Bench& bench, const AttentionCase& c, bool decode = false) {
  return on_fresh(bench, [&](Trial& t) { return serve(t, c, decode); });
}
Read explained(Bench& bench, const AttentionCase& c) {
  return on_fresh(bench, [&](Trial& t) { return explain(t, c); });
}

const std::vector<AttentionCase::Sequence> kRagged = {{7, 37}, {1, 1}, {100, 100}, {33, 64}};

Verdict causal(Bench& bench) {
  if (!has_explain(bench)) return skipped("no explain");
  const AttentionCase c = random_case(kRagged, bench.settings.seed, false);
  const Read read = explained(bench, c);
  if (read.empty()) return failed("explain failed");
  std::string wrong;
  uint64_t reads = 0;
  for_each_row(c, [&](size_t b, int64_t row, int64_t at) {
    for (int64_t i = 0; i < c.heads * c.max_keys(); ++i) {
      const uint8_t value = read[static_cast<size_t>(row * c.heads * c.max_keys() + i)];
      reads += value;
      if (value != 0 && i % c.max_keys() > at && wrong.empty())
        wrong = "row at position " + std::to_string(at) + " of sequence " + std::to_string(b) +
                " reads the key at " + std::to_string(i % c.max_keys());
    }
  });
  if (!wrong.empty()) return failed(wrong);
  return pass(std::to_string(reads / static_cast<uint64_t>(c.rows() * c.heads)) +
              " keys a row on average");
}

/// A key of no row's claim may hold anything.
Verdict explain_is_true(Bench& bench) {
  if (!has_explain(bench)) return skipped("no explain");
  const AttentionCase c = random_case({{40, 160}}, bench.settings.seed, false);
  const Read read = explained(bench, c);
  const std::vector<float> before = served(bench, c);
  if (read.empty() || before.empty()) return failed("explain or prefill failed");
  const int64_t row_floats = c.heads * c.head_dim;
  for (int64_t key = 0; key < c.max_keys(); key += 3) {
    AttentionCase other = c;
    const auto row = static_cast<size_t>(c.kv_heads * c.head_dim);
    for (size_t i = 0; i < row; ++i) {
      other.v[static_cast<size_t>(key) * row + i] += 3;
    }
    const std::vector<float> after = served(bench, other);
    if (after.size() != before.size()) return failed("prefill failed");
    for (int64_t r = 0; r < c.rows(); ++r) {
      bool claimed = false;
      for (int64_t h = 0; h < c.heads; ++h)
        claimed = claimed || read[static_cast<size_t>((r * c.heads + h) * c.max_keys() + key)] != 0;
      const bool changed =
          !std::equal(before.begin() + r * row_floats, before.begin() + (r + 1) * row_floats,
                      after.begin() + r * row_floats);
      if (changed != claimed)
        return failed("the value at position " + std::to_string(key) +
                      (claimed ? " is said to be read by" : " is said not to be read by") +
                      " row " + std::to_string(r) + ", whose output " +
                      (changed ? "changes with it" : "does not change with it"));
    }
  }
  return pass();
}

Verdict matches_oracle(Bench& bench) {
  for (const bool bf16 : {false, true}) {
    const AttentionCase c = random_case(kRagged, bench.settings.seed, bf16);
    const Read read = has_explain(bench) ? explained(bench, c) : dense_read(c);
    if (read.empty()) return failed("explain failed");
    const std::string wrong = differs(served(bench, c), oracle(c, read), kTolerance);
    if (wrong.empty()) continue;
    if (!has_explain(bench)) return skipped("no explain, and it is not dense attention: " + wrong);
    return failed(std::string(bf16 ? "bf16" : "f32") + " cache: " + wrong);
  }
  return pass();
}

/// Scores far beyond what exp() of a float holds.
Verdict extremes(Bench& bench) {
  AttentionCase c = random_case({{20, 60}}, bench.settings.seed, false);
  for (float& q : c.q) q *= 100;
  const Read read = has_explain(bench) ? explained(bench, c) : dense_read(c);
  const std::vector<float> out = served(bench, c);
  if (std::any_of(out.begin(), out.end(), [](float x) { return !std::isfinite(x); }))
    return failed("large scores give NaN or infinity");
  if (!has_explain(bench)) return pass("finite");
  const std::string wrong = differs(out, oracle(c, read), 2e-3);
  return wrong.empty() ? pass() : failed("scores up to 1600: " + wrong);
}

bool same_rows(const std::vector<float>& whole, int64_t row, const std::vector<float>& part,
               const AttentionCase& c) {
  const auto from = static_cast<size_t>(row * c.heads * c.head_dim);
  return !part.empty() && whole.size() >= from + part.size() &&
         std::memcmp(&whole[from], part.data(), part.size() * sizeof(float)) == 0;
}

Verdict batch_independent(Bench& bench) {
  const AttentionCase c = random_case(kRagged, bench.settings.seed, true);
  const std::vector<float> whole = served(bench, c);
  for (size_t b = 0; b < c.sequences.size(); ++b) {
    const AttentionCase alone = part_of(c, b, 0, c.sequences[b].rows);
    if (!same_rows(whole, c.row_starts()[b], served(bench, alone), c))
      return failed("sequence " + std::to_string(b) +
                    " alone gives other bits than in a batch of " +
                    std::to_string(c.sequences.size()));
  }
  return pass();
}

Verdict chunk_independent(Bench& bench) {
  const AttentionCase c = random_case({{96, 96}}, bench.settings.seed, true);
  const std::vector<float> whole = served(bench, c);
  for (const int64_t step : {32, 17}) {
    for (int64_t from = 0; from < 96; from += step) {
      const AttentionCase part = part_of(c, 0, from, std::min<int64_t>(96, from + step));
      if (!same_rows(whole, from, served(bench, part), c))
        return failed("rows from " + std::to_string(from) + " in chunks of " +
                      std::to_string(step) + " have other bits than in one call");
    }
  }
  for (const int64_t row : {0, 31, 32, 95}) {
    if (!same_rows(whole, row, served(bench, part_of(c, 0, row, row + 1), true), c))
      return failed("row " + std::to_string(row) + " by decode has other bits than by prefill");
  }
  return pass();
}

double weighted(const std::vector<float>& out, const std::vector<float>& dout) {
  double sum = 0;
  for (size_t i = 0; i < out.size(); ++i) sum += double{out[i]} * dout[i];
  return sum;
}

/// Central differences of sum(out * dout) in single elements.
Verdict attention_gradients(Bench& bench) {
  if (table_of<ds_attention>(bench.component).backward == nullptr) return skipped("no backward");
  const AttentionCase c = random_case({{9, 9}, {6, 20}}, bench.settings.seed, false);
  std::mt19937_64 rng(bench.settings.seed + 1);
  std::vector<float> dout(c.q.size());
  for (float& x : dout) x = std::uniform_real_distribution<float>(-1, 1)(rng);
  const TrainResult at = on_fresh(bench, [&](Trial& t) { return train(t, c, dout); });
  if (at.dq.empty()) return failed("backward failed");
  const auto loss = [&](const AttentionCase& moved) {
    return weighted(on_fresh(bench, [&](Trial& t) { return train(t, moved, {}); }).out, dout);
  };
  const size_t k_row = static_cast<size_t>(c.kv_heads * c.head_dim);
  // Where element i of dk stands in c.k: training keys follow the frozen prefix.
  const auto key_index = [&](size_t i) { return i < 9 * k_row ? i : i + 14 * k_row; };
  const float h = 1e-2f;
  const auto probe = [&](const char* name, std::vector<float> AttentionCase::*member,
                         const std::vector<float>& gradient, bool key) -> std::string {
    for (int n = 0; n < 24; ++n) {
      const size_t i = rng() % gradient.size(), to = key ? key_index(i) : i;
      AttentionCase up = c, down = c;
      (up.*member)[to] += h;
      (down.*member)[to] -= h;
      const double want = (loss(up) - loss(down)) / ((up.*member)[to] - (down.*member)[to]);
      if (!(std::abs(want - gradient[i]) <= 2e-3 + 1e-2 * std::abs(want)))
        return std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(gradient[i]) +
               ", central differences give " + std::to_string(want);
    }
    return "";
  };
  for (const std::string& wrong :
       {probe("dq", &AttentionCase::q, at.dq, false), probe("dk", &AttentionCase::k, at.dk, true),
        probe("dv", &AttentionCase::v, at.dv, true)}) {
    if (!wrong.empty()) return failed(wrong);
  }
  return pass("72 elements");
}

}  // namespace

std::vector<Check> attention_checks() {
  const uint32_t kind = DS_KIND_ATTENTION;
  return {
      {"numerics.causality", 2, kind, {}, causal},
      {"numerics.explain", 2, kind, {"numerics.causality"}, explain_is_true},
      {"numerics.oracle", 2, kind, {"numerics.explain"}, matches_oracle},
      {"numerics.extremes", 2, kind, {"numerics.oracle"}, extremes},
      {"numerics.batch", 2, kind, {"numerics.causality"}, batch_independent},
      {"numerics.chunks", 2, kind, {"numerics.causality", "numerics.batch"}, chunk_independent},
      {"numerics.gradient", 2, kind, {}, attention_gradients},
  };
}

}  // namespace ds::check
