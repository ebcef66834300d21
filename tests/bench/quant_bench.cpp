// SPDX-License-Identifier: Apache-2.0
// quant_bench [decode | drift [RATE [FORM]]]: what 8 and 4 bits do to the real model. Perplexity of
// the teacher-forced texts of tests/data/smollm2 in FP32 and with every linear weight and the head
// quantized: weights alone (the dequantized weights in FP32, lookups of the tied embedding
// included) and as the engine serves them with the plugin (input in 8 bits, lookups exact; a
// quantizer that asks for it is calibrated first, as with model.calibrate). The
// file's own weights lie on 4-bit grids, so all of it again with noise of 1 % of each row's root
// mean square. Then the time of one decode pass over all matrices.
//   drift: instead on weights that 100 steps of full fine-tuning have moved: FP32, AdamW at
//   RATE (1e-4), 8 x 64 tokens a step, through /usr/share/common-licenses without MPL-2.0,
//   whose first tokens are the second text. So small a move can be rounded away again, back onto
//   the file's grids. So the same is done with every input channel of the linear layers rescaled
//   (rescale_channels below): the model computes the same, but no trace of a grid is left.
//   With a FORM, "int4 group 32", only that one.
//   Prints the SHA-256 of the moved weights, which is the same on every run on one ISA, and how far
//   they have moved.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "engine/full_weights.h"
#include "engine/quantizer.h"
#include "kernels/quant.h"
#include "learn/objective.h"
#include "storage/hash.h"
#include "tests/bench/texts.h"
#include "tests/kernels/cases.h"

namespace ds::test {
namespace {

struct Form {
  const char* name;
  QuantFormat format;
  int32_t head_bits;

