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

use nix::sys::signal::Signal::{SIGCHLD, SIGINT, SIGTERM};
use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{UnmountFlags, mount, mount_bind, unmount};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv,
    recvmsg, send, sendmsg, sockopt,
};
use rustix::process::{Pid, Signal, kill_process};
use sealmount::broker::client::{Client, Content, Inherited};
use sealmount::broker::serve::{Settings, run};
use sealmount::broker::wire::{Answer, Commit, Denied, MAX_PACKET, Reply, Request, Standing, Verb, decode, encode};
use sealmount::broker::{REGISTRATION_REFUSED, WORKER_UID};
use sealmount::harden::{self, Confinement};
use sealmount::request::{FileName, Owner, PodUid, VolumeId, VolumeName};
use sealmount::secret::{SecretBytes, TagKey};

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
    SigSet::empty().thread_set_mask().unwrap();
    let mut control = UnixStream::connect(dir.join("control.sock")).unwrap();
    if dir.join("confine").exists() {
        confined(given, &dir, control);
    }
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

/// Says what a confined worker can and cannot do: it runs in the worker's process, and never ends by itself.
fn confined(given: Inherited, dir: &Path, mut control: UnixStream) -> ! {
    let config = dir.join("config");
    let Inherited { broker, socket, work, .. } = given;
    let missing = harden::worker(&Confinement { broker, read: &[&config], work: work.as_fd() }).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut lines = vec![format!("missing {missing:?}")];
    runtime.block_on(async {
        let client = Client::new(socket, work).unwrap();
        client.ready().await.unwrap();
        let volume = volume("db");
        let files = [(FileName::parse("a/b").unwrap(), SecretBytes::new(b"bytes".to_vec()))];
        let key = TagKey([7; 32]);
        let tag = key.tag(files.iter().map(|(name, bytes)| (name.as_str(), bytes)));
        let content = |note: &[u8]| Content {
            volume: &volume,
            owner: OWNER,
            volume_bytes: VOLUME_BYTES,
            files: &files,
            key,
            tag,
            note: note.to_vec(),
        };
        lines.push(format!("commit {:?}", client.commit(content(b"1")).await));
        lines.push(format!("again {:?}", client.commit(content(b"1")).await));
        lines.push(format!("note {:?}", client.commit(content(b"2")).await));
        let many = futures_util::future::join_all((0..32).map(|_| client.commit(content(b"2")))).await;
        lines.push(format!("many {}", many.iter().all(|answer| *answer == Ok(Answer::Unchanged))));
        let large = [(FileName::parse("large").unwrap(), SecretBytes::new(vec![0; 17 << 20]))];
        let large = Content { files: &large, ..content(b"") };
        lines.push(format!("large {}", client.commit(large).await.unwrap_err()));
        lines.push(format!(
            "volumes {:?}",
            client.volumes().await.unwrap().into_iter().map(|v| v.note).collect::<Vec<_>>()
        ));
        lines.push(format!("pods {}", client.pods().await.unwrap_err()));
        lines.push(format!("remove {:?}", client.remove(&volume).await));
        lines.push(format!("resolve {}", tokio::net::lookup_host("localhost:80").await.is_ok()));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        lines.push(format!("tcp {}", tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.is_ok()));
    });
    let error = |result: Result<(), std::io::Error>| result.map_err(|error| error.kind());
    lines.push(format!("thread {}", std::thread::spawn(|| 1).join().is_ok()));
    lines.push(format!("config {:?}", fs::read_to_string(config.join("file")).map_err(|error| error.kind())));
    let watch = rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::CLOEXEC).unwrap();
    let flags = rustix::fs::inotify::WatchFlags::MODIFY;
    lines.push(format!("watch {}", rustix::fs::inotify::add_watch(&watch, &config, flags).is_ok()));
    lines.push(format!("other file {:?}", error(fs::File::open("/etc/passwd").map(drop))));
    lines.push(format!("new file {:?}", error(fs::File::create(dir.join("new")).map(drop))));
    lines.push(format!("child {:?}", error(Command::new("/bin/true").spawn().map(drop))));
    let flags = rustix::mount::FsOpenFlags::empty();
    lines.push(format!("mount {:?}", rustix::mount::fsopen("tmpfs", flags).map(drop)));
    let raw = rustix::net::socket(rustix::net::AddressFamily::PACKET, rustix::net::SocketType::DGRAM, None);
    lines.push(format!("packet {:?}", raw.map(drop)));
    control.write_all(lines.join("\n").as_bytes()).unwrap();
    drop(control);
    loop {
        std::thread::park(); // with the socket to the broker open, or it ends this process
    }
}

/// A node of its own below a temporary directory.
struct Lab {
    dir: PathBuf,
    control: UnixListener,
    broker: Option<Child>,
}

impl Lab {
    fn new() -> Self {
        let mut lab = Self::prepared();
        lab.start();
        lab
    }

