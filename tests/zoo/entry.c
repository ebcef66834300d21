/* SPDX-License-Identifier: Apache-2.0
 * Files whose fault shows before any component is made; ZOO_FAULT chooses it. */
#include <string.h>

#include "ds/plugin.h"

enum { SOUND, OTHER_POINTERS, SIDE_EFFECT, ID_LIES, KINDS_LIE, EXTRA_EXPORT };
#define TEXT(s) \
  { s, sizeof(s) - 1 }

static ds_code create(const ds_host* host, const ds_config* config, ds_device device,
                      ds_instance** out, ds_status* st) {
  static char instance;
  (void)host, (void)config, (void)device, (void)st;
  if (out == NULL) return DS_E_ARG;
  *out = (ds_instance*)&instance;
  return DS_OK;
}
static void destroy(ds_instance* self) { (void)self; }
static ds_code analyse(ds_instance* self, const ds_call* call, ds_str language, ds_str path,
                       ds_str text, void* ctx, ds_code (*emit)(void* ctx, const ds_finding*),
                       ds_status* st) {
  (void)self, (void)call, (void)language, (void)path, (void)text, (void)ctx, (void)emit, (void)st;
  return DS_OK;
}

static const ds_instance_ops ops = {.size = sizeof ops, .destroy = destroy};
static const ds_tool table = {.size = sizeof table, .analyse = analyse};
static const ds_component component = {.size = sizeof component,
                                       .kind = DS_KIND_TOOL,
                                       .name = TEXT("quiet"),
                                       .caps = DS_CAP_CPU | DS_CAP_DETERMINISTIC,
                                       .create = create,
                                       .ops = &ops,
                                       .table = &table};
static const ds_component* const components[] = {&component};
#if ZOO_FAULT == 3
#define OWN_ID "org.driftstone.zoo.other"
#else
#define OWN_ID "org.driftstone.zoo.entry"
#endif
static const ds_plugin plugin = {.size = sizeof plugin,
                                 .abi_minor = DS_ABI_MINOR,
                                 .id = TEXT(OWN_ID),
                                 .version = TEXT("1.0.0"),
                                 .license = TEXT("Apache-2.0"),
                                 .component_count = 1,
                                 .components = components};

#if ZOO_FAULT == 4
DS_NOTE("org.driftstone.zoo.entry", 1u << DS_KIND_TOOL | 1u << DS_KIND_LEARNER);
#else
DS_NOTE("org.driftstone.zoo.entry", 1u << DS_KIND_TOOL);
#endif

#if ZOO_FAULT == 5
DS_EXPORT int zoo_extra(void);
DS_EXPORT int zoo_extra(void) { return 1; }
#endif

DS_EXPORT ds_code ds_plugin_entry_v1(const ds_host* host, const ds_plugin** out, ds_status* st) {
  (void)st;
  if (host == NULL || out == NULL) return DS_E_ARG;
  *out = &plugin;
  if (ZOO_FAULT == OTHER_POINTERS) {
    static ds_plugin copies[2];
    static int times;
    copies[times % 2] = plugin;
    *out = &copies[times++ % 2];
  }
  if (ZOO_FAULT == SIDE_EFFECT) {
    void* kept = NULL;
    const ds_device cpu = {DS_DEV_CPU, 0};
    host->alloc(host->ctx, cpu, 64, 64, &kept);
  }
  return DS_OK;
}