  QuantFormat of(int64_t n, int64_t k) const {
    return {n > 12 * k ? head_bits : format.bits, format.group};
  }
};
constexpr Form kForms[] = {{"int8 group 32", {8, 32}, 8},
                           {"int8 channel", {8, 0}, 8},
                           {"int4 group 32", {4, 32}, 8},
                           {"int4 channel", {4, 0}, 8},
                           {"all int4 group 32", {4, 32}, 4}};
constexpr float kNoise = 0.01f;
constexpr uint32_t kSeed = 20261126;

/// {n, k} of the matrices of a file; other tensors have one dimension.
bool is_matrix(const ModelFile& file, const std::string& name) {
  return file.tensors().at(name).shape.size() == 2;
}

void add_noise(const ModelFile& file, NamedTensors& tensors) {
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal;
  for (auto& [name, w] : tensors) {
    if (!is_matrix(file, name)) continue;
    const auto k = static_cast<size_t>(file.tensors().at(name).shape[1]);
    for (size_t at = 0; at < w.size(); at += k) {
      double squares = 0;
      for (size_t j = 0; j < k; ++j) squares += double{w[at + j]} * double{w[at + j]};
      const auto rms = static_cast<float>(std::sqrt(squares / static_cast<double>(k)));
      for (size_t j = 0; j < k; ++j) w[at + j] += kNoise * rms * normal(random);
    }
  }
}

std::shared_ptr<const BaseWeights> base_of(const ModelFile& file, const NamedTensors& tensors,
                                           const Compute& compute, const WeightForm& form) {
  auto base = BaseWeights::from_tensors(file.config(), tensors, file.sha256(), compute, form);
  if (!base.ok()) std::fprintf(stderr, "%s\n", base.status().message().c_str());
  DS_CHECK(base.ok());
  return *base;
}

/// Norm of the matrices' difference over the norm of `from`'s.
double distance(const ModelFile& file, const NamedTensors& from, const NamedTensors& to) {
  double error = 0, power = 0;
  for (const auto& [name, w] : from) {
    if (!is_matrix(file, name)) continue;
    const std::vector<float>& other = to.at(name);
    for (size_t i = 0; i < w.size(); ++i) {
      error += std::pow(double{w[i]} - double{other[i]}, 2);
      power += double{w[i]} * double{w[i]};
    }
  }
  return std::sqrt(error / power);
}

constexpr const char* kHeldOut = "MPL-2.0";

Texts held_out_texts(const Tokenizer& tokenizer) {
  constexpr size_t kTexts = 6, kTokens = 256;
  const auto ids = licence(tokenizer, kHeldOut);
  DS_CHECK(ids.size() >= kTexts * kTokens);
  Texts out;
  for (size_t at = 0; at < kTexts * kTokens; at += kTokens) {
    const auto from = ids.begin() + static_cast<ptrdiff_t>(at);
    out.emplace_back(from, from + kTokens);
  }
  return out;
}

double perplexity(const Compute& compute, const BaseWeights& base, const Texts& texts) {
  const int64_t vocab = base.config().vocab;
  double loss = 0;
  int64_t n = 0;
  for (const std::vector<TokenId>& ids : texts) {
    const std::vector<float> logits = serve_logits(compute, base, nullptr, ids, 64, KvDtype::kF32);
    const std::vector<double> found = next_logprobs(logits.data(), ids, vocab);
    for (const double logprob : found) loss -= logprob;
    n += std::ssize(found);
  }
  return std::exp(loss / static_cast<double>(n));
}

std::shared_ptr<const Quantizer> plugin_of(const Form& f) {
  const auto found = modules().find(DS_KIND_QUANTIZER, "int" + std::to_string(f.format.bits));
  DS_CHECK(found.ok());
  const std::shared_ptr<const PluginLibrary> library(found->instance, &found->instance->library());
  Json config = Json::object();
  config["group"] = f.format.group;
  if (f.format.bits == 4) config["head_bits"] = f.head_bits;
  auto made = PluginInstance::create(library, found->instance->component(), config);
  DS_CHECK(made.ok());
  return std::make_shared<Quantizer>(*made, 1);
}

using NamedTexts = std::vector<std::pair<const char*, Texts>>;

void compare(const ModelFile& file, const NamedTensors& tensors, const Machine& machine,
             const NamedTexts& evaluated, std::string_view only = {}) {
  const Compute& compute = machine.compute;
  const auto perplexities = [&](const NamedTensors& of, const WeightForm& form) {
    const auto base = base_of(file, of, compute, form);
    std::vector<double> out;
    for (const auto& [name, texts] : evaluated) out.push_back(perplexity(compute, *base, texts));
    return out;
  };
  const std::vector<double> exact = perplexities(tensors, WeightFormat::kF32);
  for (size_t i = 0; i < exact.size(); ++i)
    std::printf("  fp32, %s: perplexity %.4f\n", evaluated[i].first, exact[i]);
  for (const Form& f : kForms) {
    if (!only.empty() && f.name != only) continue;
    NamedTensors rounded = tensors;
    for (auto& [name, w] : rounded) {
      if (!is_matrix(file, name)) continue;
      const auto& shape = file.tensors().at(name).shape;
      cpu_quant_ops(best_cpu_isa())
          .fake(compute.context, f.of(shape[0], shape[1]), shape[0], shape[1], w.data(), w.data());
    }
    const double error = distance(file, tensors, rounded);
    const std::vector<double> weights = perplexities(rounded, WeightFormat::kF32);
    rounded.clear();
    const auto quantizer = plugin_of(f);
    const std::vector<double> served =
        perplexities(tensors, {WeightFormat::kF32, quantizer,
                               quantizer->calibrates() ? compute.components->current() : nullptr});
    for (size_t i = 0; i < exact.size(); ++i) {
      std::printf(
          "  %-17s %s: relative error %.5f | perplexity, weights alone %.4f (%+.2f %%) | served "
          "%.4f (%+.2f %%)\n",
          f.name, evaluated[i].first, error, weights[i], (weights[i] / exact[i] - 1) * 100,
          served[i], (served[i] / exact[i] - 1) * 100);
    }
    std::fflush(stdout);
  }
}

/// Multiplies the rows (out channels) of a matrix [n, k] by f[row], or its columns by 1 /
/// f[column].
void scale_rows(std::vector<float>& w, const std::vector<float>& f) {
  const size_t k = w.size() / f.size();
  for (size_t i = 0; i < w.size(); ++i) w[i] *= f[i / k];
}
void unscale_columns(std::vector<float>& w, const std::vector<float>& f) {
  for (size_t i = 0; i < w.size(); ++i) w[i] /= f[i % f.size()];
}

/// Factors around 1 on every channel between two layers, on one side times, on the other divided by
/// them: norm to q, k, v and to gate, up; v to o; up to down. What the model computes is the same
/// but for rounding in FP32; each group of 32 weights has lost the grid that it was stored on.
void rescale_channels(const ModelConfig& c, NamedTensors& tensors) {
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal(0, 0.1f);
  const auto factors = [&](int64_t n) {
    std::vector<float> out(static_cast<size_t>(n));
    for (float& f : out) f = std::exp(normal(random));
    return out;
  };
  for (int64_t layer = 0; layer < c.n_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const auto at = [&](const char* name) -> std::vector<float>& {
      return tensors.at(prefix + name + ".weight");
    };
    const auto input = factors(c.d_model), mlp_input = factors(c.d_model);
    scale_rows(at("input_layernorm"), input);
    for (const char* name : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
      unscale_columns(at(name), input);
    const auto value = factors(c.n_kv_heads * c.head_dim);
    scale_rows(at("self_attn.v_proj"), value);
    std::vector<float> of_heads;  // each value head feeds n_heads / n_kv_heads heads
    for (int64_t h = 0; h < c.n_heads; ++h) {
      const auto from = value.begin() + h * c.n_kv_heads / c.n_heads * c.head_dim;
      of_heads.insert(of_heads.end(), from, from + c.head_dim);
    }
    unscale_columns(at("self_attn.o_proj"), of_heads);
    scale_rows(at("post_attention_layernorm"), mlp_input);
    for (const char* name : {"mlp.gate_proj", "mlp.up_proj"}) unscale_columns(at(name), mlp_input);
    const auto hidden = factors(c.d_ff);
    scale_rows(at("mlp.up_proj"), hidden);
    unscale_columns(at("mlp.down_proj"), hidden);
  }
}

/// The weights after the recipe of the header.
NamedTensors drifted(const LoadedModel& model, const Compute& compute, const NamedTensors& tensors,
                     float rate) {
  constexpr int kSteps = 100, kSequences = 8;
  constexpr size_t kTokens = 64;
  const std::vector<TokenId> stream = licences(*model.tokenizer, kHeldOut);
  std::printf("  %zu tokens of licences, %zu used\n", stream.size(), kSteps * kSequences * kTokens);
  auto made = FullWeights::make(compute, model.file->config(), tensors);
  DS_CHECK(made.ok());
  FullWeights& full = **made;
  TrainGraph graph(model.file->config(), compute);
  AdamW optimizer = AdamW::make(compute, full.size()).value();
  size_t next = 0;
  for (int step = 0; step < kSteps; ++step) {
    std::vector<Sequence> sequences;
    Terms terms;
    for (int s = 0; s < kSequences; ++s, next += kTokens) {
      const auto at = stream.begin() + static_cast<ptrdiff_t>(next % (stream.size() - kTokens));
      sequences.push_back({{at, at + static_cast<int64_t>(kTokens)}, 1, nullptr});
    }
    for (const Sequence& s : sequences) terms.cross_entropy.push_back({&s, 1.0f / kSequences});
    DS_CHECK(full.pack(WeightFormat::kF32).ok() && full.zero_gradient().ok());
    const StepLoss loss =
        run_terms(graph, compute, *full.packed(), nullptr, &full.gradient(), terms, true);
    DS_CHECK(optimizer.step(full.masters(), full.gradient().all(), rate, 0.99f, 1.0f).ok());
    if (step % 25 == 0) std::printf("  step %d loss %.3f\n", step, loss.total);
    std::fflush(stdout);
  }
  Sha256 hash;
  auto masters = full.read_masters();
  DS_CHECK(masters.ok());
  for (const auto& [name, w] : *masters) hash.update(w.data(), w.size() * sizeof(float));
  const Sha256Digest digest = hash.finish();
  std::printf("  SHA-256 of the FP32 tensors by name: %s\n", to_hex(digest).c_str());
  return std::move(*masters);
}

struct Shape {
  int64_t n, k;
};

/// Fastest of 30 passes over all matrices, one row each, in seconds. run(i): matrix i.
template <typename F>
double fastest_pass(Pool& pool, size_t matrices, const F& run) {
  double best = 1e9;
  for (int pass = 0; pass < 30; ++pass) {
    pool.begin_engine_step();
    const auto start = std::chrono::steady_clock::now();
    for (size_t i = 0; i < matrices; ++i) run(i);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    pool.end_engine_step();
    best = std::min(best, took.count());
  }
  return best;
}

void report(const std::string& what, double bytes, double weights, double seconds) {
  std::printf("  %-17s %.4f bytes a weight | %6.1f MB | %6.2f ms | %5.1f GB/s | %5.0f passes/s\n",
              what.c_str(), bytes / weights, bytes / 1e6, seconds * 1e3, bytes / seconds * 1e-9,
              1 / seconds);
  std::fflush(stdout);
}

void decode_pass(const ModelFile& file, const NamedTensors& tensors, Machine& machine) {
  const Ops& ops = *machine.compute.ops;
  const QuantOps& quant = cpu_quant_ops(best_cpu_isa());
  const OpContext& context = machine.compute.context;
  std::vector<Shape> shapes;
  std::vector<const float*> sources;
  double weights = 0;
  for (const auto& [name, w] : tensors) {
    if (!is_matrix(file, name)) continue;
    shapes.push_back({file.tensors().at(name).shape[0], file.tensors().at(name).shape[1]});
    sources.push_back(w.data());
    weights += static_cast<double>(w.size());
  }
  const Floats x = random_floats(1 << 16, 5);
  Floats y(1 << 16);
  const auto prepared = aligned(1 << 18);
  const auto pass = [&](const std::string& what, const auto& pack, const auto& run) {
    std::vector<std::shared_ptr<char>> memory;
    double bytes = 0;
    for (size_t i = 0; i < shapes.size(); ++i) pack(i, memory, bytes);
    report(what, bytes, weights, fastest_pass(machine.pool, shapes.size(), [&](size_t i) {
             LinearArgs a;
             a.rows = 1;
             a.n_weights = 1;
             a.x = x.data(), a.x_stride = shapes[i].k, a.x_prepared = prepared.get();
             a.w[0] = {WeightFormat::kBF16, shapes[i].n, shapes[i].k, nullptr};
             a.y[0] = y.data(), a.y_stride[0] = shapes[i].n;
             run(i, memory, a);
           }));
  };
  using Memory = std::vector<std::shared_ptr<char>>;
  pass(
      "bf16",
      [&](size_t i, Memory& memory, double& bytes) {
        const int64_t size = ops.packed_bytes(WeightFormat::kBF16, shapes[i].n, shapes[i].k);
        memory.push_back(aligned(size));
        ops.pack(context, WeightFormat::kBF16, shapes[i].n, shapes[i].k, sources[i], false,
                 memory.back().get());
        bytes += static_cast<double>(size);
      },
      [&](size_t i, const Memory& memory, LinearArgs& a) {
        a.w[0].data = memory[i].get();
        if (ops.prepared_bytes(WeightFormat::kBF16, 1, a.w[0].k) > 0)
          ops.prepare(context, 1, a.w[0].k, a.x, a.x_stride, {prepared.get()});
        ops.linear(context, a);
      });
  for (const Form& f : kForms) {
    pass(
        f.name,
        [&](size_t i, Memory& memory, double& bytes) {
          const int64_t n = shapes[i].n, k = shapes[i].k;
          memory.push_back(aligned(quant_packed_bytes(f.of(n, k), n, k)));
          memory.push_back(aligned(quant_scale_bytes(f.of(n, k), n, k)));
          quant.quantize(context, f.of(n, k), n, k, sources[i], nullptr, memory[2 * i].get(),
                         memory[2 * i + 1].get());
          bytes += static_cast<double>(quant_packed_bytes(f.of(n, k), n, k) +
                                       quant_scale_bytes(f.of(n, k), n, k));
        },
        [&](size_t i, const Memory& memory, LinearArgs& a) {
          QuantLinearArgs q{f.of(a.w[0].n, a.w[0].k), a, {memory[2 * i + 1].get()}};
          q.linear.w[0].data = memory[2 * i].get();
          quant.prepare(context, 1, a.w[0].k, a.x, a.x_stride, prepared.get());
          quant.linear(context, q);
        });
  }
}

int run_drift(float rate, std::string_view only) {
  Machine machine;
  const LoadedModel model = load_model(smollm2_path(), machine.compute, WeightFormat::kF32);
  std::printf("%s: 100 steps of full fine-tuning at %g\n", machine.compute.ops->name, rate);
  const NamedTensors start = model.file->read_all_f32().value();
  NamedTensors weights = drifted(model, machine.compute, start, rate);
  std::printf("  moved by %.5f of the norm\n", distance(*model.file, start, weights));
  const NamedTexts evaluated = {{"general texts", reference_texts()},
                                {"licence held out", held_out_texts(*model.tokenizer)}};
  for (const auto& [name, texts] : evaluated)
    std::printf("the file's weights, %s: perplexity %.4f\n", name,
                perplexity(machine.compute, *model.base, texts));
  compare(*model.file, weights, machine, evaluated, only);
  rescale_channels(model.file->config(), weights);
  std::printf("channels rescaled\n");
  compare(*model.file, weights, machine, evaluated, only);
  return 0;
}

int run(bool decode_only) {
  Machine machine;
  const auto file = ModelFile::open(smollm2_path());
  if (!file.ok()) {
    std::fprintf(stderr, "%s\n", file.status().message().c_str());
    return 1;
  }
  NamedTensors tensors = (*file)->read_all_f32().value();
  std::printf("%s, %d threads\none decode pass over all matrices\n", machine.compute.ops->name,
              machine.pool.threads());
  decode_pass(**file, tensors, machine);
  if (decode_only) return 0;
  const NamedTexts texts = {{"general texts", reference_texts()}};
  std::printf("weights of the file\n");
  compare(**file, tensors, machine, texts);
  add_noise(**file, tensors);
  std::printf("weights with noise of %.0f %% (seed %u)\n", double{kNoise} * 100, kSeed);
  compare(**file, tensors, machine, texts);
  return 0;
}

}  // namespace
}  // namespace ds::test

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "drift")
    return ds::test::run_drift(argc > 2 ? std::stof(argv[2]) : 1e-4f, argc > 3 ? argv[3] : "");
  return ds::test::run(mode == "decode");
}
