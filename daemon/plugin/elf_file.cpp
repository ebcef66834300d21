// SPDX-License-Identifier: Apache-2.0
#include "plugin/elf_file.h"

#include <elf.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>

#include "ds/plugin.h"
#include "kernels/ops.h"

namespace ds {
namespace {

#if defined(__x86_64__)
constexpr uint16_t kMachine = EM_X86_64;
#elif defined(__aarch64__)
constexpr uint16_t kMachine = EM_AARCH64;
#else
#error "plugins are loaded on x86-64 and aarch64"
#endif
constexpr uint64_t kPage = 4096;  // the smallest page of both
constexpr uint64_t kMaxSymbols = 1u << 20, kMaxNeeded = 256;

std::string number(uint64_t n) { return std::to_string(n); }

/// The file's bytes; every read is bounded.
class Image {
 public:
  explicit Image(std::span<const std::byte> file) : file_(file) {}

  uint64_t size() const { return file_.size(); }
  bool holds(uint64_t at, uint64_t n) const { return at <= size() && n <= size() - at; }
  template <typename T>
  std::optional<T> read(uint64_t at) const {
    if (!holds(at, sizeof(T))) return {};
    T out;
    std::memcpy(&out, file_.data() + at, sizeof out);
    return out;
  }
  std::string_view text(uint64_t at, uint64_t n) const {
    return {reinterpret_cast<const char*>(file_.data()) + at, static_cast<size_t>(n)};
  }

 private:
  std::span<const std::byte> file_;
};

/// What the loader reads of the dynamic section; of repeated entries the last counts.
struct Dynamic {
  std::optional<uint64_t> symbols, strings, strings_bytes, hash, gnu_hash;
  std::vector<uint64_t> needed;  // offsets in the string table
};

class Reader {
 public:
  Reader(std::span<const std::byte> file, uint32_t machine) : image_(file), machine_(machine) {}

  Result<PluginFile> inspect() {
    DS_TRY(read_header());
    DS_TRY(read_segments());
    DS_TRY(read_notes());
    DS_TRY(read_dynamic());
    DS_TRY(read_needed());
    DS_TRY(check_exports());
    return std::move(out_);
  }

 private:
  Status read_header();
  Status read_segments();
  Status check_segment(size_t index, const Elf64_Phdr& segment);
  Status read_notes();
  Status read_notes_of(const Elf64_Phdr& segment);
  Status read_note(uint64_t at);
  Status check_note(const ds_note& note);
  Status read_dynamic();
  Status read_dynamic_entry(const Elf64_Dyn& entry);
  Status read_needed();
  Status check_exports();
  Result<uint64_t> symbol_count() const;
  Result<uint64_t> gnu_symbol_count(uint64_t at) const;
  Result<std::string_view> string_at(uint64_t offset) const;
  std::optional<uint64_t> offset_of(uint64_t address, uint64_t bytes) const;

