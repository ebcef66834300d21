// SPDX-License-Identifier: Apache-2.0
#include "plugin/isolated_syscalls.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ds {
namespace {

// A list of what is forbidden, not of what is allowed: a tool may start any program.
constexpr long kForbidden[] = {
    SYS_ptrace,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_process_madvise,
    SYS_pidfd_getfd,
    SYS_kcmp,
    SYS_perf_event_open,
    SYS_bpf,
    SYS_userfaultfd,
    SYS_keyctl,
    SYS_add_key,
    SYS_request_key,
    SYS_init_module,
    SYS_finit_module,
    SYS_delete_module,
    SYS_kexec_load,
    SYS_reboot,
    SYS_mount,
    SYS_umount2,
    SYS_pivot_root,
    SYS_move_mount,
    SYS_open_tree,
    SYS_fsopen,
    SYS_fsmount,
    SYS_fsconfig,
    SYS_fspick,
    SYS_chroot,
    SYS_setns,
    SYS_unshare,
    SYS_swapon,
    SYS_swapoff,
    SYS_open_by_handle_at,
    SYS_rt_sigqueueinfo,
    SYS_rt_tgsigqueueinfo,
    SYS_pidfd_send_signal,
    SYS_tkill,
    // The daemon listens on a socket of the file system, too: no network namespace keeps it away.
    SYS_socket,
    // io_uring does in the kernel what the filter does not see.
    SYS_io_uring_setup,
    SYS_io_uring_enter,
    SYS_io_uring_register,
};
#if defined(__x86_64__)
constexpr uint32_t kArchitecture = AUDIT_ARCH_X86_64, kOtherAbi = 0x40000000;  // x32
#elif defined(__aarch64__)
constexpr uint32_t kArchitecture = AUDIT_ARCH_AARCH64, kOtherAbi = 0;
#endif

constexpr uint32_t kDeny = SECCOMP_RET_ERRNO | EPERM;

class Filter {
 public:
  void load(size_t offset) { add(BPF_LD | BPF_W | BPF_ABS, static_cast<uint32_t>(offset)); }
  void give(uint32_t verdict) { add(BPF_RET | BPF_K, verdict); }
  /// `verdict` if what was loaded is `value`.
  void if_equal(uint32_t value, uint32_t verdict) { check(BPF_JEQ, value, verdict); }
  void if_at_least(uint32_t value, uint32_t verdict) { check(BPF_JGE, value, verdict); }
  /// Goes over the next `skipped` instructions if what was loaded is `value`, or if it is not.
  void skip_if(uint32_t value, uint8_t skipped) {
    code_.push_back({BPF_JMP | BPF_JEQ | BPF_K, skipped, 0, value});
  }
  void skip_unless(uint32_t value, uint8_t skipped) {
    code_.push_back({BPF_JMP | BPF_JEQ | BPF_K, 0, skipped, value});
  }
  bool install() {
    const sock_fprog program{static_cast<unsigned short>(code_.size()), code_.data()};
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
  }

 private:
  void add(uint16_t code, uint32_t value) { code_.push_back({code, 0, 0, value}); }
  void check(uint16_t test, uint32_t value, uint32_t verdict) {
    code_.push_back({static_cast<uint16_t>(BPF_JMP | test | BPF_K), 0, 1, value});
    give(verdict);
  }
  std::vector<sock_filter> code_;
};

}  // namespace

bool forbid_syscalls(pid_t daemon) {
  constexpr size_t kFirst = offsetof(seccomp_data, args);  // its low half: little-endian
  Filter filter;
  filter.load(offsetof(seccomp_data, arch));
  filter.skip_if(kArchitecture, 1);
  filter.give(kDeny);  // numbers of another machine mean other calls
  filter.load(offsetof(seccomp_data, nr));
  if (kOtherAbi != 0) filter.if_at_least(kOtherAbi, kDeny);
  for (const long number : kForbidden) filter.if_equal(static_cast<uint32_t>(number), kDeny);
  for (const long number : {SYS_kill, SYS_tgkill}) {
    // A pid, minus the number of a group, -1 for all.
    constexpr uint8_t kChecks = 8;
    filter.skip_unless(static_cast<uint32_t>(number), kChecks);
    filter.load(kFirst);
    filter.if_equal(static_cast<uint32_t>(daemon), kDeny);
    filter.if_equal(static_cast<uint32_t>(-daemon), kDeny);
    filter.if_equal(static_cast<uint32_t>(-1), kDeny);
    filter.give(SECCOMP_RET_ALLOW);
  }
  filter.give(SECCOMP_RET_ALLOW);
  return filter.install();
}

}  // namespace ds
