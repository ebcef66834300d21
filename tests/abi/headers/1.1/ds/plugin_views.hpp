// SPDX-License-Identifier: Apache-2.0
// Part of ds/plugin.hpp: reading what calls bring. The memory of a quantized weight, a trainable
// tensor of the plugin's own, keys and values of an attention call wherever they lie.
#pragma once

#ifndef DS_PLUGIN_H
#error "include ds/plugin.hpp"
#endif

namespace ds::sdk {

template <class T>
std::span<T> elements_of(void* data, std::uint64_t bytes, std::string_view name,
                         std::int64_t count) {
  if (count < 0 || bytes / sizeof(T) < static_cast<std::uint64_t>(count))
    throw error(DS_E_SHAPE, std::string(name) + ": " + std::to_string(bytes) + " bytes, expected " +
                                std::to_string(count) + " elements of " +
                                std::to_string(sizeof(T)));
  if (data == nullptr && count > 0) throw error(DS_E_ARG, std::string(name) + ": missing");
  return {static_cast<T*>(data), static_cast<std::size_t>(count)};
}
/// The first `count` elements of a weight's memory, checked against its format's bytes.
template <class T>
std::span<T> packed(const ds_qweight& q, std::int64_t count) {
  return elements_of<T>(q.packed, widened(q.format).packed_bytes, "packed", count);
}
template <class T>
std::span<T> scales(const ds_qweight& q, std::int64_t count) {
  return elements_of<T>(q.scales, widened(q.format).scale_bytes, "scales", count);
}
template <class T>
std::span<T> zeros(const ds_qweight& q, std::int64_t count) {
  return elements_of<T>(q.zeros, widened(q.format).zero_bytes, "zeros", count);
}

/// The call's workspace as `count` objects of T, checked against what the host gave.
template <class T>
std::span<T> workspace(const ds_call& call, std::int64_t count) {
  return elements_of<T>(call.workspace, call.workspace_bytes, "workspace", count);
}

/// A trainable FP32 tensor, zero at first. A class with some lists them:
///   std::array<const ds_parameter*, 1> all{weight.parameter()};
///   std::span<const ds_parameter* const> parameters() { return all; }
/// The host keeps the addresses, so it is neither copied nor moved.
class trainable {
 public:
  trainable(std::string_view name, std::vector<std::int64_t> shape)
      : name_(name), shape_(std::move(shape)), strides_(shape_.size()) {
    std::int64_t count = 1;
    for (std::size_t i = shape_.size(); i-- > 0;) {
      strides_[i] = count;
      if (shape_[i] < 0 || __builtin_mul_overflow(count, shape_[i], &count))
        throw error(DS_E_SHAPE, name_ + ": " + shape_text(shape_.data(), shape_.size()));
    }
    value_.resize(static_cast<std::size_t>(count));
    gradient_.resize(value_.size());
    value_tensor_ = tensor_over(value_);
    gradient_tensor_ = tensor_over(gradient_);
    parameter_.size = sizeof parameter_;
    parameter_.name = str(name_);
    parameter_.value = &value_tensor_;
    parameter_.gradient = &gradient_tensor_;
  }
  trainable(const trainable&) = delete;
  trainable& operator=(const trainable&) = delete;

  std::span<float> value() { return value_; }
  std::span<const float> value() const { return value_; }
  std::span<float> gradient() { return gradient_; }
  const ds_parameter* parameter() const { return &parameter_; }

 private:
  ds_tensor tensor_over(std::vector<float>& data) const {
    ds_tensor t{};
    t.data = data.data();
    t.device = {DS_DEV_CPU, 0};
    t.ndim = static_cast<std::int32_t>(shape_.size());
    t.dtype = dtype_of<float>();
    t.shape = shape_.data();
    t.strides = strides_.data();
    t.bytes = data.size() * sizeof(float);
    return t;
  }

