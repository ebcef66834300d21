// SPDX-License-Identifier: Apache-2.0
// Tools that break one rule each: a finding for every tenth line.
#include <fcntl.h>
#include <time.h>

#include <cstdlib>
#include <thread>

#include "tests/zoo/zoo.h"

namespace {

enum fault {
  sound,
  never_returns,
  leaks_memory,
  leaks_file,
  leaks_thread,
  silent_thread,
  keeps_host_memory,
  ignores_cancel,
  ignores_deadline,
  crashes_on_empty,
  throws_across,
  needs_whole_host,
  refuses_its_config,
  nondeterministic,
  finding_outside,
  broken_json,
  aborts_without_memory,
  trusts_host_memory,
  shared_scratch,
  breaks_on_noise,
  bad_schema,
  false_state,
  name_with_space
};
constexpr std::string_view names[] = {"sound",
                                      "never_returns",
                                      "leaks_memory",
                                      "leaks_file",
                                      "leaks_thread",
                                      "silent_thread",
                                      "keeps_host_memory",
                                      "ignores_cancel",
                                      "ignores_deadline",
                                      "crashes_on_empty",
                                      "throws_across",
                                      "needs_whole_host",
                                      "refuses_its_config",
                                      "nondeterministic",
                                      "finding_outside",
                                      "broken_json",
                                      "aborts_without_memory",
                                      "trusts_host_memory",
                                      "shared_scratch",
                                      "breaks_on_noise",
                                      "bad_schema",
                                      "false_state",
                                      "name with space"};

template <fault F>
struct tool {
  static constexpr std::string_view name = names[F];
  static constexpr std::string_view config_schema =
      F == bad_schema ? R"({"type": "object",)" : R"({"type": "object", "properties": {}})";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC |
                                        (F == false_state ? std::uint64_t{DS_CAP_STATEFUL} : 0ull);

  explicit tool(ds::sdk::context c) {
    static int made = 0;
    const ds_host* host = c.host;
    if (F == leaks_memory) kept = std::malloc(40);
    if (F == leaks_file) file = open("/dev/null", O_RDONLY);
    if (F == needs_whole_host) host->log(host->ctx, DS_LOG_DEBUG, ds::sdk::str(name), {});
    if (F == keeps_host_memory || F == trusts_host_memory) take(host);
    if (F == leaks_thread && made++ % 10 == 0 && DS_HAS(ds_host, host, thread_enter)) {
      auto* entered = new std::atomic<bool>(false);
      std::thread([host, entered] {
        host->thread_enter(host->ctx, ds::sdk::str("stays"));
        *entered = true;
        for (;;) pause_a_while();
      }).detach();
      while (!*entered) std::this_thread::yield();
    }
    if (F == silent_thread)
      thread = std::thread([this] {
        while (!stop.load()) std::this_thread::yield();
      });
    if (F == trusts_host_memory && kept != nullptr) give(host);
  }
  ~tool() {
    stop = true;
    if (thread.joinable()) thread.join();
  }
  void reconfigure(ds::sdk::context) {
    if (F == refuses_its_config) throw ds::sdk::error(DS_E_CONFIG, "no");
  }

  template <class Emit>
  void analyse(const ds_call& call, std::string_view, std::string_view, std::string_view text,
               Emit&& emit) const {
    while (F == never_returns) pause_a_while();
    if (F == crashes_on_empty && text.empty()) std::abort();
    const auto lines = static_cast<std::uint32_t>(1 + std::ranges::count(text, '\n'));
    if (F == breaks_on_noise && lines < 290 && text.find('\xff') != text.npos) std::abort();
    if (F == aborts_without_memory) {
      char* volatile buffer = static_cast<char*>(std::malloc(100));
      if (buffer == nullptr) std::abort();
      std::free(buffer);
    }
    work(call, lines);
    const bool alone = use_scratch();
    static std::uint32_t times = 0;
    const std::uint32_t shift = F == nondeterministic ? times++ % 2 : 0;
    for (std::uint32_t line = 10; line + shift <= lines; line += 10) {
      ds_finding f{};
      f.severity = alone ? DS_SEVERITY_NOTE : DS_SEVERITY_ERROR;
      f.line = f.end_line = line + shift + (F == finding_outside ? lines : 0);
      f.message = ds::sdk::str("a tenth line");
      f.confidence = 0.5f;
      emit(f);
    }
  }

