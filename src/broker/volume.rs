//! Commit and Remove on the kernel's side, as lists of steps; each step says why it is where it is.
//!
//! The rules behind all of it: no descriptor of a published superblock leaves this process; what the worker wrote is
//! copied into inodes that only the broker ever opened; nothing is touched that does not pass the safe test of
//! [`Kubelet::place`]; and whatever can wait for an application's directory lock runs in a [`fork`].

use std::fs::canonicalize;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::{fs, io};

use nix::mount::{MntFlags, umount2};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, getpid, getppid};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, Uid, XattrFlags, fchmod,
    fchown, fgetxattr, fsetxattr, fstat, fstatfs, mkdirat, openat, openat2, readlinkat, renameat, sendfile, statx,
    symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};

use super::layout::{DATA, DATA_NEXT, Layout, generation_name, parse_generation};
use super::mounts::{Usage, escape, mounts, resize, set_read_only, tmpfs, usage};
use super::wire::{Commit, Denied, Standing};
use crate::request::{DRIVER, Owner, PodUid, VolumeId, VolumeName};

/// What mountinfo shows as the source of a volume.
const SOURCE: &str = "sealmount";
/// The attribute on a volume's root that says whose it is. To forge it takes SYS_ADMIN in the first user namespace.
const ATTRIBUTE: &str = "trusted.sealmount";
/// The first byte of the attribute.
const RECORD_VERSION: u8 = 1;
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// Every path the broker opens is resolved below a descriptor it holds, through no link of any kind.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A content to put into a volume: what was asked, how it lies, and the work tmpfs it is copied from.
pub(crate) struct Content<'a> {
    pub(crate) commit: &'a Commit,
    pub(crate) layout: &'a Layout,
    pub(crate) work: &'a OwnedFd,
}

/// What a volume says of itself in [`ATTRIBUTE`].
#[derive(Serialize, Deserialize)]
struct Record {
    /// Its size and inodes are asked of the kernel instead.
    standing: Standing,
    tag: [u8; 32],
}

impl Record {
    fn of(content: &Content<'_>, generation: u64, since: u64) -> Self {
        let Commit { volume, owner, key, tag, note, .. } = content.commit;
        let (volume, note, bytes) = (volume.clone(), note.clone(), content.layout.bytes);
        let (owner, key, size, inodes) = (*owner, *key, 0, (0, 0));
        Self { standing: Standing { volume, owner, generation, bytes, size, inodes, since, key, note }, tag: *tag }
    }

    fn store(&self, root: &OwnedFd) -> Result<(), Denied> {
        let bytes = postcard::to_extend(self, vec![RECORD_VERSION]).map_err(|_| Denied::Invalid("the note".into()))?;
        fsetxattr(root, ATTRIBUTE, &bytes, XattrFlags::empty()).at("write the volume's attribute")
    }

    fn load(root: &OwnedFd) -> Option<Self> {
        let mut bytes = [0; 4096]; // the longest record is below 1 500 bytes
        let length = fgetxattr(root, ATTRIBUTE, &mut bytes).ok()?;
        let (&RECORD_VERSION, body) = bytes.get(..length)?.split_first()? else { return None };
        postcard::from_bytes(body).ok()
    }
}

/// A volume of ours that passed the safe test; its descriptors were checked and are used from here on.
pub(crate) struct Mounted {
    parent: OwnedFd,
    /// The mount's root, O_PATH.
    target: OwnedFd,
    pub(crate) standing: Standing,
    /// `None` if `..data` names another generation than the record: a crash came between rename and attribute, and
    /// nothing is known of the content.
    pub(crate) tag: Option<[u8; 32]>,
    pub(crate) usage: Usage,
}

/// What is where a volume belongs.
pub(crate) enum Place {
    /// The kubelet made no directory for it, or removed it.
    Unprepared,
    /// Nothing is mounted; the descriptor is of the volume's directory.
    Bare(OwnedFd),
    /// A volume of ours.
    Ours(Box<Mounted>),
}

/// The kubelet's directory: every path is composed below it from a pod's UID and a volume's name, never taken.
pub(crate) struct Kubelet {
    root: OwnedFd,
    /// The start of our mount points as mountinfo writes it.
    pods: String,
}