  std::string name_;
  std::vector<std::int64_t> shape_, strides_;
  std::vector<float> value_, gradient_;
  ds_tensor value_tensor_{}, gradient_tensor_{};
  ds_parameter parameter_{};
};

/// An attention call, checked once, then read by sequence, head and position: the pages of the
/// cache when serving (FP32 or BF16), the packed tensors and their prefixes when training. Holds no
/// memory of its own; lives as long as the call.
class attention_view {
 public:
  explicit attention_view(const ds_attn_args& a)
      : rows(dim(a.q, "q", 3, 0)),
        heads(dim(a.q, "q", 3, 1)),
        head_dim(dim(a.q, "q", 3, 2)),
        batch(a.batch),
        q_(flat<const float>(a.q, "q")),
        row_of_(flat<const std::int32_t>(a.rows, "rows", {a.batch + std::int64_t{1}})) {
    if ((a.kv == nullptr) == (a.train == nullptr))
      throw error(DS_E_ARG, "exactly one of kv and train is expected");
    bool ascending = row_of_.front() == 0 && row_of_.back() == rows;
    for (std::size_t b = 0; b + 1 < row_of_.size(); ++b)
      ascending = ascending && row_of_[b] <= row_of_[b + 1];
    if (!ascending)
      throw error(DS_E_SHAPE, "rows: not ascending from 0 to " + std::to_string(rows));
    if (a.kv != nullptr) {
      serve(widened(a.kv));
    } else {
      train(widened(a.train));
    }
    if (kv_heads <= 0 || heads % kv_heads != 0)
      throw error(DS_E_SHAPE, std::to_string(heads) + " query heads over " +
                                  std::to_string(kv_heads) + " key heads");
  }

  std::int64_t rows, heads, head_dim, batch, kv_heads = 0;

  /// Rows of sequence b: [row_begin(b), row_end(b)).
  std::int64_t row_begin(std::int64_t b) const { return row_of_[std::size_t(b)]; }
  std::int64_t row_end(std::int64_t b) const { return row_of_[std::size_t(b) + 1]; }
  /// The sequence of a row.
  std::int64_t sequence_of(std::int64_t row) const {
    return std::upper_bound(row_of_.begin(), row_of_.end(), row) - row_of_.begin() - 1;
  }
  /// Position of a row of sequence b; it may use the keys 0 .. position.
  std::int64_t position(std::int64_t b, std::int64_t row) const {
    const std::int64_t before =
        serving() ? lengths_[std::size_t(b)] - (row_end(b) - row_begin(b)) : prefix_tokens(b);
    return before + row - row_begin(b);
  }
  std::span<const float> query(std::int64_t row, std::int64_t head) const {
    return q_.subspan(std::size_t((row * heads + head) * head_dim), std::size_t(head_dim));
  }
  /// Key (value) at a position as FP32 into out [head_dim]. `head` is the query's.
  void key(std::int64_t b, std::int64_t head, std::int64_t position, float* out) const {
    read(k_, prefix_k_, b, head, position, out);
  }
  void value(std::int64_t b, std::int64_t head, std::int64_t position, float* out) const {
    read(v_, prefix_v_, b, head, position, out);
  }

 private:
  struct Elements {  // exactly one is there
    std::span<const float> f32;
    std::span<const bf16> half;
  };

  static Elements elements(const ds_tensor* t, std::string_view name,
                           std::initializer_list<std::int64_t> shape) {
    if (t != nullptr && t->dtype.code == DS_BFLOAT) return {{}, flat<const bf16>(t, name, shape)};
    return {flat<const float>(t, name, shape), {}};
  }

  void serve(const ds_kv_view& kv) {
    if (kv.k_scale != nullptr || kv.v_scale != nullptr)
      throw error(DS_E_UNSUPPORTED, "kv: a quantized cache");
    page_tokens_ = kv.page_tokens;
    pages_ = dim(kv.k_pages, "k_pages", 4, 0);
    kv_heads = dim(kv.k_pages, "k_pages", 4, 1);
    k_ = elements(kv.k_pages, "k_pages", {pages_, kv_heads, page_tokens_, head_dim});
    v_ = elements(kv.v_pages, "v_pages", {pages_, kv_heads, page_tokens_, head_dim});
    table_width_ = dim(kv.block_table, "block_table", 2, 1);
    table_ = flat<const std::int32_t>(kv.block_table, "block_table", {batch, table_width_});
    lengths_ = flat<const std::int32_t>(kv.lengths, "lengths", {batch});
    for (std::int64_t b = 0; b < batch; ++b) {
      const std::int64_t n = lengths_[std::size_t(b)];
      if (n < row_end(b) - row_begin(b) || n > table_width_ * page_tokens_)
        throw error(DS_E_SHAPE, "lengths[" + std::to_string(b) + "]: " + std::to_string(n) +
                                    " keys with " + std::to_string(row_end(b) - row_begin(b)) +
                                    " rows and " + std::to_string(table_width_) + " pages");
    }
  }

