// SPDX-License-Identifier: Apache-2.0
#include "check/trial.h"

#include "check/allocations.h"
#include "check/child.h"
#include "check/host_table.h"

namespace ds::check {
namespace {

// Behind everything that no check watches, so that one fault shows in one check.
constexpr size_t kSlack = 4096;

}  // namespace

Trial::Trial(const ds_component& c, ds_instance* i, const TrialOptions& o)
    : component(c),
      instance(i),
      options(o),
      cancel_(o.cancel),
      pool_(std::make_unique<CheckPool>(o.threads)) {}
Trial::~Trial() = default;

std::byte* Trial::memory(size_t bytes) {
  memory_.emplace_back(bytes, false, kSlack);
  std::memset(memory_.back().data(), 0, bytes);
  return memory_.back().data();
}

std::byte* Trial::buffer(size_t bytes) {
  memory_.emplace_back(bytes, false, options.guard_buffers ? 0 : kSlack);
  std::memset(memory_.back().data(), 0, bytes);
  return memory_.back().data();
}

std::byte* Trial::place(const PlacedStruct& item, size_t index) {
  const size_t full = item.bytes.size();
  const bool hit = options.damage.index == index;
  const uint32_t n = options.damage.bytes;
  std::byte* at = nullptr;
  if (hit && options.damage.harm == Harm::kCutAtGuard) {
    memory_.emplace_back(n, true);
    at = memory_.back().data();
    std::memcpy(at, item.bytes.data(), n);
    std::memcpy(at, &n, sizeof n);
  } else {
    at = memory(full);
    std::memcpy(at, item.bytes.data(), full);
    if (hit && options.damage.harm == Harm::kCut) {
      std::memset(at + n, 0x5a, full - n);
      std::memcpy(at, &n, sizeof n);
    } else if (hit && options.damage.harm == Harm::kZero) {
      std::memset(at + n, 0, full - n);
    }
  }
  return at;
}

std::byte* Trial::place_output(const PlacedStruct& item, size_t index) {
  if (options.damage.harm != Harm::kRoom || options.damage.index != index) {
    std::byte* at = memory(item.bytes.size());
    std::memcpy(at, item.bytes.data(), item.bytes.size());
    return at;
  }
  const uint32_t n = options.damage.bytes;
  memory_.emplace_back(n, true);
  std::byte* at = memory_.back().data();
  std::memcpy(at, item.bytes.data(), n);
  std::memcpy(at, &n, sizeof n);
  return at;
}

const ds_tensor* Trial::tensor(const char* name, ds_dtype dtype, std::vector<int64_t> shape,
                               const void* bytes, bool written, bool judged) {
  tensors.push_back({name, judged});
  const bool hit = options.damage.index == tensors.size() - 1;
  const Harm harm = hit ? options.damage.harm : Harm::kNone;
  if (harm == Harm::kNull) return nullptr;
  uint64_t size = dtype.bits / 8;
  for (const int64_t n : shape) size *= static_cast<uint64_t>(n);
  shapes_.push_back({std::move(shape), {}, {}});
  Shape& s = shapes_.back();
  memory_.emplace_back(size, false, options.guard_buffers ? 0 : kSlack);
  std::byte* data = memory_.back().data();
  if (bytes != nullptr && size != 0) {
    std::memcpy(data, bytes, size);
  } else {
    std::memset(data, 0, size);
  }
  if (harm == Harm::kShape && !s.sizes.empty()) ++s.sizes.back();
  s.strides.assign(s.sizes.size(), 1);
  for (size_t i = s.sizes.size(); i-- > 1;) s.strides[i - 1] = s.strides[i] * s.sizes[i];
  ds_tensor& t = s.tensor;
  t.data = data;
  t.device = {DS_DEV_CPU, 0};
  t.ndim = static_cast<int32_t>(s.sizes.size());
  t.dtype = dtype;
  // As wide as the right one, so that only the type is wrong.
  if (harm == Harm::kDtype) t.dtype.code = dtype.code == DS_FLOAT ? DS_INT : DS_FLOAT;
  t.shape = s.sizes.data();
  t.strides = s.strides.data();
  t.bytes = harm == Harm::kShort && size > 0 ? size - 1 : size;
  t.flags = DS_T_ALIGNED64 | (written ? 0u : static_cast<uint32_t>(DS_T_READONLY));
  return &t;
}

const ds_call* Trial::call(uint64_t workspace_bytes, uint64_t step) {
  const size_t slack = options.exact_workspace ? 0 : kSlack;
  memory_.emplace_back(workspace_bytes, false, slack);
  ds_call c{};
  c.parallel = pool_->parallel();
  c.workspace = memory_.back().data();
  c.workspace_bytes = workspace_bytes;
  c.cancel = &cancel_;
  c.deadline_ns = options.deadline_ns;
  c.seed = options.seed;
  c.step = step;
  return give("ds_call", c);
}

bool Trial::invoke(const std::string& what, const std::function<ds_code(ds_status*)>& f) {
  last_call = what;
  now_doing(what);
  ds_status st{};
  {
    const uint64_t before = allocations;
    const AllocationWatch watch(options.refuse > before ? options.refuse - before : 0);
    code = f(&st);
    allocations += AllocationWatch::counted();
    refused = refused || AllocationWatch::refused();
  }
  text.assign(st.text, std::min<size_t>(st.len, sizeof st.text));
  if (code != DS_OK && bad_status.empty()) {
    if (st.code != code)
      bad_status = what + " returned " + std::to_string(code) + " with status.code " +
                   std::to_string(st.code);
    else if (st.len == 0)
      bad_status = what + " failed with " + std::to_string(code) + " and no text";
    else if (st.len > sizeof st.text)
      bad_status = what + ": status.len " + std::to_string(st.len) + ", expected at most 240";
    else if (code < DS_OK || code > DS_E_INTERNAL)
      bad_status = what + " returned the unknown code " + std::to_string(code);
  }
  return code == DS_OK;
}

void Trial::add_output(const void* bytes, size_t n) {
  const auto* begin = static_cast<const std::byte*>(bytes);
  if (n != 0) output.insert(output.end(), begin, begin + n);
}

bool Trial::intact() const {
  for (const Guarded& memory : memory_) {
    if (!memory.intact()) return false;
  }
  return true;
}

}  // namespace ds::check
