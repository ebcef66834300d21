// SPDX-License-Identifier: Apache-2.0
// Every command of dsctl against a scripted daemon, as table and as JSON, compared with golden
// files: what people's scripts read must not change by accident. DS_UPDATE_GOLDEN=1 writes the
// files anew.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "ctl_fixture.h"

namespace ds::test {
namespace {

constexpr const char* kLearning =
    R"({"state":"training","enabled":true,"method":"lora","queued":17,"oldest_wait_s":4.2,"round":12,
"step":18204,"loss":1.8312,"lag_s_last":40.1,"lag_s_p50":38.2,"share":0.35,"tokens_per_s":812.5,
"rounds":[{"round":11,"outcome":"published","version":"v41","items":["fb_1","fb_2"],"steps":42,
  "seconds":12.4},
{"round":12,"outcome":"held","version":"v42","items":["fb_3"],"steps":60,"seconds":31,
"reason":"faq 2.4 % worse, allowed 1.0 %"}]})";

void script_status(FakeControl& daemon) {
  daemon.on("GET /ready", R"({"ready":true,"version":"v41"})");
  daemon.on("GET /health", R"({"status":"ok"})");
  daemon.on(
      "GET /ds/v1/status",
      R"({"now_ms":1000720000,"version":"0.1.0","uptime_s":273600,"host":"alpha","isa":"avx512-vnni",
"pid":4711,"model":{"name":"smollm2-135m-instruct","sha256":"9f3c2a1b00112233","parameters":134515008},
"serving":{"version":"v41","fingerprint":"ds-v41-9f3c2a1b","since_ms":1000000000,"running":2,"waiting":0,
"kv_used":31,"kv_total":100,"ttft_p50_s":0.084,"ttft_p99_s":0.21},"learning":)" +
          std::string(kLearning) +
          R"(,"store":{"items":48210,"bytes":432013312,"last_offset":48321},
"gate":{"promoted":9,"held":1,"rolled_back":0}})");
  daemon.on("GET /ds/v1/ps",
            R"({"items":[{"id":"chatcmpl-1","class":"interactive","state":"running","version":"v41",
"prompt":120,"generated":37,"ttft_s":0.084,"age_s":3.2},{"id":"chatcmpl-2","class":"batch",
"state":"waiting","version":"v40","prompt":1900,"generated":0,"ttft_s":null,"age_s":75}]})");
  daemon.on("DELETE /ds/v1/requests/chatcmpl-1", R"({"cancelled":true})");
  daemon.on("GET /metrics", Canned{200,
                                   "# HELP ds_learn_steps_total Steps\nds_learn_steps_total 204\n"
                                   "ds_serve_running_requests 2\n",
                                   "text/plain; version=0.0.4"});
  daemon.on("GET /ds/v1/learn", kLearning);
}

void script_versions(FakeControl& daemon) {
  daemon.on("GET /ds/v1/versions",
            R"({"now_ms":1000720000,"current":"v40","pinned":"v40","items":[
{"version":"v42","number":42,"parent":"v40","state":"held","method":"lora","items_count":131,
"created_ms":1000700000,"weight_hash":"aa11bb22cc33","fingerprint":"ds-v42-aa11bb22","bytes":2516582},
{"version":"v40","number":40,"parent":"v1","state":"current","method":"lora","items_count":128,
"created_ms":1000000000,"weight_hash":"9f3c2a1b0011","fingerprint":"ds-v40-9f3c2a1b","bytes":2516582},
{"version":"v1","number":1,"parent":null,"state":"retired","method":"base","items_count":0,
"created_ms":900000000,"weight_hash":"0011223344","fingerprint":"ds-v1-00112233"}]})");
  daemon.on("GET /ds/v1/versions/v40",
            R"({"now_ms":1000720000,"version":"v40","number":40,"parent":"v1","state":"current",
"method":"lora","items":["fb_0123456789abcdef0123"],"created_ms":1000000000,"weight_hash":"9f3c2a1b0011",
"fingerprint":"ds-v40-9f3c2a1b","details":{"rank":8,"steps":42,"gate":{"worst":"faq","drop":0.002}}})");
  daemon.on("GET /ds/v1/versions/diff?a=v1&b=v40",
            R"({"a":"v1","b":"v40","items_added":["fb_0123456789abcdef0123"],
"weight_hash":["0011223344","9f3c2a1b0011"],"delta_norm":0.73125})");
  daemon.on("POST /ds/v1/versions/rollback", R"({"current":"v1","pinned":"v1"})");
  daemon.on("POST /ds/v1/versions/promote", R"({"current":"v42","pinned":null})");
  daemon.on("POST /ds/v1/versions/pin", R"({"current":"v40","pinned":"v40"})");
  daemon.on("POST /ds/v1/versions/unpin", R"({"current":"v40","pinned":null})");
  daemon.on("GET /ds/v1/models",
            R"({"items":[{"name":"smollm2-135m-instruct","kind":"language","version":"v40",
"parameters":134515008,"sha256":"9f3c2a1b00112233"},{"name":"digits","kind":"mlp","version":"digits@v3",
"parameters":89610,"sha256":"abcdef0123456789"}]})");
  daemon.on(
      "GET /ds/v1/models/digits",
      R"({"name":"digits","kind":"mlp","version":"digits@v3","parameters":89610,"mlp":[784,100,100,10]})");
  daemon.on("POST /ds/v1/models", R"({"name":"digits","kind":"mlp","version":"digits@v1"})");
}

