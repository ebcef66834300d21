// SPDX-License-Identifier: Apache-2.0
// The C++ layer of the SDK, seen from both sides of the boundary: what a class becomes, and what
// the host's structs become on the way in and out.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "ds/plugin.hpp"

namespace {

using namespace ds::sdk;
using testing::ElementsAre;
using testing::HasSubstr;

std::string text_of(const ds_status& st) { return {st.text, st.len}; }

/// What a body throws, as the host sees it.
template <class F>
std::pair<ds_code, std::string> outcome(F&& body) {
  ds_status st{};
  const ds_code code = guard(&st, body);
  EXPECT_EQ(code, st.code);
  return {code, text_of(st)};
}

// ---- Sizes ----

TEST(Widened, FieldsBeyondTheWritersSizeAreZeroAtEverySize) {
  ds_call full;
  std::memset(&full, 0x5a, sizeof full);
  for (std::uint32_t size = 4; size <= sizeof full; ++size) {
    full.size = size;
    const ds_call got = widened(&full);
    EXPECT_EQ(got.size, sizeof got);
    const auto* bytes = reinterpret_cast<const unsigned char*>(&got);
    for (std::size_t i = 4; i < sizeof got; ++i) ASSERT_EQ(bytes[i], i < size ? 0x5a : 0) << size;
  }
}

TEST(Widened, ALongerStructIsCutAndNoneIsAllZero) {
  struct {
    ds_plan plan;
    std::uint64_t later;
  } from{};
  from.plan.size = sizeof from;
  from.plan.saved_bytes = 7;
  const ds_plan got = widened(&from.plan);
  EXPECT_EQ(got.size, sizeof got);
  EXPECT_EQ(got.saved_bytes, 7u);
  EXPECT_EQ(widened<ds_plan>(nullptr).saved_bytes, 0u);
  EXPECT_EQ(widened<ds_plan>(nullptr).size, sizeof(ds_plan));
}

TEST(HandOut, NeverWritesBeyondTheRoomAndSaysWhatItWrote) {
  ds_plan value;
  std::memset(&value, 0x11, sizeof value);
  alignas(8) unsigned char room[sizeof value + 16];
  for (std::uint32_t size = 4; size <= sizeof value + 16; ++size) {
    std::memset(room, 0x5a, sizeof room);
    auto* to = reinterpret_cast<ds_plan*>(room);
    to->size = size;
    hand_out(value, to);
    const std::size_t written = std::min<std::size_t>(size, sizeof value);
    EXPECT_EQ(to->size, written);
    for (std::size_t i = 4; i < sizeof room; ++i)
      ASSERT_EQ(room[i], i < written ? 0x11 : 0x5a) << i;
  }
}

TEST(HandOut, RefusesNoRoomWithoutTouchingIt) {
  alignas(8) unsigned char room[sizeof(ds_plan)];
  for (std::uint32_t size = 0; size < 4; ++size) {
    std::memset(room, 0x5a, sizeof room);
    reinterpret_cast<ds_plan*>(room)->size = size;
    const auto got = outcome([&] { hand_out(ds_plan{}, reinterpret_cast<ds_plan*>(room)); });
    EXPECT_EQ(got.first, DS_E_ARG);
    EXPECT_EQ(reinterpret_cast<ds_plan*>(room)->size, size);
  }
  EXPECT_EQ(outcome([] { hand_out<ds_plan>({}, nullptr); }).first, DS_E_ARG);
}

// ---- Errors ----

TEST(Guard, MapsEveryExceptionToACode) {
  EXPECT_EQ(outcome([] {}).first, DS_OK);
  EXPECT_EQ(outcome([] { throw error(DS_E_SHAPE, "w: bad"); }),
            std::pair(ds_code{DS_E_SHAPE}, std::string("w: bad")));
  EXPECT_EQ(outcome([] { throw std::bad_alloc(); }).first, DS_E_NOMEM);
  EXPECT_EQ(outcome([] { throw std::runtime_error("why"); }),
            std::pair(ds_code{DS_E_INTERNAL}, std::string("why")));
  EXPECT_EQ(outcome([] { throw 7; }).first, DS_E_INTERNAL);
  EXPECT_EQ(outcome([] { throw error(DS_OK, "a failure is no success"); }).first, DS_E_INTERNAL);
  EXPECT_EQ(guard(nullptr, [] { throw error(DS_E_DATA, "nobody reads it"); }), DS_E_DATA);
}

TEST(Guard, LongTextsAreCutBetweenCharacters) {
  const auto [code, text] = outcome([] { throw error(DS_E_DATA, std::string(239, 'x') + "äää"); });
  EXPECT_EQ(text, std::string(239, 'x'));
  EXPECT_EQ(outcome([] { throw error(DS_E_DATA, std::string(500, 'y')); }).second.size(), 240u);
  EXPECT_EQ(outcome([] { throw error(DS_E_DATA, ""); }).second, "");
}

// ---- Tensors ----

struct Matrix {
  std::vector<float> data;
  std::vector<std::int64_t> shape{2, 3}, strides{3, 1};
  ds_tensor t{};
  Matrix() : data(6) {
    std::iota(data.begin(), data.end(), 1.0f);
    t.data = data.data();
    t.device = {DS_DEV_CPU, 0};
    t.ndim = 2;
    t.dtype = {DS_FLOAT, 32, 1};
    t.shape = shape.data();
    t.strides = strides.data();
    t.bytes = 24;
  }
};

std::pair<ds_code, std::string> read_matrix(const Matrix& m, std::int64_t rows = -1) {
  return outcome([&] { (void)flat<const float>(m.t, "w", {rows, 3}); });
}

TEST(Flat, GivesTheElementsFromTheOffsetOn) {
  Matrix m;
  EXPECT_THAT(flat<const float>(m.t, "w"), ElementsAre(1, 2, 3, 4, 5, 6));
  m.shape = {1, 3};
  m.t.byte_offset = 12;
  EXPECT_THAT(flat<float>(m.t, "w", {1, -1}), ElementsAre(4, 5, 6));
  m.shape = {0, 3};
  m.t.data = nullptr;
  EXPECT_TRUE(flat<const float>(m.t, "w").empty());
}

TEST(Flat, RefusesTheWrongTypeByName) {
  Matrix m;
  EXPECT_EQ(outcome([&] { (void)flat<const std::int32_t>(m.t, "ids"); }),
            std::pair(ds_code{DS_E_DTYPE},
                      std::string("ids: type code 2 with 32 bits, expected code 0 with 32")));
  m.t.dtype.lanes = 4;
  EXPECT_EQ(read_matrix(m).first, DS_E_DTYPE);
  EXPECT_EQ(outcome([] { (void)flat<const float>(nullptr, "w"); }).second, "w: missing");
}

TEST(Flat, RefusesShapesThatDoNotFit) {
  Matrix m;
  EXPECT_EQ(read_matrix(m, 4),
            std::pair(ds_code{DS_E_SHAPE}, std::string("w: [2, 3], expected [4, 3]")));
  EXPECT_EQ(outcome([&] { (void)flat<const float>(m.t, "w", {6}); }).first, DS_E_SHAPE);
  m.strides = {4, 1};
  EXPECT_THAT(read_matrix(m).second, HasSubstr("not contiguous"));
  m.strides = {3, 1};
  m.shape[0] = -1;
  EXPECT_EQ(read_matrix(m).first, DS_E_SHAPE);
  m.t.ndim = 9;
  EXPECT_EQ(read_matrix(m).first, DS_E_SHAPE);
}

TEST(Flat, RefusesToReadBeyondTheBuffer) {
  Matrix m;
  m.t.bytes = 23;
  EXPECT_THAT(read_matrix(m).second, HasSubstr("buffer of 23 bytes is too small"));
  m.t.bytes = 24;
  m.t.byte_offset = 4;
  EXPECT_EQ(read_matrix(m).first, DS_E_SHAPE);
  m.t.byte_offset = std::numeric_limits<std::uint64_t>::max() - 3;  // would wrap
  EXPECT_EQ(read_matrix(m).first, DS_E_SHAPE);
  m.t.byte_offset = 0;
  m.t.data = nullptr;
  EXPECT_EQ(read_matrix(m).first, DS_E_ARG);
}

TEST(Flat, RefusesShapesWhoseProductOverflows) {
  Matrix m;
  const std::int64_t large = std::int64_t{1} << 61;
  m.shape = {8, large};  // 2^64 elements
  m.strides = {large, 1};
  EXPECT_THAT(outcome([&] { (void)flat<const float>(m.t, "w"); }).second, HasSubstr("overflows"));
  m.shape = {1, large};  // 2^61 elements are 2^63 bytes
  EXPECT_EQ(outcome([&] { (void)flat<const float>(m.t, "w"); }).first, DS_E_SHAPE);
}

TEST(Flat, RefusesReadOnlyPackedAndDeviceMemory) {
  Matrix m;
  m.t.flags = DS_T_READONLY;
  EXPECT_EQ(read_matrix(m).first, DS_OK);
  EXPECT_THAT(outcome([&] { (void)flat<float>(m.t, "w"); }).second, HasSubstr("read-only"));
  m.t.packing = DS_PACK_PANEL_F32;
  EXPECT_THAT(read_matrix(m).second, HasSubstr("packed"));
  m.t.packing = DS_PACK_NONE;
  m.t.device.type = DS_DEV_CUDA;
  EXPECT_EQ(read_matrix(m).first, DS_E_DEVICE);
}

// ---- From a class to a component ----

struct base {
  explicit base(context) {}
};
struct an_encoder : base {
  using base::base;
  static constexpr std::string_view name = "e";
  static constexpr std::uint32_t modalities = 1u << DS_MOD_AUDIO;
  ds_plan plan(const ds_encode_args&) { return {}; }
  void encode(const ds_call&, const ds_encode_args&) {}
};
struct an_attention : base {
  using base::base;
  static constexpr std::string_view name = "a";
  ds_plan plan(const ds_attn_args& a) {
    ds_plan p{};
    p.saved_bytes = a.max_rows;
    return p;
  }
  void prefill(const ds_call&, const ds_attn_args&) {}
  void decode(const ds_call&, const ds_attn_args&) {}
};
struct a_quantizer : base {
  using base::base;
  static constexpr std::string_view name = "q";
  ds_qformat format(std::int64_t, std::int64_t) { return {}; }
  void quantize(const ds_call&, std::string_view, const ds_tensor&, const ds_qweight&) {}
  void dequantize(const ds_call&, const ds_qweight&, const ds_tensor&) {}
};
struct a_learner : base {
  using base::base;
  static constexpr std::string_view name = "l";
  template <class Emit>
  void draws(const ds_call&, std::span<const ds_sample> samples, Emit&& emit) {
    for (const ds_sample& s : samples) {
      ds_draw d{};
      d.key = s.key;
      emit(d);
    }
  }
};
struct a_curriculum : base {
  using base::base;
  static constexpr std::string_view name = "c";
  std::vector<std::uint64_t> pick(const ds_call&, std::span<const ds_sample>, std::uint64_t n) {
    return std::vector<std::uint64_t>(n + extra, 5);
  }
  std::uint64_t extra = 0;
};
struct a_retriever : base {
  using base::base;
  static constexpr std::string_view name = "r";
  void put(std::uint64_t, std::string_view, const ds_tensor*, std::string_view) {}
  void erase(std::span<const std::uint64_t>) {}
  std::uint64_t commit() { return 1; }
  std::vector<ds_hit> search(const ds_call&, std::string_view, const ds_tensor*, std::string_view,
                             std::uint64_t) {
    return std::vector<ds_hit>(9);  // more than were asked for
  }
  document fetch(std::uint64_t) { return {"text", "{}"}; }
};
struct a_tool : base {
  explicit a_tool(context c)
      : base(c), limit(c.get("limit", 3)), rate(c.get("rate", 0.5)), mode(c.get("mode", "plain")) {
    c.log(DS_LOG_INFO, "a-tool", "made");
  }
  static constexpr std::string_view name = "t";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_REENTRANT;
  std::string invoke(const ds_call&, std::string_view) {
    return std::to_string(limit) + " " + std::to_string(rate) + " " + mode;
  }
  std::string save() const { return mode; }
  void restore(std::string_view bytes, std::string_view) { mode = bytes; }
  std::int64_t limit;
  double rate;
  std::string mode;
};

TEST(Kind, IsFoundByTheMembers) {
  EXPECT_EQ(kind_of<an_encoder>(), DS_KIND_ENCODER);
  EXPECT_EQ(kind_of<an_attention>(), DS_KIND_ATTENTION);
  EXPECT_EQ(kind_of<a_quantizer>(), DS_KIND_QUANTIZER);
  EXPECT_EQ(kind_of<a_learner>(), DS_KIND_LEARNER);
  EXPECT_EQ(kind_of<a_curriculum>(), DS_KIND_CURRICULUM);
  EXPECT_EQ(kind_of<a_retriever>(), DS_KIND_RETRIEVER);
  EXPECT_EQ(kind_of<a_tool>(), DS_KIND_TOOL);
  EXPECT_EQ(kind_of<base>(), 0u);
  EXPECT_EQ((plugin<a_tool, a_quantizer>::kinds()), 1u << DS_KIND_TOOL | 1u << DS_KIND_QUANTIZER);
}

TEST(Kind, OptionalFunctionsAreThereWhenTheClassHasThem) {
  EXPECT_NE(attention_table<an_attention>.decode, nullptr);
  EXPECT_EQ(attention_table<an_attention>.backward, nullptr);
  EXPECT_EQ(quantizer_table<a_quantizer>.linear, nullptr);
  EXPECT_EQ(tool_table<a_tool>.analyse, nullptr);
  EXPECT_NE(instance_ops<a_tool>.save, nullptr);
  EXPECT_EQ(instance_ops<a_tool>.health, nullptr);
  EXPECT_EQ(component<a_tool>.caps, DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_STATEFUL);
  EXPECT_EQ(component<an_encoder>.caps, DS_CAP_CPU);
}

struct Instance {
  template <class T>
  static Instance of(const ds_host* host = nullptr, const ds_config* config = nullptr) {
    Instance out;
    ds_status st{};
    EXPECT_EQ(create<T>(host, config, {DS_DEV_CPU, 0}, &out.i, &st), DS_OK) << text_of(st);
    out.destroy = instance_ops<T>.destroy;
    return out;
  }
  Instance() = default;
  Instance(Instance&& other) noexcept
      : i(std::exchange(other.i, nullptr)), destroy(other.destroy) {}
  ~Instance() {
    if (i != nullptr) destroy(i);
  }
  ds_instance* i = nullptr;
  void (*destroy)(ds_instance*) = nullptr;
};

TEST(Component, ReadsShortArgumentsAndFillsShortOutputs) {
  const Instance a = Instance::of<an_attention>();
  ds_attn_args args{};
  args.max_rows = 9;
  args.size = DS_SIZE_TO(ds_attn_args, max_rows);
  ds_plan out{};
  out.size = DS_SIZE_TO(ds_plan, saved_bytes);
  out.page_extra_bytes = 77;
  ds_status st{};
  ASSERT_EQ(attention_table<an_attention>.plan(a.i, &args, &out, &st), DS_OK);
  EXPECT_EQ(out.saved_bytes, 9u);
  EXPECT_EQ(out.page_extra_bytes, 77u) << "out of the host's sight, so not ours to write";
  args.size = 8;  // max_rows is out of sight
  ASSERT_EQ(attention_table<an_attention>.plan(a.i, &args, &out, &st), DS_OK);
  EXPECT_EQ(out.saved_bytes, 0u);
}

TEST(Component, RefusesADeviceThatItDoesNotClaim) {
  ds_instance* out = nullptr;
  ds_status st{};
  EXPECT_EQ(create<a_tool>(nullptr, nullptr, {DS_DEV_CUDA, 0}, &out, &st), DS_E_DEVICE);
  EXPECT_EQ(create<a_tool>(nullptr, nullptr, {DS_DEV_CPU, 0}, nullptr, &st), DS_E_ARG);
  EXPECT_EQ(out, nullptr);
}

TEST(Component, EmitsInOrderAndStopsWhenTheHostRefuses) {
  const Instance l = Instance::of<a_learner>();
  ds_call call{};
  call.size = sizeof call;
  std::vector<ds_sample> samples(3);
  for (std::uint64_t i = 0; i < 3; ++i) samples[i].key = 10 + i;
  std::vector<std::uint64_t> keys;
  const auto emit = [](void* ctx, const ds_draw* d) -> ds_code {
    EXPECT_EQ(d->size, sizeof *d);
    auto& all = *static_cast<std::vector<std::uint64_t>*>(ctx);
    all.push_back(d->key);
    return all.size() == 2 ? DS_E_CANCELLED : DS_OK;
  };
  ds_status st{};
  EXPECT_EQ(learner_table<a_learner>.draws(l.i, &call, samples.data(), 3, &keys, emit, &st),
            DS_E_CANCELLED);
  EXPECT_THAT(keys, ElementsAre(10, 11));
}

TEST(Component, NeverFillsMoreThanTheHostHasRoomFor) {
  ds_call call{};
  call.size = sizeof call;
  ds_status st{};
  const Instance r = Instance::of<a_retriever>();
  std::vector<ds_hit> hits(4, ds_hit{77, 0, 0});
  std::uint64_t n = 0;
  ASSERT_EQ(retriever_table<a_retriever>.search(r.i, &call, str("q"), nullptr, {}, hits.data(), 3,
                                                &n, &st),
            DS_OK);
  EXPECT_EQ(n, 3u);
  EXPECT_EQ(hits[3].id, 77u);
  const Instance c = Instance::of<a_curriculum>();
  self<a_curriculum>(c.i).extra = 1;
  std::vector<std::uint64_t> keys(3, 77);
  EXPECT_EQ(curriculum_table<a_curriculum>.pick(c.i, &call, nullptr, 0, 2, keys.data(), &n, &st),
            DS_E_INTERNAL);
  EXPECT_THAT(keys, ElementsAre(77, 77, 77));
}

// ---- The host ----

ds_code append(void* ctx, const void* bytes, std::uint64_t n) {
  static_cast<std::string*>(ctx)->append(static_cast<const char*>(bytes), n);
  return DS_OK;
}

std::string answer_of(const ds_host* host) {
  const char any = 0;
  const Instance t = Instance::of<a_tool>(host, reinterpret_cast<const ds_config*>(&any));
  std::string out;
  const ds_sink sink{sizeof sink, 0, &out, &append};
  ds_call call{};
  call.size = sizeof call;
  ds_status st{};
  EXPECT_EQ(tool_table<a_tool>.invoke(t.i, &call, {}, &sink, &st), DS_OK) << text_of(st);
  return out;
}

ds_host full_host(std::string* log) {
  ds_host host{};
  host.size = sizeof host;
  host.ctx = log;
  host.log = [](void* ctx, std::int32_t, ds_str who, ds_str text) {
    *static_cast<std::string*>(ctx) += std::string(view(who)) + ":" + std::string(view(text));
  };
  host.config_int = [](const ds_config*, const char*, std::int64_t* out) -> ds_code {
    *out = 8;
    return DS_OK;
  };
  host.config_number = [](const ds_config*, const char*, double* out) -> ds_code {
    *out = 2;
    return DS_OK;
  };
  host.config_text = [](const ds_config*, const char*, ds_str* out) -> ds_code {
    *out = str("fast");
    return DS_OK;
  };
  return host;
}

TEST(Host, IsUsedWhereItHasAFunctionAndDoneWithoutWhereNot) {
  std::string log;
  ds_host host = full_host(&log);
  EXPECT_EQ(answer_of(&host), "8 2.000000 fast");
  EXPECT_EQ(log, "a-tool:made");
  host.log_enabled = [](void*, std::int32_t) -> std::int32_t { return 0; };
  log.clear();
  (void)answer_of(&host);
  EXPECT_EQ(log, "");
  for (std::uint32_t size = 8; size <= sizeof host; size += 4) {  // cut off anywhere
    host.size = size;
    const std::string got = answer_of(&host);
    EXPECT_EQ(got.starts_with("8 "), size >= DS_SIZE_TO(ds_host, config_int)) << size;
    EXPECT_EQ(got.ends_with("plain"), size < DS_SIZE_TO(ds_host, config_text)) << size;
  }
  ds_host empty{};
  empty.size = sizeof empty;
  EXPECT_EQ(answer_of(&empty), "3 0.500000 plain");
  EXPECT_EQ(answer_of(nullptr), "3 0.500000 plain");
}

TEST(Host, SavedBytesComeBackThroughAStreamOfShortReads) {
  const Instance from = Instance::of<a_tool>(), to = Instance::of<a_tool>();
  self<a_tool>(from.i).mode.assign(10000, 'm');
  std::string bytes;
  const ds_sink sink{sizeof sink, 0, &bytes, &append};
  ds_status st{};
  ASSERT_EQ(instance_ops<a_tool>.save(from.i, &sink, &st), DS_OK);
  std::string_view rest = bytes;
  const ds_source source{sizeof source, 0, &rest,
                         [](void* ctx, void* out, std::uint64_t n, std::uint64_t* got) -> ds_code {
                           auto& left = *static_cast<std::string_view*>(ctx);
                           *got = std::min<std::uint64_t>({n, 7, left.size()});
                           std::memcpy(out, left.data(), *got);
                           left.remove_prefix(*got);
                           return DS_OK;
                         }};
  ASSERT_EQ(instance_ops<a_tool>.restore(to.i, &source, str("1.0.0"), &st), DS_OK);
  EXPECT_EQ(self<a_tool>(to.i).mode, bytes);
  const ds_sink full{sizeof full, 0, nullptr,
                     [](void*, const void*, std::uint64_t) -> ds_code { return DS_E_NOMEM; }};
  EXPECT_EQ(instance_ops<a_tool>.save(from.i, &full, &st), DS_E_NOMEM);
}

TEST(ParallelFor, ThrowsTheFirstExceptionAfterAllTasksHaveRun) {
  const auto on_threads = [](void*, std::int64_t count, ds_task_fn task, void* user) {
    std::vector<std::thread> threads;
    for (std::int64_t i = 0; i < count; ++i) threads.emplace_back(task, user, i);
    for (std::thread& t : threads) t.join();
  };
  const ds_parallel pool{sizeof pool, 4, nullptr, on_threads};
  ds_call call{};
  call.parallel = &pool;
  std::atomic<int> ran = 0;
  const auto got = outcome([&] {
    parallel_for(call, 8, [&](std::int64_t i) {
      ++ran;
      if (i % 2 == 1) throw error(DS_E_NUMERIC, "odd");
    });
  });
  EXPECT_EQ(got, std::pair(ds_code{DS_E_NUMERIC}, std::string("odd")));
  EXPECT_EQ(ran, 8);
  const std::uint32_t stop = 1;
  call.cancel = &stop;
  EXPECT_EQ(outcome([&] { check_cancelled(call); }).first, DS_E_CANCELLED);
}

// ---- The note and the entry ----

TEST(Note, HasTheBytesThatAHostLooksFor) {
  constexpr ds_note n = note("org.acme.x", 1u << DS_KIND_TOOL);
  constexpr std::string_view head("\x0b\0\0\0\x70\0\0\0\x01\0\0\0Driftstone\0\0", 24);
  EXPECT_EQ(std::string_view(reinterpret_cast<const char*>(&n), 24), head);
  EXPECT_EQ(n.abi_major, DS_ABI_MAJOR);
  EXPECT_EQ(n.abi_minor, DS_ABI_MINOR);
  EXPECT_EQ(n.kinds_mask, 128u);
  EXPECT_EQ(std::string(n.id), "org.acme.x");
  EXPECT_EQ(n.id[sizeof n.id - 1], 0);
  EXPECT_EQ(n.cpu_features & DS_CPU_AVX2,
            __builtin_cpu_supports("avx2") && DS_BUILT_AVX2 ? 1u : 0u);
}

namespace in_cpp {
DS_PLUGIN("org.acme.cpp", "1.2.3", "MIT", a_tool, a_quantizer)
}
namespace in_c {
DS_NOTE("org.acme.c", 1u << DS_KIND_TOOL);
}

TEST(Note, IsTheSameFromCAndFromCpp) {
  const ds_note from_cpp = note("org.acme.c", 1u << DS_KIND_TOOL);
  EXPECT_EQ(std::memcmp(&in_c::ds_note_, &from_cpp, sizeof from_cpp), 0);
  EXPECT_EQ(std::string(in_cpp::ds_note_.id), "org.acme.cpp");
}

TEST(Entry, GivesTheSameDescriptorEachTime) {
  const ds_host host = full_host(nullptr);
  const ds_plugin *first = nullptr, *second = nullptr;
  ds_status st{};
  ASSERT_EQ(ds_plugin_entry_v1(&host, &first, &st), DS_OK);
  ASSERT_EQ(ds_plugin_entry_v1(&host, &second, &st), DS_OK);
  EXPECT_EQ(first, second);
  EXPECT_EQ(view(first->id), "org.acme.cpp");
  EXPECT_EQ(view(first->version), "1.2.3");
  ASSERT_EQ(first->component_count, 2u);
  EXPECT_EQ(first->components[0], &component<a_tool>);
  EXPECT_EQ(ds_plugin_entry_v1(nullptr, &first, &st), DS_E_ARG);
  EXPECT_EQ(ds_plugin_entry_v1(&host, nullptr, nullptr), DS_E_ARG);
}

}  // namespace
