/* SPDX-License-Identifier: Apache-2.0
 * Quantizer in plain C: symmetric INT4, one scale for each 32 weights of a row, two weights to a
 * byte, the first in the low half, each stored as value + 8. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ds/plugin.h"

enum { GROUP = 32 };

static ds_code fail(ds_status* st, ds_code code, const char* what, long long got,
                    long long expected) {
  if (st == NULL) return code;
  memset(st, 0, sizeof *st);
  st->code = code;
  const int n = snprintf(st->text, sizeof st->text, "%s: %lld, expected %lld", what, got, expected);
  st->len = n < 0 ? 0u : (uint32_t)(n < (int)sizeof st->text ? n : (int)sizeof st->text - 1);
  return code;
}

/* Nothing to remember: the instance is one byte that only has an address. */
static ds_code create(const ds_host* host, const ds_config* config, ds_device device,
                      ds_instance** out, ds_status* st) {
  (void)host, (void)config;
  if (out == NULL) return fail(st, DS_E_ARG, "out", 0, 1);
  if (device.type != DS_DEV_CPU)
    return fail(st, DS_E_DEVICE, "device type", device.type, DS_DEV_CPU);
  *out = (ds_instance*)calloc(1, 1);
  return *out != NULL ? DS_OK : fail(st, DS_E_NOMEM, "bytes", 0, 1);
}
static void destroy(ds_instance* self) { free(self); }

static ds_code format(ds_instance* self, int64_t n, int64_t k, ds_qformat* out, ds_status* st) {
  (void)self;
  if (n <= 0) return fail(st, DS_E_SHAPE, "rows", n, 1);
  if (k <= 0 || k % GROUP != 0)
    return fail(st, DS_E_UNSUPPORTED, "columns, a multiple is", k, GROUP);
  if (out == NULL || out->size < sizeof(uint32_t)) return fail(st, DS_E_ARG, "room of out", 0, 4);
  ds_qformat f;
  memset(&f, 0, sizeof f);
  f.layout_id = DS_PACK_OWN + 2;
  f.bits = 4;
  f.group = GROUP;
  f.scale_dtype.code = DS_FLOAT;
  f.scale_dtype.bits = 32;
  f.scale_dtype.lanes = 1;
  f.symmetric = 1;
  f.packed_bytes = (uint64_t)(n * k / 2);
  f.scale_bytes = (uint64_t)(n * k / GROUP) * sizeof(float);
  f.rel_tol = 0.0715f;             /* half a step: 0.5 / 7, and rounding */
  const uint32_t room = out->size; /* an older host knows fewer fields: write no further */
  f.size = room < sizeof f ? room : (uint32_t)sizeof f;
  memcpy(out, &f, f.size);
  return DS_OK;
}

/* A weight as the plain f32 [n, k] it must be, and the memory of q large enough for it. */
static ds_code check(const ds_tensor* w, const ds_qweight* q, int writes_w, ds_status* st) {
  if (w == NULL || !DS_SEES(ds_qweight, q, scales)) /* rule R1: look at no field beyond its size */
    return fail(st, DS_E_ARG, "arguments missing", 1, 0);
  if (w->dtype.code != DS_FLOAT || w->dtype.bits != 32 || w->dtype.lanes != 1)
    return fail(st, DS_E_DTYPE, "bits of w", w->dtype.bits, 32);
  if (w->device.type == DS_DEV_CUDA) return fail(st, DS_E_DEVICE, "device of w", DS_DEV_CUDA, 1);
  if (w->packing != DS_PACK_NONE) return fail(st, DS_E_SHAPE, "packing of w", w->packing, 0);
  if (writes_w && (w->flags & DS_T_READONLY)) return fail(st, DS_E_ARG, "w is read-only", 1, 0);
  if (w->ndim != 2) return fail(st, DS_E_SHAPE, "dimensions of w", w->ndim, 2);
  if (w->shape[0] != q->n) return fail(st, DS_E_SHAPE, "rows of w", w->shape[0], q->n);
  if (w->shape[1] != q->k) return fail(st, DS_E_SHAPE, "columns of w", w->shape[1], q->k);
  if (q->n <= 0 || q->k <= 0 || q->k % GROUP != 0 || q->n > INT64_MAX / 8 / q->k)
    return fail(st, DS_E_SHAPE, "columns, a multiple is", q->k, GROUP);
  if (w->strides[1] != 1 || (q->n > 1 && w->strides[0] != q->k))
    return fail(st, DS_E_SHAPE, "stride of w", w->strides[0], q->k);
  const uint64_t elements = (uint64_t)(q->n * q->k);
  if (w->byte_offset > w->bytes || (w->bytes - w->byte_offset) / sizeof(float) < elements)
    return fail(st, DS_E_SHAPE, "bytes of w", (long long)w->bytes, (long long)elements * 4);
  if (w->data == NULL || q->packed == NULL || q->scales == NULL)
    return fail(st, DS_E_ARG, "memory missing", 1, 0);
  if (q->format == NULL || !DS_SEES(ds_qformat, q->format, scale_bytes) ||
      q->format->packed_bytes < elements / 2 ||
      q->format->scale_bytes < elements / GROUP * sizeof(float))
    return fail(st, DS_E_SHAPE, "memory of the weight fits the format", 0, 1);
  return DS_OK;
}