impl Kubelet {
    /// Opens it once; links in the given path itself are the administrator's and are followed.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let path = canonicalize(path)?;
        let root = openat(CWD, &path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let path = path.to_str().ok_or_else(|| io::Error::other("the path is not UTF-8"))?;
        Ok(Self { root, pods: escape(&format!("{}/pods/", path.trim_end_matches('/'))) })
    }

    /// The safe test. Mountinfo comes first: touching another driver's dead mount may hang for ever. Only a line that
    /// says tmpfs, our source, the file system's own root and exactly our path is touched at all; then the opened
    /// directory must be that mount's root, with that mount's id, a tmpfs, and name this pod and volume.
    pub(crate) fn place(&self, volume: &VolumeId) -> Result<Place, Denied> {
        let below = format!("{}/volumes/kubernetes.io~csi/{}", volume.pod, volume.name);
        let foreign = |why: &str| Err(Denied::Foreign(why.to_owned()));
        let point = format!("{}{below}/mount", self.pods);
        let mut lines = mounts(&point).at("read /proc/self/mountinfo")?;
        lines.retain(|line| line.point == point);
        let line = match lines.as_slice() {
            [] => None,
            [line] if line.fs == "tmpfs" && line.source == SOURCE && line.root == "/" => Some(line),
            [_] => return foreign("another mount"),
            _ => return foreign("mounts on top of each other"),
        };

        let path = OFlags::PATH | DIRECTORY;
        let parent = match openat2(&self.root, format!("pods/{below}"), path, Mode::empty(), INSIDE) {
            Ok(parent) => parent,
            Err(Errno::NOENT) if line.is_none() => return Ok(Place::Unprepared),
            Err(Errno::LOOP | Errno::NOTDIR) => return foreign("a symbolic link in its path"),
            Err(error) => return Err(error).at("open the volume's directory"),
        };
        let Some(line) = line else { return Ok(Place::Bare(parent)) };
        let target = openat2(&parent, "mount", path, Mode::empty(), INSIDE).at("open the mount")?;
        let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
        let stat = statx(&target, "", flags, StatxFlags::MNT_ID).at("stat the mount")?;
        if stat.stx_mnt_id != line.id || !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return foreign("another mount than the one listed");
        }
        if fstatfs(&target).at("stat the file system")?.f_type != TMPFS_MAGIC {
            return foreign("no tmpfs");
        }
        let root = open_dir(&target, ".")?;
        let Some(Record { mut standing, tag }) = Record::load(&root).filter(|it| it.standing.volume == *volume) else {
            return foreign("a tmpfs that does not name this pod and volume");
        };
        // Reading a link takes no directory lock: this must not wait for an application.
        let data = readlinkat(&root, DATA, Vec::new()).at("read ..data")?;
        let Some(generation) = parse_generation(data.as_bytes()) else { return foreign("..data is not ours") };
        let tag = (standing.generation == generation).then_some(tag);
        let usage = usage(&target).at("stat the file system")?;
        standing.generation = generation;
        (standing.size, standing.inodes) = (usage.size, (usage.inodes_used, usage.inodes));
        Ok(Place::Ours(Box::new(Mounted { parent, target, standing, tag, usage })))
    }

    /// The volumes mountinfo seems to show; each has yet to pass the safe test.
    pub(crate) fn candidates(&self) -> io::Result<Vec<VolumeId>> {
        let volume = |point: &str| {
            let (pod, rest) = point.strip_prefix(&self.pods)?.split_once('/')?;
            let name = rest.strip_prefix("volumes/kubernetes.io~csi/")?.strip_suffix("/mount")?;
            Some(VolumeId { pod: PodUid::parse(pod).ok()?, name: VolumeName::parse(name).ok()? })
        };
        let ours = mounts(&self.pods)?.into_iter().filter(|line| line.fs == "tmpfs" && line.source == SOURCE);
        let mut volumes: Vec<_> = ours.filter_map(|line| volume(&line.point)).collect();
        volumes.sort();
        volumes.dedup();
        Ok(volumes)
    }
}

