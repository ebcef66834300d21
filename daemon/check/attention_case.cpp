// SPDX-License-Identifier: Apache-2.0
#include "check/attention_case.h"

#include <algorithm>
#include <numeric>

namespace ds::check {
namespace {

constexpr int64_t kPageTokens = 32;

uint16_t bf16_bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return static_cast<uint16_t>(word >> 16);  // the values are exact in bf16
}

float rounded_to_bf16(float value) {
  const uint32_t word = uint32_t{bf16_bits(value)} << 16;
  float out;
  std::memcpy(&out, &word, sizeof out);
  return out;
}

std::vector<float> copy_of(const ds_tensor* t) {
  const auto* begin = static_cast<const float*>(t->data);
  return {begin, begin + t->bytes / sizeof(float)};
}

/// Pages of one side of the cache, [pages, kv_heads, 32, head_dim]. Pages are handed out from the
/// last to the first, so that a table that is not looked up gives nonsense.
struct Paged {
  std::vector<float> k, v;
  std::vector<int32_t> table, lengths;  // [batch, width], [batch]
  int64_t pages = 0, width = 0;
};

Paged paged(const AttentionCase& c) {
  Paged out;
  const auto batch = static_cast<int64_t>(c.sequences.size());
  out.width = std::max<int64_t>(1, (c.max_keys() + kPageTokens - 1) / kPageTokens);
  out.pages = out.width * batch + 1;
  const int64_t page_floats = c.kv_heads * kPageTokens * c.head_dim;
  // What no length covers is NaN: whoever reads it shows it.
  out.k.assign(static_cast<size_t>(out.pages * page_floats), std::nanf(""));
  out.v = out.k;
  int32_t next = static_cast<int32_t>(out.pages);
  for (size_t b = 0; b < c.sequences.size(); ++b) {
    for (int64_t p = 0; p < out.width; ++p) out.table.push_back(--next);
    out.lengths.push_back(static_cast<int32_t>(c.sequences[b].keys));
    for (int64_t key = 0; key < c.sequences[b].keys; ++key) {
      const int64_t page = out.table[b * static_cast<size_t>(out.width) + key / kPageTokens];
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        const int64_t to = ((page * c.kv_heads + h) * kPageTokens + key % kPageTokens) * c.head_dim;
        const int64_t from = ((c.first_key(b) + key) * c.kv_heads + h) * c.head_dim;
        std::copy_n(c.k.begin() + from, c.head_dim, out.k.begin() + to);
        std::copy_n(c.v.begin() + from, c.head_dim, out.v.begin() + to);
      }
    }
  }
  return out;
}

const ds_tensor* pages_tensor(Trial& t, const char* name, const AttentionCase& c, int64_t pages,
                              const std::vector<float>& values, bool judged) {
  std::vector<int64_t> shape = {pages, c.kv_heads, kPageTokens, c.head_dim};
  if (!c.bf16) return t.tensor(name, kF32, shape, values.data(), false, judged);
  std::vector<uint16_t> bits(values.size());
  std::transform(values.begin(), values.end(), bits.begin(), bf16_bits);
  return t.tensor(name, kBf16, shape, bits.data(), false, judged);
}

/// Arguments that serving and explain share. `judged`: the call has to notice damaged tensors.
ds_attn_args serving_args(Trial& t, const AttentionCase& c, bool judged) {
  const Paged p = paged(c);
  const auto batch = static_cast<int64_t>(c.sequences.size());
  ds_kv_view kv{};
  kv.page_tokens = static_cast<uint32_t>(kPageTokens);
  kv.k_pages = pages_tensor(t, "k_pages", c, p.pages, p.k, judged);
  kv.v_pages = pages_tensor(t, "v_pages", c, p.pages, p.v, judged);
  kv.block_table = t.tensor("block_table", kI32, {batch, p.width}, p.table.data(), false, judged);
  kv.lengths = t.tensor("lengths", kI32, {batch}, p.lengths.data());
  ds_attn_args a{};
  a.batch = static_cast<uint32_t>(batch);
  for (const auto& s : c.sequences)
    a.max_rows = std::max(a.max_rows, static_cast<uint32_t>(s.rows));
  a.max_keys = static_cast<uint32_t>(c.max_keys());
  a.q = t.tensor("q", kF32, {c.rows(), c.heads, c.head_dim}, c.q.data(), false, judged);
  a.rows = t.of("rows", kI32, {batch + 1}, c.row_starts());
  a.scale = c.scale;
  a.kv = t.give("ds_kv_view", kv);
  return a;
}

