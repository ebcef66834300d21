// SPDX-License-Identifier: Apache-2.0
#include "tests/kernels/cases.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/buffer.h"
#include "tests/kernels/cases_attention.h"
#include "tests/kernels/cases_update.h"
#include "tests/kernels/simple_case.h"

namespace ds::test {

Floats random_floats(size_t n, uint32_t seed, float scale) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  Floats out(n);
  for (float& x : out) x = normal(rng);
  return out;
}

float as_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  u = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
  std::memcpy(&x, &u, 4);
  return x;
}
float as_half(float x) { return static_cast<float>(static_cast<_Float16>(x)); }

std::string format_name(WeightFormat format) {
  static constexpr const char* kNames[] = {"f32", "bf16", "f16", "tf32"};
  return kNames[static_cast<int>(format)];
}

double rounding_tolerance(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBF16:
      return 5e-2;
    case WeightFormat::kF16:
      return 1.25e-2;  // three more bits than BF16, of which one is kept in hand
    case WeightFormat::kTF32:
      return 2.5e-2;  // as many as FP16, but weights are rounded, too
    default:
      return 2e-5;
  }
}

Floats as_half(Floats x) {
  for (float& v : x) v = as_half(v);
  return x;
}

Floats as_bf16(Floats x) {
  for (float& v : x) v = as_bf16(v);
  return x;
}

Floats rounded_to(WeightFormat format, Floats x) {
  if (is_f32(format)) return x;
  return format == WeightFormat::kF16 ? as_half(std::move(x)) : as_bf16(std::move(x));
}
Vec as_double(const Floats& x) { return Vec(x.begin(), x.end()); }

CaseMemory& case_memory() {
  const Ops& host = cpu_ops(CpuIsa::kScalar);
  static CaseMemory memory{host.allocate, host.release};
  return memory;
}

std::shared_ptr<char> aligned(int64_t bytes) {
  const CaseMemory& memory = case_memory();
  return {static_cast<char*>(memory.allocate(bytes)), memory.release};
}

double error_of(const Floats& got, const Vec& expected) {
  if (got.size() != expected.size()) return INFINITY;
  double worst = 0, squares = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(double{got[i]} - expected[i]);
    if (!(error <= worst)) worst = error;  // NaN too
    squares += expected[i] * expected[i];
  }
  return worst / std::max(1e-12, std::sqrt(squares / static_cast<double>(got.size())));
}

Case simple(std::string name, double tolerance, std::function<Floats()> in, Floats start, Run run,
            std::function<Vec(const Floats& in)> expect) {
  Case c;
  c.name = std::move(name);
  c.tolerance = c.tolerance_bf16 = tolerance;
  auto input = lazy<Floats>(std::move(in));
  auto initial = std::make_shared<Floats>(std::move(start));
  c.bind = [=](const Ops& ops, const OpContext& context, Floats* out) {
    *out = *initial;
    return [=, &ops] { run(ops, context, input(), out); };
  };
  c.expect = [=] { return expect(input()); };
  return c;
}

std::function<Floats()> normal(int64_t n, uint32_t seed, float scale) {
  return [=] { return random_floats(static_cast<size_t>(n), seed, scale); };
}

Vec slice(const Floats& x, int64_t begin, int64_t end) {
  return Vec(x.begin() + begin, x.begin() + end);
}
Vec joined(Vec a, const Vec& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}
std::string sized(const std::string& name, int64_t a, int64_t b) {
  return name + " " + std::to_string(a) + "x" + std::to_string(b);
}

namespace {

Case rmsnorm_case(int64_t rows, int64_t d) {
  const int64_t n = rows * d;
  return simple(
      sized("rmsnorm", rows, d), 2e-6, normal(n + d, 3), Floats(n + rows),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        ops.rmsnorm(c, rows, d, in.data(), in.data() + n, 1e-5f, out->data(), out->data() + n, {});
      },
      [=](const Floats& in) {
        Vec rstd;
        const Vec y =
            reference::rmsnorm(rows, d, slice(in, 0, n), slice(in, n, n + d), 1e-5, &rstd);
        return joined(y, rstd);
      });
}

