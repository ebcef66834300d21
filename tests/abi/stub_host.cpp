// SPDX-License-Identifier: Apache-2.0
// A host as small as can be: loads one plugin, runs its first component on fixed data and prints
// what came out as hashes. Built against the headers of each release; a newer one's tail fields are
// filled with rubbish, which a plugin that does not know them may not notice.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ds/plugin.h"

namespace {

constexpr std::uint64_t kRubbish = 0x5a5a5a5a5a5a5a5a;

template <class T>
constexpr bool has_tail = requires(T t) {
  t.tail;
};

template <class T>
T fresh() {
  T out{};
  out.size = sizeof out;
  if constexpr (has_tail<T>) out.tail = kRubbish;
  return out;
}

[[noreturn]] void stop(const std::string& why) {
  std::fprintf(stderr, "stub host, ABI 1.%u: %s\n", DS_ABI_MINOR, why.c_str());
  std::exit(1);
}
void must(ds_code code, const ds_status& st, const char* what) {
  if (code != DS_OK)
    stop(std::string(what) + ": code " + std::to_string(code) + " " + std::string(st.text, st.len));
}

/// A table of a plugin that was built with an older header may end early: before the tail, it does.
template <class T>
void check_table(const T* table, std::uint32_t plugin_minor, const char* what) {
  const bool sees = table->size >= sizeof(T);
  const bool knows = plugin_minor >= DS_ABI_MINOR;
  if (has_tail<T> ? sees != knows : knows && !sees)
    stop(std::string(what) + ": size " + std::to_string(table->size) + " from minor " +
         std::to_string(plugin_minor));
}

template <class T>
void print_hash(const char* what, const std::vector<T>& data) {
  std::uint64_t hash = 1469598103934665603u;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
  for (std::size_t i = 0; i < data.size() * sizeof(T); ++i)
    hash = (hash ^ bytes[i]) * 1099511628211u;
  std::printf("%s %zu %016llx\n", what, data.size(), static_cast<unsigned long long>(hash));
}

struct Tensor {
  std::vector<std::int64_t> shape, strides;
  ds_tensor view{};

