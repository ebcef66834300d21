// SPDX-License-Identifier: Apache-2.0
// A helper process that lies: it takes its instance's creation well, then answers each call with
// what its component's name says, or with random bytes ("random-SEED").
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <string>

#include "ds/plugin.h"
#include "plugin/flat.h"
#include "plugin/isolation_wire.h"

namespace {

ds::FlatWriter reply_head(ds_code code, std::string_view text, uint64_t logs = 0) {
  ds::FlatWriter out;
  out.put(code);
  out.put<int32_t>(0);
  out.put<uint32_t>(0);
  out.put_text(text);
  out.put<uint64_t>(logs);
  return out;
}

void put_finding(ds::FlatWriter& out, uint32_t severity, std::string_view message,
                 float confidence) {
  for (const uint32_t n : {severity, 1u, 1u, 0u, 0u}) out.put(n);
  for (const std::string_view text : {std::string_view("rule"), message, std::string_view()})
    out.put_text(text);
  out.put(confidence);
}

std::string lie(const std::string& what) {
  if (what.starts_with("random-")) {
    std::mt19937_64 random(std::stoull(what.substr(7)));
    std::string bytes(random() % 4096, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    if (random() % 2 != 0) bytes = reply_head(DS_OK, "").bytes() + bytes;
    return bytes;
  }
  ds::FlatWriter out = reply_head(DS_OK, "", what == "logs" ? uint64_t{1} << 60 : 0);
  if (what == "code") return reply_head(1000, "").bytes();
  if (what == "text") return reply_head(DS_E_ARG, "\xff\xfe").bytes();
  if (what == "count") out.put<uint64_t>(UINT64_MAX);
  if (what == "short") out.put<uint32_t>(1);
  if (what == "severity" || what == "utf8" || what == "nul" || what == "nan" || what == "tail") {
    out.put<uint64_t>(1);
    put_finding(out, what == "severity" ? 9 : DS_SEVERITY_NOTE,
                what == "utf8"  ? std::string_view("\xc0\x80")
                : what == "nul" ? std::string_view("a\0b", 3)
                                : std::string_view("m"),
                what == "nan" ? __builtin_nanf("") : 1.0f);
    if (what == "tail") out.put<uint8_t>(0);
  }
  if (what == "length") {
    out.put<uint64_t>(1);
    for (uint32_t i = 0; i < 5; ++i) out.put<uint32_t>(1);
    out.put<uint64_t>(UINT64_MAX - 3);
    out.put_raw(std::string(64, 'x'));
  }
  return out.bytes();
}

}  // namespace

int main(int, char** arguments) {
  const std::string what = arguments[2];
  struct stat about {};
  fstat(ds::kHelperArena, &about);
  const auto bytes = static_cast<uint64_t>(about.st_size);
  auto* base = static_cast<char*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ds::kHelperArena, 0));
  if (base == MAP_FAILED || ftruncate(ds::kHelperArena, 4096) == 0) return 3;  // it is sealed
  auto& head = *reinterpret_cast<ds::ArenaHead*>(base);
  for (char byte = 0; recv(ds::kHelperSocket, &byte, 1, 0) == 1;) {
    uint32_t op = 0;
    std::memcpy(&op, base + ds::kArenaHeadBytes, sizeof op);
    const bool create = op == static_cast<uint32_t>(ds::HelperOp::kCreate);
    const std::string reply = create ? reply_head(DS_OK, "").bytes() : lie(what);
    std::memcpy(base + ds::kArenaHeadBytes + ds::arena_room(bytes), reply.data(), reply.size());
    head.reply_sequence = head.sequence + (!create && what == "sequence" ? 1 : 0);
    head.reply_bytes = !create && what == "size" ? UINT64_MAX : reply.size();
    send(ds::kHelperSocket, &byte, 1, MSG_NOSIGNAL);
  }
  return 0;
}
