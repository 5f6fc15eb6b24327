//! The least work that gives a pod the same thing: a sealed tmpfs with the same files, made by a bare loop in this
//! process. No other process, no copy, no check.
#![allow(unsafe_code)] // neither nix nor rustix has mount_setattr

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags};

/// Attaches a tmpfs with these files, 0400 and owned by `uid`, in the layout of a Secret volume at `target`.
pub fn publish(target: &Path, files: &[(String, String)], uid: u32) -> io::Result<()> {
    DirBuilder::new().mode(0o750).create(target)?;
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = context.as_fd();
    let owner = uid.to_string();
    for (key, value) in [
        ("source", "sealmount-floor"),
        ("size", "1m"),
        ("nr_inodes", "64"),
        ("mode", "0500"),
        ("uid", owner.as_str()),
        ("gid", "0"),
        ("huge", "never"),
    ] {
        rustix::mount::fsconfig_set_string(context, key, value)?;
    }
    rustix::mount::fsconfig_set_flag(context, "noswap")?;
    rustix::mount::fsconfig_create(context)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = rustix::mount::fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(&mount, ".", directory, Mode::empty())?;
    rustix::fs::mkdirat(&root, "..1", Mode::RWXU)?;
    let generation = rustix::fs::openat(&root, "..1", directory, Mode::empty())?;
    let (owner, group) = (Some(Uid::from_raw(uid)), Some(Gid::ROOT));
    for (name, content) in files {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mut file = fs::File::from(rustix::fs::openat(&generation, name.as_str(), flags, Mode::empty())?);
        file.write_all(content.as_bytes())?;
        rustix::fs::fchown(&file, owner, group)?;
        rustix::fs::fchmod(&file, Mode::RUSR)?;
        rustix::fs::symlinkat(format!("..data/{name}"), &root, name.as_str())?;
    }
    rustix::fs::fchown(&generation, owner, group)?;
    rustix::fs::fchmod(&generation, Mode::RUSR | Mode::XUSR)?;
    rustix::fs::symlinkat("..1", &root, "..data")?;
    drop((root, generation));
    seal(&mount)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(&mount, "", CWD, target, flags)?)
}

/// Makes a detached mount read-only.
fn seal(mount: &impl AsFd) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: an open descriptor, an empty path that ends in NUL, and a struct of exactly the size that is told; the
    // kernel only reads them.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Detaches it again and removes its directory.
pub fn unpublish(target: &Path) -> io::Result<()> {
    rustix::mount::unmount(target, UnmountFlags::DETACH)?;
    fs::remove_dir(target)
}