/// The plan, and the per-page state that it asks for. False = plan failed.
bool planned(Trial& t, const ds_attn_args* a, ds_plan& plan) {
  const auto table = table_of<ds_attention>(t.component);
  ds_plan* room = t.take<ds_plan>("ds_plan");
  if (!t.invoke("plan", [&](ds_status* st) { return table.plan(t.instance, a, room, st); }))
    return false;
  plan = t.taken(room);
  return !t.room_was_cut();
}

/// A plugin with state beside the pages has seen every key in an earlier call: lets it, with
/// queries of zeros for the positions before this call's. False = that call failed.
bool with_page_state(Trial& t, const AttentionCase& c, const ds_plan& plan, ds_attn_args& a) {
  if (plan.page_extra_bytes == 0) return true;
  const auto table = table_of<ds_attention>(t.component);
  const auto batch = static_cast<int64_t>(c.sequences.size());
  const Paged p = paged(c);
  ds_kv_view kv = full_struct(a.kv);
  kv.page_extra =
      t.tensor("page_extra", kU8, {p.pages, static_cast<int64_t>(plan.page_extra_bytes)}, nullptr,
               true, false);
  a.kv = t.give("ds_kv_view", kv);
  AttentionCase before = c;
  std::vector<int32_t> lengths;
  for (AttentionCase::Sequence& s : before.sequences) {
    s = {s.keys - s.rows, s.keys - s.rows};
    lengths.push_back(static_cast<int32_t>(s.keys));
  }
  if (before.rows() == 0) return true;
  const std::vector<int64_t> shape = {before.rows(), c.heads, c.head_dim};
  ds_attn_args earlier = a;
  kv.lengths = t.tensor("lengths", kI32, {batch}, lengths.data(), false, false);
  earlier.kv = t.give("ds_kv_view", kv);
  earlier.q = t.tensor("q", kF32, shape, nullptr, false, false);
  earlier.rows = t.tensor("rows", kI32, {batch + 1}, before.row_starts().data(), false, false);
  earlier.out = t.tensor("out", kF32, shape, nullptr, true, false);
  earlier.max_rows = earlier.max_keys = static_cast<uint32_t>(before.max_keys());
  ds_plan needs{};
  const ds_attn_args* args = t.give("ds_attn_args", earlier);
  if (!planned(t, args, needs)) return false;
  const ds_call* call = t.call(needs.workspace_bytes);
  return t.invoke("prefill",
                  [&](ds_status* st) { return table.prefill(t.instance, call, args, st); });
}

}  // namespace

int64_t AttentionCase::rows() const {
  return std::accumulate(sequences.begin(), sequences.end(), int64_t{0},
                         [](int64_t n, const Sequence& s) { return n + s.rows; });
}
int64_t AttentionCase::keys() const { return first_key(sequences.size()); }
int64_t AttentionCase::max_keys() const {
  int64_t out = 0;
  for (const Sequence& s : sequences) out = std::max(out, s.keys);
  return out;
}
std::vector<int32_t> AttentionCase::row_starts() const {
  std::vector<int32_t> out = {0};
  for (const Sequence& s : sequences) out.push_back(out.back() + static_cast<int32_t>(s.rows));
  return out;
}
int64_t AttentionCase::first_key(size_t sequence) const {
  int64_t out = 0;
  for (size_t i = 0; i < sequence; ++i) out += sequences[i].keys;
  return out;
}

AttentionCase random_case(std::vector<AttentionCase::Sequence> sequences, uint64_t seed,
                          bool bf16) {
  AttentionCase c;
  c.bf16 = bf16;
  c.sequences = std::move(sequences);
  std::mt19937_64 rng(seed);
  std::uniform_real_distribution<float> value(-1, 1);
  const auto fill = [&](std::vector<float>& out, int64_t n, bool round) {
    out.resize(static_cast<size_t>(n));
    for (float& x : out) x = round ? rounded_to_bf16(value(rng)) : value(rng);
  };
  fill(c.q, c.rows() * c.heads * c.head_dim, false);
  fill(c.k, c.keys() * c.kv_heads * c.head_dim, bf16);
  fill(c.v, c.keys() * c.kv_heads * c.head_dim, bf16);
  return c;
}

