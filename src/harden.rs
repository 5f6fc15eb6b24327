//! What a process gives up before it works: each step with its own error, in the order that makes it possible.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::Mode;
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

/// Why a process could not be hardened.
#[derive(Debug, thiserror::Error)]
pub enum HardenError {
    /// The broker lacks a right.
    #[error("sealmount node needs {0}: run it as root, in a container with securityContext.privileged: true")]
    Capabilities(String),
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
