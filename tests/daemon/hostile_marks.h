// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace ds {

constexpr int kMarkDescriptor = 777;
/// What of hostile_plugin.cpp has run.
constexpr char kMarkResolver = 'r', kMarkInit = 'i', kMarkConstructor = 'c';

}  // namespace ds
