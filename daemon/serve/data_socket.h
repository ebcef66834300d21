// SPDX-License-Identifier: Apache-2.0
// The ZeroMQ ROUTER socket: feedback and inference for programs. Peers are told apart by routing
// id; each has an ordered queue of answers and limits on what it may have under way. One that stops
// reading loses its queue and its requests, and harms nobody else. IO thread only.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "serve/service.h"

namespace boost::asio {
class io_context;
}

namespace ds {

class DataSocket {
 public:
  /// Binds all endpoints. `tcp://` beyond loopback is refused: that needs CURVE keys.
  static Result<std::unique_ptr<DataSocket>> open(boost::asio::io_context& io, void* zmq_context,
                                                  Service& service,
                                                  const std::vector<std::string>& endpoints);
  ~DataSocket();

  /// As bound, with real ports.
  const std::vector<std::string>& endpoints() const;
  bool idle() const;  ///< nothing unanswered, nothing unsent
  void close();

 private:
  struct State;
  explicit DataSocket(std::shared_ptr<State> state) : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
};

}  // namespace ds
