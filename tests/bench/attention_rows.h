// SPDX-License-Identifier: Apache-2.0
// Attention alone, one layer of SmolLM2's shape (9/3 heads of 64), in a backend's own memory:
// microseconds of a call, of many in a row, and TFLOP/s of the products that causality leaves
// (4 n k d a head forward; 10 in the backward, as recomputing p is the kernel's affair).
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "engine/bf16.h"
#include "engine/model.h"
#include "kernels/buffer.h"

namespace ds {

class AttentionBench {
 public:
  explicit AttentionBench(const Compute& compute) : compute_(compute) {}

  /// `batch` sequences with `rows` rows each, the last of `keys` keys. `chosen`: the keys that
  /// window-global reads by default, and beside that what choosing them takes.
  void paged(const char* row, int64_t batch, int64_t rows, int64_t keys, bool chosen) {
    const int64_t width = (keys + kKvPageTokens - 1) / kKvPageTokens;
    const auto q = random(batch * rows * kHeads * kDim);
    const Buffer out = room(q.bytes());
    const auto k = random_pages(batch * width), v = random_pages(batch * width);
    std::vector<int32_t> starts, lengths, table;
    for (int64_t b = 0; b <= batch; ++b) starts.push_back(static_cast<int32_t>(b * rows));
    lengths.assign(static_cast<size_t>(batch), static_cast<int32_t>(keys));
    for (int64_t p = 0; p < batch * width; ++p) {
      table.push_back(static_cast<int32_t>((p * 7919) % (batch * width)));
    }
    const auto starts_at = sent(starts), lengths_at = sent(lengths), table_at = sent(table);
    AttentionArgs a;
    a.n_heads = kHeads;
    a.q = q.as<float>();
    a.out = out.as<float>();
    a.scale = kScale;
    a.batch = batch;
    a.max_rows = rows;
    a.max_keys = keys;
    a.starts = starts_at.as<int32_t>();
    a.lengths = lengths_at.as<int32_t>();
    a.table = table_at.as<int32_t>();
    a.table_width = width;
    a.kv = {KvDtype::kBF16, kKvHeads, kDim, k.data(), v.data()};
    if (chosen) return paged_chosen(row, a, rows, keys);
    const double pairs =
        static_cast<double>(batch * rows) * static_cast<double>(2 * keys - rows) / 2;
    print(row, seconds_of([&] { compute_.ops->attention(compute_.context, a); }), 4 * pairs);
  }

  /// Forward, then backward.
  void train(const char* row, int64_t batch, int64_t tokens, WeightFormat operands, bool chosen) {
    const int64_t rows = batch * tokens, width = kHeads * kDim, kv = kKvHeads * kDim;
    const auto q = random(rows * width), k = random(rows * kv), v = random(rows * kv);
    const auto dout = random(rows * width);
    const Buffer out = floats(rows * width), lse = floats(rows * kHeads), dq = floats(rows * width);
    const Buffer dk = floats(rows * kv), dv = floats(rows * kv);
    std::vector<TrainSequence> sequences;
    for (int64_t b = 0; b < batch; ++b)
      sequences.push_back({b * tokens, tokens, 0, nullptr, nullptr});
    const TrainAttentionArgs a{kHeads,          kKvHeads,         kDim,           kScale,
                               q.as<float>(),   k.as<float>(),    v.as<float>(),  out.as<float>(),
                               lse.as<float>(), dout.as<float>(), dq.as<float>(), dk.as<float>(),
                               dv.as<float>(),  sequences.data(), batch,          operands};
    const Ops& ops = *compute_.ops;
    const OpContext& context = compute_.context;
    Lists lists = chosen ? lists_for(rows, rows * kKvHeads * 4) : Lists{};
    lists.choice.kept_stride = tokens * kKvHeads * 4;
    const auto choose = [&] { ops.choose_train_keys(context, a, lists.choice); };
    const double pairs =
        static_cast<double>(rows) * (chosen ? kListed : static_cast<double>(tokens) / 2);
    const std::string name(row);
    if (chosen) print(name + ": choice", seconds_of(choose), 0);
    const double forward = seconds_of([&] {
      if (!chosen) return ops.attention_train(context, a);
      choose();
      ops.attention_selected_train(context, a, lists.choice.selection());
    });
    print(name + ": forward", forward, 4 * pairs);
    const double backward = seconds_of([&] {
      if (!chosen) return ops.attention_train_backward(context, a);
      choose();
      ops.attention_selected_train_backward(context, a, lists.choice.selection());
    });
    print(name + ": backward", backward, 10 * pairs);
  }

