// SPDX-License-Identifier: Apache-2.0
// Puts the device of tests/faulty in the place of the CPU for the Machines that are made while it
// lives.
#pragma once

#include <dlfcn.h>

#include <cstdlib>

#include "ds/status.h"
#include "tests/faulty/control.h"

namespace ds::test {

class FaultyDevice {
 public:
  FaultyDevice() {
    // By the driver's own name the loader then finds it.
    DS_CHECK(dlopen(DS_FAULTY_DRIVER, RTLD_NOW) != nullptr);
    void* const backend = dlopen(DS_FAULTY_BACKEND, RTLD_NOW);
    DS_CHECK(backend != nullptr);
    const auto entry = reinterpret_cast<FaultyControl* (*)()>(dlsym(backend, "ds_faulty_control"));
    DS_CHECK(entry != nullptr);
    control_ = entry();
    control_->reset();
    setenv("DS_TEST_DEVICE", "cuda:0", 1);
    setenv("DS_TEST_BACKEND", DS_FAULTY_BACKEND, 1);
  }
  ~FaultyDevice() {
    unsetenv("DS_TEST_DEVICE");
    unsetenv("DS_TEST_BACKEND");
  }
  FaultyControl* operator->() const { return control_; }

 private:
  FaultyControl* control_;
};

}  // namespace ds::test
