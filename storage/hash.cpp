// SPDX-License-Identifier: Apache-2.0
#include "storage/hash.h"

#include <openssl/evp.h>

#include "ds/status.h"

namespace ds {

struct Sha256::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  State() = default;
  State(const State&) = delete;
  ~State() { EVP_MD_CTX_free(context); }
};

// OpenSSL fails here only without memory or without a SHA-256 provider: nothing could be stored.
Sha256::Sha256() : state_(std::make_unique<State>()) {
  DS_CHECK(state_->context && EVP_DigestInit_ex(state_->context, EVP_sha256(), nullptr) == 1);
}

Sha256::~Sha256() = default;

void Sha256::update(const void* data, size_t bytes) {
  DS_CHECK(EVP_DigestUpdate(state_->context, data, bytes) == 1);
}

Sha256Digest Sha256::finish() {
  Sha256Digest digest;
  unsigned bytes = 0;
  DS_CHECK(EVP_DigestFinal_ex(state_->context, digest.data(), &bytes) == 1);
  DS_CHECK(bytes == digest.size());
  return digest;
}

Sha256Digest sha256(std::string_view bytes) {
  Sha256 hash;
  hash.update(bytes);
  return hash.finish();
}

std::string to_hex(std::span<const uint8_t> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  hex.reserve(bytes.size() * 2);
  for (const uint8_t byte : bytes) {
    hex += kDigits[byte >> 4];
    hex += kDigits[byte & 15];
  }
  return hex;
}

}  // namespace ds