constexpr const char* kComponent =
    R"("name":"window-global","kind":"attention","id":"org.acme.window","version":"1.2.0",
"generation":3,"state":"serving","users":2,"threads":0,"host_bytes":0,"origin":"installed",
"trusted_by":"allow-list","path":"/opt/acme/window.so","abi":"1.0","config":{"window":64},
"sha256":"64257c73a497b1d0c6904c9f2ec799a556feb2d0015435961ebd124813b73c07","loaded_ms":1000000000)";

constexpr const char* kIsolated =
    R"({"name":"lint","kind":"tool","id":"org.acme.lint","version":"0.3.0","generation":1,
"state":"serving","users":0,"threads":0,"host_bytes":0,"origin":"installed","trusted_by":"nobody",
"isolated":true,"path":"/opt/acme/lint.so","abi":"1.0","config":{},"sha256":"0d4c73a497b1d0c6904c",
"loaded_ms":1000000000,"runs_in":"process","pid":4711,"deaths":0,"breaker":"closed")";

void script_plugins(FakeControl& daemon) {
  const std::string one = "{" + std::string(kComponent) + "}";
  const std::string shown =
      "{" + std::string(kComponent) +
      R"(,"shadow":{"source":"recorded","calls":6,"differing":0,"largest":1.2e-6,
"mean":4e-8,"text":"6 recorded calls: the same within what is promised, largest relative difference 1.2e-06"},
"summary":"local window and chosen globals","license":"Apache-2.0",
"config_schema":{"type":"object"},"generations":[)" +
      one + "]}";
  daemon.on("GET /ds/v1/plugins/lint", kIsolated +
                                           std::string(R"(,"summary":"finds faults","license":"MIT",
"config_schema":{"type":"object"},"generations":[)") +
                                           kIsolated + "}]}");
  daemon.on("GET /ds/v1/plugins", R"({"plugins":[)" + one + "," + kIsolated + "}" +
                                      R"(],"refused":[{"path":"/m/bad.so",
"reason":"/m/bad.so: mode 0777, group or others may write; expected none of them"}]})");
  daemon.on("GET /ds/v1/plugins/window-global", shown);
  daemon.on("POST /ds/v1/plugins/load", R"({"path":"/opt/acme/window.so","sha256":"64257c73a497",
"trusted_by":"allow-list","components":[)" + one +
                                            "]}");
  for (const char* verb : {"reload", "rollback", "retire", "configure"})
    daemon.on(std::string("POST /ds/v1/plugins/") + verb, shown);
  daemon.on("POST /ds/v1/tools/cppcheck", R"({"tool":"cppcheck","truncated":false,"findings":[
{"path":"a.cpp","line":3,"column":11,"severity":"error","rule":"nullPointer",
"message":"Null pointer dereference: q","confidence":1},
{"path":"a.cpp","line":0,"column":0,"severity":"warning","rule":"noConfiguration","message":"none",
"confidence":0.5}]})");
  daemon.on("POST /ds/v1/plugins/diff", R"({"kind":"attention","a":{"name":"dense","generation":1},
"b":{"name":"window-global","generation":3},"source":"recorded","differing":2,"largest":0.52,"mean":0.013,
"text":"2 of 3 recorded calls differ, prefill (64 rows, 300 keys): largest difference 0.52",
"calls":[{"call":"prefill","size":"64 rows, 300 keys","largest":0.52,"mean":0.013,"within":false},
{"call":"decode","size":"1 row, 20 keys","largest":0,"mean":0,"within":true},
{"call":"decode","size":"1 row, 301 keys","failed":"window-global: softcap","within":false}],
"only_a":[{"path":"a.c","line":3,"column":1,"severity":"error","rule":"r","message":"gone"}],"only_b":[]})");
  daemon.on("POST /ds/v1/plugins/bench", R"({"kind":"quantizer","name":"int8","generation":2,
"source":"recorded","calls":[{"call":"linear","size":"1 row, 64 x 576","runs":52341,"median_us":17.25,
"p99_us":31.5,"per_s":55123.4}]})");
  daemon.on("POST /ds/v1/plugins/explain", R"({"path":"/opt/acme/window.so","loads":false,"steps":[
{"step":"file","ok":true,"text":"regular file, owner and modes are fine, 1024 bytes"},
{"step":"note","ok":false,"text":"ABI major 2, this host has 1"}]})");
}

