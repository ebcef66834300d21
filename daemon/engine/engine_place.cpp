// SPDX-License-Identifier: Apache-2.0
// Where the engine computes: as much KV memory as there is, and the way to the CPU when a GPU
// fails.
#include <algorithm>

#include "engine/engine_state.h"
#include "log.h"

namespace ds {
namespace {

/// A CPU in a GPU's place has the weights' copies in BF16 and the pages as well.
KvDtype pages_dtype(const EngineOptions& options, const Compute& c) {
  const bool stands_in = c.ops->host_memory && options.kv_dtype == KvDtype::kF16;
  return stands_in ? KvDtype::kBF16 : options.kv_dtype;
}

}  // namespace

StepPlace::StepPlace(const ModelConfig& config, const EngineOptions& options, const Compute& c,
                     int64_t kv_pages)
    : compute(c),
      cache(kv_pages, options.prefix_cache),
      pages(config, c, pages_dtype(options, c), kv_pages),
      forward(config, c, options.max_running + options.prefill_chunk),
      logits_bytes(static_cast<size_t>(forward.max_rows() * config.vocab) * sizeof(float)) {}

Status StepPlace::reserve() {
  DS_ASSIGN(logits, Buffer::pinned(*compute.ops, logits_bytes));
  DS_ASSIGN(tokens, Buffer::pinned(*compute.ops,
                                   static_cast<size_t>(forward.max_rows()) * sizeof(TokenId)));
  DS_TRY(forward.reserve());
  DS_TRY(pages.reserve());
  return finish(compute);
}

/// With half the KV pages, and half of these, as long as there is no memory for them and one
/// context fits; then on the CPU.
void Engine::State::settle_down(const Compute& compute) {
  if (!compute.ops->host_memory && compute.device != nullptr && compute.device->lost())
    return move_to_host();
  const int64_t least = pages_for(options.context);
  int64_t kv_pages = options.kv_pages;
  for (;;) {
    auto next = std::make_unique<StepPlace>(config, options, compute, kv_pages);
    const Status reserved = next->reserve();
    if (reserved.ok()) {
      place = std::move(next);
      kv_total = kv_pages;
      row_limit = place->forward.max_rows();
      break;
    }
    DS_CHECK(!compute.ops->host_memory);  // host out of memory: die, restart from the checkpoint
    const bool lost = !ds::finish(compute).ok();
    if (lost || kv_pages == least) {
      if (compute.device != nullptr) compute.device->lose(reserved.message());
      return move_to_host();
    }
    kv_pages = std::max(kv_pages / 2, least);
  }
  if (kv_pages < options.kv_pages)
    log(LogLevel::kWarn, "engine",
        "memory for " + std::to_string(kv_pages) + " KV pages, not " +
            std::to_string(options.kv_pages) + ": fewer long sequences run together");
}

/// Every sequence is set back to its tokens and goes on with its own version, as after a lack of
/// pages. What has been sent stays; the position picks the next token's chance.
void Engine::State::move_to_host() {
  place.reset();  // its buffers first: the pages of the CPU may be large
  settle_down(host);
  {
    std::lock_guard lock(mutex);
    on_host = true;
    for (const auto& [id, sequence] : live) {
      sequence->weights = ds::on_host(sequence->weights);
      sequence->pages.clear();
      sequence->computed = 0;
      std::fill(sequence->hidden_sum.begin(), sequence->hidden_sum.end(), 0.0);
    }
    set_gauges();
  }
  if (host.device != nullptr) host.device->serve_on_host();
}

}  // namespace ds