  Image image_;
  uint32_t machine_;
  Elf64_Ehdr header_{};
  std::vector<Elf64_Phdr> segments_;
  Dynamic dynamic_;
  bool has_note_ = false;
  PluginFile out_;
};

Status Reader::read_header() {
  if (image_.size() < SELFMAG || image_.text(0, SELFMAG) != std::string_view(ELFMAG, SELFMAG))
    return corrupt("not an ELF file");
  const auto header = image_.read<Elf64_Ehdr>(0);
  if (!header) return corrupt("truncated: " + number(image_.size()) + " bytes, less than a header");
  header_ = *header;
  const unsigned char* ident = header_.e_ident;
  if (ident[EI_CLASS] != ELFCLASS64)
    return unsupported("ELF class " + number(ident[EI_CLASS]) + ", expected 64-bit (2)");
  if (ident[EI_DATA] != ELFDATA2LSB)
    return unsupported("byte order " + number(ident[EI_DATA]) + ", expected little-endian (1)");
  if (header_.e_machine != kMachine)
    return unsupported("built for machine " + number(header_.e_machine) + ", this one is " +
                       number(kMachine));
  if (header_.e_type != ET_DYN)
    return invalid("ELF type " + number(header_.e_type) + ", expected a shared object (3)");
  if (header_.e_phentsize != sizeof(Elf64_Phdr))
    return corrupt("program headers of " + number(header_.e_phentsize) + " bytes, expected " +
                   number(sizeof(Elf64_Phdr)));
  if (!image_.holds(header_.e_phoff, uint64_t{header_.e_phnum} * sizeof(Elf64_Phdr)))
    return corrupt("truncated: the program headers end behind the file");
  if (header_.e_shnum != 0 &&
      !image_.holds(header_.e_shoff, uint64_t{header_.e_shnum} * header_.e_shentsize))
    return corrupt("truncated: the section headers end behind the file's " + number(image_.size()) +
                   " bytes");
  return {};
}

Status Reader::read_segments() {
  bool has_stack = false;
  uint64_t mapped_to = 0;  // first address behind the pages of the last PT_LOAD
  for (size_t i = 0; i < header_.e_phnum; ++i) {
    const Elf64_Phdr segment = *image_.read<Elf64_Phdr>(header_.e_phoff + i * sizeof(Elf64_Phdr));
    DS_TRY(check_segment(i, segment));
    if (segment.p_type == PT_GNU_STACK) {
      has_stack = true;
      if ((segment.p_flags & PF_X) != 0) return invalid("it asks for an executable stack");
    }
    if (segment.p_type == PT_LOAD) {
      // The loader maps whole pages, later ones over earlier ones: what is judged here must be what
      // is mapped.
      if (segment.p_vaddr % kPage != segment.p_offset % kPage)
        return corrupt("segment " + number(i) + ": address and offset differ within the page");
      if (segment.p_vaddr / kPage * kPage < mapped_to)
        return corrupt("segment " + number(i) + " shares pages with the one before");
      mapped_to = (segment.p_vaddr + segment.p_memsz + kPage - 1) / kPage * kPage;
      if ((segment.p_flags & PF_W) != 0 && (segment.p_flags & PF_X) != 0)
        return invalid("segment " + number(i) + " is writable and executable");
    }
    segments_.push_back(segment);
  }
  if (!has_stack) return invalid("no PT_GNU_STACK: the stack would be executable");
  return {};
}

Status Reader::check_segment(size_t index, const Elf64_Phdr& segment) {
  if (!image_.holds(segment.p_offset, segment.p_filesz))
    return corrupt("truncated: segment " + number(index) + " ends behind the file's " +
                   number(image_.size()) + " bytes");
  if (segment.p_type == PT_LOAD &&
      (segment.p_filesz > segment.p_memsz || segment.p_vaddr > (1ull << 47) ||
       segment.p_memsz > (1ull << 40)))
    return corrupt("segment " + number(index) + ": sizes make no sense");
  return {};
}

/// Where the bytes at an address of the loaded plugin stand in the file.
std::optional<uint64_t> Reader::offset_of(uint64_t address, uint64_t bytes) const {
  for (const Elf64_Phdr& s : segments_) {
    if (s.p_type != PT_LOAD || address < s.p_vaddr) continue;
    const uint64_t within = address - s.p_vaddr;
    if (within <= s.p_filesz && bytes <= s.p_filesz - within) return s.p_offset + within;
  }
  return {};
}

Status Reader::read_notes() {
  for (const Elf64_Phdr& segment : segments_) {
    if (segment.p_type == PT_NOTE) DS_TRY(read_notes_of(segment));
  }
  if (!has_note_) return invalid("no Driftstone note: not a plugin (DS_PLUGIN writes one)");
  return {};
}

Status Reader::read_notes_of(const Elf64_Phdr& segment) {
  const uint64_t unit = segment.p_align == 8 ? 8 : 4;
  const auto padded = [unit](uint64_t n) { return (n + unit - 1) / unit * unit; };
  const uint64_t end = segment.p_offset + segment.p_filesz;
  uint64_t at = segment.p_offset;
  while (at + sizeof(Elf64_Nhdr) <= end) {
    const Elf64_Nhdr head = *image_.read<Elf64_Nhdr>(at);
    const uint64_t name = at + sizeof head;
    const uint64_t desc = at + padded(sizeof head + head.n_namesz);
    const uint64_t next = desc + padded(head.n_descsz);
    if (desc > end || head.n_descsz > end - desc) return corrupt("a note ends behind its segment");
    if (head.n_namesz == 11 && image_.text(name, 11) == std::string_view("Driftstone\0", 11)) {
      if (head.n_type != 1 || head.n_descsz != sizeof(ds_note) - offsetof(ds_note, abi_major))
        return corrupt("Driftstone note of type " + number(head.n_type) + " with " +
                       number(head.n_descsz) + " bytes, expected type 1 with 112");
      if (has_note_) return corrupt("more than one Driftstone note");
      DS_TRY(read_note(at));
    }
    at = next;
  }
  return {};
}

Status Reader::read_note(uint64_t at) {
  const auto note = image_.read<ds_note>(at);
  if (!note) return corrupt("truncated: the Driftstone note ends behind the file");
  has_note_ = true;
  return check_note(*note);
}

std::string feature_names(uint32_t mask) {
  static constexpr std::string_view names[] = {"AVX2", "AVX-512", "AVX-512 BF16", "AMX BF16"};
  std::string out;
  for (size_t i = 0; i < std::size(names); ++i) {
    if ((mask >> i & 1u) != 0) out += (out.empty() ? "" : ", ") + std::string(names[i]);
  }
  return out;
}

Status Reader::check_note(const ds_note& note) {
  if (note.abi_major != DS_ABI_MAJOR)
    return unsupported("plugin ABI " + number(note.abi_major) + "." + number(note.abi_minor) +
                       ", this host speaks major " + number(DS_ABI_MAJOR));
  constexpr uint32_t known = (2u << DS_KIND_TOOL) - (1u << DS_KIND_ENCODER);
  if (note.kinds_mask == 0 || (note.kinds_mask & ~known) != 0)
    return invalid("kinds mask " + number(note.kinds_mask) + ": expected bits 1 to 7 only");
  constexpr uint32_t all_features =
      DS_CPU_AVX2 | DS_CPU_AVX512 | DS_CPU_AVX512_BF16 | DS_CPU_AMX_BF16;
  if ((note.cpu_features & ~all_features) != 0)
    return unsupported("needs CPU features that this host does not know: mask " +
                       number(note.cpu_features));
  if ((note.cpu_features & ~machine_) != 0)
    return unsupported("needs " + feature_names(note.cpu_features & ~machine_) +
                       ", which this machine lacks");
  const auto* end = static_cast<const char*>(std::memchr(note.id, 0, sizeof note.id));
  if (end == nullptr) return corrupt("the id in the note does not end within 96 bytes");
  const std::string_view id(note.id, static_cast<size_t>(end - note.id));
  if (!is_plugin_id(id))
    return invalid("id \"" + std::string(id.substr(0, 40)) +
                   "\": expected a reverse-domain name of a-z, 0-9, '-' and '.', such as "
                   "org.acme.nf4");
  out_.id = id;
  out_.abi_minor = note.abi_minor;
  out_.kinds = note.kinds_mask;
  out_.cpu_features = note.cpu_features;
  return {};
}

Status Reader::read_dynamic() {
  const Elf64_Phdr* found = nullptr;
  for (const Elf64_Phdr& segment : segments_) {
    if (segment.p_type != PT_DYNAMIC) continue;
    if (found != nullptr) return corrupt("more than one dynamic section");
    found = &segment;
  }
  if (found == nullptr) return invalid("no dynamic section");
  // By address, as the loader does: the segment's own offset may say something else.
  for (uint64_t address = found->p_vaddr;; address += sizeof(Elf64_Dyn)) {
    const auto at = offset_of(address, sizeof(Elf64_Dyn));
    if (!at) return corrupt("the dynamic section does not end inside the file");
    const Elf64_Dyn entry = *image_.read<Elf64_Dyn>(*at);
    if (entry.d_tag == DT_NULL) return {};
    DS_TRY(read_dynamic_entry(entry));
  }
}

Status Reader::read_dynamic_entry(const Elf64_Dyn& entry) {
  switch (entry.d_tag) {
    case DT_RPATH:
      return invalid("DT_RPATH: it chooses where its libraries come from");
    case DT_RUNPATH:
      return invalid("DT_RUNPATH: it chooses where its libraries come from");
    case DT_AUDIT:
    case DT_DEPAUDIT:
    case DT_AUXILIARY:
    case DT_FILTER:
      return invalid("it asks for an audit or filter library");
    case DT_TEXTREL:
      return invalid("DT_TEXTREL: its code would be written to when loaded");
    case DT_FLAGS:
      if ((entry.d_un.d_val & DF_TEXTREL) != 0)
        return invalid("DF_TEXTREL: its code would be written to when loaded");
      break;
    case DT_SYMENT:
      if (entry.d_un.d_val != sizeof(Elf64_Sym))
        return corrupt("symbols of " + number(entry.d_un.d_val) + " bytes, expected 24");
      break;
    case DT_SYMTAB:
      dynamic_.symbols = entry.d_un.d_ptr;
      break;
    case DT_STRTAB:
      dynamic_.strings = entry.d_un.d_ptr;
      break;
    case DT_STRSZ:
      dynamic_.strings_bytes = entry.d_un.d_val;
      break;
    case DT_HASH:
      dynamic_.hash = entry.d_un.d_ptr;
      break;
    case DT_GNU_HASH:
      dynamic_.gnu_hash = entry.d_un.d_ptr;
      break;
    case DT_NEEDED:
      if (dynamic_.needed.size() == kMaxNeeded) return invalid("needs more than 256 libraries");
      dynamic_.needed.push_back(entry.d_un.d_val);
      break;
    default:
      break;
  }
  return {};
}

Result<std::string_view> Reader::string_at(uint64_t offset) const {
  const uint64_t bytes = dynamic_.strings_bytes.value_or(0);
  const auto table = dynamic_.strings ? offset_of(*dynamic_.strings, bytes) : std::nullopt;
  if (!table || offset >= bytes) return corrupt("a name lies outside the string table");
  const std::string_view rest = image_.text(*table + offset, bytes - offset);
  const size_t end = rest.find('\0');
  if (end == rest.npos) return corrupt("a name runs out of the string table");
  return rest.substr(0, end);
}

Status Reader::read_needed() {
  for (const uint64_t offset : dynamic_.needed) {
    DS_ASSIGN(const std::string_view library, string_at(offset));
    if (library.empty() || library.find('/') != library.npos)
      return invalid("needs the library \"" + std::string(library) + "\" by path");
    out_.needed.emplace_back(library);
  }
  return {};
}

/// Of the GNU hash table: the last symbol of the last chain is the table's last.
Result<uint64_t> Reader::gnu_symbol_count(uint64_t at) const {
  const auto word = [&](uint64_t index) -> std::optional<uint32_t> {
    const auto offset = offset_of(at + index * 4, 4);
    return offset ? image_.read<uint32_t>(*offset) : std::nullopt;
  };
  const Status broken = corrupt("the symbol hash table runs out of the file");
  const auto buckets = word(0), first = word(1), bloom = word(2);
  if (!buckets || !first || !bloom) return broken;
  uint64_t last = 0;
  for (uint64_t i = 0; i < *buckets; ++i) {
    const auto bucket = word(4 + uint64_t{*bloom} * 2 + i);
    if (!bucket) return broken;
    last = std::max<uint64_t>(last, *bucket);
  }
  if (last < *first) return uint64_t{*first};  // nothing exported
  for (;; ++last) {
    const auto chain = word(4 + uint64_t{*bloom} * 2 + *buckets + (last - *first));
    if (!chain) return broken;
    if ((*chain & 1u) != 0) return last + 1;
  }
}

Result<uint64_t> Reader::symbol_count() const {
  uint64_t count = 0;
  if (dynamic_.gnu_hash) {
    DS_ASSIGN(count, gnu_symbol_count(*dynamic_.gnu_hash));
  }
  if (dynamic_.hash) {
    const auto at = offset_of(*dynamic_.hash, 8);
    if (!at) return corrupt("the symbol hash table runs out of the file");
    count = std::max<uint64_t>(count, *image_.read<uint32_t>(*at + 4));
  }
  if (count == 0) return invalid("exports nothing, expected " DS_ENTRY_NAME);
  if (count > kMaxSymbols) return corrupt(number(count) + " symbols, expected at most 2^20");
  return count;
}

Status Reader::check_exports() {
  DS_ASSIGN(const uint64_t count, symbol_count());
  const auto table =
      dynamic_.symbols ? offset_of(*dynamic_.symbols, count * sizeof(Elf64_Sym)) : std::nullopt;
  if (!table) return corrupt("the symbol table runs out of the file");
  bool has_entry = false;
  for (uint64_t i = 1; i < count; ++i) {
    const Elf64_Sym symbol = *image_.read<Elf64_Sym>(*table + i * sizeof(Elf64_Sym));
    const auto visibility = ELF64_ST_VISIBILITY(symbol.st_other);
    if (symbol.st_shndx == SHN_UNDEF || ELF64_ST_BIND(symbol.st_info) == STB_LOCAL ||
        visibility == STV_HIDDEN || visibility == STV_INTERNAL)
      continue;
    DS_ASSIGN(const std::string_view name, string_at(symbol.st_name));
    if (name != DS_ENTRY_NAME)
      return invalid("exports \"" + std::string(name.substr(0, 80)) +
                     "\", expected nothing but " DS_ENTRY_NAME);
    if (ELF64_ST_BIND(symbol.st_info) == STB_GNU_UNIQUE)
      return invalid(DS_ENTRY_NAME
                     " is a unique symbol, which is shared by all files loaded later");
    if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || !offset_of(symbol.st_value, 1))
      return invalid(DS_ENTRY_NAME " is no function in the file");
    has_entry = true;
  }
  if (!has_entry) return invalid("does not export " DS_ENTRY_NAME);
  return {};
}

}  // namespace

uint32_t machine_cpu_features() {
  uint32_t out = 0;
  if (cpu_supports(CpuIsa::kAvx2)) out |= DS_CPU_AVX2;
  if (cpu_supports(CpuIsa::kAvx512)) out |= DS_CPU_AVX512;
  if (cpu_supports(CpuIsa::kAvx512Bf16)) out |= DS_CPU_AVX512_BF16;
  if (cpu_supports(CpuIsa::kAvx512Amx)) out |= DS_CPU_AMX_BF16;
  return out;
}

bool is_plugin_id(std::string_view id) {
  if (id.find('.') == id.npos || id.starts_with('.') || id.ends_with('.')) return false;
  if (id.find("..") != id.npos) return false;
  return std::all_of(id.begin(), id.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '-';
  });
}

Result<PluginFile> inspect_plugin(std::span<const std::byte> file, uint32_t machine) {
  return Reader(file, machine).inspect();
}

}  // namespace ds