void script_feedback(FakeControl& daemon) {
  daemon.on(
      "GET /ds/v1/feedback",
      R"({"now_ms":1000720000,"items":[{"id":"fb_0123456789abcdef0123","offset":17,"kind":"correction",
"source":"alice","domain":"faq","state":"served","received_ms":1000000000,"version":"v40"},
{"id":"fb_0123456789abcdef0124","offset":16,"kind":"text","source":"a source with a name that is long",
"domain":"b\u001b[31mred","state":"quarantined","received_ms":999000000,"version":null}]})");
  daemon.on("GET /ds/v1/feedback/fb_0123456789abcdef0123",
            R"({"id":"fb_0123456789abcdef0123","offset":17,"client":"http-1","epoch":1,"seq":3,
"source":"alice","kind":"correction","domain":"faq","received_ms":1000000000,
"record":{"kind":"correction","response_id":"chatcmpl-1","correction":"Monday"},
"fate":[{"state":"stored","at_ms":1000000412,"version":"","step":0,"reason":""},
{"state":"queued","at_ms":1000000500},{"state":"trained","at_ms":1000030000,"version":"v40","step":42},
{"state":"served","at_ms":1000039012,"version":"v40"}]})");
  daemon.on("DELETE /ds/v1/feedback/fb_0123456789abcdef0123",
            R"({"id":"fb_0123456789abcdef0123","state":"reverted","version":"v43"})");
  daemon.on("POST /ds/v1/feedback",
            R"({"items":[{"offset":18,"id":"fb_a","state":"stored","duplicate":false},
{"offset":17,"id":"fb_b","state":"stored","duplicate":true}]})");
  daemon.on(
      "GET /ds/v1/feedback-stats",
      R"({"items":48210,"bytes":432013312,"state":{"served":48000,"held":210},"kind":{"correction":48210}})");
}