AttentionCase part_of(const AttentionCase& whole, size_t sequence, int64_t from, int64_t to) {
  AttentionCase c = whole;
  const AttentionCase::Sequence s = whole.sequences[sequence];
  const int64_t keys = s.keys - s.rows + to;
  c.sequences = {{to - from, keys}};
  const int64_t q_row = c.heads * c.head_dim, k_row = c.kv_heads * c.head_dim;
  const int64_t row = whole.row_starts()[sequence] + from, key = whole.first_key(sequence);
  c.q.assign(whole.q.begin() + row * q_row, whole.q.begin() + (row + to - from) * q_row);
  c.k.assign(whole.k.begin() + key * k_row, whole.k.begin() + (key + keys) * k_row);
  c.v.assign(whole.v.begin() + key * k_row, whole.v.begin() + (key + keys) * k_row);
  return c;
}

std::vector<float> serve(Trial& t, const AttentionCase& c, bool decode) {
  const auto table = table_of<ds_attention>(t.component);
  ds_attn_args a = serving_args(t, c, true);
  a.out = t.tensor("out", kF32, {c.rows(), c.heads, c.head_dim}, nullptr, true);
  ds_plan plan{};
  if (!planned(t, t.give("ds_attn_args", a), plan) || !with_page_state(t, c, plan, a)) return {};
  const ds_attn_args* args = t.give("ds_attn_args", a);
  const ds_call* call = t.call(plan.workspace_bytes);
  const auto run = decode && table.decode != nullptr ? table.decode : table.prefill;
  if (!t.invoke(decode ? "decode" : "prefill",
                [&](ds_status* st) { return run(t.instance, call, args, st); }))
    return {};
  if (a.out == nullptr) return {};
  t.add_output(a.out);
  return copy_of(a.out);
}

std::vector<uint8_t> explain(Trial& t, const AttentionCase& c) {
  const auto table = table_of<ds_attention>(t.component);
  ds_attn_args a = serving_args(t, c, false);
  a.out = t.tensor("out", kF32, {c.rows(), c.heads, c.head_dim}, nullptr, true, false);
  ds_plan plan{};
  if (!planned(t, t.give("ds_attn_args", a), plan) || !with_page_state(t, c, plan, a)) return {};
  const ds_attn_args* args = t.give("ds_attn_args", a);
  const ds_tensor* read = t.tensor("read", kU8, {c.rows(), c.heads, c.max_keys()}, nullptr, true);
  const ds_call* call = t.call(plan.workspace_bytes);
  if (!t.invoke("explain",
                [&](ds_status* st) { return table.explain(t.instance, call, args, read, st); }) ||
      read == nullptr)
    return {};
  t.add_output(read);
  const auto* begin = static_cast<const uint8_t*>(read->data);
  return {begin, begin + read->bytes};
}

