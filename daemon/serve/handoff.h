// SPDX-License-Identifier: Apache-2.0
// Getting work from one thread to another. Mailbox: from any thread to the IO thread (callbacks of
// the engine, the store, the learner). Worker: from the IO thread to a thread that may block.
//
// Neither queue has a limit of its own: what enters is bounded by connections, in-flight wire
// messages and live engine requests, each of which has one.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace boost::asio {
class io_context;
}

namespace ds {

using Task = std::function<void()>;

/// Held by shared_ptr by every callback that may outlive the server.
class Mailbox {
 public:
  explicit Mailbox(boost::asio::io_context& io) : io_(&io) {}

  /// Runs `task` on the IO thread, in the order of the posts. Many posts between two turns of the
  /// loop cost one wake-up. After close() tasks are dropped.
  void post(Task task);
  void close();

 private:
  void run_all();
  std::mutex mutex_;
  boost::asio::io_context* io_;  ///< null once closed
  std::vector<Task> tasks_;
};

/// One thread that runs tasks in order.
class Worker {
 public:
  Worker();
  ~Worker();  ///< finish()
  void post(Task task);
  void finish();  ///< runs what is queued, ends the thread; later posts are dropped

 private:
  void loop();
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Task> tasks_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace ds
