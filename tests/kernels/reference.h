// SPDX-License-Identifier: Apache-2.0
// The oracle: every op in double precision, written as the textbook has it and as plainly as loops
// allow. Matrices are row-major vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace ds::reference {

using Vec = std::vector<double>;

/// y [rows, n] = x W^T, W [n, k].
inline Vec matmul(int64_t rows, int64_t n, int64_t k, const Vec& x, const Vec& w) {
  Vec y(static_cast<size_t>(rows * n), 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += x[r * k + j] * w[i * k + j];
      y[r * n + i] = sum;
    }
  }
  return y;
}

inline Vec transposed(int64_t n, int64_t k, const Vec& w) {
  Vec t(w.size());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) t[j * n + i] = w[i * k + j];
  }
  return t;
}

/// Gradient of a weight: dy^T x, [n, k].
inline Vec outer(int64_t rows, int64_t n, int64_t k, const Vec& dy, const Vec& x) {
  return matmul(n, k, rows, transposed(rows, n, dy), transposed(rows, k, x));
}

inline double silu(double g) { return g / (1.0 + std::exp(-g)); }
inline double silu_slope(double g) {
  const double s = 1.0 / (1.0 + std::exp(-g));
  return s * (1.0 + g * (1.0 - s));
}

inline Vec rmsnorm(int64_t rows, int64_t d, const Vec& x, const Vec& w, double eps,
                   Vec* rstd = nullptr) {
  Vec y(x.size());
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < d; ++i) sum += x[r * d + i] * x[r * d + i];
    const double inverse = 1.0 / std::sqrt(sum / static_cast<double>(d) + eps);
    if (rstd != nullptr) rstd->push_back(inverse);
    for (int64_t i = 0; i < d; ++i) y[r * d + i] = x[r * d + i] * inverse * w[i];
  }
  return y;
}

/// {dx, dw}.
inline std::pair<Vec, Vec> rmsnorm_backward(int64_t rows, int64_t d, const Vec& dy, const Vec& x,
                                            const Vec& w, double eps) {
  Vec rstd;
  rmsnorm(rows, d, x, w, eps, &rstd);
  Vec dx(x.size()), dw(w.size(), 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 0;
    for (int64_t i = 0; i < d; ++i) mean += dy[r * d + i] * w[i] * x[r * d + i] * rstd[r];
    mean /= static_cast<double>(d);
    for (int64_t i = 0; i < d; ++i) {
      const double h = x[r * d + i] * rstd[r];
      dx[r * d + i] = rstd[r] * (dy[r * d + i] * w[i] - h * mean);
      dw[i] += dy[r * d + i] * h;
    }
  }
  return {dx, dw};
}

/// Rotation by halves of one head at one position; angles [half].
inline void rotate(int64_t half, const double* cos, const double* sin, bool inverse, double* x) {
  for (int64_t i = 0; i < half; ++i) {
    const double a = x[i], b = x[half + i], s = inverse ? -sin[i] : sin[i];
    x[i] = a * cos[i] - b * s;
    x[half + i] = b * cos[i] + a * s;
  }
}

struct Heads {
  int64_t n_heads, n_kv_heads, d;
  double scale;
  /// Whether a row at `position` uses the key at `key`, for one kv head; empty: it does.
  std::function<bool(int64_t position, int64_t kv_head, int64_t key)> reads = {};
};

/// Causal attention of rows [0, rows) whose keys are `prefix` earlier ones and then their own rows.
/// k and v: [prefix + rows, n_kv_heads * d].
inline Vec attention(const Heads& h, int64_t rows, int64_t prefix, const Vec& q, const Vec& k,
                     const Vec& v, Vec* lse = nullptr, std::vector<Vec>* probabilities = nullptr) {
  const int64_t width = h.n_heads * h.d, kv_width = h.n_kv_heads * h.d;
  Vec out(static_cast<size_t>(rows * width), 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t head = 0; head < h.n_heads; ++head) {
      const int64_t kv = head / (h.n_heads / h.n_kv_heads) * h.d;
      const int64_t keys = prefix + r + 1;
      Vec p(static_cast<size_t>(keys));
      double top = -INFINITY, sum = 0;
      for (int64_t j = 0; j < keys; ++j) {
        double dot = 0;
        for (int64_t i = 0; i < h.d; ++i) {
          dot += q[r * width + head * h.d + i] * k[j * kv_width + kv + i];
        }
        const bool read = !h.reads || h.reads(prefix + r, kv / h.d, j);
        p[j] = read ? dot * h.scale : -INFINITY;
        top = std::max(top, p[j]);
      }
      for (double& s : p) sum += s = std::exp(s - top);
      for (double& s : p) s /= sum;
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t i = 0; i < h.d; ++i) {
          out[r * width + head * h.d + i] += p[j] * v[j * kv_width + kv + i];
        }
      }
      if (lse != nullptr) lse->push_back(top + std::log(sum));
      if (probabilities != nullptr) probabilities->push_back(p);
    }
  }
  return out;
}