    /// Everything but the broker.
    fn prepared() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests mount: run them as root");
        let dir = tempfile::Builder::new().prefix("sm-").permissions(fs::Permissions::from_mode(0o755)).tempdir();
        let dir = dir.unwrap().keep();
        fs::create_dir_all(dir.join("kubelet/pods")).unwrap();
        fs::create_dir(dir.join("registry")).unwrap();
        let control = UnixListener::bind(dir.join("control.sock")).unwrap();
        fs::set_permissions(dir.join("control.sock"), fs::Permissions::from_mode(0o777)).unwrap();
        Self { dir, control, broker: None }
    }

    fn start(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        // The test harness has a second thread; a mask that is inherited keeps the broker's signals from it.
        let mut mask = SigSet::empty();
        for signal in [SIGCHLD, SIGTERM, SIGINT] {
            mask.add(signal);
        }
        let before = mask.thread_swap_mask(SigmaskHow::SIG_BLOCK).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "broker::as_broker", "--nocapture", "--test-threads=1"])
            .env(ROLE, &self.dir)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(Stdio::null())
            .spawn();
        before.thread_set_mask().unwrap();
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
        let named: Vec<_> = files.iter().map(|(name, bytes)| (*name, SecretBytes::new(bytes.to_vec()))).collect();
        let key = TagKey([7; 32]);
        let tag = key.tag(named.iter().map(|(name, bytes)| (*name, bytes))).0;
        Commit {
            volume: volume.clone(),
            owner: OWNER,
            volume_bytes: VOLUME_BYTES,
            work,
            files: files.iter().map(|(name, bytes)| (FileName::parse(name).unwrap(), bytes.len() as u64)).collect(),
            key: key.0,
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

/// The state of the thread that says `what`. The harness has another, that was there before it was hardened.
fn status_of(pid: i32, what: &str) -> String {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut states = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("status")).unwrap());
    states.find(|status| status.contains(what)).expect("no such thread")
}

#[test]
fn a_confined_worker_does_its_work_and_nothing_else() {
    let mut lab = Lab::prepared();
    lab.prepare("db");
    fs::create_dir(lab.dir.join("config")).unwrap();
    fs::write(lab.dir.join("config/file"), "text").unwrap();
    fs::write(lab.dir.join("confine"), "").unwrap();
    lab.start();
    wait_readable(&lab.control, "no worker came");
    let (mut control, _) = lab.control.accept().unwrap();
    let pid = sockopt::socket_peercred(&control).unwrap().pid.as_raw_nonzero();
    let mut said = String::new();
    control.read_to_string(&mut said).unwrap();
    let wanted = [
        "missing []",
        "commit Ok(Published)",
        "again Ok(Unchanged)",
        "note Ok(Unchanged)",
        "many true",
        "large the work tmpfs: 4353 pages do not fit into it (--work-bytes)",
        "volumes [[50]]",
        "pods connect to the kubelet's pods API: No such file or directory (os error 2)",
        "remove Ok(())",
        "resolve true",
        "tcp true",
        "thread true",
        "config Ok(\"text\")",
        "watch true",
        "other file Err(PermissionDenied)",
        "new file Err(PermissionDenied)",
        "child Err(PermissionDenied)",
        "mount Err(Os { code: 1, kind: PermissionDenied, message: \"Operation not permitted\" })",
        "packet Err(Os { code: 1, kind: PermissionDenied, message: \"Operation not permitted\" })",
    ];
    assert_eq!(said.lines().collect::<Vec<_>>(), wanted);

    let status = status_of(pid.get(), "Seccomp:\t2");
    for line in
        ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "Groups:\t \n"]
    {
        assert!(status.contains(line), "{line:?} in\n{status}");
    }
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim(), "1000");
    assert_eq!(fs::metadata(format!("/proc/{pid}/mem")).unwrap().uid(), 0, "not dumpable: its files are root's");
    let broker = lab.broker.as_ref().unwrap().id();
    let status = status_of(i32::try_from(broker).unwrap(), "CapBnd:\t00000000002801eb");
    // CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, KILL 5, SETGID 6, SETUID 7, SETPCAP 8, SYS_PTRACE 19, SYS_ADMIN 21
    for line in ["CapPrm:\t00000000002801eb", "CapEff:\t00000000002801eb", "CapBnd:\t00000000002801eb", "Umask:\t0077"]
    {
        assert!(status.contains(line), "{line:?} in\n{status}");
    }
}

#[test]
fn a_swap_is_whole_and_old_readers_read_to_the_end() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let volume = lab.prepare("db");
    let target = lab.target(&volume);
    let old = vec![b'o'; 10_000];
    assert_eq!(worker.commit(&volume, &[("a", &old), ("gone", b"g"), ("tls/key", b"1")]), Ok(Answer::Published));
    let mut half_read = fs::File::open(target.join("a")).unwrap();
    half_read.read_exact(&mut [0; 5000]).unwrap();
    let sub_path = lab.dir.join("sub-path");
    fs::write(&sub_path, "").unwrap();
    mount_bind(target.join("a"), &sub_path).unwrap();
    let mount_of = |lab: &Lab| {
        let line = lab.mounts().into_iter().find(|line| line.contains("/mount ")).unwrap();
        line.split_once(" - ").unwrap().0.to_owned()
    };
    let before = mount_of(&lab);

    let new = vec![b'n'; 20_000];
    assert_eq!(worker.commit(&volume, &[("a", &new), ("tls/key", b"2"), ("tls/new", b"3")]), Ok(Answer::Swapped));

    assert_eq!(fs::read(target.join("a")).unwrap(), new);
    let mut rest = Vec::new();
    half_read.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, old[5000..], "an open file goes on with the old bytes");
    assert_eq!(fs::read(&sub_path).unwrap(), old, "a subPath bind keeps the old bytes");
    assert_eq!(
        tree(&target),
        [
            "..2 500 1000:0",
            "..2/a 400 1000:0",
            "..2/tls 500 1000:0",
            "..2/tls/key 400 1000:0",
            "..2/tls/new 400 1000:0",
            "..data -> ..2",
            "a -> ..data/a",
            "tls -> ..data/tls",
        ]
    );
    assert_eq!(mount_of(&lab), before, "containers keep the very mount");
    assert!(fs::write(target.join("x"), "").is_err(), "sealed again");
    assert_eq!(worker.volumes()[0].generation, 2);
    assert_eq!(worker.volumes()[0].bytes, 20_002);
    assert_eq!(worker.commit(&volume, &[("a", &new), ("tls/key", b"2"), ("tls/new", b"3")]), Ok(Answer::Unchanged));
    assert!(target.join("..2").exists());

    assert_eq!(worker.remove(&volume), Ok(Answer::Removed));
    assert_eq!(fs::read(&sub_path).unwrap(), old, "what only a reader holds is the reader's");
}

