// SPDX-License-Identifier: Apache-2.0
// The kit's side of the ABI: a host table that counts what a plugin does with it, and a pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "check/guarded.h"
#include "ds/plugin.h"
#include "storage/json.h"

struct ds_config {  // what a plugin reads through the table
  ds::Json values;
  std::string text;
  std::map<std::string, std::string> texts;  // strings handed out, alive as long as the config
};

namespace ds::check {

/// `json` is an object; members by path "a.b".
std::unique_ptr<ds_config> make_config(const Json& json);

class HostTable {
 public:
  /// The first `bytes` of the table; the rest is filled with 0x5a, or is forbidden memory if
  /// `at_guard`. `extra`: bytes behind the table that the plugin cannot know.
  explicit HostTable(uint32_t bytes = sizeof(ds_host), uint32_t extra = 0, bool at_guard = false);
  HostTable(const HostTable&) = delete;

  const ds_host* table() const { return table_; }
  int threads_entered() const { return threads_; }
  int64_t allocated() const { return allocated_; }  ///< blocks not given back
  void refuse_alloc(uint64_t number) {
    refuse_at_ = number;
    allocs_ = 0;
  }
  uint64_t allocs() const { return allocs_; }

 private:
  static ds_host full(HostTable* self);

  Guarded memory_;
  const ds_host* table_ = nullptr;
  std::atomic<int> threads_{0};
  std::atomic<int64_t> allocated_{0};
  std::atomic<uint64_t> allocs_{0}, refuse_at_{0};
};

/// `threads` at a time, in an order that differs from run to run.
class CheckPool {
 public:
  explicit CheckPool(int threads);
  CheckPool(const CheckPool&) = delete;
  const ds_parallel* parallel() const { return &table_; }

 private:
  int threads_;
  ds_parallel table_;
};

}  // namespace ds::check
