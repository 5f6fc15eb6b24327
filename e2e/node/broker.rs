//! The broker on the real kernel. The test plays the kubelet and the worker: the broker starts this very program as its
//! worker, which hands everything it inherited to the test and waits. So the test can say to the broker what no honest
//! worker would.

use std::fs;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{UnmountFlags, mount, mount_bind, unmount};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv,
    recvmsg, send, sendmsg, sockopt,
};
use rustix::process::{Pid, Signal, kill_process};
use sealmount::broker::client::Inherited;
use sealmount::broker::serve::{Settings, run};
use sealmount::broker::wire::{Answer, Commit, Denied, MAX_PACKET, Reply, Request, Standing, Verb, decode, encode};
use sealmount::broker::{REGISTRATION_REFUSED, WORKER_UID};
use sealmount::request::{FileName, Owner, PodUid, VolumeId, VolumeName};

const ROLE: &str = "SEALMOUNT_TEST_DIR";
const OWNER: Owner = Owner { uid: 1000, gid: 0 };
const NODE_BYTES: u64 = 64 << 20;
const VOLUME_BYTES: u64 = 1 << 20;

/// Not a test of its own: the process that [`Lab::start`] starts as a broker.
#[test]
fn as_broker() {
    let Some(dir) = std::env::var_os(ROLE).map(PathBuf::from) else { return };
    let args = ["--exact", "broker::as_worker", "--nocapture", "--test-threads=1"];
    run(Settings {
        kubelet_dir: dir.join("kubelet"),
        csi_socket: dir.join("csi.sock"),
        registration_dir: dir.join("registry"),
        max_node_bytes: NODE_BYTES,
        work_bytes: 16 << 20,
        allow_swap: true,
        worker: "/proc/self/exe".into(),
        worker_args: args.map(Into::into).to_vec(),
        worker_env: vec![(ROLE.into(), dir.into())],
    })
    .unwrap();
}

/// Not a test of its own: the process that the broker starts as its worker.
#[test]
fn as_worker() {
    let Some(dir) = std::env::var_os(ROLE).map(PathBuf::from) else { return };
    let given = Inherited::take().unwrap();
    assert_eq!(rustix::process::getuid().as_raw(), WORKER_UID);
    assert_eq!(rustix::process::getgid().as_raw(), WORKER_UID);
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    nix::sys::signal::SigSet::empty().thread_set_mask().unwrap();
    let mut control = UnixStream::connect(dir.join("control.sock")).unwrap();
    {
        let fds = [given.socket.as_fd(), given.csi.as_fd(), given.registration.as_fd(), given.work.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(&control, &[IoSlice::new(b"f")], &mut ancillary, SendFlags::empty()).unwrap();
    }
    drop(given); // the test's copies are the only ones now
    let mut code = [0];
    control.read_exact(&mut code).unwrap();
    std::process::exit(i32::from(code[0]));
}

/// A node of its own below a temporary directory.
struct Lab {
    dir: PathBuf,
    control: UnixListener,
    broker: Option<Child>,
}

impl Lab {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests mount: run them as root");
        let dir = tempfile::Builder::new().prefix("sm-").permissions(fs::Permissions::from_mode(0o755)).tempdir();
        let dir = dir.unwrap().keep();
        fs::create_dir_all(dir.join("kubelet/pods")).unwrap();
        fs::create_dir(dir.join("registry")).unwrap();
        let control = UnixListener::bind(dir.join("control.sock")).unwrap();
        fs::set_permissions(dir.join("control.sock"), fs::Permissions::from_mode(0o777)).unwrap();
        let mut lab = Self { dir, control, broker: None };
        lab.start();
        lab
    }

    fn start(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "broker::as_broker", "--nocapture", "--test-threads=1"])
            .env(ROLE, &self.dir)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(Stdio::null())
            .spawn();
        self.broker = Some(child.unwrap());
    }

    fn kill(&mut self) {
        let mut child = self.broker.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// The next worker the broker starts.
    fn worker(&self) -> Worker {
        wait_readable(&self.control, "no worker came");
        let (control, _) = self.control.accept().unwrap();
        wait_readable(&control, "the worker sent nothing");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        recvmsg(&control, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
        let mut fds: Vec<OwnedFd> = ancillary
            .drain()
            .flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
                _ => Vec::new(),
            })
            .collect();
        let (work, registration, csi, socket) =
            (fds.pop().unwrap(), fds.pop().unwrap(), fds.pop().unwrap(), fds.pop().unwrap());
        let pid = sockopt::socket_peercred(&control).unwrap().pid;
        Worker { socket, csi: csi.into(), registration: registration.into(), work, control, pid, next: 1 }
    }

    fn pod_dir(&self, volume: &VolumeId) -> PathBuf {
        self.dir.join(format!("kubelet/pods/{}/volumes/kubernetes.io~csi/{}", volume.pod, volume.name))
    }

    fn target(&self, volume: &VolumeId) -> PathBuf {
        self.pod_dir(volume).join("mount")
    }

    /// What the kubelet does before it calls NodePublishVolume.
    fn prepare(&self, name: &str) -> VolumeId {
        let volume = volume(name);
        fs::create_dir_all(self.pod_dir(&volume)).unwrap();
        let data = r#"{"attachmentID":"csi-1","driverName":"csi.sealmount.io","nodeName":"n","specVolID":"v"}"#;
        fs::write(self.pod_dir(&volume).join("vol_data.json"), data).unwrap();
        volume
    }

    /// Lines of mountinfo about this lab.
    fn mounts(&self) -> Vec<String> {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dir = self.dir.to_str().unwrap();
        text.lines().filter(|line| line.contains(dir)).map(str::to_owned).collect()
    }

    fn is_mounted(&self, volume: &VolumeId) -> bool {
        let target = format!(" {} ", self.target(volume).display());
        self.mounts().iter().any(|line| line.contains(&target))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut child) = self.broker.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.dir.join("log")).unwrap_or_default());
        }
        for line in self.mounts().iter().rev() {
            let _ = unmount(line.split(' ').nth(4).unwrap(), UnmountFlags::DETACH);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn wait_readable(fd: impl AsFd, why: &str) {
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)), Ok(1), "{why}");
}