#[test]
fn what_stood_is_overwritten_before_it_goes() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let volume = lab.prepare("db");
    assert_eq!(worker.commit(&volume, &[("a", b"secret")]), Ok(Answer::Published));
    let mut open = fs::File::open(lab.target(&volume).join("a")).unwrap();
    assert_eq!(worker.remove(&volume), Ok(Answer::Removed));
    let mut left = Vec::new();
    open.read_to_end(&mut left).unwrap();
    assert_eq!(left, b"", "the file was emptied under its reader");
}

#[test]
fn growth_for_old_readers_ends_at_four_times_the_limit() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let volume = lab.prepare("db");
    let content = |byte| vec![byte; 1 << 20];
    assert_eq!(worker.commit(&volume, &[("a", &content(0))]), Ok(Answer::Published));
    let mut held = Vec::new();
    let mut refused = None;
    for byte in 1..10 {
        held.push(fs::File::open(lab.target(&volume).join("a")).unwrap());
        match worker.commit(&volume, &[("a", &content(byte))]) {
            Ok(answer) => assert_eq!(answer, Answer::Swapped),
            Err(denied) => {
                refused = Some((byte, denied));
                break;
            }
        }
    }
    let (byte, denied) = refused.expect("held generations never filled the volume");
    assert!(matches!(&denied, Denied::System { error, .. } if error.contains("No space")), "{denied:?}");
    assert_eq!(fs::read(lab.target(&volume).join("a")).unwrap(), content(byte - 1), "the last whole content stands");
    let size = worker.volumes()[0].size;
    assert!(size > 2 << 20 && size <= 4 * ((1 << 20) + 4096), "{size}");
    held.clear();
    assert_eq!(worker.commit(&volume, &[("a", &content(99))]), Ok(Answer::Swapped));
    assert!(worker.volumes()[0].size < size, "what old readers do not hold is given back");
}

#[test]
fn a_volume_is_published_only_where_the_kubelet_asked_for_this_driver() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let refused = |worker: &mut Worker, volume: &VolumeId, what: &str| {
        let denied = worker.commit(volume, &[("a", b"1")]).expect_err(what);
        assert!(matches!(denied, Denied::NotPrepared(_) | Denied::Foreign(_)), "{what}: {denied:?}");
        assert!(!lab.is_mounted(volume), "{what}");
        denied
    };
    refused(&mut worker, &volume("nowhere"), "no directory");

    let id = lab.prepare("missing");
    fs::remove_file(lab.pod_dir(&id).join("vol_data.json")).unwrap();
    refused(&mut worker, &id, "no vol_data.json");
    assert!(!lab.target(&id).exists(), "nothing of ours is left");

    let id = lab.prepare("other");
    fs::write(lab.pod_dir(&id).join("vol_data.json"), r#"{"driverName":"other.example","x":"csi.sealmount.io"}"#)
        .unwrap();
    refused(&mut worker, &id, "another driver");

    let id = lab.prepare("escaped");
    let data = r#"{"driverName":"other.example","volumeHandle":"\"driverName\":\"csi.sealmount.io\""}"#;
    fs::write(lab.pod_dir(&id).join("vol_data.json"), data).unwrap();
    refused(&mut worker, &id, "our name inside a string");

    let id = lab.prepare("link");
    let real = lab.dir.join("vol_data.json");
    fs::rename(lab.pod_dir(&id).join("vol_data.json"), &real).unwrap();
    symlink(&real, lab.pod_dir(&id).join("vol_data.json")).unwrap();
    refused(&mut worker, &id, "a symlink");

    let id = lab.prepare("owner");
    std::os::unix::fs::chown(lab.pod_dir(&id).join("vol_data.json"), Some(1000), None).unwrap();
    refused(&mut worker, &id, "not root's");

    let id = lab.prepare("full");
    fs::create_dir(lab.target(&id)).unwrap();
    fs::write(lab.target(&id).join("theirs"), "").unwrap();
    refused(&mut worker, &id, "a directory that is not empty");
    assert!(worker.remove(&id).is_err());
    assert!(lab.target(&id).join("theirs").exists());

    let id = lab.prepare("file");
    fs::write(lab.target(&id), "").unwrap();
    refused(&mut worker, &id, "a file");
    assert!(worker.remove(&id).is_err());
    assert!(lab.target(&id).exists());

    let id = lab.prepare("dangling");
    symlink(&lab.dir, lab.target(&id)).unwrap();
    refused(&mut worker, &id, "a symlink at the target");

    let id = lab.prepare("parent");
    fs::rename(lab.pod_dir(&id), lab.dir.join("elsewhere")).unwrap();
    symlink(lab.dir.join("elsewhere"), lab.pod_dir(&id)).unwrap();
    refused(&mut worker, &id, "a symlink in the path");
    assert!(!lab.dir.join("elsewhere/mount").exists());

    let id = lab.prepare("empty");
    fs::create_dir(lab.target(&id)).unwrap();
    assert_eq!(worker.commit(&id, &[("a", b"1")]), Ok(Answer::Published), "an empty directory is what a crash leaves");
    let id = lab.prepare("left");
    fs::create_dir(lab.target(&id)).unwrap();
    assert_eq!(worker.remove(&id), Ok(Answer::Removed));
    assert!(!lab.target(&id).exists(), "the kubelet expects the path to be gone");
}

