// SPDX-License-Identifier: Apache-2.0
// Runs one fuzz target without libFuzzer: every file of a corpus folder as it is, then seeded
// mutations of them. fuzz_replay FOLDER MUTATIONS [SEED]
#include <cstdio>
#include <cstdlib>

#include "storage/seams.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

/// One to four small changes: a byte, a piece cut out, doubled, or taken from another input.
std::string mutate(std::string input, const std::string& other, ds::Rng& rng) {
  constexpr uint64_t kPiece = 32;  // bytes, at most
  for (uint64_t n = rng.below(4) + 1; n > 0 && !input.empty(); --n) {
    const uint64_t at = rng.below(input.size());
    const uint64_t length = rng.below(kPiece) + 1;
    switch (rng.below(5)) {
      case 0:
        input[at] = static_cast<char>(rng.next());
        break;
      case 1:
        input[at] = static_cast<char>(input[at] ^ 1 << rng.below(8));
        break;
      case 2:
        input.erase(at, length);
        break;
      case 3:
        input.insert(at, input.substr(rng.below(input.size()), length));
        break;
      default:
        if (!other.empty())
          input.replace(at, length, other.substr(rng.below(other.size()), length));
    }
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s CORPUS_FOLDER MUTATIONS [SEED]\n", argv[0]);
    return 2;
  }
  const std::string folder = argv[1];
  const uint64_t mutations = std::strtoull(argv[2], nullptr, 0);
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 0) : 1;
  ds::FileSystem& fs = ds::posix_file_system();
  const auto names = fs.list(folder);
  if (!names.ok() || names->empty()) {
    std::fprintf(stderr, "%s: no corpus\n", folder.c_str());
    return 1;
  }
  std::vector<std::string> corpus;
  for (const std::string& name : *names) {
    corpus.push_back(fs.read(folder + "/" + name).value());
    run(corpus.back());
  }
  std::printf("%zu inputs, %llu mutations, seed %llu\n", corpus.size(),
              static_cast<unsigned long long>(mutations), static_cast<unsigned long long>(seed));
  ds::Rng rng(seed);
  for (uint64_t i = 0; i < mutations; ++i) {
    const std::string& base = corpus[rng.below(corpus.size())];
    run(mutate(base, corpus[rng.below(corpus.size())], rng));
  }
  return 0;
}
