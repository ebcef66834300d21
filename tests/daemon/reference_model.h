// SPDX-License-Identifier: Apache-2.0
// What the tests on models share: the reference files, the compute pool, and a loader.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device.h"
#include "engine/model.h"
#include "kernels/pool.h"
#include "plugin/plugins.h"
#include "storage/json.h"
#include "storage/safetensors.h"
#include "storage/seams.h"

namespace ds::test {

inline std::string data_path(const std::string& name) {
  return std::string(DS_TEST_DATA) + "/" + name;
}

inline Json read_json(const std::string& path) {
  Result<std::string> text = posix_file_system().read(path);
  if (!text.ok()) std::fprintf(stderr, "%s\n", text.status().message().c_str());
  DS_CHECK(text.ok());
  Result<Json> json = parse_json(*text);
  DS_CHECK(json.ok());
  return std::move(json).value();
}

/// SmolLM2's GGUF: $DS_MODEL, else the cache that examples/setup.sh fills. Empty when absent.
inline std::string smollm2_path() {
  if (const char* path = std::getenv("DS_MODEL")) return path;
  const char* xdg = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  const std::string cache =
      xdg != nullptr ? xdg : std::string(home != nullptr ? home : "") + "/.cache";
  const std::string path =
      cache + "/driftstone/b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53/" +
      "SmolLM2-135M-Instruct.Q4_1.gguf";
  return posix_file_system().exists(path) ? path : "";
}

/// The built-in modules of this build, loaded once per test program.
inline Plugins& modules() {
  static const std::unique_ptr<Plugins> loaded = [] {
    Result<std::unique_ptr<Plugins>> opened =
        Plugins::open({std::string(DS_BIN_DIR) + "/../modules", "/nonexistent", Json::object()}, {},
                      posix_file_system(), system_clock_seam());
    DS_CHECK(opened.ok());
    return std::move(opened).value();
  }();
  return *loaded;
}

inline std::shared_ptr<const PluginInstance> module_of(uint32_t kind, const std::string& name) {
  Result<Plugins::Serving> found = modules().find(kind, name);
  if (!found.ok()) std::fprintf(stderr, "%s\n", found.status().message().c_str());
  DS_CHECK(found.ok());
  return found->instance;
}

/// A generation of one of the modules; `generation` is only its name.
inline std::shared_ptr<const Attention> attention_module(const std::string& name,
                                                         uint64_t generation = 1) {
  return std::make_shared<Attention>(module_of(DS_KIND_ATTENTION, name), generation);
}

inline std::shared_ptr<const TextEncoder> text_encoder_module() {
  auto made = TextEncoder::make(module_of(DS_KIND_ENCODER, "text"), 1);
  DS_CHECK(made.ok());
  return *made;
}

/// What passes compute with by default; $DS_TEST_ATTENTION takes dense's place.
inline Components default_components() {
  const char* attention = std::getenv("DS_TEST_ATTENTION");
  return {text_encoder_module(), attention_module(attention != nullptr ? attention : "dense")};
}

/// One pool, backend and set of components per test program. $DS_TEST_DEVICE, cuda:0 for one, takes
/// the place of the CPU, by the backend of this build or the file $DS_TEST_BACKEND.
struct Machine {
  explicit Machine(CpuIsa isa = best_cpu_isa())
      : pool(0),
        components(default_components()),
        compute{&cpu_ops(isa), {pool.engine(), nullptr}, &components} {
    const char* name = std::getenv("DS_TEST_DEVICE");
    if (name == nullptr) return;
    const char* backend = std::getenv("DS_TEST_BACKEND");
    auto opened = Device::open(
        name, backend != nullptr ? backend : std::string(DS_BIN_DIR) + "/../lib/libds_cuda.so");
    if (!opened.ok()) std::fprintf(stderr, "%s\n", opened.status().message().c_str());
    DS_CHECK(opened.ok());
    device = std::move(*opened);
    const auto context = device->context(pool.engine(), false);
    DS_CHECK(context.ok());
    compute = {&device->ops(), *context, &components};
  }
  std::unique_ptr<Device> device;
  Pool pool;
  ComponentsSlot components;
  Compute compute;
};

struct LoadedModel {
  std::unique_ptr<ModelFile> file;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const BaseWeights> base;
};

inline LoadedModel load_model(const std::string& path, const Compute& compute,
                              WeightFormat format) {
  LoadedModel out;
  Result<std::unique_ptr<ModelFile>> file = ModelFile::open(path);
  if (!file.ok()) std::fprintf(stderr, "%s\n", file.status().message().c_str());
  DS_CHECK(file.ok());
  out.file = std::move(file).value();
  Result<std::shared_ptr<const Tokenizer>> tokenizer = Tokenizer::create(out.file->tokenizer());
  DS_CHECK(tokenizer.ok());
  out.tokenizer = *tokenizer;
  Result<std::shared_ptr<const BaseWeights>> base = BaseWeights::load(*out.file, compute, format);
  if (!base.ok()) std::fprintf(stderr, "%s\n", base.status().message().c_str());
  DS_CHECK(base.ok());
  out.base = *base;
  return out;
}

/// Logits of every row of one sequence by the serving path, FP32 [ids, vocab]. `chunk` rows a step;
/// `delta` may be null.
inline std::vector<float> serve_logits(const Compute& compute, const BaseWeights& base,
                                       const LoraDelta* delta, const std::vector<TokenId>& ids,
                                       int64_t chunk, KvDtype kv) {
  const auto n = static_cast<int64_t>(ids.size());
  const int64_t pages = (n + kKvPageTokens - 1) / kKvPageTokens;
  KvPages cache(base.config(), compute, kv, pages + 2);
  std::vector<int32_t> table;
  for (int64_t i = 0; i < pages; ++i)
    table.push_back(static_cast<int32_t>(pages + 1 - i));  // not in order
  Forward forward(base.config(), compute, chunk);
  std::vector<float> logits(static_cast<size_t>(n * base.config().vocab));
  for (int64_t at = 0; at < n; at += chunk) {
    const int64_t rows = std::min(chunk, n - at);
    const SequenceSpan span{0, rows, at, table.data()};
    std::vector<int32_t> all, slots(static_cast<size_t>(rows), delta != nullptr ? 0 : -1);
    for (int32_t r = 0; r < rows; ++r) all.push_back(r);
    StepBatch batch;
    batch.ids = std::span(ids).subspan(static_cast<size_t>(at), static_cast<size_t>(rows));
    batch.sequences = {&span, 1};
    batch.slot_of_row = slots;
    if (delta != nullptr) batch.deltas = {&delta, 1};
    batch.logit_rows = all;
    DS_CHECK(
        forward.run(base, batch, cache, logits.data() + at * base.config().vocab, nullptr).ok());
  }
  return logits;
}

}  // namespace ds::test