#[test]
fn what_is_not_ours_is_never_adopted_published_over_or_removed() {
    let mut lab = Lab::new();
    let foreign = |lab: &Lab, name: &str, source: &str, kind: &str| {
        let id = lab.prepare(name);
        fs::create_dir(lab.target(&id)).unwrap();
        mount(source, lab.target(&id), kind, rustix::mount::MountFlags::empty(), None).unwrap();
        fs::write(lab.target(&id).join("theirs"), "").unwrap();
        id
    };
    let other = foreign(&lab, "other", "other", "tmpfs");
    let fake = foreign(&lab, "fake", "sealmount", "tmpfs");
    let mut worker = lab.worker();
    // A volume of ours, bound where another would be: the right source, the wrong name.
    let ours = lab.prepare("ours");
    assert_eq!(worker.commit(&ours, &[("a", b"1")]), Ok(Answer::Published));
    let bound = lab.prepare("bound");
    fs::create_dir(lab.target(&bound)).unwrap();
    mount_bind(lab.target(&ours), lab.target(&bound)).unwrap();
    // One of its files, as the kubelet binds a subPath.
    let sub = lab.prepare("sub");
    fs::create_dir(lab.target(&sub)).unwrap();
    mount_bind(lab.target(&ours).join("..1"), lab.target(&sub)).unwrap();
    // A volume of ours with something on top.
    let covered = lab.prepare("covered");
    assert_eq!(worker.commit(&covered, &[("a", b"1")]), Ok(Answer::Published));
    mount("other", lab.target(&covered), "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();

    let before = lab.mounts();
    for restarted in [false, true] {
        for id in [&other, &fake, &bound, &sub, &covered] {
            let denied = worker.commit(id, &[("a", b"2")]).unwrap_err();
            assert!(matches!(denied, Denied::Foreign(_)), "{id}: {denied:?}");
            let denied = worker.remove(id).unwrap_err();
            assert!(matches!(denied, Denied::Foreign(_)), "{id}: {denied:?}");
        }
        assert_eq!(lab.mounts(), before);
        if !restarted {
            lab.kill();
            lab.start();
            worker = lab.worker();
            let standing: Vec<_> = worker.volumes().into_iter().map(|standing| standing.volume).collect();
            assert_eq!(standing, std::slice::from_ref(&ours), "only ours is adopted");
        }
    }
    assert!(lab.target(&fake).join("theirs").exists());
}

#[test]
fn a_hostile_source_publishes_nothing() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let id = lab.prepare("db");
    let work_file = |worker: &Worker, commit: &Commit| worker.work_dir(commit.work).join("1");
    type Break = fn(&Path);
    let cases: [(&str, Break); 7] = [
        ("shorter", |path| fs::write(path, "123").unwrap()),
        ("longer", |path| fs::write(path, "12345").unwrap()),
        ("missing", |path| fs::remove_file(path).unwrap()),
        ("symlink", |path| {
            fs::remove_file(path).unwrap();
            symlink("0", path).unwrap();
        }),
        ("fifo", |path| {
            fs::remove_file(path).unwrap();
            let fifo = rustix::fs::FileType::Fifo;
            rustix::fs::mknodat(rustix::fs::CWD, path, fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        }),
        ("directory", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
        ("socket", |path| {
            fs::remove_file(path).unwrap();
            let dir = fs::File::open(path.parent().unwrap()).unwrap();
            drop(UnixListener::bind(format!("/proc/self/fd/{}/1", dir.as_raw_fd())).unwrap());
        }),
    ];
    for standing in [false, true] {
        for (what, break_it) in cases {
            let commit = worker.content(&id, &[("a", b"1234"), ("b", b"4321")]);
            break_it(&work_file(&worker, &commit));
            let denied = worker.call(Verb::Commit(commit)).unwrap_err();
            assert!(matches!(denied, Denied::Source { index: 1, .. }), "{what}: {denied:?}");
            if standing {
                assert_eq!(fs::read(lab.target(&id).join("a")).unwrap(), b"old", "{what}");
                assert_eq!(tree(&lab.target(&id)).len(), 4, "nothing half made is left: {what}");
            } else {
                assert!(!lab.target(&id).exists(), "{what}");
            }
        }
        if !standing {
            assert_eq!(worker.commit(&id, &[("a", b"old")]), Ok(Answer::Published));
        }
    }
    // A work directory that leads out of the work tmpfs.
    let commit = worker.content(&id, &[("a", b"1234")]);
    fs::remove_dir_all(worker.work_dir(commit.work)).unwrap();
    fs::write(lab.dir.join("0"), "1234").unwrap();
    symlink(&lab.dir, worker.work_dir(commit.work)).unwrap();
    assert!(matches!(worker.call(Verb::Commit(commit)), Err(Denied::Source { index: 0, .. })));
}

#[test]
fn published_bytes_do_not_change_whatever_the_worker_keeps() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let id = lab.prepare("db");
    let stop = std::sync::atomic::AtomicBool::new(false);
    for round in 0..50_u8 {
        let commit = worker.content(&id, &[("a", &[b'x'; 8192])]);
        let commit = Commit { tag: [round; 32], ..commit };
        let path = worker.work_dir(commit.work).join("0");
        let writer = fs::File::options().write(true).open(&path).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    rustix::io::pwrite(&writer, &[round; 8192], 0).unwrap();
                }
            });
            worker.call(Verb::Commit(commit)).unwrap();
            let published = fs::read(lab.target(&id).join("a")).unwrap();
            for _ in 0..20 {
                assert!(fs::read(lab.target(&id).join("a")).unwrap() == published, "round {round}");
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        stop.store(false, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn a_request_that_is_not_valid_changes_nothing() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let id = lab.prepare("db");
    type Break = fn(&mut Commit);
    let cases: [(&str, Break); 9] = [
        ("the worker's own UID", |commit| commit.owner.uid = WORKER_UID),
        ("a UID no pod can have", |commit| commit.owner.uid = u32::MAX),
        ("a group", |commit| commit.owner.gid = 5),
        ("a long note", |commit| commit.note = vec![0; 1025]),
        ("a name twice", |commit| commit.files[1].0 = commit.files[0].0.clone()),
        ("a file that is a directory", |commit| commit.files[1].0 = FileName::parse("a/b").unwrap()),
        ("too large", |commit| commit.volume_bytes = 7),
        ("a sum that overflows", |commit| commit.files[0].1 = u64::MAX),
        ("a vast limit", |commit| commit.volume_bytes = u64::MAX),
    ];
    for (what, break_it) in cases {
        let mut commit = worker.content(&id, &[("a", b"1234"), ("b", b"4321")]);
        break_it(&mut commit);
        let denied = worker.call(Verb::Commit(commit)).unwrap_err();
        assert!(matches!(denied, Denied::Invalid(_) | Denied::TooLarge { .. }), "{what}: {denied:?}");
        assert!(!lab.target(&id).exists(), "{what}");
    }
    // Packets that are none. The names cannot even be said by an honest encoder.
    let good = encode(&Request { id: 5, verb: Verb::Commit(worker.content(&id, &[("xx", b"1")])) }).unwrap();
    let at = good.windows(2).position(|pair| pair == b"xx").unwrap();
    let mut packets: Vec<Vec<u8>> = [b"..", b"./", b"a\0", b"a\n", b"\xff\xfe"]
        .iter()
        .map(|name| {
            let mut packet = good.clone();
            packet[at..at + 2].copy_from_slice(*name);
            packet
        })
        .collect();
    packets.push(vec![1, 5]);
    packets.push([good.clone(), vec![0]].concat());
    packets.push([vec![1, 5], vec![0; MAX_PACKET]].concat());
    for packet in packets {
        send(&worker.socket, &packet, SendFlags::NOSIGNAL).unwrap();
        let reply = worker.reply();
        assert!(matches!(reply.answer, Err(Denied::Invalid(_))), "{:?}", reply.answer);
        assert_eq!(reply.id, 5);
    }
    for length in [1, 2, 3, 100] {
        send(&worker.socket, &vec![0xff; length], SendFlags::NOSIGNAL).unwrap();
        assert!(matches!(worker.reply().answer, Err(Denied::Invalid(_))));
    }
    assert!(worker.volumes().is_empty());
    assert_eq!(worker.commit(&id, &[("a", b"1")]), Ok(Answer::Published), "and the broker goes on");
    let other = Commit { owner: Owner { uid: 1001, gid: 0 }, ..worker.content(&id, &[("a", b"2")]) };
    assert_eq!(worker.call(Verb::Commit(other)), Err(Denied::OwnerChanged));
}

#[test]
fn the_longest_names_are_served() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let id = lab.prepare("db");
    let names: Vec<String> = (0..256).map(|i| format!("{i:0253}")).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), b"1".as_slice())).collect();
    assert_eq!(worker.commit(&id, &files), Ok(Answer::Published));
    let again: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), b"22".as_slice())).collect();
    assert_eq!(worker.commit(&id, &again), Ok(Answer::Swapped));
    assert!(names.iter().all(|name| fs::read(lab.target(&id).join(name)).unwrap() == b"22"));
}

