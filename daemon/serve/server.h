// SPDX-License-Identifier: Apache-2.0
// The daemon's ears: HTTP on a UNIX socket and on TCP, the ZeroMQ data socket and the event socket,
// all on one Asio thread that never blocks. What may block (disk, long admin work) runs on two
// workers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "config.h"
#include "engine/engine.h"
#include "engine/tokenizer.h"
#include "engine/versions.h"
#include "events.h"
#include "metrics.h"
#include "serve/control.h"
#include "storage/replay_store.h"
#include "storage/version_store.h"

namespace ds {

struct ModelInfo {
  std::string name;          ///< "smollm2-135m-instruct"; "default" also names it
  std::string sha256;        ///< of the model file
  std::string architecture;  ///< "llama"
  int64_t parameters = 0;
  int64_t created_ms = 0;  ///< unix; 0 = start of the server
  std::string path = {};   ///< absolute, of the file or folder; shown in status
};

/// What the server speaks for. Everything referenced outlives the server.
class Plugins;

struct ServerParts {
  Engine& engine;
  Versions& versions;
  ReplayStore& store;
  VersionStore& version_files;
  Config& config;
  Metrics& metrics;
  EventBus& events;
  Clock& clock;
  std::shared_ptr<const Tokenizer> tokenizer = {};
  ChatTemplate chat_template = {};
  ModelInfo model = {};
  std::string isa = {};               ///< "avx2": shown in status
  LearnControl learn = {};            ///< absent functions: their routes answer 501
  TaskModelControl task_models = {};  ///< the same
  std::string data_dir = {};          ///< absolute; shown in status
  /// {path, files, bytes}; may take long.
  std::function<Result<Json>(const std::string& path)> backup = {};
  Plugins* plugins = nullptr;  ///< null: their routes answer 501
  const DeviceState* device = nullptr;  ///< what `isa` names; null: it never fails
};

struct ServerOptions {
  std::string run_dir;  ///< exists; control.sock, data.sock, events.sock go here
  std::string http_address = "127.0.0.1:8471";  ///< "" = no TCP; port 0 = any; loopback only
  std::vector<std::string>
      data_endpoints;                   ///< empty: ipc://<run_dir>/data.sock; tcp only on loopback
  std::vector<std::string> http_hosts;  ///< more names accepted in Host and Origin

  size_t max_body_bytes = 32u << 20;
  size_t max_header_bytes = 16u << 10;
  size_t max_connections = 256;              ///< per listener
  int64_t idle_timeout_ms = 60'000;          ///< between requests, and for a whole body
  int64_t header_timeout_ms = 10'000;        ///< first byte to end of header
  int64_t stalled_reader_ms = 5'000;         ///< a peer that reads nothing for so long is dropped
  size_t max_stream_queue_bytes = 1u << 20;  ///< unread bytes of one SSE stream; beyond: closed

  size_t max_frame_bytes = 128u << 20;      ///< ZMQ_MAXMSGSIZE: larger frames end the connection
  size_t max_record_bytes = 1u << 20;  ///< the store's limit, for hello to tell
  size_t max_wire_header_bytes = 2u << 20;  ///< larger JSON headers get an error
  size_t max_attachment_bytes = 16u << 20;  ///< all attachments of a message
  size_t peer_inflight_items = 512;         ///< unanswered messages of one peer; beyond: busy
  size_t peer_inflight_bytes = 32u << 20;
  size_t peer_queue_bytes = 8u << 20;  ///< unsent answers of one peer; beyond: dropped
  size_t max_peers = 4096;
};

/// What the settings say. Refused: an entry of auth.origins that is no host name.
Result<ServerOptions> server_options(const Config& config, const std::string& run_dir);

/// Where the server can be reached, for ready.json.
struct Endpoints {
  std::string http;     ///< "127.0.0.1:41234", "" when off
  std::string control;  ///< path of control.sock
  std::string data;     ///< first data endpoint, with its real port
  std::string events;   ///< "ipc://..."
  std::vector<std::string> all_data;
};

class Server {
 public:
  /// Binds everything and starts the threads. Refused: a run folder that another process serves, an
  /// address beyond this machine (keys are needed for that), a port in use.
  static Result<std::unique_ptr<Server>> start(ServerParts parts, ServerOptions options);
  ~Server();  ///< stop(0)

  const Endpoints& endpoints() const;

  /// Final. /ready turns 503, listeners close, the engine drains for at most `drain_ms`, answers
  /// under way are flushed (at most a second more), sockets close. Blocks; not on the IO thread.
  void stop(int64_t drain_ms);

 private:
  Server();
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ds
