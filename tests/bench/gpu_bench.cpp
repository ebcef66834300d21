// SPDX-License-Identifier: Apache-2.0
// gpu_bench ROW...: one line per row, tokens per second on the GPU of this machine, weights BF16:
// those of $DS_MODEL if that is set, else random ones of SmolLM2-135M's shapes (speed does not
// depend on them). Median of five, after one warm-up. Rows, those without "attention" with -fp16,
// -tf32, -fp32, -int8 or -int4 (codes of the module of that name) behind them in that form:
//
//   decode-B     one token for each of B sequences behind 256 tokens, drawn on the GPU, greedily,
//                as the engine does it; logits-B: with all logits on the host
//   prefill-T    a prompt of T tokens, 4,096 rows at a time, and the first token of the answer
//   decode-B-delta, prefill-T-delta
//                the same with a learned delta, of rank 8 on all weights but k's
//   lora-BxT     LoRA step (rank 8 on every linear), B sequences of T tokens, loss on all of them
//   full-BxT     the same for every parameter
//   attention-T, attention-R+K, attention-decode-BxK, attention-train-BxT
//                attention alone, one layer: a prompt of T rows, R rows behind K keys, one row for
//                each of B sequences of K keys, training forward and backward (products may round)
//   share-lora-BxT, share-full-BxT
//                such steps beside decode steps of 8 sequences that take 30 % of the time: how long
//                these take and how fast training goes, alone and by way of sharing
//   parity       log-probabilities of GPU and CPU: mean and largest difference
//   gap          log-probabilities of trainer and server: mean difference, in BF16 and FP16
//   held-out     loss on what is held out after 200 steps of all weights, 8x512, three seeds, by
//                precision; needs $DS_MODEL
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <optional>
#include <random>

#include "engine/full_weights.h"
#include "kernels/pool.h"
#include "learn/round_trainer.h"
#include "storage/llama_tensors.h"
#include "tests/bench/attention_rows.h"
#include "tests/bench/precision_rows.h"
#include "tests/bench/share_rows.h"
#include "tests/daemon/random_delta.h"
#include "tests/daemon/reference_model.h"
#include "tests/kernels/cases.h"

namespace {

using namespace ds;

ModelConfig smollm2_shapes() {
  ModelConfig c;
  c.vocab = 49152;
  c.context = 8192;
  c.n_layers = 30;
  c.d_model = 576;
  c.d_ff = 1536;
  c.n_heads = 9;
  c.n_kv_heads = 3;
  c.head_dim = 64;
  c.rope_theta = 100000;
  c.tied_head = true;
  return c;
}

NamedTensors random_tensors(const ModelConfig& config) {
  std::mt19937 rng(1);
  NamedTensors out;
  for (const ExpectedTensor& wanted : llama_tensors(config)) {
    std::vector<float>& tensor = out[wanted.hf_name];
    tensor.resize(static_cast<size_t>(elements_of(wanted.shape)));
    std::normal_distribution<float> normal(wanted.shape.size() == 1 ? 1.0f : 0.0f, 0.05f);
    for (float& v : tensor) v = normal(rng);
  }
  return out;
}

std::vector<TokenId> some_ids(int64_t count, int64_t vocab, int64_t first) {
  std::vector<TokenId> ids;
  for (int64_t i = 0; i < count; ++i)
    ids.push_back(static_cast<TokenId>(((i + first) * 7919 + 17) % vocab));
  return ids;
}

/// Median of five.
double seconds(const Compute& compute, const std::function<void()>& work) {
  work();
  std::vector<double> took;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    DS_CHECK(finish(compute).ok());
    took.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(took.begin(), took.end());
  return took[2];
}

/// B sequences, each on pages of its own.
class Serving {
 public:
  Serving(const Compute& compute, std::shared_ptr<const BaseWeights> base, int64_t batch,
          int64_t tokens, int64_t max_rows)
      : base_(std::move(base)),
        batch_(batch),
        width_((tokens + kKvPageTokens - 1) / kKvPageTokens),
        pages_(base_->config(), compute, kv_dtype(*compute.ops, base_->format()), batch * width_),
        forward_(base_->config(), compute, max_rows),
        logits_(Buffer::pinned(*compute.ops,
                               static_cast<size_t>(batch * base_->config().vocab) * sizeof(float))
                    .value()),
        tokens_(Buffer::pinned(*compute.ops, static_cast<size_t>(batch) * sizeof(TokenId)).value()),
        draws_(static_cast<size_t>(batch)) {
    table_.resize(static_cast<size_t>(batch * width_));
    std::iota(table_.begin(), table_.end(), 0);
  }
  /// Tokens are not drawn: all logits come to the host.
  void want_logits() { draws_.clear(); }
  void set_delta(std::shared_ptr<const LoraDelta> delta) { delta_ = std::move(delta); }
  /// Each sequence's next `rows` tokens from `position` on.
  void step(int64_t rows, int64_t position) {
    const std::vector<TokenId> ids = some_ids(rows * batch_, base_->config().vocab, position);
    const std::vector<int32_t> slots(ids.size(), delta_ != nullptr ? 0 : -1);
    const LoraDelta* const delta = delta_.get();
    std::vector<SequenceSpan> spans;
    std::vector<int32_t> last;
    for (int64_t b = 0; b < batch_; ++b) {
      spans.push_back({b * rows, rows, position, table_.data() + b * width_});
      last.push_back(static_cast<int32_t>((b + 1) * rows - 1));
    }
    StepBatch batch;
    batch.ids = ids;
    batch.sequences = spans;
    batch.slot_of_row = slots;
    if (delta != nullptr) batch.deltas = {&delta, 1};
    batch.logit_rows = last;
    batch.draws = draws_;
    DS_CHECK(
        forward_.run(*base_, batch, pages_, logits_.as<float>(), nullptr, tokens_.as<TokenId>())
            .ok());
  }