 private:
  static constexpr int64_t kHeads = 9, kKvHeads = 3, kDim = 64;
  static constexpr float kScale = 0.125f;
  static constexpr int kCalls = 30;
  static constexpr int64_t kWindow = 32, kGlobals = 32, kListed = kWindow + kGlobals;

  struct Lists {
    Buffer keys, counts, kept;
    KeyChoice choice;
  };
  Lists lists_for(int64_t rows, int64_t kept_bytes) const {
    Lists out{floats(rows * kKvHeads * kListed),
              floats(rows * kKvHeads),
              room(static_cast<size_t>(kept_bytes)),
              {}};
    out.choice.window = kWindow, out.choice.globals = kGlobals, out.choice.sinks = 4;
    out.choice.kept = out.kept.data();
    out.choice.keys = out.keys.as<int32_t>(), out.choice.counts = out.counts.as<int32_t>();
    out.choice.stride = kListed;
    return out;
  }

  void paged_chosen(const char* row, const AttentionArgs& a, int64_t rows, int64_t keys) {
    const Ops& ops = *compute_.ops;
    KeyChoice sizes;
    sizes.globals = kGlobals;
    const int64_t beside = sizes.kept_bytes(kKvHeads);
    Lists lists = lists_for(a.batch * keys, a.batch * a.table_width * beside);
    lists.choice.kept_stride = beside;
    // The rows before left what they chose beside the pages.
    AttentionArgs before = a;
    std::vector<int32_t> starts;
    for (int64_t b = 0; b <= a.batch; ++b) starts.push_back(static_cast<int32_t>(b * keys));
    const Buffer starts_at = sent(starts);
    before.starts = starts_at.as<int32_t>();
    before.max_rows = keys;
    ops.choose_keys(compute_.context, before, lists.choice);
    const auto choose = [&] { ops.choose_keys(compute_.context, a, lists.choice); };
    print(std::string(row) + ": choice", seconds_of(choose), 0);
    const double both = seconds_of([&] {
      choose();
      ops.attention_selected(compute_.context, a, lists.choice.selection());
    });
    print(row, both, 4.0 * static_cast<double>(a.batch * rows * kListed));
  }

  Buffer room(size_t bytes) const { return Buffer::make(*compute_.ops, bytes).value(); }
  Buffer floats(int64_t n) const { return room(static_cast<size_t>(n) * sizeof(float)); }
  template <typename T>
  Buffer sent(const std::vector<T>& x) const {
    Buffer to = room(x.size() * sizeof(T));
    compute_.ops->upload(compute_.context, to.data(), x.data(),
                         static_cast<int64_t>(x.size() * sizeof(T)));
    return to;
  }
  std::vector<float> normal(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = normal(rng_);
    return x;
  }
  Buffer random(int64_t n) { return sent(normal(n)); }
  Buffer random_pages(int64_t pages) {
    std::vector<uint16_t> x;
    for (const float v : normal(pages * kKvHeads * kKvPageTokens * kDim)) x.push_back(to_bf16(v));
    return sent(x);
  }

  /// Of one call: the median of five times kCalls, recorded where the backend does that, so that
  /// the host's part is not in it.
  double seconds_of(const std::function<void()>& call) const {
    const Ops& ops = *compute_.ops;
    call();
    DS_CHECK(finish(compute_).ok());
    void* recording = nullptr;
    if (ops.begin_recording(compute_.context)) {
      for (int n = 0; n < kCalls; ++n) call();
      recording = ops.end_recording(compute_.context);
      DS_CHECK(recording != nullptr);
    }
    std::vector<double> took;
    for (int i = 0; i < 6; ++i) {
      const auto start = std::chrono::steady_clock::now();
      if (recording != nullptr) {
        ops.replay(compute_.context, recording);
      } else {
        for (int n = 0; n < kCalls; ++n) call();
      }
      DS_CHECK(finish(compute_).ok());
      const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
      if (i > 0) took.push_back(passed.count() / kCalls);
    }
    ops.release_recording(recording);
    std::sort(took.begin(), took.end());
    return took[2];
  }
  static void print(const std::string& row, double s, double products) {
    std::printf("%s: %.1f us, %.0f TFLOP/s\n", row.c_str(), s * 1e6,
                products * static_cast<double>(kHeads * kDim) / s * 1e-12);
  }

  Compute compute_;
  std::mt19937 rng_{1};
};

}  // namespace ds