Case rmsnorm_backward_case(int64_t rows, int64_t d) {
  const int64_t n = rows * d;
  return simple(
      sized("rmsnorm_backward", rows, d), 1e-5, normal(2 * n + d, 4), Floats(n + d, 0.5f),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Floats y(n), rstd(rows);
        ops.rmsnorm(c, rows, d, &in[n], &in[2 * n], 1e-5f, y.data(), rstd.data(), {});
        ops.rmsnorm_backward(c, rows, d, in.data(), &in[n], &in[2 * n], rstd.data(), out->data(),
                             nullptr, out->data() + n);
        ops.finish(c);
      },
      [=](const Floats& in) {
        auto [dx, dw] = reference::rmsnorm_backward(rows, d, slice(in, 0, n), slice(in, n, 2 * n),
                                                    slice(in, 2 * n, 2 * n + d), 1e-5);
        Vec all = joined(dx, dw);
        for (double& x : all) x += 0.5;  // both accumulate
        return all;
      });
}

Case swiglu_case(int64_t n, bool backward) {
  const char* name = backward ? "swiglu_backward" : "swiglu";
  return simple(
      sized(name, n, 1), 5e-6, normal(3 * n, 6, 3.0f), Floats(backward ? 3 * n : n),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        const float *g = in.data(), *u = g + n, *dy = u + n;
        float* to = out->data();
        if (!backward) return ops.swiglu(c, {.rows = 1, .d = n, .gate = g, .up = u, .y = to});
        std::copy(in.begin(), in.begin() + 2 * n, out->begin());  // outputs alias the inputs
        SwigluArgs a{.rows = 1, .d = n, .gate = to, .up = to + n, .y = to + 2 * n};
        a.dy = dy;
        a.dgate = to, a.dup = to + n;
        ops.swiglu_backward(c, a);
      },
      [=](const Floats& in) {
        Vec y, dgate, dup;
        for (int64_t i = 0; i < n; ++i) {
          const double g = in[i], u = in[n + i], dy = in[2 * n + i];
          y.push_back(reference::silu(g) * u);
          dgate.push_back(dy * u * reference::silu_slope(g));
          dup.push_back(dy * reference::silu(g));
        }
        return backward ? joined(joined(dgate, dup), y) : y;
      });
}

Case relu_case(int64_t n) {
  return simple(
      sized("relu, relu_backward", n, 1), 0.0, normal(2 * n, 7), Floats(2 * n),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        ops.copy(c, out->data(), in.data(), 8 * n);
        ops.relu(c, n, out->data());
        ops.relu_backward(c, n, out->data(), out->data() + n);
      },
      [=](const Floats& in) {
        Vec all = as_double(in);
        for (int64_t i = 0; i < n; ++i) {
          if (in[i] <= 0) all[i] = all[n + i] = 0;
        }
        return all;
      });
}