void script_upkeep(FakeControl& daemon) {
  daemon.on("POST /ds/v1/learn/step",
            R"({"round":13,"outcome":"published","version":"v43","items":["fb_a","fb_b"],"steps":40,
"seconds":12.25,"reason":"","gate":{"worst":"faq"}})");
  daemon.on("POST /ds/v1/learn/pause", R"({"state":"paused"})");
  daemon.on("POST /ds/v1/learn/resume", R"({"state":"idle"})");
  daemon.on(
      "GET /ds/v1/replay",
      R"({"domains":{"faq":{"examples":2048},"chat":{"examples":77}},"offset":48321,"store_id":"5e0c"})");
  daemon.on("POST /ds/v1/replay/verify", R"({"ok":true,"records":48210})");
  daemon.on(
      "GET /ds/v1/config",
      R"({"items":[{"name":"learn.rank","value":8,"default":8,"origin":"default","live":false,"help":"h"},
{"name":"learn.settle","value":"5s","default":"2s","origin":"dsd.toml:3","live":true,"help":"h"}]})");
  daemon.on("POST /ds/v1/config", R"({"name":"learn.settle","value":"1s"})");
  daemon.on("POST /ds/v1/backup", R"({"path":"/b/1","files":12,"bytes":85000000})");
  daemon.on("POST /ds/v1/tokenize", R"({"ids":[504,2365,1]})");
  const std::string steps =
      R"({"number":1,"at_ms":50400000,"topic":"step","loss":2.51234567,"step":1,"round":12})";
  const std::string version =
      R"({"number":2,"at_ms":50401000,"topic":"version","current":"v43","parent":"v40","reason":"",)"
      R"("items":["fb_a","fb_b"],"gate":{"kl":0.01}})";
  const std::string log =
      R"({"number":3,"at_ms":50402000,"topic":"log","level":"warn","unit":"learn","message":"slow"})";
  const std::string quiet =
      R"({"number":4,"at_ms":50403000,"topic":"log","level":"debug","unit":"serve","message":"tick"})";
  daemon.on("GET /ds/v1/events", R"({"items":[)" + steps + "," + version + "," + log + "]}");
  daemon.on("GET /ds/v1/events?follow=0&since=0&topic=log",
            R"({"items":[)" + log + "," + quiet + "]}");
  daemon.on("GET /ds/v1/events?follow=1",
            Canned{200,
                   "id: 1\nevent: step\ndata: " + steps +
                       "\n\n: ping\n\nid: 2\r\nevent: version\r\ndata: " + version + "\r\n\r\n",
                   "text/event-stream", true});
}

void script_answers(FakeControl& daemon) {
  const auto chunk = [](const std::string& text, const std::string& finish) {
    return R"(data: {"id":"chatcmpl-7","system_fingerprint":"ds-v41-9f3c2a1b",)"
           R"("choices":[{"index":0,"delta":{"content":")" +
           text + R"("},"finish_reason":)" + finish + "}]}\n\n";
  };
  daemon.on(
      "POST /v1/chat/completions",
      Canned{200,
             chunk("The office opens ", "null") + chunk("on M\\u00fcnday.", "null") +
                 chunk("", "\"stop\"") +
                 "data: {\"id\":\"chatcmpl-7\",\"choices\":[],\"usage\":{\"prompt_tokens\":20,"
                 "\"completion_tokens\":2}}\n\ndata: [DONE]\n\n",
             "text/event-stream", true});
}

struct Case {
  const char* name;
  std::vector<std::string> arguments;
  std::string input = "";
};

std::string case_name(const testing::TestParamInfo<Case>& info) { return info.param.name; }

class Golden : public testing::TestWithParam<Case> {};

TEST_P(Golden, PrintsWhatTheFileSays) {
  const ScratchFolder run;
  FakeControl daemon(run.path());
  if (std::string_view(GetParam().name).starts_with("doctor")) {  // it looks at the real clock too
    const auto since_1970 = std::chrono::system_clock::now().time_since_epoch();
    const auto now_ms = std::chrono::duration_cast<std::chrono::milliseconds>(since_1970).count();
    daemon.on("GET /ds/v1/status", R"({"version":"0.1.0","now_ms":)" + std::to_string(now_ms) +
                                       R"(,"learning":)" + kLearning + "}");
  }
  script_status(daemon);
  script_versions(daemon);
  script_plugins(daemon);
  script_feedback(daemon);
  script_upkeep(daemon);
  script_answers(daemon);
  std::vector<std::string> arguments = {"--run", run.path()};
  arguments.insert(arguments.end(), GetParam().arguments.begin(), GetParam().arguments.end());
  const Ran ran = run_dsctl(arguments, GetParam().input);
  const std::string got =
      ran.out + "--- stderr\n" + ran.err + "--- exit " + std::to_string(ran.exit) + "\n";

  const std::string path = std::string(DS_TEST_DATA) + "/golden/" + GetParam().name + ".txt";
  if (const char* update = std::getenv("DS_UPDATE_GOLDEN"); update && *update == '1') {
    std::ofstream(path, std::ios::binary) << got;
    return;
  }
  std::ifstream file(path, std::ios::binary);
  ASSERT_TRUE(file) << path << " is missing; DS_UPDATE_GOLDEN=1 writes it";
  std::stringstream want;
  want << file.rdbuf();
  EXPECT_EQ(got, want.str()) << path;
}

const std::string kLines =
    "{\"messages\":[{\"role\":\"user\",\"content\":\"When?\"},{\"role\":\"assistant\",\"content\":"
    "\"Monday\"}]}\n"
    "{\"prompt\":\"When?\",\"completion\":\"Monday\"}\n"
    "not json\n"
    "{\"strange\":1}\n";