/// First publish: nothing is visible before the one atomic attach, so any error leaves nothing but, at the worst, an
/// empty directory. Runs in the broker: nobody else can lock a tmpfs that is attached nowhere.
pub(crate) fn publish(parent: &OwnedFd, content: &Content<'_>, noswap: bool, since: u64) -> Result<(), Denied> {
    // Only where the kubelet asked for this driver: a hostile worker must not publish over another's volume.
    prepared(parent)?;
    let made = match mkdirat(parent, "mount", Mode::from_raw_mode(0o750)) {
        Err(Errno::EXIST) => false,
        result => result.at("make the volume's directory").map(|()| true)?,
    };
    let result = attach(parent, content, noswap, since);
    if made && result.is_err() {
        let _ = unlinkat(parent, "mount", AtFlags::REMOVEDIR); // only what this call made
    }
    result
}

fn attach(parent: &OwnedFd, content: &Content<'_>, noswap: bool, since: u64) -> Result<(), Denied> {
    let target = open_bare(parent).map_err(|_| Denied::Foreign("no plain directory".into()))?;
    if !entries(&target)?.is_empty() {
        return Err(Denied::Foreign("a directory that is not empty".into()));
    }
    let Content { commit, layout, .. } = content;
    let mount = tmpfs(SOURCE, layout.room((0, 0)), "0500", commit.owner, noswap).at("make a tmpfs")?;
    let root = open_dir(&mount, ".")?; // the mount's own descriptor is O_PATH
    fill(&root, content, 1)?;
    link(&root, layout)?;
    symlinkat(generation_name(1), &root, DATA).at("link ..data")?;
    Record::of(content, 1, since).store(&root)?;

    // Every writable descriptor is closed now; EBUSY here means that one is not: a check of ourselves, for free.
    drop(root);
    set_read_only(&mount, true).at("seal the mount")?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&mount, "", &target, "", flags).at("attach the mount")
}

/// Swaps a standing volume's content. Runs in a fork: an application can hold the lock of its volume's directory.
pub(crate) fn update(mounted: &Mounted, content: &Content<'_>) -> Result<(), Denied> {
    let layout = content.layout;
    writing(mounted, |root| {
        clean(root)?; // what an earlier attempt left would be in the way
        let usage = usage(root).at("stat the file system")?;
        let room = layout.room((usage.used, usage.inodes_used));
        if room != (usage.size, usage.inodes) {
            resize(&mounted.target, room).at("resize the volume")?;
        }

        let generation = mounted.standing.generation.saturating_add(1);
        let swap = || {
            fill(root, content, generation)?;
            // New names first: they lead nowhere until the rename, and everywhere after it.
            link(root, layout)?;
            symlinkat(generation_name(generation), root, DATA_NEXT).at("link ..data_tmp")?;
            renameat(root, DATA_NEXT, root, DATA).at("rename ..data")
        };
        if let Err(denied) = swap() {
            let _ = clean(root); // nothing was visible; what stays is cleaned by the next attempt
            return Err(denied);
        }
        // After the rename: with a crash between the two the attribute names another generation than `..data`, and its
        // tag then counts for nothing.
        Record::of(content, generation, mounted.standing.since).store(root)?;
        // The old generation is unlinked, not overwritten: a mapping, an open file or a subPath bind reads it to the end.
        clean(root)
    })
}

/// Stores another note beside the same content. Runs in a fork, as writing an attribute locks the directory.
pub(crate) fn annotate(mounted: &Mounted, content: &Content<'_>) -> Result<(), Denied> {
    let Standing { generation, since, .. } = mounted.standing;
    writing(mounted, |root| Record::of(content, generation, since).store(root))
}

/// Removes what a crash left in a standing volume. Runs in a fork.
pub(crate) fn tidy(mounted: &Mounted) -> Result<(), Denied> {
    writing(mounted, clean)
}

