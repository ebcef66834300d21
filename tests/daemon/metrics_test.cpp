// SPDX-License-Identifier: Apache-2.0
#include "metrics.h"

#include <gtest/gtest.h>

#include <thread>

namespace ds {
namespace {

TEST(Metrics, RendersPrometheusText) {
  Metrics metrics;
  metrics.counter("ds_a_total", "Things\nwith \\").add(2);
  metrics.gauge("ds_b", "A gauge", {{"state", "x\"y"}}).set(0.1);
  Histogram& h = metrics.histogram("ds_c_seconds", "Times", {{"class", "batch"}}, {0.5, 1});
  h.observe(0.5);
  h.observe(0.75);
  h.observe(9);
  EXPECT_EQ(metrics.render(),
            "# HELP ds_a_total Things\\nwith \\\\\n"
            "# TYPE ds_a_total counter\n"
            "ds_a_total 2\n"
            "# HELP ds_b A gauge\n"
            "# TYPE ds_b gauge\n"
            "ds_b{state=\"x\\\"y\"} 0.1\n"
            "# HELP ds_c_seconds Times\n"
            "# TYPE ds_c_seconds histogram\n"
            "ds_c_seconds_bucket{class=\"batch\",le=\"0.5\"} 1\n"
            "ds_c_seconds_bucket{class=\"batch\",le=\"1\"} 2\n"
            "ds_c_seconds_bucket{class=\"batch\",le=\"+Inf\"} 3\n"
            "ds_c_seconds_sum{class=\"batch\"} 10.25\n"
            "ds_c_seconds_count{class=\"batch\"} 3\n");
}

TEST(Metrics, SameNameAndLabelsAreOneInstrument) {
  Metrics metrics;
  EXPECT_EQ(&metrics.counter("ds_a_total", ""), &metrics.counter("ds_a_total", ""));
  EXPECT_NE(&metrics.gauge("ds_b", "", {{"s", "1"}}), &metrics.gauge("ds_b", "", {{"s", "2"}}));
}

TEST(Metrics, CollectorsRunBeforeRendering) {
  Metrics metrics;
  metrics.on_collect([&] { metrics.gauge("ds_late", "").set(7); });
  EXPECT_NE(metrics.render().find("ds_late 7\n"), std::string::npos);
}

TEST(Metrics, QuantilesInterpolate) {
  Histogram h({1, 2, 4});
  EXPECT_EQ(h.quantile(0.5), 0);
  for (int i = 0; i < 10; ++i) h.observe(1.5);
  EXPECT_DOUBLE_EQ(h.quantile(0.5), 1.5);
  h.observe(100);
  EXPECT_DOUBLE_EQ(h.quantile(1.0), 4);  // beyond the last bound nothing is known
}

TEST(Metrics, CountsFromManyThreads) {
  Metrics metrics;
  Counter& counter = metrics.counter("ds_a_total", "");
  Histogram& h = metrics.histogram("ds_c_seconds", "");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10000; ++i) counter.add(), h.observe(0.001);
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(counter.value(), 40000);
  EXPECT_EQ(h.count(), 40000u);
}

}  // namespace
}  // namespace ds