  std::string invoke(const ds_call&, std::string_view arguments) const {
    if (arguments != "{}") throw ds::sdk::error(DS_E_DATA, "arguments: expected {}");
    return F == broken_json ? "{\"a\":" : "{}";
  }

 private:
  static void pause_a_while() {
    const timespec t{0, 50'000'000};
    nanosleep(&t, nullptr);
  }
  void take(const ds_host* host) {
    if (!DS_HAS(ds_host, host, alloc)) return;
    const ds_code code = host->alloc(host->ctx, {DS_DEV_CPU, 0}, 64, 64, &kept);
    if (F == keeps_host_memory && code != DS_OK) throw std::bad_alloc();
    if (F == trusts_host_memory) *static_cast<volatile char*>(kept) = 1;
  }
  void give(const ds_host* host) {
    if (DS_HAS(ds_host, host, dealloc)) host->dealloc(host->ctx, {DS_DEV_CPU, 0}, kept, 64);
  }
  /// Long for long texts, in pieces between which it looks up, unless it does not.
  static void work(const ds_call& call, std::uint32_t lines) {
    const std::int64_t until =
        zoo::now_ns(CLOCK_PROCESS_CPUTIME_ID) + (lines > 400 ? 1'200'000'000 : 0);
    do {
      if (F != ignores_cancel) ds::sdk::check_cancelled(call);
      if (F != ignores_deadline) zoo::check_deadline(call);
    } while (zoo::now_ns(CLOCK_PROCESS_CPUTIME_ID) < until);
  }
  /// Whether nobody else used it meanwhile.
  bool use_scratch() const {
    if (F != shared_scratch) return true;
    const int mine = ++users;
    for (int i = 0; i < 20; ++i) std::this_thread::yield();
    return users == mine;
  }

  void* kept = nullptr;
  int file = -1;
  std::thread thread;
  std::atomic<bool> stop = false;
  mutable std::atomic<int> users = 0;
};

template <fault F>
constexpr const ds_component* bad = &ds::sdk::component<tool<F>>;

struct thrower : zoo::raw_component<tool<throws_across>, ds_tool> {
  thrower() {
    table.analyse = [](ds_instance* i, const ds_call* c, ds_str language, ds_str path, ds_str text,
                       void* ctx, ds_code (*emit)(void*, const ds_finding*), ds_status* st) {
      if (text.len == 0) throw ds::sdk::error(DS_E_DATA, "no text");
      return ds::sdk::tool_table<tool<throws_across>>.analyse(i, c, language, path, text, ctx, emit,
                                                              st);
    };
  }
};
const thrower thrower_component;

}  // namespace

ZOO("org.driftstone.zoo.tool", 1u << DS_KIND_TOOL, bad<sound>, bad<never_returns>,
    bad<leaks_memory>, bad<leaks_file>, bad<leaks_thread>, bad<silent_thread>,
    bad<keeps_host_memory>, bad<ignores_cancel>, bad<ignores_deadline>, bad<crashes_on_empty>,
    &thrower_component.component, bad<needs_whole_host>, bad<refuses_its_config>,
    bad<nondeterministic>, bad<finding_outside>, bad<broken_json>, bad<aborts_without_memory>,
    bad<trusts_host_memory>, bad<shared_scratch>, bad<breaks_on_noise>, bad<bad_schema>,
    bad<false_state>, bad<name_with_space>)
