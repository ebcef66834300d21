// SPDX-License-Identifier: Apache-2.0
// Ed25519 signatures of files (RFC 8032, OpenSSL): 64 raw bytes over the whole content.
#pragma once

#include <string>
#include <string_view>

#include "ds/status.h"

namespace ds {

/// `public_pem`: SubjectPublicKeyInfo. An unreadable or other kind of key is an error; a signature
/// that does not fit is false.
Result<bool> verify_ed25519(const std::string& public_pem, std::string_view message,
                            std::string_view signature);
/// `private_pem`: PKCS #8, unencrypted.
Result<std::string> sign_ed25519(const std::string& private_pem, std::string_view message);

struct KeyPair {
  std::string private_pem, public_pem;
};
Result<KeyPair> make_ed25519();

}  // namespace ds