const char* const kId = "fb_0123456789abcdef0123";

INSTANTIATE_TEST_SUITE_P(
    Dsctl, Golden,
    testing::Values(Case{"status", {"status"}}, Case{"status_json", {"status", "-o", "json"}},
                    Case{"ps", {"ps"}}, Case{"ps_json", {"ps", "-o", "json"}},
                    Case{"cancel", {"cancel", "chatcmpl-1"}},
                    Case{"cancel_json", {"cancel", "chatcmpl-1", "-o", "json"}},
                    Case{"cancel_unknown", {"cancel", "nope"}}, Case{"top_once", {"top", "--once"}},
                    Case{"metrics", {"metrics"}},
                    Case{"metrics_grep", {"metrics", "--grep", "^ds_learn"}},
                    Case{"ask", {"ask", "When does the office open?", "--max-tokens", "32"}},
                    Case{"tokenize", {"tokenize", "Hello there"}},
                    Case{"tokenize_json", {"tokenize", "x", "-o", "json"}},
                    Case{"tokenize_count", {"tokenize", "-", "--count"}, "Hello there"},
                    Case{"events", {"events"}}, Case{"events_json", {"events", "-o", "json"}},
                    Case{"events_follow", {"events", "-f"}},
                    Case{"events_follow_json", {"events", "-f", "-o", "json"}},
                    Case{"logs", {"logs"}},
                    Case{"logs_debug", {"logs", "--level", "debug", "-n", "1"}},
                    Case{"logs_json", {"logs", "-o", "json"}}, Case{"model_ls", {"model", "ls"}},
                    Case{"model_ls_json", {"model", "ls", "-o", "json"}},
                    Case{"model_show", {"model", "show", "digits"}},
                    Case{"model_show_json", {"model", "show", "digits", "-o", "json"}},
                    Case{"model_new", {"model", "new", "digits", "--mlp", "784,100,100,10"}},
                    Case{"model_new_json",
                         {"model", "new", "digits", "--mlp", "784,100,100,10", "-o", "json"}}),
    case_name);

INSTANTIATE_TEST_SUITE_P(
    DsctlPlugin, Golden,
    testing::Values(
        Case{"plugin_ls", {"plugin", "ls"}}, Case{"plugin_ls_json", {"plugin", "ls", "-o", "json"}},
        Case{"plugin_show", {"plugin", "show", "window-global"}},
        Case{"plugin_show_json", {"plugin", "show", "window-global", "-o", "json"}},
        Case{"plugin_show_unknown", {"plugin", "show", "flash"}},
        Case{"plugin_explain", {"plugin", "explain", "/opt/acme/window.so"}},
        Case{"plugin_explain_json", {"plugin", "explain", "/opt/acme/window.so", "-o", "json"}},
        Case{"plugin_load", {"plugin", "load", "/opt/acme/window.so", "window=64", "--trust"}},
        Case{"plugin_load_both", {"plugin", "load", "/opt/acme/lint.so", "--trust", "--isolated"}},
        Case{"plugin_show_isolated", {"plugin", "show", "lint"}},
        Case{"plugin_load_wrong", {"plugin", "load", "/opt/acme/window.so", "window"}},
        Case{"plugin_reload",
             {"plugin", "reload", "window-global", "--file", "/opt/acme/window.so"}},
        Case{"plugin_reload_shadow", {"plugin", "reload", "window-global", "--shadow", "refuse"}},
        Case{"plugin_reload_wrong", {"plugin", "reload", "window-global", "--shadow", "maybe"}},
        Case{"plugin_diff", {"plugin", "diff", "dense", "window-global"}},
        Case{"plugin_diff_json", {"plugin", "diff", "dense", "-o", "json"}},
        Case{"plugin_bench", {"plugin", "bench", "int8"}},
        Case{"plugin_bench_json", {"plugin", "bench", "int8@2", "--seconds", "1", "-o", "json"}},
        Case{"plugin_configure", {"plugin", "configure", "window-global", "window=32"}},
        Case{"plugin_run", {"plugin", "run", "cppcheck", "/dev/null", "--language", "c"}},
        Case{"plugin_run_json",
             {"plugin", "run", "cppcheck", "/dev/null", "--language", "c", "-o", "json"}},
        Case{"plugin_run_unknown", {"plugin", "run", "lint", "/dev/null", "--language", "c"}},
        Case{"plugin_run_language", {"plugin", "run", "cppcheck", "/dev/null"}},
        Case{"plugin_run_no_file", {"plugin", "run", "cppcheck", "/nonexistent/a.c"}},
        Case{"plugin_rollback", {"plugin", "rollback", "window-global"}},
        Case{"plugin_retire", {"plugin", "retire", "window-global", "-o", "json"}}),
    case_name);

