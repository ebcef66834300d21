// SPDX-License-Identifier: Apache-2.0
// Prometheus text exposition format 0.0.4: families by name, samples by label values, both sorted,
// so that two renders of the same state are the same bytes.
#include "metrics.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <mutex>

#include "ds/status.h"

namespace ds {
namespace {

std::string number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  return {text, end};
}

/// Help text escapes \ and newline; label values also the double quote.
std::string escaped(const std::string& text, bool quotes) {
  std::string out;
  for (const char c : text) {
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\\' || (quotes && c == '"')) {
      out += '\\';
      out += c;
    } else {
      out += c;
    }
  }
  return out;
}

/// `a="x",b="y"` without braces; also the key of a sample within its family.
std::string label_text(const Labels& labels) {
  std::string out;
  for (const auto& [name, value] : labels) {
    if (!out.empty()) out += ',';
    out += name + "=\"" + escaped(value, true) + '"';
  }
  return out;
}

std::string braced(const std::string& labels) { return labels.empty() ? "" : "{" + labels + "}"; }

std::vector<double> seconds_buckets() {
  return {0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60};
}

}  // namespace

void Counter::add(double value) { value_.fetch_add(value, std::memory_order_relaxed); }
double Counter::value() const { return value_.load(std::memory_order_relaxed); }

void Gauge::set(double value) { value_.store(value, std::memory_order_relaxed); }
double Gauge::value() const { return value_.load(std::memory_order_relaxed); }

Histogram::Histogram(std::vector<double> upper_bounds)
    : bounds_(std::move(upper_bounds)), buckets_(bounds_.size() + 1) {
  DS_CHECK(std::is_sorted(bounds_.begin(), bounds_.end()));
}

void Histogram::observe(double value) {
  const auto at = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  buckets_[static_cast<size_t>(at)].fetch_add(1, std::memory_order_relaxed);
  sum_.fetch_add(value, std::memory_order_relaxed);
}

uint64_t Histogram::count() const {
  uint64_t total = 0;
  for (const auto& bucket : buckets_) total += bucket.load(std::memory_order_relaxed);
  return total;
}

double Histogram::sum() const { return sum_.load(std::memory_order_relaxed); }

double Histogram::quantile(double q) const {
  const double rank = q * static_cast<double>(count());
  double below = 0;
  for (size_t i = 0; i < bounds_.size(); ++i) {
    const auto in_bucket = static_cast<double>(buckets_[i].load(std::memory_order_relaxed));
    if (in_bucket > 0 && below + in_bucket >= rank) {
      const double low = i == 0 ? 0.0 : bounds_[i - 1];
      return low + (bounds_[i] - low) * (rank - below) / in_bucket;
    }
    below += in_bucket;
  }
  // In the overflow bucket nothing is known but its lower end.
  return below < rank && !bounds_.empty() ? bounds_.back() : 0.0;
}

struct Metrics::State {
  struct Sample {
    std::unique_ptr<Counter> counter;
    std::unique_ptr<Gauge> gauge;
    std::unique_ptr<Histogram> histogram;
  };
  struct Family {
    const char* type = "";
    std::string help;
    std::map<std::string, Sample> samples;  ///< by label text
  };
  std::mutex mutex;
  std::map<std::string, Family> families;
  std::vector<std::function<void()>> collectors;

  /// A name has one type for life: the same name with another type is a bug.
  Sample& sample(const std::string& name, const std::string& help, const char* type,
                 const Labels& labels) {
    Family& family = families[name];
    if (family.samples.empty()) {
      family.type = type;
      family.help = help;
    }
    DS_CHECK(std::string_view(family.type) == type);
    return family.samples[label_text(labels)];
  }
};

Metrics::Metrics() : state_(std::make_unique<State>()) {}
Metrics::~Metrics() = default;

Counter& Metrics::counter(const std::string& name, const std::string& help, const Labels& labels) {
  std::lock_guard lock(state_->mutex);
  auto& slot = state_->sample(name, help, "counter", labels).counter;
  if (!slot) slot = std::make_unique<Counter>();
  return *slot;
}

Gauge& Metrics::gauge(const std::string& name, const std::string& help, const Labels& labels) {
  std::lock_guard lock(state_->mutex);
  auto& slot = state_->sample(name, help, "gauge", labels).gauge;
  if (!slot) slot = std::make_unique<Gauge>();
  return *slot;
}

Histogram& Metrics::histogram(const std::string& name, const std::string& help,
                              const Labels& labels, std::vector<double> upper_bounds) {
  std::lock_guard lock(state_->mutex);
  auto& slot = state_->sample(name, help, "histogram", labels).histogram;
  if (!slot) {
    slot = std::make_unique<Histogram>(upper_bounds.empty() ? seconds_buckets()
                                                            : std::move(upper_bounds));
  }
  return *slot;
}

void Metrics::on_collect(std::function<void()> collect) {
  std::lock_guard lock(state_->mutex);
  state_->collectors.push_back(std::move(collect));
}

std::string Metrics::render() const {
  std::vector<std::function<void()>> collectors;
  {
    std::lock_guard lock(state_->mutex);
    collectors = state_->collectors;
  }
  for (const auto& collect : collectors) collect();  // unlocked: they look instruments up

  std::lock_guard lock(state_->mutex);
  std::string out;
  for (const auto& [name, family] : state_->families) {
    out += "# HELP " + name + ' ' + escaped(family.help, false) + '\n';
    out += "# TYPE " + name + ' ' + family.type + '\n';
    for (const auto& [labels, sample] : family.samples) {
      if (sample.counter)
        out += name + braced(labels) + ' ' + number(sample.counter->value()) + '\n';
      if (sample.gauge) out += name + braced(labels) + ' ' + number(sample.gauge->value()) + '\n';
      if (!sample.histogram) continue;
      const Histogram& h = *sample.histogram;
      uint64_t cumulative = 0;
      for (size_t i = 0; i < h.buckets_.size(); ++i) {
        cumulative += h.buckets_[i].load(std::memory_order_relaxed);
        const double bound = i < h.bounds_.size() ? h.bounds_[i] : INFINITY;
        const std::string le = "le=\"" + number(bound) + '"';
        out += name + "_bucket{" + (labels.empty() ? le : labels + ',' + le) + "} " +
               std::to_string(cumulative) + '\n';
      }
      out += name + "_sum" + braced(labels) + ' ' + number(h.sum()) + '\n';
      out += name + "_count" + braced(labels) + ' ' + std::to_string(cumulative) + '\n';
    }
  }
  return out;
}

}  // namespace ds