#[test]
fn the_nodes_budget_is_reached_and_freed_again() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let count = NODE_BYTES / (2 * VOLUME_BYTES);
    for i in 0..count {
        let id = lab.prepare(&format!("v{i}"));
        assert_eq!(worker.commit(&id, &[("a", b"1")]), Ok(Answer::Published));
    }
    let more = lab.prepare("more");
    assert_eq!(worker.commit(&more, &[("a", b"1")]), Err(Denied::NodeFull { used: NODE_BYTES, limit: NODE_BYTES }));
    assert!(!lab.target(&more).exists());
    assert_eq!(worker.commit(&volume("v0"), &[("a", b"2")]), Ok(Answer::Swapped), "an update within its size is free");
    assert_eq!(worker.remove(&volume("v0")), Ok(Answer::Removed));
    assert_eq!(worker.commit(&more, &[("a", b"1")]), Ok(Answer::Published));

    let mut all = Vec::new();
    loop {
        let after = all.last().map(|standing: &Standing| standing.volume.clone());
        let Ok(Answer::Volumes(page)) = worker.call(Verb::Volumes { after }) else { panic!("no page") };
        if page.is_empty() {
            break;
        }
        all.extend(page);
    }
    assert_eq!(all.len(), usize::try_from(count).unwrap());
}

/// Does to a volume what a broker does that dies in the middle of an update.
fn writable_view(lab: &Lab, id: &VolumeId, steps: &dyn Fn(&Path)) {
    let view = lab.dir.join("view");
    fs::create_dir_all(&view).unwrap();
    mount_bind(lab.target(id), &view).unwrap();
    rustix::mount::mount_remount(&view, rustix::mount::MountFlags::BIND, "").unwrap();
    steps(&view);
    unmount(&view, UnmountFlags::DETACH).unwrap();
}

