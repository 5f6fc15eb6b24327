//! What a process gives up before it works: each step with its own error, in the order that makes it possible.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::{fs, slice};

use landlock::{
    ABI, Access, AccessFs, BitFlags, LandlockStatus, PathBeneath, PathFd, PathFdError, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope, path_beneath_rules,
};
use libc::c_long;
use rustix::fs::Mode;
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, Signal, getppid, getrlimit, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit, umask,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

/// The most memory a worker may map: a leak ends the worker, not the node.
const MAX_MEMORY: u64 = 1 << 30;
/// The most descriptors a worker may hold.
const MAX_FILES: u64 = 4096;
/// Memory of [`arena`], in bytes: the least RLIMIT_MEMLOCK a process without rights is usually given.
const ARENA: usize = 64 * 1024;

/// Why a process could not be hardened.
#[derive(Debug, thiserror::Error)]
pub enum HardenError {
    /// The broker lacks a right.
    #[error("sealmount node needs {0}: run it as root, in a container with securityContext.privileged: true")]
    Capabilities(String),
    /// The broker ended before its worker could ask to end with it.
    #[error("the broker is gone")]
    Orphaned,
    /// A directory the worker must read is not there.
    #[error("cannot allow reading a directory: {0}")]
    Unreadable(#[from] PathFdError),
    /// Landlock is there but refuses.
    #[error("cannot restrict files with Landlock: {0}")]
    Landlock(#[from] RulesetError),
    /// The filter of system calls could not be made.
    #[error("cannot make the filter of system calls: {0}")]
    Filter(#[from] seccompiler::BackendError),
    /// The filter of system calls could not be set.
    #[error("cannot set the filter of system calls: {0}")]
    Seccomp(#[from] seccompiler::Error),
    /// A step failed.
    #[error("cannot {step}: {error}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// Why it was not.
        error: io::Error,
    },
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> HardenError {
    move |error| HardenError::Step { step, error: error.into() }
}

/// What the broker keeps: mounts and trusted attributes (SYS_ADMIN), making files that belong to others below
/// directories that do (CHOWN, DAC_OVERRIDE, FOWNER), looking into and ending the worker (SYS_PTRACE, KILL), starting
/// one under another UID (SETUID, SETGID), and giving up the rest (SETPCAP).
const KEPT: [(&str, CapabilitySet); 9] = [
    ("CAP_SYS_ADMIN", CapabilitySet::SYS_ADMIN),
    ("CAP_CHOWN", CapabilitySet::CHOWN),
    ("CAP_DAC_OVERRIDE", CapabilitySet::DAC_OVERRIDE),
    ("CAP_FOWNER", CapabilitySet::FOWNER),
    ("CAP_SYS_PTRACE", CapabilitySet::SYS_PTRACE),
    ("CAP_KILL", CapabilitySet::KILL),
    ("CAP_SETUID", CapabilitySet::SETUID),
    ("CAP_SETGID", CapabilitySet::SETGID),
    ("CAP_SETPCAP", CapabilitySet::SETPCAP),
];

/// Hardens the broker: no core, not dumpable, nothing of what it makes is anybody else's, no right it does not use.
pub fn broker() -> Result<(), HardenError> {
    no_core()?;
    umask(Mode::RWXG | Mode::RWXO);

    let had = capabilities(None).map_err(step("read its capabilities"))?.permitted;
    let missing: Vec<_> = KEPT.iter().filter(|(_, capability)| !had.contains(*capability)).map(|kept| kept.0).collect();
    if !missing.is_empty() {
        return Err(HardenError::Capabilities(missing.join(", ")));
    }
    let keep = KEPT.iter().fold(CapabilitySet::empty(), |set, (_, capability)| set | *capability);
    clear_ambient_capability_set().map_err(step("clear its ambient capabilities"))?;
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(capability) {
            Err(_) => break, // beyond the last one this kernel knows
            Ok(true) if !keep.contains(capability) => {
                remove_capability_from_bounding_set(capability).map_err(step("drop a capability for good"))?;
            }
            Ok(_) => {}
        }
    }
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(step("drop its capabilities"))
}

/// What a worker keeps access to.
#[derive(Debug, Clone, Copy)]
pub struct Confinement<'a> {
    /// The broker's process id ([`crate::broker::client::Inherited::broker`]).
    pub broker: i32,
    /// Directories and files to read: the directory of `--config`, of a kubeconfig, of manifests. Each must exist.
    pub read: &'a [&'a Path],
    /// The work tmpfs, to write.
    pub work: BorrowedFd<'a>,
}

/// Read besides, where they are: the pod's own ServiceAccount, and what resolving a name takes.
const READ: [&str; 4] =
    ["/var/run/secrets/kubernetes.io/serviceaccount", "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"];

/// Confines a worker. To be called before it has a second thread: most of it holds for the calling thread and what it
/// starts. The result names what this kernel cannot enforce, to be logged once.
pub fn worker(confinement: &Confinement<'_>) -> Result<Vec<String>, HardenError> {
    // The broker's mask is inherited: a blocked SIGTERM would never arrive.
    nix::sys::signal::SigSet::empty().thread_set_mask().map_err(step("unblock signals"))?;
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("ask to end with the broker"))?;
    // It may have died before that.
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(confinement.broker) {
        return Err(HardenError::Orphaned);
    }
    // Before it is not dumpable, which makes the file root's. The kernel takes the worker first, not the broker.
    let oom = fs::OpenOptions::new().write(true).open("/proc/self/oom_score_adj");
    oom.and_then(|mut file| io::Write::write_all(&mut file, b"1000")).map_err(step("raise its OOM score"))?;