typedef struct quantize_job {
  const float* w;
  uint8_t* packed;
  float* scales;
  int64_t k;
} quantize_job;

static void quantize_row(void* user, int64_t row) {
  const quantize_job* job = (const quantize_job*)user;
  for (int64_t at = row * job->k; at < (row + 1) * job->k; at += GROUP) {
    float top = 0;
    for (int i = 0; i < GROUP; ++i) top = fmaxf(top, fabsf(job->w[at + i]));
    job->scales[at / GROUP] = top / 7;
    for (int i = 0; i < GROUP; i += 2) {
      int pair[2];
      for (int j = 0; j < 2; ++j)
        pair[j] = top > 0 ? (int)lroundf(job->w[at + i + j] / top * 7) + 8 : 8;
      job->packed[(at + i) / 2] = (uint8_t)(pair[0] | pair[1] << 4);
    }
  }
}

static ds_code quantize(ds_instance* self, const ds_call* call, ds_str name, const ds_tensor* w,
                        const ds_qweight* out, ds_status* st) {
  (void)self, (void)name;
  const ds_code code = check(w, out, 0, st);
  if (code != DS_OK) return code;
  quantize_job job;
  job.w = (const float*)((const char*)w->data + w->byte_offset);
  job.packed = (uint8_t*)out->packed;
  job.scales = (float*)out->scales;
  job.k = out->k;
  for (int64_t i = 0; i < out->n * out->k; ++i)
    if (!isfinite(job.w[i]))
      return fail(st, DS_E_NUMERIC, "finite weights before one that is not", i, out->n * out->k);
  call->parallel->run(call->parallel->ctx, out->n, quantize_row, &job);
  return DS_OK;
}

static ds_code dequantize(ds_instance* self, const ds_call* call, const ds_qweight* q,
                          const ds_tensor* w, ds_status* st) {
  (void)self, (void)call;
  const ds_code code = check(w, q, 1, st);
  if (code != DS_OK) return code;
  float* out = (float*)((char*)w->data + w->byte_offset);
  for (int64_t i = 0; i < q->n * q->k; ++i) {
    const int byte = ((const uint8_t*)q->packed)[i / 2];
    out[i] = (float)((i % 2 ? byte >> 4 : byte & 15) - 8) * ((const float*)q->scales)[i / GROUP];
  }
  return DS_OK;
}

#define TEXT(s) \
  { s, sizeof(s) - 1 }
static const ds_instance_ops ops = {.size = sizeof ops, .destroy = destroy};
static const ds_quantizer table = {
    .size = sizeof table, .format = format, .quantize = quantize, .dequantize = dequantize};
static const ds_component component = {.size = sizeof component,
                                       .kind = DS_KIND_QUANTIZER,
                                       .name = TEXT("block-int4"),
                                       .caps = DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC,
                                       .create = create,
                                       .ops = &ops,
                                       .table = &table};
static const ds_component* const components[] = {&component};
static const ds_plugin plugin = {.size = sizeof plugin,
                                 .abi_minor = DS_ABI_MINOR,
                                 .id = TEXT("org.driftstone.example.block-int4"),
                                 .version = TEXT("1.0.0"),
                                 .license = TEXT("Apache-2.0"),
                                 .component_count = 1,
                                 .components = components};

DS_NOTE("org.driftstone.example.block-int4", 1u << DS_KIND_QUANTIZER);
DS_EXPORT ds_code ds_plugin_entry_v1(const ds_host* host, const ds_plugin** out, ds_status* st) {
  if (host == NULL || out == NULL) return fail(st, DS_E_ARG, "host or output missing", 1, 0);
  *out = &plugin;
  return DS_OK;
}