Case rope_case(int64_t rows, int64_t heads, int64_t kv_heads, int64_t d, bool inverse) {
  const int64_t q = rows * heads * d, n = q + rows * kv_heads * d, half = d / 2;
  Floats in = random_floats(n + 2 * 50 * half, 8);
  for (int64_t i = 0; i < 50 * half; ++i) {
    in[n + i] = std::cos(static_cast<float>(i));
    in[n + 50 * half + i] = std::sin(static_cast<float>(i));
  }
  const auto position = [](int64_t r) { return static_cast<int32_t>(r * 7 % 50); };
  return simple(
      sized(inverse ? "rope inverse" : "rope", rows, (heads + kv_heads) * d), 1e-6,
      [in] { return in; }, Floats(n),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Ints positions;
        for (int64_t r = 0; r < rows; ++r) positions.push_back(position(r));
        std::copy(in.begin(), in.begin() + n, out->begin());
        RopeArgs a{rows, heads, kv_heads, d, positions.data(), &in[n], &in[n + 50 * half], inverse};
        a.q = out->data();
        a.k = out->data() + q;
        ops.rope(c, a);
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec x = slice(in, 0, n);
        const Vec cos = slice(in, n, n + 50 * half);
        const Vec sin = slice(in, n + 50 * half, n + 100 * half);
        const auto rotate = [&](int64_t row, double* head) {
          reference::rotate(half, &cos[position(row) * half], &sin[position(row) * half], inverse,
                            head);
        };
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t h = 0; h < heads; ++h) rotate(r, &x[(r * heads + h) * d]);
          for (int64_t h = 0; h < kv_heads; ++h) rotate(r, &x[q + (r * kv_heads + h) * d]);
        }
        return x;
      });
}

Case cross_entropy_case(int64_t rows, int64_t vocab) {
  const int64_t n = rows * vocab;
  const auto target = [=](int64_t r) { return static_cast<int32_t>((r * 31 + 5) % vocab); };
  const auto weight = [](int64_t r) { return r % 3 == 2 ? 0.0f : 0.5f + static_cast<float>(r); };
  return simple(
      sized("cross_entropy", rows, vocab), 2e-5, normal(n, 9, 3.0f), Floats(n + 2 * rows),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Ints targets, argmax(rows);
        Floats weights;
        for (int64_t r = 0; r < rows; ++r) {
          targets.push_back(target(r));
          weights.push_back(weight(r));
        }
        std::copy(in.begin(), in.end(), out->begin());
        ops.cross_entropy(c, {rows, vocab, vocab, out->data(), targets.data(), weights.data(),
                              out->data() + n, argmax.data(), true});
        ops.finish(c);
        std::copy(argmax.begin(), argmax.end(), out->begin() + n + rows);
      },
      [=](const Floats& in) {
        Vec gradient, logprob, argmax;
        for (int64_t r = 0; r < rows; ++r) {
          const Vec x = slice(in, r * vocab, (r + 1) * vocab);
          Vec g = reference::softmax(x.data(), vocab);
          g[target(r)] -= 1;
          for (double& v : g) v *= double{weight(r)};
          gradient = joined(gradient, g);
          logprob.push_back(-reference::cross_entropy(x, target(r)));
          argmax.push_back(static_cast<double>(std::max_element(x.begin(), x.end()) - x.begin()));
        }
        return joined(joined(gradient, logprob), argmax);
      });
}

Case kl_case(int64_t rows, int64_t vocab, int64_t top_k) {
  const int64_t n = rows * vocab;
  const auto index = [=](int64_t r, int64_t i) {
    return static_cast<int32_t>((r * 13 + i * 17) % vocab);
  };
  const auto logprob = [](int64_t i) { return std::log(0.9f / std::pow(2.0f, float(i + 1))); };
  return simple(
      sized("kl_topk", rows, vocab), 5e-5, normal(n, 10, 3.0f), Floats(n + rows),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Ints indices;
        Floats logprobs, weights;
        for (int64_t r = 0; r < rows; ++r) {
          weights.push_back(1.0f + static_cast<float>(r));
          for (int64_t i = 0; i < top_k; ++i) {
            indices.push_back(index(r, i));
            logprobs.push_back(logprob(i));
          }
        }
        std::copy(in.begin(), in.end(), out->begin());
        ops.kl_topk(c, {rows, vocab, vocab, top_k, out->data(), indices.data(), logprobs.data(),
                        weights.data(), out->data() + n, true});
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec gradient, kl;
        for (int64_t r = 0; r < rows; ++r) {
          const Vec x = slice(in, r * vocab, (r + 1) * vocab);
          std::vector<int32_t> ids;
          Vec stored;
          for (int64_t i = 0; i < top_k; ++i) {
            ids.push_back(index(r, i));
            stored.push_back(double{logprob(i)});
          }
          Vec g = reference::kl_topk_gradient(x, ids, stored);
          for (double& v : g) v *= 1.0 + static_cast<double>(r);
          gradient = joined(gradient, g);
          kl.push_back(reference::kl_topk(x, ids, stored));
        }
        return joined(gradient, kl);
      });
}