#[test]
fn a_restarted_broker_learns_what_stands_and_cleans_what_a_crash_left() {
    let mut lab = Lab::new();
    let mut worker = lab.worker();
    let id = lab.prepare("db");
    assert_eq!(worker.commit(&id, &[("a", b"1"), ("tls/key", b"k")]), Ok(Answer::Published));
    let before = worker.volumes();
    let worker_pid = worker.pid;
    lab.kill();
    until("a worker outlived its broker", || rustix::process::test_kill_process(worker_pid).is_err());
    assert_eq!(fs::read(lab.target(&id).join("a")).unwrap(), b"1", "every volume stays");

    // What a broker leaves that dies in the middle of an update, made through a writable view of the volume.
    writable_view(&lab, &id, &|view| {
        fs::create_dir_all(view.join("..2/tls")).unwrap();
        fs::write(view.join("..2/a"), "half").unwrap();
        symlink("..data/new", view.join("new")).unwrap();
        symlink("..2", view.join("..data_tmp")).unwrap();
    });
    lab.start();
    let mut worker = lab.worker();
    assert_eq!(worker.volumes(), before, "what stands is known as it was");
    let clean = ["..1 ", "..1/a ", "..1/tls ", "..1/tls/key ", "..data ", "a ", "tls "];
    let names =
        |lab: &Lab| tree(&lab.target(&id)).iter().map(|l| l[..=l.find(' ').unwrap()].to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&lab), clean);
    assert_eq!(worker.commit(&id, &[("a", b"1"), ("tls/key", b"k")]), Ok(Answer::Unchanged));

    // A crash between rename and attribute: new bytes stand under the old tag, which must then count for nothing.
    lab.kill();
    writable_view(&lab, &id, &|view| {
        fs::create_dir(view.join("..2")).unwrap();
        fs::write(view.join("..2/a"), "new").unwrap();
        symlink("..2", view.join("..data_tmp")).unwrap();
        fs::rename(view.join("..data_tmp"), view.join("..data")).unwrap();
    });
    lab.start();
    let mut worker = lab.worker();
    assert_eq!(worker.volumes()[0].generation, 2);
    assert_eq!(names(&lab), ["..2 ", "..2/a ", "..data ", "a "], "the old generation and its names are gone");
    assert_eq!(worker.commit(&id, &[("a", b"1"), ("tls/key", b"k")]), Ok(Answer::Swapped));
    assert_eq!(fs::read(lab.target(&id).join("tls/key")).unwrap(), b"k");
    assert_eq!(worker.remove(&id), Ok(Answer::Removed));
}

/// A broker killed at any point leaves a volume complete or absent, and whatever is tried next works.
#[test]
fn killed_at_any_point_a_volume_is_complete_or_absent() {
    let mut lab = Lab::new();
    let id = lab.prepare("db");
    let first: Vec<(String, Vec<u8>)> = (0..100).map(|i| (format!("f{i}"), vec![b'1'; 5000])).collect();
    let second: Vec<(String, Vec<u8>)> = (50..150).map(|i| (format!("f{i}"), vec![b'2'; 5000])).collect();
    fn content(files: &[(String, Vec<u8>)]) -> Vec<(&str, &[u8])> {
        files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect()
    }
    let stands = |lab: &Lab, files: &[(String, Vec<u8>)]| {
        files.iter().all(|(name, bytes)| fs::read(lab.target(&id).join(name)).is_ok_and(|found| found == *bytes))
            && fs::read_dir(lab.target(&id).join("..data")).is_ok_and(|dir| dir.count() == files.len())
    };
    let (mut absent, mut published, mut old, mut new, mut kept, mut removed) = (0, 0, 0, 0, 0, 0);
    let mut worker = lab.worker();
    for step in 0..20_u64 {
        let after = Duration::from_micros(step * 60);
        // The first publish.
        let commit = worker.content(&id, &content(&first));
        worker.send(Verb::Commit(commit));
        std::thread::sleep(after);
        lab.kill();
        if lab.is_mounted(&id) {
            assert!(stands(&lab, &first), "step {step}: half a volume");
            published += 1;
        } else {
            absent += 1;
        }
        lab.start();
        worker = lab.worker();
        worker.commit(&id, &content(&first)).unwrap();
        assert!(stands(&lab, &first));
        // A swap.
        let commit = worker.content(&id, &content(&second));
        worker.send(Verb::Commit(commit));
        std::thread::sleep(after);
        lab.kill();
        assert!(stands(&lab, &first) || stands(&lab, &second), "step {step}: neither the old nor the new");
        if stands(&lab, &first) {
            old += 1
        } else {
            new += 1
        }
        lab.start();
        worker = lab.worker();
        worker.commit(&id, &content(&second)).unwrap();
        assert!(stands(&lab, &second));
        assert_eq!(tree(&lab.target(&id)).len(), 1 + 100 + 1 + 100, "nothing is left over");
        // A removal.
        worker.send(Verb::Remove(id.clone()));
        std::thread::sleep(after);
        lab.kill();
        if lab.is_mounted(&id) {
            kept += 1
        } else {
            removed += 1
        }
        lab.start();
        worker = lab.worker();
        assert_eq!(worker.remove(&id), Ok(Answer::Removed), "step {step}");
        assert!(!lab.target(&id).exists());
        assert!(lab.mounts().is_empty());
    }
    eprintln!("publish: {absent} absent, {published} complete; swap: {old} old, {new} new; removal: {kept} {removed}");
}

