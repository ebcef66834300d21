// SPDX-License-Identifier: Apache-2.0
// Values one after the other in bytes that another process reads: no pointers, every read within
// bounds. A string is its length and its bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

namespace ds {

class FlatWriter {
 public:
  template <class T>
  void put(T value) {
    static_assert(std::is_arithmetic_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void put_text(std::string_view text) {
    put<uint64_t>(text.size());
    bytes_.append(text);
  }
  void put_raw(std::string_view bytes) { bytes_.append(bytes); }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

/// The bytes are hostile. After the first read that does not fit, or fail(), all reads give zero
/// and ok() is false.
class FlatReader {
 public:
  explicit FlatReader(std::string_view bytes) : left_(bytes) {}

  template <class T>
  T get() {
    static_assert(std::is_arithmetic_v<T> && !std::is_same_v<T, bool>);
    T value{};
    if (left_.size() < sizeof value) {
      fail("it ends too early");
      return value;
    }
    std::memcpy(&value, left_.data(), sizeof value);
    left_.remove_prefix(sizeof value);
    return value;
  }
  std::string_view get_text() {
    const auto n = get<uint64_t>();
    if (n > left_.size()) {
      fail("a length is beyond its end");
      return {};
    }
    const std::string_view text = left_.substr(0, static_cast<size_t>(n));
    left_.remove_prefix(static_cast<size_t>(n));
    return text;
  }
  /// A count of things that take at least `each` bytes.
  uint64_t get_count(uint64_t each) {
    const auto n = get<uint64_t>();
    if (n <= left_.size() / each) return n;
    fail("a count is beyond its end");
    return 0;
  }
  /// `what` is constant text.
  void fail(const char* what) {
    if (what_ == nullptr) what_ = what;
    left_ = {};
  }
  bool ok() const { return what_ == nullptr; }
  bool at_end() const { return left_.empty(); }
  const char* why() const { return what_ != nullptr ? what_ : ""; }

 private:
  std::string_view left_;
  const char* what_ = nullptr;
};

}  // namespace ds
