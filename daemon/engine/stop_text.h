// SPDX-License-Identifier: Apache-2.0
// Where generated text ends: finds stop strings that may span tokens and holds back what could
// still become one, so that nothing is ever shown and taken back. The outcome depends on the text
// alone, never on how it was cut into pieces.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace ds {

class StopText {
 public:
  explicit StopText(std::vector<std::string> stop) : stop_(std::move(stop)) {}  ///< none empty

  /// Text that may be shown now. The stop string that ends first decides; if two end together, the
  /// longer. After a stop nothing more comes out.
  std::string push(std::string_view text);
  /// The held-back rest, when generation ended for another reason.
  std::string flush();
  bool stopped() const { return stopped_; }

 private:
  size_t held_back() const;  ///< bytes at the end of pending_ that begin some stop string

  std::vector<std::string> stop_;
  std::string pending_;
  bool stopped_ = false;
};

}  // namespace ds