 private:
  std::shared_ptr<const BaseWeights> base_;
  std::shared_ptr<const LoraDelta> delta_;  ///< null: the base alone
  int64_t batch_, width_;
  KvPages pages_;
  Forward forward_;
  std::vector<int32_t> table_;
  Buffer logits_, tokens_;
  std::vector<Draw> draws_;
};

/// Steps on the same B sequences of T tokens, loss on all of them: of all weights, from `masters`
/// on, or, where that is null, of low-rank factors.
class Training {
 public:
  Training(const Compute& compute, std::shared_ptr<const BaseWeights> base,
           const NamedTensors* masters, int64_t batch, int64_t tokens)
      : gpu_(compute),
        base_(std::move(base)),
        graph_(base_->config(), gpu_),
        adapters_(Adapters::make(gpu_, base_->config(), 8, 2.0f, (1u << kTargets) - 1).value()) {
    for (int64_t b = 0; b < batch; ++b)
      sequences_.push_back({some_ids(tokens + 1, base_->config().vocab, b), 1, nullptr});
    for (const Sequence& s : sequences_) terms_.cross_entropy.push_back({&s, 1.0f});
    adapters_->initialise(1);
    if (masters != nullptr) weights_ = FullWeights::make(gpu_, base_->config(), *masters).value();
    optimizer_ = AdamW::make(gpu_, trained().weights().size()).value();
  }

  /// Seconds of its passes, which are followed by the optimizer.
  double step() {
    const Trainable what = trained();
    const auto start = std::chrono::steady_clock::now();
    DS_CHECK(what.pack(graph_.formats(*base_)).ok() && what.zero_gradient().ok());
    const StepLoss loss = run_terms(graph_, gpu_, what.over(*base_), what.adapters(),
                                    what.gradient(), terms_, true, &*optimizer_);
    DS_CHECK(loss.failure.ok() && graph_.take_status().ok() && std::isfinite(loss.total));
    const double passes =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const auto norm = optimizer_->step(what.weights(), what.gradients(), 1e-5f, 0.99f, 1.0f);
    DS_CHECK(norm.ok() && std::isfinite(*norm));
    return passes;
  }

 private:
  Trainable trained() { return weights_ != nullptr ? Trainable(*weights_) : Trainable(*adapters_); }

  const Compute gpu_;
  const std::shared_ptr<const BaseWeights> base_;
  std::vector<Sequence> sequences_;
  Terms terms_;
  TrainGraph graph_;
  std::unique_ptr<Adapters> adapters_;
  std::unique_ptr<FullWeights> weights_;  ///< null: the adapters are trained
  std::optional<AdamW> optimizer_;
};

struct Bench {
  std::unique_ptr<ModelFile> file;  ///< null: random weights
  ModelConfig config = smollm2_shapes();
  NamedTensors tensors;  ///< random weights, or masters()
  Compute gpu;
  std::shared_ptr<const BaseWeights> base;
  std::string suffix;  ///< of the row at hand: "-fp16"

  Bench() {
    const char* path = std::getenv("DS_MODEL");
    if (path == nullptr) {
      tensors = random_tensors(config);
      return;
    }
    auto opened = ModelFile::open(path);
    if (!opened.ok()) std::fprintf(stderr, "%s\n", opened.status().message().c_str());
    DS_CHECK(opened.ok());
    file = std::move(*opened);
    config = file->config();
  }

  /// What training of all weights begins with.
  const NamedTensors& masters() {
    if (tensors.empty()) tensors = file->read_all_f32().value();
    return tensors;
  }