    no_core()?;
    limit(Resource::As, MAX_MEMORY)?;
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(MAX_FILES);
    limit(Resource::Nofile, files.min(MAX_FILES))?;
    one_malloc_arena();
    set_no_new_privs(true).map_err(step("give up new privileges"))?;
    let missing = restrict_files(confinement)?;
    restrict_calls()?;
    Ok(missing)
}

/// Landlock: what is not listed cannot be opened, whatever its mode says.
fn restrict_files(confinement: &Confinement<'_>) -> Result<Vec<String>, HardenError> {
    let abi = ABI::V6;
    let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let write: BitFlags<AccessFs> = AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir;
    for path in confinement.read {
        PathFd::new(path)?; // below, a path that is not there would be left out
    }
    let paths = confinement.read.iter().copied().chain(READ.iter().map(Path::new));
    // Rules before restrict_self: a directory opened later is refused.
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .add_rules(path_beneath_rules(paths, read))?
        .add_rule(PathBeneath::new(confinement.work, write))?
        .restrict_self()?;
    Ok(match status.landlock {
        LandlockStatus::Available { effective_abi, .. } if effective_abi >= abi => Vec::new(),
        LandlockStatus::Available { effective_abi, .. } => {
            vec![format!("Landlock has ABI {effective_abi:?} of {abi:?} (Linux 6.12)")]
        }
        status => vec![format!("Landlock restricts nothing: {status:?}")],
    })
}

/// What a worker may ask of the kernel, each with who asks. Not on it, ever: unshare, setns, the mount family,
/// userfaultfd, io_uring, ptrace, process_vm_*, pidfd_getfd, bpf, perf_event_open.
const ALLOWED: &[c_long] = &[
    // std and rustix: reading configuration, tokens and sockets; writing logs and the work tmpfs
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_ioctl,
    // the client of the broker: content in the work tmpfs
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_ftruncate,
    // tokio: its poller, wakers and signal pipe
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    // the reload of the configuration
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    // tonic, hyper, the metrics listener, glibc's resolver (sendmmsg, netlink)
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    // malloc, thread stacks, the locked arena
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mlock,
    // threads: tokio's blocking pool, in which names are resolved; clone3 is answered by its own filter
    libc::SYS_clone3,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // signals: std's stack guard, tokio's handlers, abort
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    // ring and hash maps; clocks where the vDSO cannot answer; sleeping
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    // glibc asking who and where it is
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_prlimit64,
];

/// The older forms that glibc and tokio use on x86-64.
#[cfg(target_arch = "x86_64")]
const ALLOWED_OLD: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_pipe,
    libc::SYS_getrlimit,
    libc::SYS_nanosleep,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_OLD: &[c_long] = &[];

