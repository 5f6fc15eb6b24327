//! The kernel's calls about mounts, each as one function: the only file of the broker with raw system calls.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::{io, ptr};

use rustix::fs::fstatfs;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, fspick,
};

use crate::request::Owner;

/// A new tmpfs as a detached mount, which nobody but the holder of the descriptor (O_PATH) can reach. `source` is what
/// mountinfo shows, `room` its size in bytes and its inodes; mode and owner are its root's; `noswap` keeps its pages out
/// of swap (Linux 6.4).
pub(crate) fn tmpfs(
    source: &str,
    room: (u64, u64),
    mode: &str,
    owner: Owner,
    noswap: bool,
) -> rustix::io::Result<OwnedFd> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let set = |key: &str, value: &str| fsconfig_set_string(fs.as_fd(), key, value);
    set("source", source)?;
    set("size", &room.0.to_string())?;
    set("nr_inodes", &room.1.to_string())?;
    set("mode", mode)?;
    set("uid", &owner.uid.to_string())?;
    set("gid", &owner.gid.to_string())?;
    set("huge", "never")?;
    if noswap {
        fsconfig_set_flag(fs.as_fd(), "noswap")?;
    }
    if Path::new("/sys/fs/selinux/enforce").exists() {
        // Containers may read this type; without it a read-only volume keeps tmpfs_t, which they may not.
        set("context", "system_u:object_r:container_file_t:s0")?;
    }
    fsconfig_create(fs.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes | MountAttrFlags::MOUNT_ATTR_NOEXEC)
}

/// Whether this kernel knows tmpfs' `noswap` (Linux 6.4).
pub(crate) fn knows_noswap() -> rustix::io::Result<bool> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    match fsconfig_set_flag(fs.as_fd(), "noswap") {
        Err(Errno::INVAL) => Ok(false),
        other => other.map(|()| true),
    }
}

/// Changes size and inodes of the superblock below `mount`; works under a read-only mount.
pub(crate) fn resize(mount: impl AsFd, room: (u64, u64)) -> rustix::io::Result<()> {
    let fs = fspick(mount, "", FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH)?;
    fsconfig_set_string(fs.as_fd(), "size", room.0.to_string())?;
    fsconfig_set_string(fs.as_fd(), "nr_inodes", room.1.to_string())?;
    fsconfig_reconfigure(fs.as_fd())
}

/// Sets or clears RDONLY on a mount. Setting fails with EBUSY while anybody can write through it.
pub(crate) fn set_read_only(mount: impl AsFd, read_only: bool) -> io::Result<()> {
    let flag = libc::MOUNT_ATTR_RDONLY;
    let (attr_set, attr_clr) = if read_only { (flag, 0) } else { (0, flag) };
    let attributes = libc::mount_attr { attr_set, attr_clr, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is an empty C string, and the kernel reads `size_of` bytes of a structure that outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            ptr::from_ref(&attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Refuses descriptors sent to this socket (SO_PASSRIGHTS, Linux 6.16): closing one can block its receiver. The number
/// is that of include/uapi/asm-generic/socket.h.
pub(crate) fn refuse_descriptors(socket: impl AsFd) -> io::Result<()> {
    const SO_PASSRIGHTS: c_int = 83;
    const LENGTH: libc::socklen_t = 4;
    let off: c_int = 0;
    // SAFETY: the kernel reads the 4 bytes of `off`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            ptr::from_ref(&off).cast(),
            LENGTH,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How full a superblock is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    pub(crate) page: u64,
    pub(crate) size: u64,
    pub(crate) used: u64,
    pub(crate) inodes: u64,
    pub(crate) inodes_used: u64,
}

/// Asks a tmpfs; takes no lock.
pub(crate) fn usage(fd: impl AsFd) -> rustix::io::Result<Usage> {
    let stat = fstatfs(fd)?;
    let page = u64::try_from(stat.f_bsize).unwrap_or(4096);
    Ok(Usage {
        page,
        size: stat.f_blocks.saturating_mul(page),
        used: stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(page),
        inodes: stat.f_files,
        inodes_used: stat.f_files.saturating_sub(stat.f_ffree),
    })
}

/// One line of /proc/self/mountinfo (proc_pid_mountinfo(5)), as written there: compare with [`escape`]d text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MountLine {
    pub(crate) id: u64,
    pub(crate) root: String,
    pub(crate) point: String,
    pub(crate) fs: String,
    pub(crate) source: String,
}

/// Every mount whose mount point starts with `below`, as the kernel lists them: touches none of them.
pub(crate) fn mounts(below: &str) -> io::Result<Vec<MountLine>> {
    let mut text = Vec::with_capacity(64 * 1024); // each read renders a part anew
    File::open("/proc/self/mountinfo")?.read_to_end(&mut text)?;
    Ok(parse_mountinfo(&text, below))
}

fn parse_mountinfo(text: &[u8], below: &str) -> Vec<MountLine> {
    let text = String::from_utf8_lossy(text); // a path that is not UTF-8 is not ours
    let line = |line: &str| {
        let mut fields = line.split(' ').map(str::to_owned);
        let (id, root, point) = (fields.next()?.parse().ok()?, fields.nth(2)?, fields.next()?);
        let mut rest = fields.skip_while(|field| field != "-").skip(1);
        point.starts_with(below).then_some(MountLine { id, root, point, fs: rest.next()?, source: rest.next()? })
    };
    text.lines().filter_map(line).collect()
}

/// A path as mountinfo writes it.
pub(crate) fn escape(path: &str) -> String {
    path.replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011").replace('\n', "\\012")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_and_without_optional_fields() {
        let text = b"36 35 98:0 /mnt1 /k/a\\040b rw,noatime master:1 shared:2 - ext4 /dev/root rw,errors=continue\n\
                     37 35 0:50 / /k/c ro,relatime - tmpfs sealmount rw,size=4k\n\
                     38 35 0:51 / /other ro - tmpfs sealmount rw\n\
                     39 35 \n\
                     x - y\n";
        let lines = parse_mountinfo(text, "/k/");
        let line = |id, root: &str, point: &str, fs: &str, source: &str| MountLine {
            id,
            root: root.into(),
            point: point.into(),
            fs: fs.into(),
            source: source.into(),
        };
        let first = line(36, "/mnt1", &escape("/k/a b"), "ext4", "/dev/root");
        assert_eq!(lines, [first, line(37, "/", "/k/c", "tmpfs", "sealmount")]);
        assert_eq!(escape("a\\b\tc\n"), "a\\134b\\011c\\012");
    }
}