#[test]
fn a_dead_worker_is_started_again_with_the_same_sockets() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    let registration = lab.dir.join("registry/csi.sealmount.io@reg.sock");
    let hidden = lab.dir.join("registry/.csi.sealmount.io@reg.sock");
    assert!(!registration.exists() && hidden.exists(), "not to be seen before the worker is ready");
    for path in [&hidden, &lab.dir.join("csi.sock")] {
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o600);
    }
    assert_eq!(worker.call(Verb::Ready), Ok(Answer::Ready));
    assert!(registration.exists() && !hidden.exists());
    let id = lab.prepare("db");
    assert_eq!(worker.commit(&id, &[("a", b"1")]), Ok(Answer::Published));
    worker.content(&id, &[("a", b"left in the work tmpfs")]);
    let inode = fs::metadata(&registration).unwrap().ino();

    kill_process(worker.pid, Signal::KILL).unwrap();
    let caller = UnixStream::connect(lab.dir.join("csi.sock")).unwrap(); // while no worker is there
    let mut next = lab.worker();
    assert_ne!(next.pid, worker.pid);
    wait_readable(&next.csi, "the call did not wait");
    next.csi.accept().unwrap();
    drop(caller);
    UnixStream::connect(&registration).unwrap();
    wait_readable(&next.registration, "no call on the registration socket");
    assert_eq!(fs::metadata(&registration).unwrap().ino(), inode);
    assert_eq!(next.volumes().len(), 1);
    let work = PathBuf::from(format!("/proc/self/fd/{}", next.work.as_raw_fd()));
    assert_eq!(fs::read_dir(work).unwrap().count(), 0, "nothing of a dead worker's content is left");
    // A worker that closes its socket is of no use.
    let (pid, control) = (next.pid, next.control);
    drop(next.socket);
    assert_ne!(lab.worker().pid, pid);
    drop(control);
}

#[test]
fn sockets_that_are_removed_or_refused_are_bound_anew() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    assert_eq!(worker.call(Verb::Ready), Ok(Answer::Ready));
    let registration = lab.dir.join("registry/csi.sealmount.io@reg.sock");
    let identity = |path: &Path| fs::metadata(path).map(|stat| (stat.ino(), stat.ctime(), stat.ctime_nsec())).ok();

    fs::remove_file(&registration).unwrap();
    let mut worker = lab.worker();
    assert_eq!(worker.call(Verb::Ready), Ok(Answer::Ready));
    let before = identity(&registration).expect("bound anew");

    // Somebody else's socket at our path.
    fs::remove_file(lab.dir.join("csi.sock")).unwrap();
    let _other = UnixListener::bind(lab.dir.join("csi.sock")).unwrap();
    let mut worker = lab.worker();
    let _call = UnixStream::connect(lab.dir.join("csi.sock")).unwrap();
    wait_readable(&worker.csi, "the path does not lead to the worker's listener");
    assert_eq!(worker.call(Verb::Ready), Ok(Answer::Ready));

    // The kubelet refused: only a new file makes it ask again.
    worker.control.write_all(&[REGISTRATION_REFUSED]).unwrap();
    let mut worker = lab.worker();
    assert!(!registration.exists(), "not before the next worker is ready");
    assert_eq!(worker.call(Verb::Ready), Ok(Answer::Ready));
    assert_ne!(identity(&registration).unwrap(), before);
}

#[test]
fn told_to_end_it_takes_its_sockets_away_and_leaves_the_volumes() {
    let mut lab = Lab::new();
    let mut worker = lab.worker();
    let id = lab.prepare("db");
    assert_eq!(worker.call(Verb::Ready), Ok(Answer::Ready));
    assert_eq!(worker.commit(&id, &[("a", b"1")]), Ok(Answer::Published));
    let broker = lab.broker.as_mut().unwrap();
    kill_process(Pid::from_child(broker), Signal::TERM).unwrap();
    assert!(broker.wait().unwrap().success());
    lab.broker = None;
    assert_eq!(fs::read_dir(lab.dir.join("registry")).unwrap().count(), 0);
    assert!(!lab.dir.join("csi.sock").exists());
    assert!(rustix::process::test_kill_process(worker.pid).is_err(), "the worker is gone");
    assert_eq!(fs::read(lab.target(&id).join("a")).unwrap(), b"1");
}

#[test]
fn the_pods_api_is_passed_on_connected() {
    let lab = Lab::new();
    let mut worker = lab.worker();
    assert!(matches!(worker.call(Verb::Pods), Err(Denied::System { .. })), "there is none");
    fs::create_dir(lab.dir.join("kubelet/pods-api")).unwrap();
    let kubelet = UnixListener::bind(lab.dir.join("kubelet/pods-api/pods-api.sock")).unwrap();
    worker.send(Verb::Pods);
    wait_readable(&worker.socket, "no reply");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut packet = [0; 64];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let length = recvmsg(&worker.socket, &mut [IoSliceMut::new(&mut packet)], &mut ancillary, flags).unwrap().bytes;
    assert_eq!(decode::<Reply>(&packet[..length]).unwrap().answer, Ok(Answer::Pods));
    let Some(RecvAncillaryMessage::ScmRights(mut fds)) = ancillary.drain().next() else { panic!("no descriptor") };
    let mut stream = UnixStream::from(fds.next().unwrap());
    stream.write_all(b"hello").unwrap();
    let mut said = [0; 5];
    kubelet.accept().unwrap().0.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hello");
}