/// Unmounts a volume that passed the safe test, by the checked descriptor and not by a path, and removes its
/// directory: the kubelet expects the path to be gone. What comes back can still overwrite it. In this order a crash
/// in between leaves no volume, where the other would leave one of zeros that looks whole.
pub(crate) fn detach(mounted: &Mounted) -> Result<OwnedFd, Denied> {
    let handle = writable(mounted)?; // a mount that is no longer attached cannot be cloned
    let path = format!("/proc/self/fd/{}", mounted.target.as_raw_fd());
    umount2(path.as_str(), MntFlags::MNT_DETACH).at("unmount the volume")?;
    remove_directory(&mounted.parent)?;
    Ok(handle)
}

/// Overwrites everything in a volume that was taken away. A file that an application leased is skipped.
pub(crate) fn overwrite(handle: &OwnedFd) -> Result<(), Denied> {
    overwrite_below(&open_dir(handle, ".")?)
}

/// Remove where nothing is mounted: an empty directory that a publish of ours left goes too, anything else stays.
pub(crate) fn remove_bare(parent: &OwnedFd) -> Result<(), Denied> {
    match open_bare(parent) {
        Err(Errno::NOENT) => return Ok(()),
        Err(_) => return Err(Denied::Foreign("no plain directory".into())),
        Ok(_) => prepared(parent).map_err(|denied| Denied::Foreign(denied.to_string()))?,
    }
    remove_directory(parent)
}

fn remove_directory(parent: &OwnedFd) -> Result<(), Denied> {
    match unlinkat(parent, "mount", AtFlags::REMOVEDIR) {
        Err(Errno::NOENT) => Ok(()),
        Err(Errno::NOTEMPTY) => Err(Denied::Foreign("a directory that is not empty".into())),
        result => result.at("remove the volume's directory"),
    }
}

/// Opens `mount` where nothing is mounted on it. NO_XDEV refuses a mount without touching its file system.
fn open_bare(parent: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    openat2(parent, "mount", OFlags::PATH | DIRECTORY, Mode::empty(), INSIDE | ResolveFlags::NO_XDEV)
}

/// Whether the kubelet prepared this directory for this driver: it writes vol_data.json, as root, before it calls
/// (kubernetes, pkg/volume/csi/csi_mounter.go). A quote inside a JSON string is escaped, so no value can hold these
/// bytes; blanks between tokens are ignored.
fn prepared(parent: &OwnedFd) -> Result<(), Denied> {
    let refuse = |why: &str| Denied::NotPrepared(format!("vol_data.json {why}"));
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match openat2(parent, "vol_data.json", flags, Mode::empty(), INSIDE | ResolveFlags::NO_XDEV) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Err(refuse("is missing")),
        Err(error) => return Err(refuse(&format!("cannot be opened: {error}"))),
    };
    let stat = fstat(&file).at("stat vol_data.json")?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_uid != 0 {
        return Err(refuse("is not a regular file of root's"));
    }
    let mut text = Vec::new();
    fs::File::from(file).take(64 * 1024).read_to_end(&mut text).at("read vol_data.json")?;
    text.retain(|byte| !byte.is_ascii_whitespace());
    let wanted = format!("\"driverName\":\"{DRIVER}\"");
    if text.windows(wanted.len()).any(|bytes| bytes == wanted.as_bytes()) {
        return Ok(());
    }
    Err(refuse("names another driver"))
}

/// Lets `work` write through a clone of the mount that the broker alone has for a moment. No writable handle is kept
/// between calls, so that a restart and an update take the same path.
fn writing(mounted: &Mounted, work: impl FnOnce(&OwnedFd) -> Result<(), Denied>) -> Result<(), Denied> {
    let handle = writable(mounted)?;
    work(&open_dir(&handle, ".")?)?;
    set_read_only(&handle, true).at("seal the clone")
}

fn writable(mounted: &Mounted) -> Result<OwnedFd, Denied> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let handle = open_tree(&mounted.target, "", flags).at("clone the mount")?;
    set_read_only(&handle, false).at("make the clone writable")?;
    Ok(handle)
}

/// Opens a directory inside a volume, where every name is the broker's own.
fn open_dir(dir: &OwnedFd, name: &str) -> Result<OwnedFd, Denied> {
    openat(dir, name, OFlags::RDONLY | DIRECTORY, Mode::empty()).at("open a directory of the volume")
}