/// Waits for what must come; the time is a guard against hanging, not a measure.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < limit, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn volume(name: &str) -> VolumeId {
    VolumeId { pod: PodUid::parse("0a1b-2c").unwrap(), name: VolumeName::parse(name).unwrap() }
}

/// The worker's side of the socket, in the test's hands.
struct Worker {
    socket: OwnedFd,
    csi: UnixListener,
    registration: UnixListener,
    work: OwnedFd,
    control: UnixStream,
    pid: Pid,
    next: u64,
}

impl Worker {
    fn work_dir(&self, id: u64) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{id}", self.work.as_raw_fd()))
    }

    fn send(&mut self, verb: Verb) -> u64 {
        self.next += 1;
        let packet = encode(&Request { id: self.next, verb }).unwrap();
        send(&self.socket, &packet, SendFlags::NOSIGNAL).unwrap();
        self.next
    }

    fn reply(&self) -> Reply {
        wait_readable(&self.socket, "no reply");
        let mut packet = vec![0; MAX_PACKET];
        let (_, length) = recv(&self.socket, &mut packet[..], RecvFlags::empty()).unwrap();
        assert!(length > 0, "the broker is gone");
        decode(&packet[..length]).unwrap()
    }

    fn call(&mut self, verb: Verb) -> Result<Answer, Denied> {
        let id = self.send(verb);
        let reply = self.reply();
        assert_eq!(reply.id, id);
        reply.answer
    }

    /// Writes the work files as an honest worker does, and gives the request to go with them.
    fn content(&mut self, volume: &VolumeId, files: &[(&str, &[u8])]) -> Commit {
        let work = self.next + 1000;
        fs::create_dir(self.work_dir(work)).unwrap();
        for (index, (_, bytes)) in files.iter().enumerate() {
            fs::write(self.work_dir(work).join(index.to_string()), bytes).unwrap();
        }
        let mut tag = [0; 32];
        for (at, byte) in files.iter().flat_map(|(name, bytes)| name.bytes().chain(bytes.iter().copied())).enumerate() {
            tag[at % 32] ^= byte.rotate_left(u32::try_from(at / 32 % 8).unwrap());
        }
        Commit {
            volume: volume.clone(),
            owner: OWNER,
            volume_bytes: VOLUME_BYTES,
            work,
            files: files.iter().map(|(name, bytes)| (FileName::parse(name).unwrap(), bytes.len() as u64)).collect(),
            key: [7; 32],
            tag,
            note: b"note".to_vec(),
        }
    }

    fn commit(&mut self, volume: &VolumeId, files: &[(&str, &[u8])]) -> Result<Answer, Denied> {
        let commit = self.content(volume, files);
        let work = commit.work;
        let answer = self.call(Verb::Commit(commit));
        fs::remove_dir_all(self.work_dir(work)).unwrap();
        answer
    }

    fn remove(&mut self, volume: &VolumeId) -> Result<Answer, Denied> {
        self.call(Verb::Remove(volume.clone()))
    }

    fn volumes(&mut self) -> Vec<Standing> {
        match self.call(Verb::Volumes { after: None }) {
            Ok(Answer::Volumes(page)) => page,
            other => panic!("{other:?}"),
        }
    }
}