  void train(const ds_train_view& t) {
    kv_heads = dim(t.k, "k", 3, 1);
    k_ = elements(t.k, "k", {rows, kv_heads, head_dim});
    v_ = elements(t.v, "v", {rows, kv_heads, head_dim});
    prefix_k_ = t.prefix_k;
    prefix_v_ = t.prefix_v;
  }

  bool serving() const { return page_tokens_ != 0; }
  std::int64_t prefix_tokens(std::int64_t b) const {
    const ds_tensor* t = prefix_k_ != nullptr ? prefix_k_[b] : nullptr;
    return t != nullptr ? dim(t, "prefix_k", 3, 0) : 0;
  }

  void read(const Elements& all, const ds_tensor* const* prefix, std::int64_t b, std::int64_t head,
            std::int64_t position, float* out) const {
    const std::int64_t kv_head = head / (heads / kv_heads);
    if (serving()) {
      const std::int64_t page = table_[std::size_t(b * table_width_ + position / page_tokens_)];
      if (page < 0 || page >= pages_)
        throw error(DS_E_ARG,
                    "block_table: page " + std::to_string(page) + " of " + std::to_string(pages_));
      copy(all, ((page * kv_heads + kv_head) * page_tokens_ + position % page_tokens_), out);
      return;
    }
    const std::int64_t before = prefix_tokens(b);
    if (position >= before) {
      copy(all, (row_begin(b) + position - before) * kv_heads + kv_head, out);
    } else {
      copy(
          elements(prefix != nullptr ? prefix[b] : nullptr, "prefix", {before, kv_heads, head_dim}),
          position * kv_heads + kv_head, out);
    }
  }
  void copy(const Elements& all, std::int64_t vector, float* out) const {
    const auto at = static_cast<std::size_t>(vector * head_dim);
    const auto n = static_cast<std::size_t>(head_dim);
    if (!all.f32.empty()) {
      std::copy_n(all.f32.begin() + static_cast<std::ptrdiff_t>(at), n, out);
    } else {
      for (std::size_t i = 0; i < n; ++i) out[i] = static_cast<float>(all.half[at + i]);
    }
  }

  std::span<const float> q_;
  std::span<const std::int32_t> row_of_, table_, lengths_;
  Elements k_, v_;
  const ds_tensor* const* prefix_k_ = nullptr;
  const ds_tensor* const* prefix_v_ = nullptr;
  std::int64_t page_tokens_ = 0, pages_ = 0, table_width_ = 0;  // 0 when training
};

/// A learner's vectors over the model's weights: handles, see ds_vectors. Throws what the host
/// refuses.
class vectors {
 public:
  explicit vectors(const ds_vectors& host) : host_(host) {}

  /// Zero at first. With a name it is kept with the version: the next round's make() finds it.
  std::int32_t make(std::string_view name = {}) const {
    std::int32_t handle = 0;
    check(host_.make(host_.ctx, ds_str{name.data(), name.size()}, &handle), "make");
    return handle;
  }
  void copy(std::int32_t from, std::int32_t to) const {
    check(host_.copy(host_.ctx, from, to), "copy");
  }
  void scale(float a, std::int32_t x) const { check(host_.scale(host_.ctx, a, x), "scale"); }
  /// y += a * x
  void axpy(float a, std::int32_t x, std::int32_t y) const {
    check(host_.axpy(host_.ctx, a, x, y), "axpy");
  }
  /// y += a * x * z, by element
  void multiply(float a, std::int32_t x, std::int32_t z, std::int32_t y) const {
    check(host_.multiply(host_.ctx, a, x, z, y), "multiply");
  }
  double dot(std::int32_t x, std::int32_t y) const {
    double out = 0;
    check(host_.dot(host_.ctx, x, y, &out), "dot");
    return out;
  }

 private:
  static void check(ds_code code, const char* what) {
    if (code != DS_OK) throw error(code, std::string("vectors: ") + what + " was refused");
  }
  const ds_vectors& host_;
};

}  // namespace ds::sdk