  template <class T>
  Tensor(std::vector<T>& data, ds_dtype dtype, std::vector<std::int64_t> dims)
      : shape(std::move(dims)), strides(shape.size()) {
    std::int64_t count = 1;
    for (std::size_t i = shape.size(); i-- > 0; count *= shape[i]) strides[i] = count;
    view.data = data.data();
    view.device = {DS_DEV_CPU, 0};
    view.ndim = static_cast<std::int32_t>(shape.size());
    view.dtype = dtype;
    view.shape = shape.data();
    view.strides = strides.data();
    view.bytes = data.size() * sizeof(T);
  }
  Tensor(const Tensor&) = delete;
};

constexpr ds_dtype kF32{DS_FLOAT, 32, 1}, kI32{DS_INT, 32, 1};

std::vector<float> numbers(std::size_t n, std::uint32_t seed) {
  std::vector<float> out(n);
  for (float& v : out) {
    seed = seed * 1664525u + 1013904223u;
    v = static_cast<float>(seed >> 8) / (1u << 23) - 1;
  }
  return out;
}

void run_in_order(void*, std::int64_t count, ds_task_fn task, void* user) {
  for (std::int64_t i = 0; i < count; ++i) task(user, i);
}

void drive(const ds_quantizer& table, ds_instance* instance, const ds_call& call) {
  constexpr std::int64_t n = 24, k = 64;
  ds_status st{};
  struct {
    ds_qformat format;
    std::uint64_t canary;
  } room{fresh<ds_qformat>(), kRubbish};
  must(table.format(instance, n, k, &room.format, &st), st, "format");
  if (room.canary != kRubbish) stop("format wrote past the end of its output");
  std::vector<std::uint64_t> packed(room.format.packed_bytes / 8),
      scales(room.format.scale_bytes / 8);
  auto q = fresh<ds_qweight>();
  q.n = n;
  q.k = k;
  q.format = &room.format;
  q.packed = packed.data();
  q.scales = scales.data();
  std::vector<float> weights = numbers(n * k, 7), back(n * k);
  const Tensor w(weights, kF32, {n, k}), out(back, kF32, {n, k});
  const ds_str name{"w", 1};
  must(table.quantize(instance, &call, name, &w.view, &q, &st), st, "quantize");
  must(table.dequantize(instance, &call, &q, &out.view, &st), st, "dequantize");
  std::printf("layout %u bits %u tolerance %a\n", room.format.layout_id, room.format.bits,
              static_cast<double>(room.format.rel_tol));
  print_hash("packed", packed);
  print_hash("scales", scales);
  print_hash("dequantized", back);
}

void drive(const ds_attention& table, ds_instance* instance, const ds_call& call) {
  constexpr std::int64_t heads = 4, kv_heads = 2, dim = 16, pages = 6, page = 32, rows = 43;
  std::vector<float> query = numbers(rows * heads * dim, 1);
  std::vector<float> k = numbers(pages * kv_heads * page * dim, 2);
  std::vector<float> v = numbers(pages * kv_heads * page * dim, 3);
  std::vector<std::int32_t> row_of{0, 3, rows}, blocks{4, 0, 2, 5, 3, 1}, lengths{70, 40};
  std::vector<float> result(rows * heads * dim), log_sum(rows * heads);
  const Tensor q(query, kF32, {rows, heads, dim}), row_begin(row_of, kI32, {3});
  const Tensor k_pages(k, kF32, {pages, kv_heads, page, dim});
  const Tensor v_pages(v, kF32, {pages, kv_heads, page, dim});
  const Tensor table_of(blocks, kI32, {2, 3}), length_of(lengths, kI32, {2});
  const Tensor out(result, kF32, {rows, heads, dim}), lse(log_sum, kF32, {rows, heads});
  auto kv = fresh<ds_kv_view>();
  kv.page_tokens = page;
  kv.k_pages = &k_pages.view;
  kv.v_pages = &v_pages.view;
  kv.block_table = &table_of.view;
  kv.lengths = &length_of.view;
  auto args = fresh<ds_attn_args>();
  args.batch = 2;
  args.max_rows = 40;
  args.max_keys = 70;
  args.q = &q.view;
  args.rows = &row_begin.view;
  args.kv = &kv;
  args.out = &out.view;
  args.lse = &lse.view;
  args.scale = 0.25f;
  ds_status st{};
  struct {
    ds_plan plan;
    std::uint64_t canary;
  } room{fresh<ds_plan>(), kRubbish};
  must(table.plan(instance, &args, &room.plan, &st), st, "plan");
  if (room.canary != kRubbish) stop("plan wrote past the end of its output");
  if (room.plan.workspace_bytes > call.workspace_bytes) stop("plan wants more than a megabyte");
  must(table.prefill(instance, &call, &args, &st), st, "prefill");
  print_hash("out", result);
  print_hash("lse", log_sum);
}

ds_code config_int(const ds_config*, const char* path, std::int64_t* out) {
  if (std::strcmp(path, "window") != 0) return DS_E_CONFIG;
  *out = 20;
  return DS_OK;
}

ds_host a_host() {
  auto host = fresh<ds_host>();
  host.abi_minor = DS_ABI_MINOR;
  host.config_int = &config_int;
  return host;
}

void drive_component(const ds_host& host, const ds_plugin& plugin) {
  const ds_component& component = *plugin.components[0];
  check_table(&component, plugin.abi_minor, "component");
  check_table(component.ops, plugin.abi_minor, "ops");
  auto parallel = fresh<ds_parallel>();
  parallel.threads = 1;
  parallel.run = &run_in_order;
  std::vector<std::uint64_t> workspace(1 << 17);
  auto call = fresh<ds_call>();
  call.parallel = &parallel;
  call.workspace = workspace.data();
  call.workspace_bytes = workspace.size() * sizeof workspace[0];
  const char config = 0;
  ds_instance* instance = nullptr;
  ds_status st{};
  must(component.create(&host, reinterpret_cast<const ds_config*>(&config), {DS_DEV_CPU, 0},
                        &instance, &st),
       st, "create");
  if (component.kind == DS_KIND_QUANTIZER) {
    const auto* table = static_cast<const ds_quantizer*>(component.table);
    check_table(table, plugin.abi_minor, "quantizer");
    drive(*table, instance, call);
  } else if (component.kind == DS_KIND_ATTENTION) {
    const auto* table = static_cast<const ds_attention*>(component.table);
    check_table(table, plugin.abi_minor, "attention");
    drive(*table, instance, call);
  } else {
    stop("kind " + std::to_string(component.kind) + ", expected a quantizer or attention");
  }
  component.ops->destroy(instance);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) stop("usage: stub_host PLUGIN.so");
  void* file = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (file == nullptr) stop(dlerror());
  const auto entry = reinterpret_cast<ds_plugin_entry_fn>(dlsym(file, DS_ENTRY_NAME));
  if (entry == nullptr) stop("no entry " DS_ENTRY_NAME);
  const ds_host host = a_host();
  const ds_plugin* plugin = nullptr;
  ds_status st{};
  must(entry(&host, &plugin, &st), st, "entry");
  check_table(plugin, plugin->abi_minor, "plugin");
  std::fprintf(stderr, "host 1.%u, plugin 1.%u\n", DS_ABI_MINOR, plugin->abi_minor);
  drive_component(host, *plugin);
}