/// Fills a new generation, complete and owned, with root's own copies.
fn fill(root: &OwnedFd, content: &Content<'_>, generation: u64) -> Result<(), Denied> {
    let Content { commit, layout, work } = content;
    let name = generation_name(generation);
    let private = Mode::from_raw_mode(0o700);
    mkdirat(root, &name, private).at("make the generation")?;
    let tree = open_dir(root, &name)?;
    for dir in &layout.dirs {
        mkdirat(&tree, dir, private).at("make a directory")?;
    }
    for (index, (name, length)) in (0_u32..).zip(&commit.files) {
        let source = |why: &str| Denied::Source { index, why: why.to_owned() };
        let input = open_source(work, &format!("{}/{index}", commit.work))
            .map_err(|error| source(&format!("it cannot be opened: {error}")))?;
        let stat = fstat(&input).at("stat a work file")?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(source("it is not a regular file"));
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let output = openat(&tree, name.as_str(), flags, Mode::empty()).at("make a file")?;
        // The bytes go from one tmpfs to the other inside the kernel; no page is shared afterwards.
        let mut offset = 0;
        while offset < *length {
            let rest = usize::try_from(*length - offset).unwrap_or(usize::MAX).min(1 << 20);
            if sendfile(&output, &input, Some(&mut offset), rest).at("copy a file")? == 0 {
                return Err(source("it is shorter"));
            }
        }
        if sendfile(&output, &input, Some(&mut offset), 1).at("copy a file")? != 0 {
            return Err(source("it is longer"));
        }
        give(&output, commit.owner, 0o400)?;
    }
    // Innermost first: a directory that is the owner's already would need no right of ours, but none is left behind.
    for dir in layout.dirs.iter().rev() {
        give(&open_dir(&tree, dir)?, commit.owner, 0o500)?;
    }
    give(&tree, commit.owner, 0o500)
}

/// Gives an inode of the broker's own to the owner. Never called with one of the worker's: that can hang in D.
fn give(fd: &OwnedFd, owner: Owner, mode: u32) -> Result<(), Denied> {
    fchown(fd, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid))).at("give to the owner")?;
    fchmod(fd, Mode::from_raw_mode(mode)).at("set the mode")
}

/// Opens what the worker wrote. CACHED: a tmpfs keeps every name in the cache, and a lookup that is not cached waits
/// for the directory's lock, which a hostile worker can hold. A mount elsewhere on the node can make it fail once.
fn open_source(work: &OwnedFd, path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = INSIDE | ResolveFlags::NO_XDEV | ResolveFlags::CACHED;
    let mut result = Err(Errno::AGAIN);
    for _ in 0..100 {
        result = openat2(work, path, flags, Mode::empty(), resolve);
        if !matches!(result, Err(Errno::AGAIN)) {
            break;
        }
    }
    result
}

/// Makes the names of a content; those that stand already are the same links.
fn link(root: &OwnedFd, layout: &Layout) -> Result<(), Denied> {
    for name in &layout.links {
        match symlinkat(format!("{DATA}/{name}"), root, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).at("link a name"),
        }
    }
    Ok(())
}

/// Removes everything `..data` does not name. `..data_tmp` goes first: a dead broker's child may still wait in a
/// rename of it, and must then find nothing, or it would bring back a generation that is being removed here.
fn clean(root: &OwnedFd) -> Result<(), Denied> {
    match unlinkat(root, DATA_NEXT, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error).at("remove ..data_tmp"),
    }
    let data = readlinkat(root, DATA, Vec::new()).at("read ..data")?.into_string();
    let data = data.map_err(|_| Denied::Foreign("..data is not ours".into()))?;
    let named = entries(&open_dir(root, &data)?)?;
    for (name, kind) in entries(root)? {
        if parse_generation(name.as_bytes()).is_some() && name != data {
            remove_tree(root, &name)?;
        } else if kind == FileType::Symlink && name != DATA && !named.iter().any(|(top, _)| *top == name) {
            unlinkat(root, &name, AtFlags::empty()).at("remove a name")?;
        }
    }
    Ok(())
}

