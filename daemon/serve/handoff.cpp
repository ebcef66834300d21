// SPDX-License-Identifier: Apache-2.0
// Mailbox and Worker.
#include "serve/handoff.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <utility>

namespace ds {

void Mailbox::post(Task task) {
  const std::lock_guard lock(mutex_);
  if (!io_) return;
  tasks_.push_back(std::move(task));
  if (tasks_.size() == 1) boost::asio::post(*io_, [this] { run_all(); });
}

void Mailbox::close() {
  std::vector<Task> dropped;  // destroyed after the lock is free: a task may own what posts
  {
    const std::lock_guard lock(mutex_);
    io_ = nullptr;
    dropped.swap(tasks_);
  }
}

void Mailbox::run_all() {
  std::vector<Task> batch;
  {
    const std::lock_guard lock(mutex_);
    batch.swap(tasks_);
  }
  for (Task& task : batch) task();
}

Worker::Worker() : thread_([this] { loop(); }) {}

Worker::~Worker() { finish(); }

void Worker::finish() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void Worker::post(Task task) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    tasks_.push_back(std::move(task));
  }
  wake_.notify_one();
}

void Worker::loop() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    task();
    task = nullptr;  // its captures go while the lock is free
    lock.lock();
  }
}

}  // namespace ds