TrainResult train(Trial& t, const AttentionCase& c, const std::vector<float>& dout) {
  const auto table = table_of<ds_attention>(t.component);
  const auto batch = static_cast<int64_t>(c.sequences.size());
  const int64_t k_row = c.kv_heads * c.head_dim;
  std::vector<float> k, v;
  std::vector<const ds_tensor*> prefix_k, prefix_v;
  for (size_t b = 0; b < c.sequences.size(); ++b) {
    const auto [rows, keys] = c.sequences[b];
    const int64_t prefix = keys - rows, at = c.first_key(b);
    const auto append = [&](std::vector<float>& to, const std::vector<float>& from) {
      to.insert(to.end(), from.begin() + (at + prefix) * k_row, from.begin() + (at + keys) * k_row);
    };
    append(k, c.k);
    append(v, c.v);
    const auto frozen = [&](const char* name, const std::vector<float>& from) -> const ds_tensor* {
      if (prefix == 0) return nullptr;
      return t.tensor(name, kF32, {prefix, c.kv_heads, c.head_dim}, from.data() + at * k_row, false,
                      false);
    };
    prefix_k.push_back(frozen("prefix_k", c.k));
    prefix_v.push_back(frozen("prefix_v", c.v));
  }
  const std::vector<int64_t> q_shape = {c.rows(), c.heads, c.head_dim},
                             k_shape = {c.rows(), c.kv_heads, c.head_dim};
  ds_train_view view{};
  view.k = t.of("k", kF32, k_shape, k);
  view.v = t.of("v", kF32, k_shape, v);
  view.prefix_k = prefix_k.data();
  view.prefix_v = prefix_v.data();
  ds_attn_args a{};
  a.batch = static_cast<uint32_t>(batch);
  for (const auto& s : c.sequences)
    a.max_rows = std::max(a.max_rows, static_cast<uint32_t>(s.rows));
  a.max_keys = static_cast<uint32_t>(c.max_keys());
  a.q = t.of("q", kF32, q_shape, c.q);
  a.rows = t.of("rows", kI32, {batch + 1}, c.row_starts());
  a.scale = c.scale;
  a.train = t.give("ds_train_view", view);
  a.out = t.tensor("out", kF32, q_shape, nullptr, true);
  ds_plan plan{};
  if (!planned(t, t.give("ds_attn_args", a), plan)) return {};
  a.saved = t.memory(plan.saved_bytes);
  const ds_call* call = t.call(plan.workspace_bytes);
  const ds_attn_args* args = t.give("ds_attn_args", a);
  if (!t.invoke("prefill",
                [&](ds_status* st) { return table.prefill(t.instance, call, args, st); }))
    return {};
  TrainResult out;
  if (a.out == nullptr) return out;
  t.add_output(a.out);
  out.out = copy_of(a.out);
  if (table.backward == nullptr || dout.empty()) return out;
  a.dout = t.of("dout", kF32, q_shape, dout);
  a.dq = t.tensor("dq", kF32, q_shape, nullptr, true);
  a.dk = t.tensor("dk", kF32, k_shape, nullptr, true);
  a.dv = t.tensor("dv", kF32, k_shape, nullptr, true);
  call = t.call(plan.workspace_bytes);
  args = t.give("ds_attn_args", a);
  if (!t.invoke("backward",
                [&](ds_status* st) { return table.backward(t.instance, call, args, st); }))
    return out;
  for (const ds_tensor* d : {a.dq, a.dk, a.dv}) {
    if (d == nullptr) return out;
    t.add_output(d);
  }
  out.dq = copy_of(a.dq);
  out.dk = copy_of(a.dk);
  out.dv = copy_of(a.dv);
  return out;
}

namespace {

AttentionCase case_of(const Trial& t, bool bf16, bool decode) {
  const int64_t n = t.options.scale;
  if (t.options.empty) return random_case({{0, 3}}, t.options.content, bf16);
  if (decode) return random_case({{1, 37 * n}, {1, 1}, {1, 64 * n}}, t.options.content, bf16);
  return random_case({{7 * n, 37 * n}, {5, 5}, {33 * n, 64 * n}}, t.options.content, bf16);
}

void serve_f32(Trial& t) { serve(t, case_of(t, false, false)); }
void serve_bf16(Trial& t) { serve(t, case_of(t, true, false)); }
void decode_rows(Trial& t) { serve(t, case_of(t, true, !t.options.empty), true); }
void explain_rows(Trial& t) { explain(t, case_of(t, false, false)); }
void train_rows(Trial& t) {
  const AttentionCase c = case_of(t, false, false);
  std::vector<float> dout(c.q.size());
  std::mt19937_64 rng(t.options.content + 1);
  for (float& x : dout) x = std::uniform_real_distribution<float>(-1, 1)(rng);
  train(t, c, dout);
}

ds_attention attention(const ds_component& c) { return table_of<ds_attention>(c); }

}  // namespace

std::vector<Operation> attention_operations() {
  const auto always = [](const ds_component&) { return true; };
  return {
      {"serve-f32", always, serve_f32},
      {"serve-bf16", always, serve_bf16},
      {"decode", [](const ds_component& c) { return attention(c).decode != nullptr; }, decode_rows},
      {"train", [](const ds_component& c) { return attention(c).backward != nullptr; }, train_rows},
      {"explain", [](const ds_component& c) { return attention(c).explain != nullptr; },
       explain_rows},
  };
}

}  // namespace ds::check
