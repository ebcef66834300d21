// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace ds {

/// Whether 512-bit dot products of bytes (vpdpbusd) may be used: some AVX-512 machines lack them.
bool cpu_has_vnni();

}  // namespace ds