#[test]
fn a_worker_that_does_not_read_delays_only_itself() {
    let mut lab = Lab::new();
    let worker = lab.worker();
    let packet = encode(&Request { id: 1, verb: Verb::Volumes { after: None } }).unwrap();
    // Until its own socket is full: the broker holds one reply back and stops reading.
    let mut sent = 0;
    while send(&worker.socket, &packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_ok() || sent < 1000 {
        sent += 1;
        if sent > 1000 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(sent < 100_000, "the broker reads without end");
        if sent % 1000 == 0 && send(&worker.socket, &packet, SendFlags::DONTWAIT).is_err() {
            break;
        }
    }
    let broker = lab.broker.as_mut().unwrap();
    kill_process(Pid::from_child(broker), Signal::TERM).unwrap();
    assert!(broker.wait().unwrap().success(), "it is not stuck");
    lab.broker = None;
}

/// A process's page that the kernel cannot fill until this is dropped: an application that lists its volume into it
/// holds the directory's lock.
struct SlowPage {
    userfault: OwnedFd,
    page: usize,
}

impl SlowPage {
    #[allow(unsafe_code)]
    fn new() -> Self {
        // SAFETY: makes a descriptor; the result is checked.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        assert!(fd >= 0, "userfaultfd: {}", std::io::Error::last_os_error());
        // SAFETY: the descriptor was just made and is nobody else's.
        let userfault = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(i32::try_from(fd).unwrap()) };
        let (protection, flags) =
            (rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE, rustix::mm::MapFlags::PRIVATE);
        // SAFETY: an anonymous mapping where the kernel chooses; it is never unmapped.
        let page = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), 4096, protection, flags) }.unwrap();
        // struct uffdio_api and struct uffdio_register of linux/userfaultfd.h
        let mut api = [0xaa_u64, 0, 0];
        let mut register = [page as u64, 4096, 1, 0];
        // SAFETY: both requests take the structure of exactly this size.
        unsafe {
            assert_eq!(libc::ioctl(userfault.as_raw_fd(), 0xc018_aa3f, api.as_mut_ptr()), 0);
            assert_eq!(libc::ioctl(userfault.as_raw_fd(), 0xc020_aa00, register.as_mut_ptr()), 0);
        }
        Self { userfault, page: page as usize }
    }

    /// Lists `dir` into the page: returns when `self` is dropped.
    #[allow(unsafe_code)]
    fn list(&self, dir: &Path) -> std::thread::JoinHandle<()> {
        let dir = fs::File::open(dir).unwrap();
        let page = self.page;
        let thread = std::thread::spawn(move || {
            // SAFETY: the page is 4096 bytes and is never unmapped.
            unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), page, 4096) };
        });
        wait_readable(&self.userfault, "the listing does not wait for the page");
        thread
    }
}

#[test]
fn an_application_that_holds_its_directory_delays_no_other_volume() {
    let mut lab = Lab::new();
    let mut worker = lab.worker();
    let (held, other) = (lab.prepare("held"), lab.prepare("other"));
    assert_eq!(worker.commit(&held, &[("a", b"1")]), Ok(Answer::Published));
    assert_eq!(worker.commit(&other, &[("a", b"1")]), Ok(Answer::Published));

    let page = SlowPage::new();
    let listing = page.list(&lab.target(&held));
    let commit = worker.content(&held, &[("a", b"2")]);
    let update = worker.send(Verb::Commit(commit));
    // While it hangs: everything of other volumes, and Busy for this one.
    assert_eq!(worker.commit(&other, &[("a", b"2")]), Ok(Answer::Swapped));
    assert_eq!(worker.commit(&held, &[("a", b"3")]), Err(Denied::Busy));
    assert_eq!(worker.volumes().len(), 2);
    let reply = worker.reply();
    assert_eq!((reply.id, reply.answer), (update, Err(Denied::Timeout)));
    assert_eq!(fs::read(lab.target(&held).join("a")).unwrap(), b"1");
    assert_eq!(worker.commit(&held, &[("a", b"3")]), Err(Denied::Busy), "its child still hangs");

    // A new broker does not wait either.
    lab.kill();
    lab.start();
    let mut worker = lab.worker();
    assert_eq!(worker.volumes().len(), 2);
    assert_eq!(worker.commit(&other, &[("a", b"4")]), Ok(Answer::Swapped));

    // Released: what hung ends as it may, and the volume is whole and usable again.
    drop(page);
    listing.join().unwrap();
    until("the volume stays busy", || worker.commit(&held, &[("a", b"5")]).is_ok());
    assert_eq!(fs::read(lab.target(&held).join("a")).unwrap(), b"5");
    assert_eq!(tree(&lab.target(&held)).len(), 4, "nothing is left over: {:?}", tree(&lab.target(&held)));

    // Held again: a removal does not wait for it.
    let page = SlowPage::new();
    let listing = page.list(&lab.target(&held));
    let commit = worker.content(&held, &[("a", b"6")]);
    let update = worker.send(Verb::Commit(commit));
    let removal = worker.send(Verb::Remove(held.clone()));
    let mut replies = [worker.reply(), worker.reply()];
    replies.sort_by_key(|reply| reply.id);
    assert_eq!((replies[0].id, replies[1].id), (update, removal));
    assert_eq!(replies[0].answer, Err(Denied::Busy));
    assert_eq!(replies[1].answer, Ok(Answer::Removed));
    assert!(!lab.is_mounted(&held));
    assert!(!lab.target(&held).exists());
    assert_eq!(worker.commit(&held, &[("a", b"7")]), Ok(Answer::Published), "and it can be published again");
    drop(page);
    listing.join().unwrap();
    assert_eq!(fs::read(lab.target(&held).join("a")).unwrap(), b"7");
}
