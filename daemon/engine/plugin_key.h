// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "plugin/library.h"
#include "storage/hash.h"

namespace ds {

/// What a component computes depends on: its file, name and config. Equal keys give equal bits.
inline uint64_t plugin_key(const PluginInstance& plugin) {
  return first_word(sha256(plugin.library().sha256() + " " + std::string(plugin.name()) + " " +
                           canonical_json(plugin.config())));
}

}  // namespace ds