fn remove_tree(parent: &OwnedFd, name: &str) -> Result<(), Denied> {
    let dir = open_dir(parent, name)?;
    for (name, kind) in entries(&dir)? {
        if kind == FileType::Directory {
            remove_tree(&dir, &name)?;
        } else {
            unlinkat(&dir, &name, AtFlags::empty()).at("remove an old file")?;
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR).at("remove an old directory")
}

fn overwrite_below(dir: &OwnedFd) -> Result<(), Denied> {
    for (name, kind) in entries(dir)? {
        if kind == FileType::Directory {
            overwrite_below(&open_dir(dir, &name)?)?;
        } else if kind == FileType::RegularFile {
            let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file = match openat2(dir, &name, flags, Mode::empty(), INSIDE) {
                Err(Errno::AGAIN) => continue, // leased by the application: its pages go with the superblock
                file => fs::File::from(file.at("open a file to overwrite")?),
            };
            let length = file.metadata().at("stat a file")?.len();
            io::copy(&mut io::repeat(0).take(length), &mut file).at("overwrite a file")?;
            file.set_len(0).at("truncate a file")?;
        }
    }
    Ok(())
}

/// The names and kinds in a directory of ours, without `.` and `..`.
fn entries(dir: &OwnedFd) -> Result<Vec<(String, FileType)>, Denied> {
    // Opened anew: reading moves a descriptor's offset, and a directory to attach to is held by O_PATH.
    let dir = open_dir(dir, ".")?;
    let mut names = Vec::new();
    for entry in Dir::new(dir).at("list a directory")? {
        let entry = entry.at("list a directory")?;
        let name = entry.file_name().to_string_lossy();
        if name != "." && name != ".." {
            names.push((name.into_owned(), entry.file_type()));
        }
    }
    Ok(names)
}

/// Names the step that failed.
pub(crate) trait At<T> {
    fn at(self, step: &str) -> Result<T, Denied>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: &str) -> Result<T, Denied> {
        self.map_err(|error| Denied::System { step: step.to_owned(), error: error.into().to_string() })
    }
}

/// A short-lived child: it may wait for an application's lock, for ever at the worst, and nobody waits with it.
pub(crate) struct Fork {
    pid: Pid,
    result: OwnedFd,
}

/// Runs `work` in a child, which dies with the broker.
pub(crate) fn fork(work: impl FnOnce() -> Result<(), Denied>) -> Result<Fork, Denied> {
    let (result, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).at("make a pipe")?;
    let parent = getpid();
    // SAFETY: the broker has one thread, so no lock is held by a thread the child lacks and the child may allocate.
    #[allow(unsafe_code)]
    let forked = unsafe { nix::unistd::fork() }.at("fork")?;
    if let ForkResult::Parent { child } = forked {
        return Ok(Fork { pid: child, result });
    }
    let answer = catch_unwind(AssertUnwindSafe(|| {
        // A child that outlived its broker would race with the next one's cleaning.
        set_pdeathsig(Signal::SIGKILL).at("ask to die with the broker")?;
        if getppid() != parent { Err(Denied::Busy) } else { work() }
    }));
    let answer = answer.unwrap_or_else(|_| Err(io::Error::other("a defect of sealmount's")).at("update"));
    let _ = rustix::io::write(&write, &postcard::to_stdvec(&answer).unwrap_or_default());
    // SAFETY: ends the child without running the parent's destructors and exit handlers.
    #[allow(unsafe_code)]
    unsafe {
        libc::_exit(0)
    }
}

impl Fork {
    /// What came of it, once it ended.
    pub(crate) fn ended(&self) -> Option<Result<(), Denied>> {
        if let Ok(WaitStatus::StillAlive) = waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
            return None;
        }
        let mut answer = [0; 4096];
        let length = rustix::io::read(&self.result, &mut answer).unwrap_or(0);
        let answer = answer.get(..length).and_then(|bytes| postcard::from_bytes(bytes).ok());
        Some(answer.unwrap_or(Err(Denied::Timeout))) // it wrote nothing: it was killed
    }

    /// Ends it if the kernel can: a child that waits for a lock goes on until it has it, does that one call, and ends.
    pub(crate) fn kill(&self) {
        let _ = kill(self.pid, Signal::SIGKILL);
    }
}
