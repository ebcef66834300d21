// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include <gtest/gtest.h>

#include "kernels/pool.h"

namespace ds {
namespace {

TEST(Device, ASharedContextOfTheCpuIsThePoolAlone) {
  const auto device = Device::open("cpu", "");
  ASSERT_TRUE(device.ok());
  Pool pool(1);
  pool.gpu_share().hold(GpuPart::kNone);
  pool.begin_engine_step();  // whoever asked the share would wait from here on
  for (GpuShare* share : {static_cast<GpuShare*>(nullptr), &pool.gpu_share()}) {
    const auto context = (*device)->context(pool.background(), false, share);
    ASSERT_TRUE(context.ok());
    EXPECT_EQ(context->parallel, pool.background());
    EXPECT_EQ(context->stream, nullptr);
    int to = 0;
    const int from = 7;
    (*device)->ops().copy(*context, &to, &from, sizeof from);
    EXPECT_EQ((*device)->ops().finish(*context), nullptr);
    EXPECT_EQ(to, from);
  }
  pool.end_engine_step();
  EXPECT_EQ((*device)->why_not_parted(), "");
}

}  // namespace
}  // namespace ds
