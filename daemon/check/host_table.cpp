// SPDX-License-Identifier: Apache-2.0
#include "check/host_table.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "check/allocations.h"
#include "ds/status.h"

namespace ds::check {
namespace {

const Json* member(const ds_config* config, const char* path) {
  const Json* at = &config->values;
  const std::string_view all(path);
  for (size_t begin = 0; begin <= all.size();) {
    const size_t end = std::min(all.find('.', begin), all.size());
    at = at->is_object() ? find(*at, all.substr(begin, end - begin)) : nullptr;
    if (at == nullptr) return nullptr;
    begin = end + 1;
  }
  return at;
}

ds_code config_int(const ds_config* config, const char* path, int64_t* out) {
  const AllocationPause ours;
  const Json* value = member(config, path);
  if (value == nullptr || !value->is_number_integer()) return DS_E_CONFIG;
  *out = value->get<int64_t>();
  return DS_OK;
}

ds_code config_number(const ds_config* config, const char* path, double* out) {
  const AllocationPause ours;
  const Json* value = member(config, path);
  if (value == nullptr || !value->is_number()) return DS_E_CONFIG;
  *out = value->get<double>();
  return DS_OK;
}

ds_code config_text(const ds_config* config, const char* path, ds_str* out) {
  const AllocationPause ours;
  const auto found = config->texts.find(path);
  if (found == config->texts.end()) return DS_E_CONFIG;
  *out = {found->second.data(), found->second.size()};
  return DS_OK;
}

ds_str config_json(const ds_config* config) { return {config->text.data(), config->text.size()}; }

void collect_texts(const Json& object, const std::string& prefix, ds_config& out) {
  for (const auto& [key, value] : object.items()) {
    if (value.is_object()) collect_texts(value, prefix + key + ".", out);
    if (value.is_string()) out.texts[prefix + key] = value.get<std::string>();
  }
}

void run_serial(void*, int64_t count, ds_task_fn task, void* user) {
  for (int64_t i = 0; i < count; ++i) task(user, i);
}

void run_threads(void* ctx, int64_t count, ds_task_fn task, void* user) {
  const AllocationPause ours;
  const auto threads = static_cast<int64_t>(reinterpret_cast<intptr_t>(ctx));
  std::atomic<int64_t> next{count};  // the last first: an order that no plugin should rely on
  const auto work = [&] {
    for (int64_t i; (i = --next) >= 0;) task(user, i);
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min(threads, count); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace

std::unique_ptr<ds_config> make_config(const Json& json) {
  auto out = std::make_unique<ds_config>();
  out->values = json;
  out->text = dump_json(json);
  collect_texts(json, "", *out);
  return out;
}

ds_host HostTable::full(HostTable* self) {
  ds_host t{};
  t.size = sizeof t;
  t.abi_minor = DS_ABI_MINOR;
  t.ctx = self;
  t.name = {"ds-plugin-check", 15};
  t.version = {"1.0.0", 5};
  t.get_interface = [](void*, ds_str) -> const void* { return nullptr; };
  t.log_enabled = [](void*, int32_t) -> int32_t { return 1; };
  t.log = [](void*, int32_t, ds_str, ds_str) {};
  t.alloc = [](void* ctx, ds_device device, uint64_t bytes, uint64_t align, void** out) -> ds_code {
    const AllocationPause ours;
    auto* host = static_cast<HostTable*>(ctx);
    if (device.type != DS_DEV_CPU) return DS_E_DEVICE;
    if (++host->allocs_ == host->refuse_at_) return DS_E_NOMEM;
    const uint64_t unit = std::max<uint64_t>(align, 64);
    void* p = std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
    if (p == nullptr) return DS_E_NOMEM;
    ++host->allocated_;
    *out = p;
    return DS_OK;
  };
  t.dealloc = [](void* ctx, ds_device, void* p, uint64_t) {
    if (p != nullptr) --static_cast<HostTable*>(ctx)->allocated_;
    std::free(p);
  };
  t.thread_enter = [](void* ctx, ds_str) { ++static_cast<HostTable*>(ctx)->threads_; };
  t.thread_leave = [](void* ctx) { --static_cast<HostTable*>(ctx)->threads_; };
  t.metric = [](void*, ds_str, double, int32_t) {};
  t.config_int = config_int;
  t.config_number = config_number;
  t.config_text = config_text;
  t.config_json = config_json;
  return t;
}

HostTable::HostTable(uint32_t bytes, uint32_t extra, bool at_guard)
    : memory_(at_guard ? bytes : sizeof(ds_host) + extra, at_guard) {
  ds_host all = full(this);
  all.size = bytes + extra;
  std::memset(memory_.data(), 0x5a, memory_.size());
  std::memcpy(memory_.data(), &all, bytes);
  table_ = reinterpret_cast<const ds_host*>(memory_.data());
}

CheckPool::CheckPool(int threads) : threads_(threads), table_{} {
  table_.size = sizeof table_;
  table_.threads = static_cast<uint32_t>(threads);
  table_.ctx = reinterpret_cast<void*>(static_cast<intptr_t>(threads_));
  table_.run = threads == 1 ? run_serial : run_threads;
}

}  // namespace ds::check
