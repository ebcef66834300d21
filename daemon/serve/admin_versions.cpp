// SPDX-License-Identifier: Apache-2.0
// Versions: list, compare, roll back, promote, pin. Models: the language model and task models.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <map>
#include <utility>

#include "serve/admin.h"

namespace ds {
namespace {

Result<int64_t> version_number(std::string_view text) {
  const std::string_view digits = text.starts_with('v') ? text.substr(1) : text;
  int64_t number = 0;
  const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  if (parsed.ec == std::errc() && parsed.ptr == digits.data() + digits.size() && number > 0)
    return number;
  return invalid("'" + std::string(text) + "' is not a version, expected v1, v2, ...");
}

Json pointer_json(const Versions& versions) {
  const int64_t pinned = versions.pinned();
  return {{"current", version_name(versions.current_number())},
          {"pinned", pinned ? Json(version_name(pinned)) : Json()}};
}

Json list_versions(const Versions& versions) {
  Json json = pointer_json(versions);
  json["items"] = versions.list();
  return json;
}

// The member `key`, or `fallback` without it.
Result<int64_t> version_member(const Json& body, const char* key, int64_t fallback) {
  DS_ASSIGN(const std::string text, get_string(body, key, ""));
  if (text.empty()) return fallback;
  return version_number(text);
}

Result<Json> roll_back(Versions& versions, const Json& body) {
  const int64_t current = versions.current_number();
  const std::vector<int64_t> lineage = versions.ancestors(current);
  const int64_t parent = lineage.size() > 1 ? lineage[1] : 0;
  DS_ASSIGN(const int64_t to, version_member(body, "to", parent));
  if (to == 0) return conflict(version_name(current) + " has no parent to roll back to");
  DS_ASSIGN(const std::string reason, get_string(body, "reason", "asked for"));
  DS_TRY(versions.rollback(to, reason));
  return pointer_json(versions);
}

Result<Json> promote(Versions& versions, const Json& body) {
  DS_ASSIGN(const int64_t to, version_member(body, "to", 0));
  if (to == 0) return invalid("to: missing, expected the version to serve, e.g. \"v2\"");
  DS_TRY(versions.promote(to));
  return pointer_json(versions);
}

Result<Json> pin(Versions& versions, const Json& body) {
  DS_ASSIGN(const int64_t number, version_member(body, "version", versions.current_number()));
  DS_TRY(versions.pin(number));
  return pointer_json(versions);
}

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

struct Matrix {
  int64_t rows = 0, columns = 0;
  std::vector<float> values;
};

Matrix matrix_of(const StoredTensor& tensor) {
  Matrix m;
  if (tensor.shape.size() != 2) return m;
  const size_t width = tensor.dtype == "BF16" ? 2 : 4;
  const size_t count = static_cast<size_t>(tensor.shape[0] * tensor.shape[1]);
  if (tensor.data.size() != count * width) return m;
  m.rows = tensor.shape[0], m.columns = tensor.shape[1];
  m.values.resize(count);
  for (size_t i = 0; i < count; ++i) {
    if (width == 4) {
      std::memcpy(&m.values[i], tensor.data.data() + 4 * i, 4);
    } else {
      uint16_t bits;
      std::memcpy(&bits, tensor.data.data() + 2 * i, 2);
      m.values[i] = bf16_to_float(bits);
    }
  }
  return m;
}

// Low-rank parts of one version: target name -> factors, with scale * B A the change of the weight.
struct Delta {
  double scale = 1;
  std::map<std::string, Matrix> a, b;  // [rank, k], [n, rank]
};

Result<Delta> read_delta(const ServerParts& parts, const VersionManifest& manifest) {
  Delta delta;
  if (manifest.method == "base") return delta;
  if (manifest.method != "lora")
    return unsupported(version_name(manifest.number) + " is no low-rank delta");
  if (const auto scale = get_number(manifest.details, "scale"); scale.ok()) delta.scale = *scale;
  DS_ASSIGN(const auto tensors, parts.version_files.read_delta(manifest.model, manifest.number));
  for (const StoredTensor& tensor : tensors) {
    const size_t a = tensor.name.find(".lora_A"), b = tensor.name.find(".lora_B");
    if (a != std::string::npos) delta.a[tensor.name.substr(0, a)] = matrix_of(tensor);
    if (b != std::string::npos) delta.b[tensor.name.substr(0, b)] = matrix_of(tensor);
  }
  return delta;
}

// <B1 A1, B2 A2> in the Frobenius sense, without forming either product: the sum over rank pairs
// (r, s) of (column r of B1 . column s of B2) * (row r of A1 . row s of A2).
double inner(const Delta& x, const Delta& y) {
  double sum = 0;
  for (const auto& [name, a1] : x.a) {
    const auto b1 = x.b.find(name), a2 = y.a.find(name), b2 = y.b.find(name);
    if (b1 == x.b.end() || a2 == y.a.end() || b2 == y.b.end()) continue;
    const Matrix &l = b1->second, &r = b2->second, &s = a2->second;
    const bool fits =
        l.columns == a1.rows && r.columns == s.rows && l.rows == r.rows && a1.columns == s.columns;
    if (!fits) continue;
    for (int64_t i = 0; i < a1.rows; ++i) {
      for (int64_t j = 0; j < s.rows; ++j) {
        double rows = 0, columns = 0;
        for (int64_t k = 0; k < s.columns; ++k) {
          rows += double(a1.values[i * a1.columns + k]) * s.values[j * s.columns + k];
        }
        for (int64_t k = 0; k < l.rows; ++k) {
          columns += double(l.values[k * l.columns + i]) * r.values[k * r.columns + j];
        }
        sum += rows * columns;
      }
    }
  }
  return sum * x.scale * y.scale;
}

Result<Json> diff(const ServerParts& parts, int64_t a, int64_t b) {
  DS_ASSIGN(const VersionManifest from, parts.versions.manifest(a));
  DS_ASSIGN(const VersionManifest to, parts.versions.manifest(b));
  const std::vector<int64_t> known = parts.versions.ancestors(a);
  Json added = Json::array();
  std::vector<VersionManifest> path = parts.versions.lineage(b);
  std::reverse(path.begin(), path.end());
  for (const VersionManifest& version : path) {
    if (std::find(known.begin(), known.end(), version.number) != known.end()) continue;
    for (const std::string& id : version.items) added.push_back(id);
  }
  Json json = {{"a", version_name(a)},
               {"b", version_name(b)},
               {"items_added", std::move(added)},
               {"weight_hash", {from.weight_hash, to.weight_hash}},
               {"delta_norm", nullptr}};
  const Result<Delta> x = read_delta(parts, from), y = read_delta(parts, to);
  for (const auto* delta : {&x, &y}) {
    if (!delta->ok() && delta->status().code() != Code::kUnsupported) return delta->status();
  }
  if (x.ok() && y.ok() && from.base_sha256 == to.base_sha256) {
    const double squared = inner(*y, *y) - 2 * inner(*x, *y) + inner(*x, *x);
    json["delta_norm"] = std::sqrt(std::max(squared, 0.0));
  }
  return json;
}

Json all_models(Service& service) {
  const ModelInfo& model = service.parts.model;
  Json items = Json::array({{{"name", model.name.empty() ? "default" : model.name},
                             {"kind", "language"},
                             {"version", service.parts.versions.current()->version},
                             {"parameters", model.parameters},
                             {"sha256", model.sha256}}});
  if (!service.parts.task_models.list) return items;
  const Json listed = service.parts.task_models.list();
  const Json* tasks = listed.is_array() ? &listed : find(listed, "items");
  if (tasks) items.insert(items.end(), tasks->begin(), tasks->end());
  return items;
}

Result<Json> one_model(Service& service, const std::string& name) {
  const Json models = all_models(service);
  if (name == "default") return models.front();
  for (const Json& model : models) {
    if (const Json* known = find(model, "name"); known && *known == name) return model;
  }
  return not_found("no model '" + name + "'");
}

Result<Json> create_model(Service& service, const Json& body) {
  if (!service.parts.task_models.create) return unsupported("this daemon has no task models");
  DS_ASSIGN(const std::string name, get_string(body, "name"));
  const Json* sizes = find(body, "mlp");
  if (!sizes || !sizes->is_array()) {
    return invalid("mlp: missing, expected layer sizes such as [784, 100, 10]");
  }
  std::vector<int64_t> layers;
  for (const Json& size : *sizes) {
    if (!size.is_number_integer())
      return invalid("mlp: expected integers, found " + dump_json(size));
    layers.push_back(size.get<int64_t>());
  }
  return service.parts.task_models.create(name, layers);
}

Result<Json> model_versions(Service& service, const std::string& name) {
  if (name == "default" || name == service.parts.model.name)
    return list_versions(service.parts.versions);
  if (!service.parts.task_models.versions) return not_found("no model '" + name + "'");
  return service.parts.task_models.versions(name);
}

void infer_task(Service& service, RouteCall& call, const ResponderPtr& to) {
  if (!service.parts.task_models.infer)
    return to->result(unsupported("this daemon has no task models"));
  const Result<std::string> model = get_string(call.body, "model");
  if (!model.ok()) return to->result(model.status());
  const Json* input = find(call.body, "input");
  std::vector<float> values;
  bool numbers = input && input->is_array();
  for (size_t i = 0; numbers && i < input->size(); ++i) {
    numbers = (*input)[i].is_number();
    if (numbers) values.push_back((*input)[i].get<float>());
  }
  if (!numbers) return to->result(invalid("input: missing or not a list of numbers"));
  service.parts.task_models.infer(*model, std::move(values), service.answer_later(to));
}

using Change = Result<Json> (*)(Versions&, const Json&);

void add_change(Router& router, Service& service, const char* path, Change change) {
  router.add("POST", path, kAdmin, BodyKind::kJson,
             [&service, change](RouteCall& call, const ResponderPtr& to) {
               service.answer_from(service.slow, to,
                                   [&service, change, body = std::move(call.body)] {
                                     return change(service.parts.versions, body);
                                   });
             });
}

}  // namespace

void add_version_routes(Router& router, Service& service) {
  router.add(
      "GET", "/ds/v1/versions", kRead, BodyKind::kNone,
      [&](RouteCall&, const ResponderPtr& to) { to->json(list_versions(service.parts.versions)); });
  router.add("GET", "/ds/v1/versions/{}", kRead, BodyKind::kNone,
             [&](RouteCall& call, const ResponderPtr& to) {
               const Result<int64_t> number = version_number(call.params[0]);
               to->result(number.ok() ? service.parts.versions.show(*number)
                                      : Result<Json>(number.status()));
             });
  router.add("GET", "/ds/v1/versions/diff", kRead, BodyKind::kNone,
             [&](RouteCall& call, const ResponderPtr& to) {
               const Result<int64_t> a = version_number(call.request.query_value("a"));
               const Result<int64_t> b = version_number(call.request.query_value("b"));
               if (!a.ok()) return to->result(a.status().in("a"));
               if (!b.ok()) return to->result(b.status().in("b"));
               service.answer_from(service.slow, to, [&service, a = *a, b = *b] {
                 return diff(service.parts, a, b);
               });
             });
  add_change(router, service, "/ds/v1/versions/rollback", roll_back);
  add_change(router, service, "/ds/v1/versions/promote", promote);
  add_change(router, service, "/ds/v1/versions/pin", pin);
  add_change(router, service, "/ds/v1/versions/unpin",
             [](Versions& versions, const Json&) -> Result<Json> {
               DS_TRY(versions.unpin());
               return pointer_json(versions);
             });

  router.add("GET", "/ds/v1/models", kRead, BodyKind::kNone,
             [&](RouteCall&, const ResponderPtr& to) {
               service.answer_from(service.quick, to, [&service]() -> Result<Json> {
                 return Json{{"items", all_models(service)}};
               });
             });
  router.add("POST", "/ds/v1/models", kAdmin, BodyKind::kJson,
             [&](RouteCall& call, const ResponderPtr& to) {
               service.answer_from(service.slow, to, [&service, body = std::move(call.body)] {
                 return create_model(service, body);
               });
             });
  router.add("GET", "/ds/v1/models/{}", kRead, BodyKind::kNone,
             [&](RouteCall& call, const ResponderPtr& to) {
               service.answer_from(service.quick, to, [&service, name = call.params[0]] {
                 return one_model(service, name);
               });
             });
  router.add("GET", "/ds/v1/models/{}/versions", kRead, BodyKind::kNone,
             [&](RouteCall& call, const ResponderPtr& to) {
               service.answer_from(service.quick, to, [&service, name = call.params[0]] {
                 return model_versions(service, name);
               });
             });
  router.add("POST", "/ds/v1/infer", kInfer, BodyKind::kJson,
             [&](RouteCall& call, const ResponderPtr& to) { infer_task(service, call, to); });
}

}  // namespace ds
