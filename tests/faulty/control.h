// SPDX-License-Identifier: Apache-2.0
// A device for tests that fails when it is told to: the CPU's kernels behind the face of the CUDA
// backend, with memory that is not the host's to use, a limit of it, and a failure that stays.
//
// It is a libds_cuda.so of its own, so that a daemon takes it as it is
// (tests/e2e/gpu_faults_test.py): where $DS_FAULTY_DEVICE names a folder, a file `fault` there,
// which is taken away, makes the device fail, and `memory` holds the limit in bytes.
#pragma once

#include <atomic>
#include <cstdint>

namespace ds::test {

struct FaultyControl {
  // Set by tests.
  std::atomic<int64_t> fail_at_call{0};          ///< the nth op from now fails, for good; 0: none
  std::atomic<int64_t> refuse_at_allocation{0};  ///< the nth from now finds no memory; 0: none
  std::atomic<int64_t> refuse_from_bytes{0};     ///< larger ones find none; 0: all do
  std::atomic<int64_t> limit_bytes{0};           ///< of all together; 0: none
  // Told to tests.
  std::atomic<int64_t> calls{0}, allocations{0}, refused{0}, bytes{0};
  std::atomic<bool> failed{false};
  /// As new. Nothing may be computing.
  void reset() {
    fail_at_call = refuse_at_allocation = refuse_from_bytes = limit_bytes = 0;
    calls = allocations = refused = 0;
    failed = false;
  }
};

}  // namespace ds::test

extern "C" ds::test::FaultyControl* ds_faulty_control();