Case embed_case(WeightFormat format, int64_t vocab, int64_t d, int64_t rows) {
  const auto id = [=](int64_t r) { return static_cast<int32_t>(r * r % vocab); };
  const int64_t n = vocab * d;
  return simple(
      sized("pack, unpack, embed, embed_backward " + format_name(format), vocab, d), 1e-6,
      [=] { return as_bf16(random_floats(n + rows * d, 18)); }, Floats(2 * n + rows * d),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        auto packed = aligned(ops.packed_bytes(format, vocab, d));
        Floats turned(n);
        for (int64_t i = 0; i < n; ++i) turned[i % d * vocab + i / d] = in[i];
        ops.pack(c, format, vocab, d, turned.data(), true, packed.get());
        const WeightView view{format, vocab, d, packed.get()};
        ops.unpack(c, view, out->data());
        Ints ids;
        for (int64_t r = 0; r < rows; ++r) ids.push_back(id(r));
        ops.embed(c, view, rows, ids.data(), out->data() + n);
        ops.zero(c, out->data() + n + rows * d, n * 4);
        ops.embed_backward(c, rows, d, ids.data(), in.data() + n, out->data() + n + rows * d);
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec table = slice(in, 0, n), looked_up, gradient(n, 0.0);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < d; ++i) {
            looked_up.push_back(table[id(r) * d + i]);
            gradient[id(r) * d + i] += double{in[n + r * d + i]};
          }
        }
        return joined(joined(table, looked_up), gradient);
      });
}

Case move_rows_case(int64_t rows, int64_t d) {
  const int64_t n = rows * d;
  const auto index = [=](int64_t r) {
    return static_cast<int32_t>(r * 7 % rows);
  };  // 7 divides no `rows`
  return simple(
      sized("gather_rows, scatter_rows", rows, d), 0.0, normal(n, 20), Floats(2 * n, 0.5f),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Ints all;
        for (int64_t r = 0; r < rows; ++r) all.push_back(index(r));
        ops.gather_rows(c, rows, d, all.data(), in.data(), out->data());
        // All rows but the last: where nothing is put, what was there stays.
        ops.scatter_rows(c, rows - 1, d, all.data(), in.data(), out->data() + n);
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec gathered, scattered(static_cast<size_t>(n), 0.5);
        for (int64_t r = 0; r < rows; ++r) {
          gathered = joined(gathered, slice(in, index(r) * d, (index(r) + 1) * d));
          if (r == rows - 1) continue;
          std::copy_n(in.begin() + r * d, d, scattered.begin() + index(r) * d);
        }
        return joined(gathered, scattered);
      });
}

/// A recording replayed on other values; a backend that records nothing runs the calls themselves.
Case recording_case(int64_t n) {
  return simple(
      sized("begin_recording, end_recording, replay", n, 1), 5e-6, normal(4 * n, 22), Floats(n),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        Floats x(in.begin(), in.begin() + 2 * n);
        const auto run = [&] {
          ops.swiglu(c,
                     {.rows = 1, .d = n, .gate = x.data(), .up = x.data() + n, .y = out->data()});
        };
        run();
        ops.finish(c);
        const uint64_t place = ops.recording_place(c);
        const bool records = ops.begin_recording(c);
        DS_CHECK(ops.recording_place(c) == place);  // it neither moves nor waits while it records
        run();
        void* const recording = records ? ops.end_recording(c) : nullptr;
        ops.finish(c);
        DS_CHECK(records == !ops.host_memory && records == (recording != nullptr));
        std::copy(in.begin() + 2 * n, in.end(), x.begin());
        if (records) {
          ops.replay(c, recording);
        } else {
          run();
        }
        ops.finish(c);
        ops.release_recording(recording);
      },
      [=](const Floats& in) {
        Vec y;
        for (int64_t i = 0; i < n; ++i) y.push_back(reference::silu(in[2 * n + i]) * in[3 * n + i]);
        return y;
      });
}