struct AttentionGradient {
  Vec dq, dk, dv;  ///< dk, dv over prefix + rows keys
};

inline AttentionGradient attention_backward(const Heads& h, int64_t rows, int64_t prefix,
                                            const Vec& q, const Vec& k, const Vec& v,
                                            const Vec& dout) {
  const int64_t width = h.n_heads * h.d, kv_width = h.n_kv_heads * h.d;
  std::vector<Vec> probabilities;
  attention(h, rows, prefix, q, k, v, nullptr, &probabilities);
  AttentionGradient g{Vec(q.size(), 0.0), Vec(k.size(), 0.0), Vec(v.size(), 0.0)};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t head = 0; head < h.n_heads; ++head) {
      const Vec& p = probabilities[r * h.n_heads + head];
      const int64_t kv = head / (h.n_heads / h.n_kv_heads) * h.d, at = r * width + head * h.d;
      Vec dp(p.size(), 0.0);
      double mean = 0;
      for (size_t j = 0; j < p.size(); ++j) {
        for (int64_t i = 0; i < h.d; ++i) {
          dp[j] += dout[at + i] * v[j * kv_width + kv + i];
          g.dv[j * kv_width + kv + i] += p[j] * dout[at + i];
        }
        mean += p[j] * dp[j];
      }
      for (size_t j = 0; j < p.size(); ++j) {
        const double ds = p[j] * (dp[j] - mean) * h.scale;
        for (int64_t i = 0; i < h.d; ++i) {
          g.dq[at + i] += ds * k[j * kv_width + kv + i];
          g.dk[j * kv_width + kv + i] += ds * q[at + i];
        }
      }
    }
  }
  return g;
}

inline Vec softmax(const double* x, int64_t n) {
  Vec p(x, x + n);
  const double top = *std::max_element(p.begin(), p.end());
  double sum = 0;
  for (double& v : p) sum += v = std::exp(v - top);
  for (double& v : p) v /= sum;
  return p;
}

inline double cross_entropy(const Vec& x, int64_t target) {
  return -std::log(softmax(x.data(), static_cast<int64_t>(x.size()))[target]);
}

/// KL of stored top-k probabilities and their rest against softmax(x).
inline double kl_topk(const Vec& x, const std::vector<int32_t>& index, const Vec& logprob) {
  const Vec q = softmax(x.data(), static_cast<int64_t>(x.size()));
  double kl = 0, p_rest = 1, q_rest = 0;
  for (size_t j = 0; j < q.size(); ++j) {
    if (std::find(index.begin(), index.end(), static_cast<int32_t>(j)) == index.end())
      q_rest += q[j];
  }
  for (size_t i = 0; i < index.size(); ++i) {
    const double p = std::exp(logprob[i]);
    kl += p * (logprob[i] - std::log(q[index[i]]));
    p_rest -= p;
  }
  return kl + p_rest * (std::log(p_rest) - std::log(q_rest));
}

inline Vec kl_topk_gradient(const Vec& x, const std::vector<int32_t>& index, const Vec& logprob) {
  Vec g = softmax(x.data(), static_cast<int64_t>(x.size()));
  const Vec q = g;
  double p_rest = 1, q_rest = 1;
  for (size_t i = 0; i < index.size(); ++i) {
    p_rest -= std::exp(logprob[i]);
    q_rest -= q[index[i]];
  }
  for (size_t j = 0; j < g.size(); ++j) g[j] = q[j] * (1.0 - p_rest / q_rest);
  for (size_t i = 0; i < index.size(); ++i) g[index[i]] = q[index[i]] - std::exp(logprob[i]);
  return g;
}

}  // namespace ds::reference