  std::shared_ptr<const BaseWeights> on(const Compute& compute,
                                        const WeightForm& form = WeightFormat::kBF16) const {
    auto made = file != nullptr ? BaseWeights::load(*file, compute, form)
                                : BaseWeights::from_tensors(config, tensors, "", compute, form);
    DS_CHECK(made.ok());
    return *made;
  }

  /// Takes the form of the weights off the row's name, and has the base in it.
  std::string in_form(std::string row) {
    std::string wanted;
    WeightForm form = WeightFormat::kBF16;
    for (const WeightFormat format :
         {WeightFormat::kF32, WeightFormat::kF16, WeightFormat::kTF32}) {
      if (!row.ends_with(precision_name(format))) continue;
      wanted = std::string("-") + precision_name(format);
      form = format;
    }
    for (const std::string name : {"int8", "int4"}) {
      if (!row.ends_with("-" + name)) continue;
      wanted = "-" + name;
      form.quantizer = std::make_shared<Quantizer>(test::module_of(DS_KIND_QUANTIZER, name), 1);
    }
    if (wanted != suffix) base = on(gpu, form);
    suffix = wanted;
    return row.substr(0, row.size() - suffix.size());
  }

  /// The architecture's bar: FP16 is at least four times closer.
  bool gap() const {
    std::vector<double> means;
    for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF16}) {
      const auto in_format = on(gpu, format);
      double sum = 0;
      const auto all = texts();
      for (const auto& ids : all) sum += trainer_server_gap(gpu, *in_format, ids);
      std::printf("gap: %s, mean %.6f nats a token\n", precision_name(format),
                  sum / static_cast<double>(all.size()));
      means.push_back(sum);
    }
    return means[1] * 4 <= means[0];
  }

  bool held_out() {
    if (file == nullptr) return std::puts("held-out: needs DS_MODEL"), false;
    const auto tokenizer = Tokenizer::create(file->tokenizer());
    DS_CHECK(tokenizer.ok());
    const HeldOut held_out(gpu, config, masters(), licences(**tokenizer));
    return held_out_rows(held_out,
                         std::array{WeightFormat::kF32, WeightFormat::kF16, WeightFormat::kBF16});
  }

  /// A delta where the row asks for one.
  std::shared_ptr<const LoraDelta> delta_of(const std::string& row) const {
    return row.ends_with("-delta") ? test::random_delta(*base, gpu, 8, 1) : nullptr;
  }

  void decode(const std::string& row, int64_t batch, bool logits) const {
    Serving serving(gpu, base, batch, 320, std::max<int64_t>(batch, 512));
    serving.set_delta(delta_of(row));
    if (logits) serving.want_logits();
    int64_t position = 256;
    const double s = seconds(gpu, [&] { serving.step(1, position++); });
    std::printf("%s%s: %.0f tok/s, %.1f us a step\n", row.c_str(), suffix.c_str(),
                double(batch) / s, s * 1e6);
  }

  void prefill(const std::string& row, int64_t tokens) const {
    constexpr int64_t kChunk = 4096;
    Serving serving(gpu, base, 1, tokens, kChunk);
    serving.set_delta(delta_of(row));
    const double s = seconds(gpu, [&] {
      for (int64_t at = 0; at < tokens; at += kChunk)
        serving.step(std::min(kChunk, tokens - at), at);
    });
    std::printf("%s%s: %.0f tok/s, %.2f ms\n", row.c_str(), suffix.c_str(), double(tokens) / s,
                s * 1e3);
  }

  void train(int64_t batch, int64_t tokens, bool full) {
    Training training(gpu, base, full ? &masters() : nullptr, batch, tokens);
    double passes = 0;
    const double s = seconds(gpu, [&] { passes = training.step(); });
    std::printf("%s-%ldx%ld%s: %.0f tok/s, %.1f ms a step, the last one's passes %.1f ms\n",
                full ? "full" : "lora", batch, tokens, suffix.c_str(), double(batch * tokens) / s,
                s * 1e3, passes * 1e3);
  }

  void share(const char* row, int64_t batch, int64_t tokens, bool full) {
    static constexpr int64_t kSequences = 8, kBehind = 256, kNew = 64;
    const auto decode = [&](const Compute& compute) {
      auto serving = std::make_shared<Serving>(compute, base, kSequences, kBehind + kNew, 512);
      return [serving, n = int64_t{0}]() mutable { serving->step(1, kBehind + n++ % kNew); };
    };
    const auto train = [&](const Compute& compute) {
      auto training =
          std::make_shared<Training>(compute, base, full ? &masters() : nullptr, batch, tokens);
      return [training] { training->step(); };
    };
    DS_CHECK(finish(gpu).ok());
    ShareBench(row, gpu, decode, train, batch * tokens).run();
  }

  /// BF16 rounds inputs there and, on most CPUs, not here.
  bool parity(const Compute& cpu) const {
    const auto here_base = on(cpu, base->format());
    double sum = 0, largest = 0;
    size_t count = 0;
    for (const std::vector<TokenId>& ids : texts()) {
      const auto on_gpu = served_logits(gpu, *base, ids, 64);
      const auto on_cpu = served_logits(cpu, *here_base, ids, 64);
      const auto there = next_logprobs(on_gpu.data(), ids, config.vocab);
      const auto here = next_logprobs(on_cpu.data(), ids, config.vocab);
      for (size_t i = 0; i < here.size(); ++i) {
        sum += std::abs(there[i] - here[i]);
        largest = std::max(largest, std::abs(there[i] - here[i]));
      }
      count += here.size();
    }
    std::printf("parity%s: mean %.5f, largest %.5f of %zu log-probabilities\n", suffix.c_str(),
                sum / static_cast<double>(count), largest, count);
    const double bar = base->format() == WeightFormat::kBF16 ? 0.03 : 0.01;
    return sum / static_cast<double>(count) <= bar;
  }
  /// A real model's are real: only there does accuracy mean anything.
  std::vector<std::vector<TokenId>> texts() const {
    if (file != nullptr) return reference_texts();
    return {some_ids(200, config.vocab, 0)};
  }

  /// One of the rows attention-..., or window-global-... for its choice of keys.
  bool attention(const std::string& row) const {
    const std::string_view dense = "attention-", chooses = "window-global-";
    const bool chosen = row.starts_with(chooses);
    if (!chosen && !row.starts_with(dense)) return false;
    const std::string part = row.substr((chosen ? chooses : dense).size());
    long batch = 0, tokens = 0;
    AttentionBench bench(gpu);
    if (std::sscanf(part.c_str(), "train-%ldx%ld", &batch, &tokens) == 2) {
      bench.train(row.c_str(), batch, tokens, WeightFormat::kBF16, chosen);
    } else if (std::sscanf(part.c_str(), "decode-%ldx%ld", &batch, &tokens) == 2) {
      bench.paged(row.c_str(), batch, 1, tokens, chosen);
    } else if (std::sscanf(part.c_str(), "%ld+%ld", &batch, &tokens) == 2) {
      bench.paged(row.c_str(), 1, batch, batch + tokens, chosen);
    } else if (std::sscanf(part.c_str(), "%ld", &tokens) == 1) {
      bench.paged(row.c_str(), 1, tokens, tokens, chosen);
    } else {
      return false;
    }
    return true;
  }

  bool run(const std::string& name, const Compute& cpu) {
    const std::string row = in_form(name);
    long batch = 0, tokens = 0;
    if (row == "parity") {
      if (!parity(cpu)) return false;
    } else if (row == "gap") {
      if (!gap()) return false;
    } else if (row == "held-out") {
      if (!held_out()) return false;
    } else if (std::sscanf(row.c_str(), "decode-%ld", &batch) == 1 && batch > 0) {
      decode(row, batch, false);
    } else if (std::sscanf(row.c_str(), "logits-%ld", &batch) == 1 && batch > 0) {
      decode(row, batch, true);
    } else if (std::sscanf(row.c_str(), "prefill-%ld", &tokens) == 1 && tokens > 0) {
      prefill(row, tokens);
    } else if (std::sscanf(row.c_str(), "lora-%ldx%ld", &batch, &tokens) == 2) {
      train(batch, tokens, false);
    } else if (std::sscanf(row.c_str(), "full-%ldx%ld", &batch, &tokens) == 2) {
      train(batch, tokens, true);
    } else if (std::sscanf(row.c_str(), "share-lora-%ldx%ld", &batch, &tokens) == 2) {
      share(row.c_str(), batch, tokens, false);
    } else if (std::sscanf(row.c_str(), "share-full-%ldx%ld", &batch, &tokens) == 2) {
      share(row.c_str(), batch, tokens, true);
    } else if (!attention(row)) {
      std::printf("%s: no such row\n", row.c_str());
      return false;
    }
    std::fflush(stdout);
    return true;
  }
};

}  // namespace

int main(int argc, char** argv) {
  const test::TestedBackend& backend = test::tested_backends().back();
  if (backend.ops->host_memory) return 77;
  Pool pool(0);
  const ComponentsSlot components(test::default_components());
  const Compute cpu{&cpu_ops(best_cpu_isa()), {pool.engine()}, &components};
  Bench bench;
  bench.gpu = {backend.ops, backend.context, &components};
  bench.gpu.context.parallel = pool.engine();
  bench.base = bench.on(bench.gpu);
  bool known = true;
  for (int i = 1; i < argc; ++i) known = bench.run(argv[i], cpu) && known;
  return known ? 0 : 2;
}
