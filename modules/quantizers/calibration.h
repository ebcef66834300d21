// SPDX-License-Identifier: Apache-2.0
// What a quantizer was shown of its weights' inputs, until it needs it.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/quant.h"

namespace ds::modules {

/// Inputs x [rows, k] by weight, as x^T x. Weights that were shown the same (q, k and v of a layer)
/// share one sum and one factor. Thread-safe.
class Calibration {
 public:
  static constexpr float kLargest = 1e15f;  ///< beyond it the sums may overflow
  Calibration(const Ops& ops, const QuantOps& quant) : ops_(ops), quant_(quant) {}

  void observe(const OpContext& context, std::string_view name, std::int64_t rows, std::int64_t k,
               const float* x) {
    std::lock_guard lock(mutex_);
    auto& of_name = seen_.emplace(name, nullptr).first->second;
    if (of_name != nullptr && of_name->k != k)
      of_name = nullptr;  // the name is another weight's now
    const std::uint64_t before =
        of_name == nullptr ? static_cast<std::uint64_t>(k) : of_name->history;
    const std::uint64_t history = after(before, x, rows * k);
    for (const auto& [other, sum] : seen_) {
      if (sum == nullptr || sum->history != history) continue;
      of_name = sum;
      return;
    }
    if (of_name == nullptr) {
      of_name = std::make_shared<Sum>(k);
    } else if (of_name.use_count() > 1) {
      of_name = std::make_shared<Sum>(*of_name);
    }
    of_name->history = history;
    of_name->factor.clear();  // of what was shown until now
    for (Stripe& s : of_name->stripes) {
      OuterArgs outer;
      outer.rows = rows;
      outer.n = s.end - s.begin;
      outer.dy = x + s.begin;
      outer.k = s.end;
      outer.x = x;
      outer.dy_stride = outer.x_stride = k;
      outer.out = s.sums.data();
      ops_.outer_accumulate(context, 1, &outer);
    }
  }

  /// Calls f(feedback) with the factor of what `name` was shown, null if nothing, and forgets it.
  template <typename F>
  void use(const OpContext& context, std::string_view name, std::int64_t k, const F& f) {
    const std::shared_ptr<const Sum> sum = take(context, name);
    f(sum == nullptr || sum->k != k ? nullptr : sum->factor.data());
  }

 private:
  /// Rows [begin, end) of x^T x, up to column `end`: the rest is the same mirrored.
  struct Stripe {
    std::int64_t begin, end;
    std::vector<float> sums;  ///< [end - begin, end]
  };
  struct Sum {
    explicit Sum(std::int64_t columns) : k(columns) {
      constexpr std::int64_t kRows = 240;  // outputs of one task of outer_accumulate
      for (std::int64_t at = 0; at < k; at += kRows) {
        const std::int64_t end = std::min(k, at + kRows);
        stripes.push_back(
            {at, end, std::vector<float>(static_cast<std::size_t>((end - at) * end))});
      }
    }
    std::vector<float> lower() const {
      std::vector<float> out(static_cast<std::size_t>(k * k));
      for (const Stripe& s : stripes) {
        for (std::int64_t i = s.begin; i < s.end; ++i)
          std::copy_n(s.sums.begin() + (i - s.begin) * s.end, i + 1, out.begin() + i * k);
      }
      return out;
    }
    std::int64_t k;
    std::uint64_t history = 0;  ///< of all inputs that are in it
    std::vector<Stripe> stripes;
    std::vector<float> factor;
  };

  std::shared_ptr<const Sum> take(const OpContext& context, std::string_view name) {
    std::lock_guard lock(mutex_);
    const auto found = seen_.find(name);
    if (found == seen_.end()) return nullptr;
    const std::shared_ptr<Sum> sum = std::move(found->second);
    seen_.erase(found);
    if (sum != nullptr && sum->factor.empty()) {
      std::vector<float> factor(static_cast<std::size_t>(sum->k * sum->k));
      quant_.feedback_factor(context, sum->k, sum->lower().data(), factor.data());
      sum->factor = std::move(factor);
    }
    return sum;
  }

  static std::uint64_t after(std::uint64_t history, const float* x, std::int64_t count) {
    constexpr std::uint64_t kPrime = 0x9E3779B97F4A7C15;
    for (std::int64_t i = 0; i < count; ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      history = (history ^ bits) * kPrime;
      history ^= history >> 29;
    }
    return history;
  }

  const Ops& ops_;
  const QuantOps& quant_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Sum>, std::less<>> seen_;
};

}  // namespace ds::modules
