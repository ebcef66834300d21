// SPDX-License-Identifier: Apache-2.0
// Counters, gauges and histograms in Prometheus' text format. Lock-free on the hot path: an
// instrument is looked up once by name and label values, then updated by relaxed atomics.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ds {

using Labels = std::vector<std::pair<std::string, std::string>>;

class Counter {
 public:
  void add(double value = 1.0);
  double value() const;

 private:
  std::atomic<double> value_{0};
};

class Gauge {
 public:
  void set(double value);
  double value() const;

 private:
  std::atomic<double> value_{0};
};

class Histogram {
 public:
  explicit Histogram(std::vector<double> upper_bounds);
  void observe(double value);
  uint64_t count() const;
  double sum() const;
  double quantile(double q) const;  ///< interpolated from the buckets; 0 when empty

 private:
  friend class Metrics;
  std::vector<double> bounds_;
  std::vector<std::atomic<uint64_t>> buckets_;
  std::atomic<double> sum_{0};
};

class Metrics {
 public:
  Metrics();
  ~Metrics();
  /// The instrument of that name and labels, created at the first call. Names follow Prometheus'
  /// rules: prefix ds_, base unit last, _total for counters.
  Counter& counter(const std::string& name, const std::string& help, const Labels& labels = {});
  Gauge& gauge(const std::string& name, const std::string& help, const Labels& labels = {});
  /// Seconds buckets 1 ms .. 60 s unless given.
  Histogram& histogram(const std::string& name, const std::string& help, const Labels& labels = {},
                       std::vector<double> upper_bounds = {});
  /// Called before each render, to set gauges from elsewhere.
  void on_collect(std::function<void()> collect);
  std::string render() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ds
