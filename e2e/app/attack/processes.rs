//! Attempts on other processes: their environment, memory and descriptors.

use std::fs::{self, File};
use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixStream};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::{Attempt, errno, find, worst};

/// No more of a mapping is looked at.
const MOST: usize = 8 << 20;
/// No process here has more descriptors.
const DESCRIPTORS: i32 = 64;

/// All processes in sight but this one.
pub(super) fn others() -> Vec<i32> {
    let own = std::process::id().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = entries.map(|it| it.file_name().to_string_lossy().into_owned());
    names.filter(|name| *name != own).filter_map(|name| name.parse().ok()).collect()
}

/// The first gain from any process.
fn any(attempt: impl Fn(i32) -> Result<Option<String>, Errno>) -> Attempt {
    let mut refusals = Vec::new();
    for pid in others() {
        match attempt(pid) {
            Ok(Some(gain)) => return Ok(gain),
            Ok(None) => {}
            Err(refusal) => refusals.push(refusal),
        }
    }
    Err(worst(&refusals))
}

pub(super) fn environments(mark: &str) -> Attempt {
    any(|pid| fs::read(format!("/proc/{pid}/environ")).map(|it| find(&it, mark)).map_err(|it| errno(&it)))
}

pub(super) fn memories(mark: &str) -> Attempt {
    any(|pid| {
        let memory = File::open(format!("/proc/{pid}/mem")).map_err(|it| errno(&it))?;
        in_memory(pid, mark, |at, bytes| memory.read_at(bytes, at as u64).map_err(|it| errno(&it)))
    })
}

pub(super) fn vm_readv(mark: &str) -> Attempt {
    any(|pid| {
        in_memory(pid, mark, |at, bytes| {
            let from = RemoteIoVec { base: at, len: bytes.len() };
            process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(bytes)], &[from])
        })
    })
}

pub(super) fn traced(mark: &str) -> Attempt {
    any(|pid| {
        let pid = Pid::from_raw(pid);
        ptrace::attach(pid)?;
        waitpid(pid, None)?;
        let found = in_memory(pid.as_raw(), mark, |at, bytes| {
            for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&ptrace::read(pid, (at + index * 8) as ptrace::AddressType)?.to_ne_bytes());
            }
            Ok(bytes.len())
        });
        ptrace::detach(pid, None)?;
        found
    })
}

/// Looks through the writable memory of a process.
fn in_memory(
    pid: i32,
    mark: &str,
    read: impl Fn(usize, &mut [u8]) -> Result<usize, Errno>,
) -> Result<Option<String>, Errno> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|it| errno(&it))?;
    let mut refusal = None;
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(rights)) = (fields.next(), fields.next()) else { continue };
        let Some((start, end)) = range.split_once('-').filter(|_| rights.starts_with("rw")) else { continue };
        let hex = |text| usize::from_str_radix(text, 16).unwrap();
        let (start, end) = (hex(start), hex(end));
        let mut bytes = vec![0; (end - start).min(MOST)];
        match read(start, &mut bytes) {
            Ok(length) => {
                if let Some(value) = find(&bytes[..length], mark) {
                    return Ok(Some(value));
                }
            }
            Err(error) => refusal = Some(error),
        }
    }
    refusal.map_or(Ok(None), Err)
}

pub(super) fn descriptors(mark: &str) -> Attempt {
    any(|pid| {
        let pid = rustix::process::Pid::from_raw(pid).ok_or(Errno::ESRCH)?;
        let process = pidfd_open(pid, PidfdFlags::empty()).map_err(|it| Errno::from_raw(it.raw_os_error()))?;
        taken_from(&process, mark)
    })
}

/// A process that listens on an abstract socket of the pod's network is known by it, across process namespaces.
pub(super) fn peer(socket: &str, mark: &str) -> Attempt {
    let address = SocketAddr::from_abstract_name(socket).map_err(|it| errno(&it))?;
    let stream = UnixStream::connect_addr(&address).map_err(|it| errno(&it))?;
    let process = getsockopt(&stream, sockopt::PeerPidfd)?;
    taken_from(&process, mark)?.ok_or(Errno::ENOENT)
}

fn taken_from(process: &OwnedFd, mark: &str) -> Result<Option<String>, Errno> {
    let mut refusal = None;
    for number in 0..DESCRIPTORS {
        match pidfd_getfd(process.as_fd(), number, PidfdGetfdFlags::empty()) {
            Ok(taken) => {
                let mut bytes = vec![0; 4096];
                let length = File::from(taken).read_at(&mut bytes, 0).unwrap_or(0);
                if let Some(value) = find(&bytes[..length], mark) {
                    return Ok(Some(value));
                }
            }
            Err(rustix::io::Errno::BADF) => {}
            Err(error) => refusal = Some(Errno::from_raw(error.raw_os_error())),
        }
    }
    refusal.map_or(Ok(None), Err)
}