/// To the backend and back, by each way that memory moves.
Case memory_case(int64_t n) {
  return simple(
      sized("upload, copy, zero, download", n, 1), 0.0, normal(n, 21), Floats(2 * n),
      [=](const Ops& ops, const OpContext& c, const Floats& in, Floats* out) {
        const Buffer first = Buffer::make(ops, static_cast<size_t>(4 * n)).value(),
                     second = Buffer::make(ops, static_cast<size_t>(4 * n)).value();
        auto* const pinned = static_cast<float*>(ops.allocate_pinned(4 * n));
        std::copy(in.begin(), in.end(), pinned);
        ops.upload(c, first.data(), pinned, 4 * n);
        std::fill_n(pinned, n, NAN);  // upload has read it
        ops.release_pinned(pinned);
        ops.copy(c, second.data(), first.data(), 4 * n);
        ops.zero(c, first.data(), 2 * n);
        ops.download(c, out->data(), second.data(), 4 * n);
        ops.download(c, out->data() + n, first.data(), 4 * n);
        ops.finish(c);
      },
      [=](const Floats& in) {
        Vec half = as_double(in);
        std::fill(half.begin(), half.begin() + n / 2, 0.0);
        return joined(as_double(in), half);
      });
}

/// What a memory-bound op must move.
Case moving(double bytes, Case c) {
  c.bytes = bytes;
  return c;
}

constexpr WeightFormat kFormats[] = {WeightFormat::kBF16, WeightFormat::kF32, WeightFormat::kF16};

