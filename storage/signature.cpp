// SPDX-License-Identifier: Apache-2.0
#include "storage/signature.h"

#include <openssl/evp.h>
#include <openssl/pem.h>

#include <memory>

namespace ds {
namespace {

using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using Memory = std::unique_ptr<BIO, decltype(&BIO_free)>;
using Digest = std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)>;

/// Never asks a terminal for a pass phrase.
int no_pass_phrase(char*, int, int, void*) { return 0; }

Result<Key> read_key(const std::string& pem, bool secret) {
  const Memory bytes(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())), &BIO_free);
  Key key(secret ? PEM_read_bio_PrivateKey(bytes.get(), nullptr, &no_pass_phrase, nullptr)
                 : PEM_read_bio_PUBKEY(bytes.get(), nullptr, &no_pass_phrase, nullptr),
          &EVP_PKEY_free);
  const std::string what = secret ? "private key" : "public key";
  if (key == nullptr) return invalid(what + ": not PEM, or encrypted");
  if (EVP_PKEY_get_id(key.get()) != EVP_PKEY_ED25519)
    return unsupported(what + ": expected an Ed25519 key");
  return key;
}

const unsigned char* raw(std::string_view s) {
  return reinterpret_cast<const unsigned char*>(s.data());
}

Result<std::string> to_pem(const Key& key, bool secret) {
  const Memory out(BIO_new(BIO_s_mem()), &BIO_free);
  const int done =
      secret ? PEM_write_bio_PrivateKey(out.get(), key.get(), nullptr, nullptr, 0, nullptr, nullptr)
             : PEM_write_bio_PUBKEY(out.get(), key.get());
  char* data = nullptr;
  const long size = BIO_get_mem_data(out.get(), &data);
  if (done != 1 || size <= 0) return unavailable("key: cannot be written as PEM");
  return std::string(data, static_cast<size_t>(size));
}

}  // namespace

Result<bool> verify_ed25519(const std::string& public_pem, std::string_view message,
                            std::string_view signature) {
  DS_ASSIGN(const Key key, read_key(public_pem, false));
  const Digest digest(EVP_MD_CTX_new(), &EVP_MD_CTX_free);
  if (EVP_DigestVerifyInit(digest.get(), nullptr, nullptr, nullptr, key.get()) != 1)
    return unavailable("signature: OpenSSL has no Ed25519");
  return EVP_DigestVerify(digest.get(), raw(signature), signature.size(), raw(message),
                          message.size()) == 1;
}

Result<std::string> sign_ed25519(const std::string& private_pem, std::string_view message) {
  DS_ASSIGN(const Key key, read_key(private_pem, true));
  const Digest digest(EVP_MD_CTX_new(), &EVP_MD_CTX_free);
  unsigned char out[64];
  size_t size = sizeof out;
  if (EVP_DigestSignInit(digest.get(), nullptr, nullptr, nullptr, key.get()) != 1 ||
      EVP_DigestSign(digest.get(), out, &size, raw(message), message.size()) != 1)
    return unavailable("signature: OpenSSL has no Ed25519");
  return std::string(reinterpret_cast<const char*>(out), size);
}

Result<KeyPair> make_ed25519() {
  const Key key(EVP_PKEY_Q_keygen(nullptr, nullptr, "ED25519"), &EVP_PKEY_free);
  if (key == nullptr) return unavailable("key: OpenSSL has no Ed25519");
  KeyPair out;
  DS_ASSIGN(out.private_pem, to_pem(key, true));
  DS_ASSIGN(out.public_pem, to_pem(key, false));
  return out;
}

}  // namespace ds
