// SPDX-License-Identifier: Apache-2.0
// Feedback records: the schema at the door, and the identities derived from them. The schema of
// every kind is in FORMAT.md, "Records".
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "ds/status.h"
#include "storage/hash.h"
#include "storage/json.h"

namespace ds {

/// Checks one record against the schema of its kind (demonstration, correction, preference, rating,
/// label, text, retract) and normalises what has two spellings. Messages name the field, what was
/// found and what was expected. Unknown fields are kept, and so are attachments that nothing refers
/// to.
Result<Json> check_record(const Json& record, const std::vector<std::string>& attachments = {});

/// Input of a task model: [numbers], or {"attachment": i} = the i-th of `attachments`,
/// little-endian FP32. Refused: none at all, more than a model can have, an index or byte length
/// that does not fit, and what FP32 does not hold as a finite number (it would spoil a whole
/// round).
Result<std::vector<float>> read_input(const Json& input,
                                      const std::vector<std::string_view>& attachments);

/// SHA-256 over the canonical JSON of `record`, then per attachment u64 length (little-endian) and
/// bytes.
Sha256Digest payload_hash(const Json& record, const std::vector<std::string>& attachments);
/// The same from the canonical text.
Sha256Digest payload_hash_of_text(std::string_view canonical_record,
                                  const std::vector<std::string>& attachments);

/// SHA-256 of the canonical record without id, seq, ts: what a record *says*. Equal for equal
/// feedback whoever sent it and whenever; draws are keyed by it (plus an occurrence number). Hex.
/// Attachments are part of what it says: they follow as in payload_hash().
std::string draw_key(const Json& record, const std::vector<std::string>& attachments = {});

/// "fb_" + 20 hex digits of SHA-256(client, epoch, seq).
std::string feedback_id(const std::string& client, int64_t epoch, int64_t seq);

/// Clients, sources and domains: 1 to 128 bytes without control characters (keys separate by NUL).
Status check_label(std::string_view what, std::string_view value);

/// Names that become folders or files: ^[a-z0-9][a-z0-9._-]{0,63}$.
Status check_name(std::string_view what, std::string_view value);

}  // namespace ds
