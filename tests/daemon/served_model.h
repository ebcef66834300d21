// SPDX-License-Identifier: Apache-2.0
// A small model behind a real engine: stores in a scratch folder, versions whose random deltas
// follow from their numbers, and calls that wait for an answer.
#pragma once

#include <future>
#include <limits>

#include "engine/engine.h"
#include "reference_model.h"
#include "tests/storage/scratch_folder.h"

namespace ds::test {

/// Factors large enough to change what a tiny model says. Even numbers adapt q and v, odd ones all
/// targets. `poisoned` holds NaN.
inline std::shared_ptr<const LoraDelta> random_delta(const BaseWeights& base,
                                                     const Compute& compute, int64_t number,
                                                     bool poisoned = false) {
  constexpr int64_t kRank = 4;
  Rng rng(static_cast<uint64_t>(number));
  std::vector<LoraDelta::LayerFactors> factors(static_cast<size_t>(base.config().n_layers));
  for (LoraDelta::LayerFactors& layer : factors) {
    for (int t = 0; t < kTargets; ++t) {
      if (number % 2 == 0 && t != kQ && t != kV) continue;
      const auto [n, k] = target_shape(base.config(), static_cast<Target>(t));
      for (int64_t i = 0; i < kRank * k; ++i)
        layer[t].a.push_back(static_cast<float>(rng.uniform() - 0.5) * 0.3f);
      for (int64_t i = 0; i < n * kRank; ++i)
        layer[t].b.push_back(static_cast<float>(rng.uniform() - 0.5) * 0.3f);
      if (poisoned) layer[t].b[0] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  return LoraDelta::pack(base, compute, kRank, 2.0f, factors).value();
}

constexpr int64_t kPoisonedVersion = 13;

class ServedModel {
 public:
  explicit ServedModel(const std::string& name, WeightFormat format = WeightFormat::kF32,
                       CpuIsa isa = best_cpu_isa())
      : machine(isa),
        path(data_path("tiny/" + name)),
        model(load_model(path, machine.compute, format)),
        files(posix_file_system(), folder.path()) {
    ReplayStore::Options options;
    options.directory = folder / "replay";
    options.fs = &posix_file_system();
    options.clock = &system_clock_seam();
    auto opened_store = ReplayStore::open(options);
    DS_CHECK(opened_store.ok());
    store = std::move(*opened_store);
    auto opened =
        Versions::open("default", model.base->sha256(), *store, files, system_clock_seam(),
                       [this](const VersionManifest& m) { return Loaded(weights_of(m)); });
    DS_CHECK(opened.ok());
    versions = std::move(*opened);
  }

  /// Adds versions up to `last`, each the child of the one before; `last` serves.
  void publish_up_to(int64_t last) {
    for (int64_t n = versions->next_number(); n <= last; ++n) {
      VersionManifest m;
      m.model = "default";
      m.number = n;
      m.parent = n - 1;
      m.base_sha256 = model.base->sha256();
      m.method = "lora";
      const std::vector<StoredTensor> delta = {
          {"seed", "F32", {1}, std::string(4, static_cast<char>(n))}};
      m.weight_hash = weight_hash(m.base_sha256, delta);
      const Status status = versions->publish(m, delta, {}, {}, weights_of(m), true);
      if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
      DS_CHECK(status.ok());
    }
  }

  std::unique_ptr<Engine> engine(const EngineOptions& options) {
    return std::make_unique<Engine>(options, machine.compute, machine.pool, *versions,
                                    model.tokenizer, metrics, system_clock_seam());
  }

  Machine machine;
  const std::string path;  ///< folder of the model
  LoadedModel model;
  ScratchFolder folder;
  VersionStore files;
  std::unique_ptr<ReplayStore> store;
  std::unique_ptr<Versions> versions;
  Metrics metrics;

 private:
  using Loaded = Result<std::shared_ptr<const Weights>>;
  std::shared_ptr<const Weights> weights_of(const VersionManifest& m) {
    if (m.number == 1) return make_weights(m, model.base, nullptr);
    const Compute serial{machine.compute.ops, {serial_parallel(), nullptr}};
    const bool poisoned = m.number == kPoisonedVersion;
    return make_weights(m, model.base, random_delta(*model.base, serial, m.number, poisoned));
  }
};

/// A request whose answer can be waited for.
struct Pending {
  std::future<Finish> future;
  Status refused;
  std::shared_ptr<std::string> streamed = std::make_shared<std::string>();
  std::shared_ptr<std::vector<TokenInfo>> tokens = std::make_shared<std::vector<TokenInfo>>();
  Finish wait() { return future.get(); }
};

/// `each_chunk` runs on the engine thread; tests hold the engine still in it.
inline Pending submit(Engine& engine, GenerateRequest request,
                      std::function<void()> each_chunk = nullptr) {
  Pending out;
  auto promise = std::make_shared<std::promise<Finish>>();
  out.future = promise->get_future();
  out.refused = engine.submit(
      std::move(request),
      [text = out.streamed, tokens = out.tokens, each_chunk](const Chunk& chunk) {
        *text += chunk.text;
        tokens->insert(tokens->end(), chunk.tokens.begin(), chunk.tokens.end());
        if (each_chunk) each_chunk();
      },
      [promise](const Finish& finish) { promise->set_value(finish); });
  return out;
}

}  // namespace ds::test
