// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "tests/kernels/simple_case.h"

namespace ds::test {
namespace {

/// Rows of kinds in turn: greedy with equal largest logits, one that is not finite, draws at the
/// middle of some token's interval, at 0, and just below 1.
struct Sampled {
  int64_t rows, vocab;

  enum Kind { kGreedy, kPoisoned, kDraw, kHotDraw, kFirst, kLast, kKinds };
  static Kind kind(int64_t r) { return static_cast<Kind>(r % kKinds); }
  static float heat(int64_t r) {
    if (kind(r) == kGreedy) return 0.0f;
    return kind(r) == kHotDraw ? 4.0f : 1.25f;
  }

  Floats logits() const {
    Floats x = random_floats(static_cast<size_t>(rows * vocab), 71, 2.0f);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = x.data() + r * vocab;
      if (kind(r) == kGreedy) row[vocab / 3] = row[vocab - 1] = 50.0f;
      if (kind(r) == kPoisoned) row[r * 7 % vocab] = std::numeric_limits<float>::quiet_NaN();
      if (kind(r) == kFirst || kind(r) == kLast) row[0] = row[vocab - 1] = -1000.0f;  // no weight
    }
    return x;
  }

  /// Sums of weights up to each token, itself included.
  Vec sums(const Floats& x, int64_t r) const {
    const float* row = x.data() + r * vocab;
    const double best = *std::max_element(row, row + vocab);
    Vec out;
    double sum = 0;
    for (int64_t i = 0; i < vocab; ++i) {
      const double at = (double{row[i]} - best) * double{heat(r)};
      out.push_back(sum += at < -87 ? 0 : std::exp(at));
    }
    return out;
  }

  /// The token that a row should give, and a chance that gives it.
  std::pair<int64_t, double> wanted(const Floats& x, int64_t r) const {
    if (kind(r) == kGreedy) return {vocab / 3, 0.5};
    if (kind(r) == kPoisoned) return {-1, 0.5};
    if (kind(r) == kFirst) return {1, 0.0};
    if (kind(r) == kLast) return {vocab - 2, std::nextafter(1.0, 0.0)};
    const Vec upto = sums(x, r);
    // The heaviest of some: its interval is wide against the rounding of weights.
    int64_t token = r * 977 % vocab;
    for (int64_t i = token; i < std::min(token + 50, vocab); ++i) {
      if (x[r * vocab + i] > x[r * vocab + token]) token = i;
    }
    const double before = token == 0 ? 0 : upto[token - 1];
    return {token, (before + upto[token]) / 2 / upto.back()};
  }
};

}  // namespace

void add_sample_cases(std::vector<Case>* all) {
  for (const Sampled of : {Sampled{7, 40}, Sampled{12, 1003}, Sampled{20, 49152}}) {
    all->push_back(simple(
        sized("sample", of.rows, of.vocab), 0, [of] { return of.logits(); }, Floats(of.rows),
        [of](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
          Floats heat;
          std::vector<double, CaseAllocator<double>> chance;
          Ints token(of.rows);
          for (int64_t r = 0; r < of.rows; ++r) {
            heat.push_back(Sampled::heat(r));
            chance.push_back(of.wanted(in, r).second);
          }
          ops.sample(c, {of.rows, of.vocab, of.vocab, in.data(), heat.data(), chance.data(),
                         token.data()});
          ops.finish(c);
          std::copy(token.begin(), token.end(), out->begin());
        },
        [of](const Floats& in) {
          Vec tokens;
          for (int64_t r = 0; r < of.rows; ++r)
            tokens.push_back(static_cast<double>(of.wanted(in, r).first));
          return tokens;
        }));
  }
}

}  // namespace ds::test
