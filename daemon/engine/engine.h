// SPDX-License-Identifier: Apache-2.0
// The engine: one thread that owns the KV cache and decodes all live sequences together, one step
// at a time (continuous batching). Requests come from any thread; callbacks run on the engine
// thread and must not block.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/answer.h"
#include "engine/model.h"
#include "engine/sampler.h"
#include "engine/tokenizer.h"
#include "engine/versions.h"
#include "kernels/pool.h"
#include "metrics.h"

namespace ds {

constexpr int kMaxLogprobs = 100;

enum class LatencyClass { kInteractive, kBatch };

/// A prompt is a list of segments: token ids now, embeddings of other modalities later.
struct Segment {
  std::vector<TokenId> ids;
};

struct GenerateRequest {
  std::string id;     ///< unique among live requests; also the trace's response id
  std::string model;  ///< "", "default", "vN"
  std::vector<Segment> prompt;
  int64_t max_tokens = -1;  ///< -1 = rest of the context; 0 = prompt only
  Sampling sampling;
  std::vector<std::string> stop;  ///< the text ends before the first of them
  std::vector<TokenId> stop_ids;  ///< end of turn, end of text
  int logprobs = -1;              ///< top alternatives per token, at most kMaxLogprobs; -1 = none
  bool prompt_logprobs = false;   ///< one entry per prompt token (echo)
  LatencyClass latency = LatencyClass::kInteractive;
};

struct Finish {
  Status status;              ///< not OK: refused or failed, the rest is partial
  std::string finish_reason;  ///< "stop", "length", "cancelled"; empty when it failed
  std::string text;           ///< all chunks together; special tokens have no text
  std::vector<TokenInfo> prompt_tokens, tokens;
  /// Sampled tokens, the one that stopped it included; prompt tokens whose K/V came from the cache.
  int64_t prompt_count = 0, completion_count = 0, cached_count = 0;
  std::string version, fingerprint;
  int64_t queue_us = 0, first_token_us = 0, total_us = 0;
};

using OnChunk = std::function<void(const Chunk&)>;
using OnFinish = std::function<void(const Finish&)>;

struct EngineOptions {
  int64_t context = 2048;     ///< longest sequence; <= the model's
  int64_t max_running = 16;   ///< sequences decoding together
  int64_t max_waiting = 256;  ///< beyond: busy
  int64_t prefill_chunk = 128;  ///< prompt rows per step: decoding sequences are not held up
  int64_t kv_pages = 0;         ///< 0 = enough for max_running / 4 full contexts; at least one is kept
  bool prefix_cache = true;
  KvDtype kv_dtype = KvDtype::kBF16;
};

class Engine {
 public:
  Engine(EngineOptions options, const Compute& compute, Pool& pool, Versions& versions,
         std::shared_ptr<const Tokenizer> tokenizer, Metrics& metrics, Clock& clock);
  ~Engine();  ///< cancels what is live

  /// Queues a request. Refused at once (busy, draining, unknown version, id in use, prompt longer
  /// than the context, ids or values out of range); otherwise `on_finish` is called exactly once.
  /// The weights are those that serve now; a "vN" that is not in memory is loaded here, on the
  /// caller's thread.
  Status submit(GenerateRequest request, OnChunk on_chunk, OnFinish on_finish);
  bool cancel(const std::string& id);  ///< false: not live

  /// Mean of the final hidden states over the tokens, FP32 [d_model]; not normalised.
  Status submit_embedding(
      std::string id, std::string model, std::vector<TokenId> ids,
      std::function<void(Status, std::vector<float>, std::string version)> done);

  /// What it computes on has failed, as another thread has seen: the engine goes on on the CPU. It
  /// notices by itself when a step fails.
  void leave_device();

  /// Refuses new requests and returns when nothing is live or `timeout_ms` has passed (then
  /// cancels).
  void drain(int64_t timeout_ms);

  Json ps() const;     ///< live requests: id, class, state, version, prompt, generated, age
  Json stats() const;  ///< running, waiting, pages used and total, prefix hits, tokens per second
  const EngineOptions& options() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ds