INSTANTIATE_TEST_SUITE_P(
    DsctlVersions, Golden,
    testing::Values(Case{"version_ls", {"version", "ls"}},
                    Case{"version_ls_json", {"version", "ls", "-o", "json"}},
                    Case{"version_show", {"version", "show", "v40"}},
                    Case{"version_show_json", {"version", "show", "40", "-o", "json"}},
                    Case{"version_show_unknown", {"version", "show", "v99"}},
                    Case{"version_diff", {"version", "diff", "v1", "v40"}},
                    Case{"version_diff_json", {"version", "diff", "v1", "v40", "-o", "json"}},
                    Case{"version_rollback", {"version", "rollback", "v1", "--reason", "worse"}},
                    Case{"version_rollback_json", {"version", "rollback", "-o", "json"}},
                    Case{"version_promote", {"version", "promote", "v42"}},
                    Case{"version_promote_json", {"version", "promote", "v42", "-o", "json"}},
                    Case{"version_pin", {"version", "pin", "v40"}},
                    Case{"version_unpin", {"version", "unpin"}}),
    case_name);

INSTANTIATE_TEST_SUITE_P(
    DsctlFeedback, Golden,
    testing::Values(Case{"feedback_ls", {"feedback", "ls"}},
                    Case{"feedback_ls_json", {"feedback", "ls", "-o", "json"}},
                    Case{"feedback_show", {"feedback", "show", kId}},
                    Case{"feedback_show_json", {"feedback", "show", kId, "-o", "json"}},
                    Case{"feedback_push", {"feedback", "push", "-"}, kLines},
                    Case{"feedback_push_json", {"feedback", "push", "-", "-o", "json"}, kLines},
                    Case{"feedback_rm", {"feedback", "rm", kId, "--yes"}},
                    Case{"feedback_rm_json", {"feedback", "rm", kId, "--yes", "-o", "json"}},
                    Case{"feedback_rm_unconfirmed", {"feedback", "rm", kId}},
                    Case{"feedback_stats", {"feedback", "stats"}},
                    Case{"feedback_stats_json", {"feedback", "stats", "-o", "json"}}),
    case_name);

INSTANTIATE_TEST_SUITE_P(
    DsctlUpkeep, Golden,
    testing::Values(
        Case{"learn_status", {"learn", "status"}},
        Case{"learn_status_json", {"learn", "status", "-o", "json"}},
        Case{"learn_step", {"learn", "step"}},
        Case{"learn_step_json", {"learn", "step", "-o", "json"}},
        Case{"learn_pause", {"learn", "pause"}}, Case{"learn_resume", {"learn", "resume"}},
        Case{"learn_watch_once", {"learn", "watch", "--once"}},
        Case{"replay_stats", {"replay", "stats"}},
        Case{"replay_stats_json", {"replay", "stats", "-o", "json"}},
        Case{"replay_verify", {"replay", "verify"}},
        Case{"replay_verify_json", {"replay", "verify", "-o", "json"}},
        Case{"config_show", {"config", "show"}},
        Case{"config_show_origin", {"config", "show", "--origin"}},
        Case{"config_show_json", {"config", "show", "-o", "json"}},
        Case{"config_set", {"config", "set", "learn.settle=1s"}},
        Case{"config_set_json", {"config", "set", "learn.settle", "1s", "-o", "json"}},
        Case{"config_doc", {"config", "doc"}}, Case{"backup_create", {"backup", "create", "/b/1"}},
        Case{"backup_create_json", {"backup", "create", "/b/1", "-o", "json"}},
        Case{"backup_restore_unconfirmed", {"backup", "restore", "/b/1", "--data", "/d"}},
        Case{"doctor_daemon", {"doctor"}}, Case{"help", {"--help"}}),
    case_name);

}  // namespace
}  // namespace ds::test