/// Two filters: the first answers clone3 with ENOSYS, since its flags lie in memory where a filter cannot see them,
/// and glibc then uses clone; the second allows what is listed and answers the rest with EPERM.
fn restrict_calls() -> Result<(), HardenError> {
    let equals = |argument, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
            .and_then(|c| SeccompRule::new(vec![c]))
    };
    let unsigned = |value: libc::c_int| u64::try_from(value).unwrap_or(u64::MAX);
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        ALLOWED.iter().chain(ALLOWED_OLD).map(|call| (*call, Vec::new())).collect();

    let mut sockets = Vec::new();
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK] {
        sockets.push(equals(0, unsigned(family))?);
    }
    rules.insert(libc::SYS_socket, sockets);
    rules.insert(libc::SYS_socketpair, vec![equals(0, unsigned(libc::AF_UNIX))?]);
    // A thread, and nothing that makes a namespace.
    let spaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    let thread = unsigned(libc::CLONE_THREAD);
    let only_threads = SeccompCmpOp::MaskedEq(thread | unsigned(spaces));
    let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, only_threads, thread)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![condition])?]);
    // Threads name themselves.
    rules.insert(libc::SYS_prctl, vec![equals(0, unsigned(libc::PR_SET_NAME))?]);

    let arch = std::env::consts::ARCH.try_into()?;
    let errno = |number: libc::c_int| SeccompAction::Errno(number.unsigned_abs());
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let clone3 = SeccompFilter::new(clone3, SeccompAction::Allow, errno(libc::ENOSYS), arch)?;
    let listed = SeccompFilter::new(rules, errno(libc::EPERM), SeccompAction::Allow, arch)?;
    for filter in [clone3, listed] {
        let program: BpfProgram = filter.try_into()?;
        apply_filter(&program)?;
    }
    Ok(())
}

/// Memory for keys and tokens: 64 KiB that are never swapped and never in a core file, for the life of the process.
/// Each call maps another; a process calls once.
pub fn arena() -> Result<&'static mut [u8], HardenError> {
    // SAFETY: an anonymous mapping where the kernel chooses; no memory of Rust's is touched.
    let start =
        unsafe { mmap_anonymous(std::ptr::null_mut(), ARENA, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) };
    let start = start.map_err(step("map memory for keys"))?;
    // SAFETY: exactly the mapping made above.
    unsafe { mlock(start, ARENA) }.map_err(step("lock memory for keys (RLIMIT_MEMLOCK)"))?;
    // SAFETY: exactly the mapping made above; its content does not change.
    unsafe { madvise(start, ARENA, Advice::LinuxDontDump) }.map_err(step("keep keys out of a core file"))?;
    // SAFETY: readable, writable, zeroed, `ARENA` bytes, never unmapped, and known to nobody else.
    Ok(unsafe { slice::from_raw_parts_mut(start.cast(), ARENA) })
}

/// One arena for all threads: each more is 64 MiB of address space and keeps what it freed.
fn one_malloc_arena() {
    // SAFETY: called before there is a second thread; both numbers are those of malloc.h.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Nothing of this process reaches a core file, and nobody without SYS_PTRACE looks into it.
fn no_core() -> Result<(), HardenError> {
    limit(Resource::Core, 0)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("make itself not dumpable"))
}

fn limit(resource: Resource, value: u64) -> Result<(), HardenError> {
    setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) }).map_err(step("set a resource limit"))
}

/// Takes over a descriptor that was inherited by its number; it is not passed on by another exec.
pub fn adopt(number: RawFd) -> Result<OwnedFd, HardenError> {
    if number <= 2 {
        return Err(step("inherit a descriptor")(io::Error::other("it is a standard stream")));
    }
    // SAFETY: borrowed for one question, whose answer is an error if the number is not open.
    let open = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) });
    open.map_err(step("inherit a descriptor"))?;
    // SAFETY: it is open, and came from the process that started this one, which passed it for this purpose.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(step("inherit a descriptor"))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_is_locked_and_left_out_of_cores() {
        let arena = arena().unwrap();
        assert!(arena.iter().all(|byte| *byte == 0));
        arena.fill(1);
        let start = format!("{:x}-", arena.as_ptr() as usize);
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let (_, mapping) = maps.split_once(&start).expect("no mapping starts there");
        let flags = mapping.lines().find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(flags.contains(" lo ") && flags.contains(" dd "), "{flags}");
    }

    #[test]
    fn what_is_no_descriptor_is_not_taken_over() {
        assert!(adopt(1).is_err(), "a standard stream");
        assert!(adopt(1_000_000).is_err(), "not open");
    }
}