/// Every path below a volume with kind, mode and owner.
fn tree(dir: &Path) -> Vec<String> {
    fn walk(dir: &Path, top: &Path, lines: &mut Vec<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let stat = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(top).unwrap().display();
            if stat.is_symlink() {
                lines.push(format!("{name} -> {}", fs::read_link(&path).unwrap().display()));
            } else {
                lines.push(format!("{name} {:o} {}:{}", stat.mode() & 0o7777, stat.uid(), stat.gid()));
                if stat.is_dir() {
                    walk(&path, top, lines);
                }
            }
        }
    }
    let mut lines = Vec::new();
    walk(dir, dir, &mut lines);
    lines.sort();
    lines
}

#[test]
fn a_first_publish_is_complete_owned_and_sealed() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let volume = lab.prepare("db");
    let files: &[(&str, &[u8])] = &[("password", b"s3cr3t"), ("tls/a/key", b"key"), ("tls/crt", b""), ("user", b"u")];
    assert_eq!(worker.commit(&volume, files), Ok(Answer::Published));

    let target = lab.target(&volume);
    assert_eq!(
        tree(&target),
        [
            "..1 500 1000:0",
            "..1/password 400 1000:0",
            "..1/tls 500 1000:0",
            "..1/tls/a 500 1000:0",
            "..1/tls/a/key 400 1000:0",
            "..1/tls/crt 400 1000:0",
            "..1/user 400 1000:0",
            "..data -> ..1",
            "password -> ..data/password",
            "tls -> ..data/tls",
            "user -> ..data/user",
        ]
    );
    for (name, bytes) in files {
        assert_eq!(fs::read(target.join(name)).unwrap(), *bytes);
    }
    let root = fs::metadata(&target).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o500, 1000, 0));
    let lines = lab.mounts();
    assert_eq!(lines.len(), 1, "{lines:?}");
    let (mount, fs_part) = lines[0].split_once(" - ").unwrap();
    assert!(mount.contains(" ro,nosuid,nodev,noexec"), "{mount}");
    assert!(fs_part.starts_with("tmpfs sealmount ") && fs_part.contains("noswap"), "{fs_part}");
    assert_eq!(fs::write(target.join("new"), "").unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);

    let standing = worker.volumes();
    assert_eq!(standing.len(), 1);
    let Standing { volume: id, owner, generation, bytes, size, key, note, .. } = &standing[0];
    assert_eq!((id, owner, generation, bytes, size), (&volume, &OWNER, &1, &10, &(2 << 20)));
    assert_eq!((key, note.as_slice()), (&[7; 32], b"note".as_slice()));

    assert_eq!(worker.remove(&volume), Ok(Answer::Removed));
    assert!(lab.mounts().is_empty());
    assert!(!target.exists());
    assert!(lab.pod_dir(&volume).join("vol_data.json").exists(), "the kubelet's own file is its own");
    assert_eq!(worker.remove(&volume), Ok(Answer::Removed), "a second time");
    assert!(worker.volumes().is_empty());
}