void add_linear_cases(std::vector<Case>* all) {
  for (WeightFormat format : kFormats) {
    for (int64_t rows : {1, 2, 5, 17, 40, 64, 100}) {
      all->push_back(linear_case({rows, 37, {5, 16, 33}, format, Epilogue::kNone, true, 2}));
      all->push_back(linear_case({rows, 96, {70}, format, Epilogue::kResidual, rows == 5, 1}));
      all->push_back(linear_case({rows, 131, {56, 56}, format, Epilogue::kSwiglu, rows == 2, 3}));
      all->push_back(linear_case({rows, 576, {576, 192, 192}, format}));
    }
    all->push_back(linear_case({3, 1, {1}, format, Epilogue::kNone, true}));
    all->push_back(linear_case({20, 3000, {40}, format}));
    all->push_back(linear_case({8, 1536, {40}, format}));    // 48 KiB of input rows
    all->push_back(linear_case({7, 12'000, {24}, format}));  // more than a block of the GPU takes
    for (int64_t rows : {3, 70}) {
      LinearShape turned{rows, 37, {60}, format, Epilogue::kResidual, true, 1};
      turned.transposed = true;
      all->push_back(linear_case(turned));
    }
    for (int64_t rows : {1, 3, 8, 9, 20, 50, 70}) {
      LinearShape normed{rows, rows == 9 ? 1600 : 131, {56, 56}, format, Epilogue::kSwiglu, false,
                         2};
      normed.norm = true;
      all->push_back(linear_case(normed));
      normed.k = 576;
      all->push_back(linear_case(normed));
    }
    for (int64_t rows : {1, 12, 40, 70}) all->push_back(norm_range_case(rows, format));
    add_rope_linear_cases(format, all);
    for (int64_t rows : {12, 40, 140}) {
      LinearShape shape{rows, 131, {56, 56}, format, Epilogue::kSwiglu, rows == 140, 3};
      shape.y_prepared = true;
      all->push_back(linear_case(shape));
    }
  }
  for (int64_t rows : {2, 100}) {
    LinearShape shape{rows, 96, {70}, WeightFormat::kTF32, Epilogue::kResidual, true, 1};
    all->push_back(linear_case(shape));
    shape.transposed = true;
    all->push_back(linear_case(shape));
  }
}

void add_outer_cases(std::vector<Case>* all) {
  all->push_back(outer_case(1, 5, 7));
  all->push_back(outer_case(131, 250, 70));
  all->push_back(outer_case(64, 16, 576));
  all->push_back(outer_case(300, 96, 16));
  all->push_back(outer_case(300, 9, 40));
  all->push_back(outer_case(700, 8, 130));
  all->push_back(outers_case());
  all->push_back(outer_case(131, 250, 70, true));
  all->push_back(outer_case(64, 40, 576, true));
}

}  // namespace

std::vector<Case> all_cases() {
  std::vector<Case> all;
  add_linear_cases(&all);
  for (int64_t d : {5, 64, 576}) {
    all.push_back(rmsnorm_case(7, d));
    all.push_back(rmsnorm_case(140, d));
    all.push_back(rmsnorm_backward_case(70, d));
    all.push_back(adamw_case(d * 3));
    all.push_back(vectors_case(d * 100));
  }
  add_outer_cases(&all);
  all.push_back(adamw_case((2 << 20) + 5));  // more than a GPU that gives way enqueues at once
  all.push_back(pack_all_case());
  for (WeightFormat format : kFormats) {
    all.push_back(factors_case(format, 5));
    all.push_back(factors_case(format, 16));
  }
  for (bool flag : {false, true}) {
    all.push_back(swiglu_case(35'000, flag));
    all.push_back(rope_case(9, 3, 1, 64, flag));
    all.push_back(rope_case(9, 2, 2, 20, flag));
  }
  add_prepared_cases(&all);
  add_side_by_side_cases(&all);
  add_sample_cases(&all);
  all.push_back(relu_case(1001));
  for (const auto& make : {recording_case, memory_case}) all.push_back(make(1000));
  all.push_back(move_rows_case(9, 5));
  all.push_back(move_rows_case(100, 576));
  for (int64_t vocab : {3, 100, 5003}) {
    all.push_back(cross_entropy_case(7, vocab));
    if (vocab < 1000) all.push_back(cross_entropy_case(300, vocab));
    if (vocab >= 100) all.push_back(kl_case(5, vocab, 6));
  }
  for (WeightFormat format : kFormats) {
    all.push_back(embed_case(format, 50, 17, 40));
    all.push_back(embed_case(format, 300, 64, 70));
  }
  for (KvDtype dtype : {KvDtype::kBF16, KvDtype::kF32, KvDtype::kF16}) {
    all.push_back(attention_case({9, 3, 64, dtype, {{0, 1}, {0, 70}, {37, 1}, {64, 5}}}));
    all.push_back(attention_case({4, 1, 16, dtype, {{0, 33}, {31, 2}}}));
    all.push_back(attention_case({2, 2, 128, dtype, {{0, 65}}}));
    all.push_back(attention_case({2, 1, 20, dtype, {{3, 40}}}));
    all.push_back(attention_case({5, 1, 32, dtype, {{0, 9}, {100, 1}}}));
    all.push_back(attention_case({9, 3, 64, dtype, {{0, 1}, {0, 130}, {37, 1}, {64, 5}}, true}));
    all.push_back(attention_case({2, 1, 20, dtype, {{3, 40}}, true}));
    // One row each: heads that share a block or need two, contexts that one block or eight take.
    all.push_back(attention_case({9, 3, 64, dtype, {{255, 1}, {0, 1}, {40, 1}}}));
    all.push_back(attention_case({16, 2, 128, dtype, {{129, 1}, {30, 1}}}));
    all.push_back(attention_case({5, 1, 48, dtype, {{77, 1}}}));
    all.push_back(attention_case({2, 1, 80, dtype, {{310, 1}, {31, 1}}}));
    all.push_back(attention_case({2, 1, 64, dtype, {{1030, 1}, {90, 1}}}));
  }
  for (auto& cases : {tensor_core_attention_cases, key_choice_cases})
    for (Case& c : cases()) all.push_back(std::move(c));
  for (bool backward : {false, true}) {
    all.push_back(train_attention_case({9, 3, 64, 0, {20, 1, 70}}, backward));
    all.push_back(train_attention_case({4, 2, 16, 37, {33, 5}}, backward));
    all.push_back(train_attention_case({2, 2, 128, 3, {40}}, backward));
    all.push_back(train_attention_case({3, 1, 20, 0, {65}}, backward));
    all.push_back(train_attention_case({9, 3, 64, 0, {20, 1, 70}, true}, backward));
    all.push_back(train_attention_case({3, 1, 20, 37, {65}, true}, backward));
  }
  return all;
}

std::vector<Case> model_cases() {
  std::vector<Case> all;
  for (int64_t rows : {1, 4, 8, 16, 64, 512}) {
    all.push_back(linear_case({rows, 576, {576, 192, 192}}));
    all.push_back(linear_case({rows, 576, {576}, WeightFormat::kBF16, Epilogue::kResidual}));
    all.push_back(linear_case({rows, 576, {1536, 1536}, WeightFormat::kBF16, Epilogue::kSwiglu}));
    all.push_back(linear_case({rows, 1536, {576}, WeightFormat::kBF16, Epilogue::kResidual}));
    if (rows < 512) all.push_back(linear_case({rows, 576, {49152}}));
  }
  all.push_back(linear_case({64, 49152, {576}}));
  all.push_back(
      linear_case({512, 576, {1536, 1536}, WeightFormat::kBF16, Epilogue::kSwiglu, false, 1}));
  all.push_back(
      linear_case({1, 576, {1536, 1536}, WeightFormat::kBF16, Epilogue::kSwiglu, false, 1, 2}));
  all.push_back(outer_case(512, 1536, 576));
  all.push_back(outer_case(64, 576, 1536));
  all.push_back(outer_case(512, 16, 1536));
  all.push_back(outer_case(64, 49152, 576));
  all.push_back(attention_case({9, 3, 64, KvDtype::kBF16, {{0, 512}}}));
  all.push_back(attention_case({9, 3, 64, KvDtype::kF32, {{0, 512}}}));
  all.push_back(attention_case({9, 3, 64, KvDtype::kBF16, {{512, 1}}}));
  all.push_back(attention_case({9, 3, 64, KvDtype::kBF16, {{3000, 1}}}));
  for (bool backward : {false, true}) {
    all.push_back(train_attention_case({9, 3, 64, 0, {60, 60, 60, 60}}, backward));
    all.push_back(train_attention_case({9, 3, 64, 0, {512}}, backward));
  }
  all.push_back(moving(512 * 576 * 8, rmsnorm_case(512, 576)));
  all.push_back(moving(512 * 576 * 16, rmsnorm_backward_case(512, 576)));
  all.push_back(moving(512 * 1536 * 12, swiglu_case(512 * 1536, false)));
  all.push_back(moving(512 * 1536 * 20, swiglu_case(512 * 1536, true)));
  all.push_back(moving(49152 * 8, cross_entropy_case(1, 49152)));
  all.push_back(moving(64 * 49152 * 8, cross_entropy_case(64, 49152)));
  all.push_back(moving(64 * 49152 * 8, kl_case(64, 49152, 32)));
  all.push_back(moving(4e6 * 28, adamw_case(4'000'000)));
  all.push_back(moving(8e6 * 12, vectors_case(8'000'000)));
  return all;
}

}  // namespace ds::test
