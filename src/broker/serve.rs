//! The broker: one thread, one poll. It supervises the worker, answers its verbs, and waits for nobody.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::ops::Bound;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recv, sendmsg, socket_with, socketpair,
};
use rustix::process::{Pid, kill_process, umask};
use tracing::{error, info, warn};

use super::layout::Layout;
use super::mounts::{Tmpfs, knows_noswap, refuse_descriptors, tmpfs, usage};
use super::volume::{
    Fork, Kubelet, Mounted, Place, annotate, at, detach, fork, overwrite, publish, remove_bare, tidy, update,
};
use super::wire::{
    Answer, Commit, Denied, MAX_PACKET, PAGE, Reply, Request, Standing, Verb, decode, encode, request_id,
};
use super::{INHERITED, REGISTRATION_REFUSED, WORKER_UID};
use crate::harden;
use crate::request::{DRIVER, VolumeId};

/// An update that takes longer waits for an application's lock.
const UPDATE_TIME: Duration = Duration::from_secs(5);
/// How long a Remove may wait for what stands to be overwritten when an update of it hangs.
const OVERWRITE_TIME: Duration = Duration::from_secs(1);
/// How long a worker may take to end when asked.
const STOP_TIME: Duration = Duration::from_secs(5);
/// How long a worker that closed its socket may take to be gone.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The first pause before a dead worker is started again; doubled up to `BACKOFF_MAX`, forgotten after `BACKOFF_RESET`.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
const BACKOFF_RESET: Duration = Duration::from_secs(60);

/// What the broker is told; nothing else decides what it does.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The kubelet's directory (`--kubelet-dir`). Every volume lies below it.
    pub kubelet_dir: PathBuf,
    /// Where the kubelet calls the driver (`--csi-socket`).
    pub csi_socket: PathBuf,
    /// Where the kubelet looks for plugins (`--registration-dir`).
    pub registration_dir: PathBuf,
    /// The most bytes of all volumes at their worst (`--max-node-bytes`).
    pub max_node_bytes: u64,
    /// Size of the work tmpfs in bytes (`--work-bytes`).
    pub work_bytes: u64,
    /// Start although secrets can reach swap (`--allow-swap`).
    pub allow_swap: bool,
    /// The worker's program: `/proc/self/exe` but in tests.
    pub worker: PathBuf,
    /// Its arguments.
    pub worker_args: Vec<OsString>,
    /// Its whole environment.
    pub worker_env: Vec<(OsString, OsString)>,
}

/// Why the broker does not start. Once it runs it ends only when told to.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The process could not be hardened.
    #[error(transparent)]
    Harden(#[from] harden::HardenError),
    /// Secrets could reach a disk.
    #[error("swap is on and this kernel's tmpfs has no noswap (Linux 6.4): turn swap off, or start with --allow-swap")]
    Swap,
    /// The kernel lacks something every volume needs.
    #[error(
        "{feature} does not work here ({error}): Linux 5.15 or later, as root in the first user namespace, is needed"
    )]
    Kernel {
        /// What.
        feature: &'static str,
        /// How it failed.
        error: io::Error,
    },
    /// The kubelet's directory cannot be used.
    #[error("--kubelet-dir {}: {error}", path.display())]
    KubeletDir {
        /// The path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A socket cannot be bound.
    #[error("cannot bind {}: {error}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A socket's path is too long for an address.
    #[error("{} is longer than the 107 bytes a socket's address holds: use a shorter path", .0.display())]
    PathTooLong(PathBuf),
    /// A system call failed.
    #[error("{0}")]
    System(Denied),
}

/// Becomes the broker: returns after SIGTERM or SIGINT, or if it cannot start. Volumes stay in either case. To be
/// called before the process has a second thread.
pub fn run(settings: Settings) -> Result<(), BrokerError> {
    harden::broker()?;
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
        mask.add(signal);
    }
    let system = |step: &'static str| move |error: io::Error| BrokerError::System(at(step)(error));
    mask.thread_block().map_err(|error| system("block signals")(error.into()))?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&mask, flags).map_err(|error| system("make a signalfd")(error.into()))?;

    let noswap = swap_is_safe(settings.allow_swap)?;
    let kubelet = Kubelet::open(&settings.kubelet_dir)
        .map_err(|error| BrokerError::KubeletDir { path: settings.kubelet_dir.clone(), error })?;
    let csi = Endpoint::bind(&settings.csi_socket)?;
    let registration = Endpoint::bind(&hidden(&settings.registration_dir))?;
    let mut broker = Broker {
        settings,
        kubelet,
        noswap,
        csi,
        registration,
        signals,
        volumes: BTreeMap::new(),
        forks: Vec::new(),
        worker: None,
        starts: 0,
        backoff: BACKOFF,
        start_at: Instant::now(),
        next_check: Instant::now(),
        stop_by: None,
    };
    broker.relearn().map_err(system("read /proc/self/mountinfo"))?;
    broker.serve()
}

/// Whether volumes can be kept out of swap; an error if secrets could reach a disk and nobody allowed it.
fn swap_is_safe(allow_swap: bool) -> Result<bool, BrokerError> {
    let noswap = knows_noswap()
        .map_err(|error| BrokerError::Kernel { feature: "making a tmpfs with fsopen", error: error.into() })?;
    if !noswap {
        warn!("this kernel's tmpfs has no noswap (Linux 6.4)");
        // One line is the heading; no file at all is a kernel without swap.
        let swaps = fs::read_to_string("/proc/swaps").map_or(0, |text| text.lines().skip(1).count());
        if swaps > 0 && !allow_swap {
            return Err(BrokerError::Swap);
        }
    }
    Ok(noswap)
}

/// The registration socket's name until the worker is ready: the kubelet passes over names that start with a dot.
fn hidden(dir: &Path) -> PathBuf {
    dir.join(format!(".{DRIVER}-reg.sock"))
}

/// A listening socket and the file it was bound to.
#[derive(Debug)]
struct Endpoint {
    path: PathBuf,
    inode: (u64, u64),
    listener: UnixListener,
}

impl Endpoint {
    fn bind(path: &Path) -> Result<Self, BrokerError> {
        if path.as_os_str().len() > 107 {
            return Err(BrokerError::PathTooLong(path.to_owned()));
        }
        let socket = |error| BrokerError::Socket { path: path.to_owned(), error };
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(socket(error)),
            _ => {}
        }
        let before = umask(Mode::RWXG | Mode::RWXO | Mode::XUSR); // 0600 from the first moment on
        let listener = UnixListener::bind(path);
        umask(before);
        let listener = listener.map_err(socket)?;
        listener.set_nonblocking(true).map_err(socket)?;
        let stat = fs::symlink_metadata(path).map_err(socket)?;
        Ok(Self { path: path.to_owned(), inode: (stat.dev(), stat.ino()), listener })
    }

    /// Whether the path still leads to this socket.
    fn stands(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|stat| (stat.dev(), stat.ino()) == self.inode)
    }

    fn rename(&mut self, path: PathBuf) -> io::Result<()> {
        fs::rename(&self.path, &path)?;
        self.path = path;
        Ok(())
    }

    fn remove(&self) {
        if self.stands() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[derive(Debug)]
struct Worker {
    child: Child,
    /// `None` once it closed its end, and is being killed for it.
    socket: Option<OwnedFd>,
    /// The work tmpfs, made anew for each worker, so that nothing of a dead one's stays.
    work: OwnedFd,
    born: Instant,
    /// When it is killed, if it was asked to end.
    kill_at: Option<Instant>,
    /// Replies its full socket did not take. Nothing is read from it meanwhile: it delays only itself.
    outbox: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
}

impl Worker {
    fn end_by(&mut self, time: Duration) {
        self.kill_at.get_or_insert_with(|| Instant::now() + time);
    }
}

/// A verb whose answer comes later: to which worker, and to which of its requests.
#[derive(Debug, Clone, Copy)]
struct Caller {
    start: u64,
    id: u64,
}

#[derive(Debug)]
struct Pending {
    fork: Fork,
    volume: VolumeId,
    /// When it is given up and killed; `None`: that was done.
    deadline: Option<Instant>,
    then: Then,
}

#[derive(Debug)]
enum Then {
    /// Answer so if it went well.
    Answer(Caller, Answer),
    /// Take the volume away, whatever came of it.
    Detach(Caller, Box<Mounted>),
    /// Leftovers were cleaned.
    Nothing,
    /// The volume is gone: it works on a superblock nobody reaches.
    Orphaned,
}

/// An answer now, or `None` if it comes later.
type Verdict = Result<Option<Answer>, Denied>;

#[derive(Debug)]
struct Broker {
    settings: Settings,
    kubelet: Kubelet,
    noswap: bool,
    csi: Endpoint,
    registration: Endpoint,
    signals: SignalFd,
    volumes: BTreeMap<VolumeId, Standing>,
    forks: Vec<Pending>,
    worker: Option<Worker>,
    starts: u64,
    backoff: Duration,
    start_at: Instant,
    next_check: Instant,
    stop_by: Option<Instant>,
}

impl Broker {
    /// Learns what stands after a restart. Leftovers are removed by children, as an application can hold a lock.
    fn relearn(&mut self) -> io::Result<()> {
        for volume in self.kubelet.candidates()? {
            match self.kubelet.place(&volume) {
                Ok(Place::Ours(mounted)) => {
                    self.remember(&mounted);
                    self.tidy(mounted);
                }
                Ok(_) => {}
                Err(denied) => warn!(%volume, %denied, "left alone"),
            }
        }
        info!(volumes = self.volumes.len(), "learned what stands");
        let until = Instant::now() + OVERWRITE_TIME;
        while !self.forks.is_empty() && Instant::now() < until {
            self.wait(Some(until));
            self.tend_forks();
        }
        Ok(())
    }

    fn serve(mut self) -> Result<(), BrokerError> {
        let mut packet = vec![0; MAX_PACKET];
        loop {
            self.tend_forks();
            self.tend_sockets();
            if self.tend_worker() {
                self.registration.remove();
                self.csi.remove();
                return Ok(());
            }
            if self.wait(None) {
                self.receive(&mut packet);
            }
            self.flush();
        }
    }

    /// Waits for a signal, the worker, or the next thing that is due. Whether the worker has something to say.
    fn wait(&mut self, until: Option<Instant>) -> bool {
        let now = Instant::now();
        let due = [Some(self.next_check), until, self.stop_by, self.worker.as_ref().and_then(|worker| worker.kill_at)];
        let due = due.into_iter().flatten().chain(self.forks.iter().filter_map(|pending| pending.deadline));
        let due = due.chain(self.worker.is_none().then_some(self.start_at)).min().unwrap_or(now);
        let timeout = Timespec::try_from(due.saturating_duration_since(now) + Duration::from_millis(1)).ok();
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if let Some(worker) = &self.worker
            && let Some(socket) = &worker.socket
        {
            fds.push(PollFd::new(socket, if worker.outbox.is_empty() { PollFlags::IN } else { PollFlags::OUT }));
        }
        let _ = poll(&mut fds, timeout.as_ref()); // whatever it says, the tending looks for itself
        let ready = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match i32::try_from(signal.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok()) {
                Some(Signal::SIGTERM | Signal::SIGINT) => {
                    info!("ending; the volumes stay");
                    self.stop_by.get_or_insert_with(|| Instant::now() + STOP_TIME);
                    self.registration.remove(); // the kubelet takes the driver off its list
                    self.stop_worker();
                }
                // The platform's file is the worker's.
                Some(Signal::SIGHUP) => self.signal_worker(rustix::process::Signal::HUP),
                _ => {}
            }
        }
        ready
    }

    // --- sockets and worker ---

    /// Binds both sockets anew if one is gone or another's; the worker is started again with the new ones.
    fn tend_sockets(&mut self) {
        if Instant::now() < self.next_check {
            return;
        }
        self.next_check = Instant::now() + Duration::from_secs(1);
        if self.stop_by.is_some() {
            return;
        }
        if !self.csi.stands() || !self.registration.stands() {
            warn!("a socket was removed or replaced: binding both anew");
            self.rebind();
            self.stop_worker();
        }
    }

    fn rebind(&mut self) {
        self.registration.remove();
        self.csi.remove();
        let csi = Endpoint::bind(&self.settings.csi_socket);
        let registration = Endpoint::bind(&hidden(&self.settings.registration_dir));
        for (endpoint, bound) in [(&mut self.csi, csi), (&mut self.registration, registration)] {
            match bound {
                Ok(bound) => *endpoint = bound,
                Err(error) => error!(%error, "trying again in a second"),
            }
        }
    }

    fn stop_worker(&mut self) {
        if let Some(worker) = self.worker.as_mut().filter(|worker| worker.kill_at.is_none()) {
            worker.end_by(STOP_TIME);
            self.signal_worker(rustix::process::Signal::TERM);
        }
    }

    fn signal_worker(&self, signal: rustix::process::Signal) {
        let pid = self.worker.as_ref().and_then(|worker| i32::try_from(worker.child.id()).ok());
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal);
        }
    }

    /// Starts, ends and buries the worker. True when it is dead and stays so.
    fn tend_worker(&mut self) -> bool {
        let now = Instant::now();
        let stopping = self.stop_by.is_some();
        let Some(worker) = &mut self.worker else {
            if !stopping && now >= self.start_at {
                match self.start_worker() {
                    Ok(worker) => self.worker = Some(worker),
                    Err(denied) => {
                        error!(%denied, "cannot start the worker");
                        self.pause();
                    }
                }
            }
            return stopping;
        };
        if worker.kill_at.is_some_and(|at| now >= at) {
            let _ = worker.child.kill();
        }
        let Ok(Some(status)) = worker.child.try_wait() else { return false };
        // One that closed its socket by itself was not asked to end.
        let (asked, up) = (worker.kill_at.is_some() && worker.socket.is_some(), worker.born.elapsed());
        self.worker = None; // and with it its work tmpfs
        if up >= BACKOFF_RESET {
            self.backoff = BACKOFF;
        }
        if stopping {
            return true;
        }
        if asked {
            self.start_at = now;
        } else {
            error!(%status, "the worker ended; the volumes stay");
            self.pause();
        }
        if status.code() == Some(i32::from(REGISTRATION_REFUSED)) {
            self.rebind();
        }
        false
    }

    fn pause(&mut self) {
        self.start_at = Instant::now() + self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
    }

    fn start_worker(&mut self) -> Result<Worker, Denied> {
        let pages = self.settings.work_bytes.div_ceil(4096);
        let (size, inodes) = (self.settings.work_bytes, pages.saturating_add(64));
        let (uid, gid, noswap) = (WORKER_UID, WORKER_UID, self.noswap);
        let spec = Tmpfs { source: "sealmount-work", size, inodes, mode: "0700", uid, gid, noswap };
        let mount = tmpfs(&spec).map_err(at("make the work tmpfs"))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let work = openat(&mount, ".", flags, Mode::empty()).map_err(at("open the work tmpfs"))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(at("make a socket pair"))?;
        if let Err(error) = refuse_descriptors(&socket)
            && self.starts == 0
        {
            info!(%error, "this kernel has no SO_PASSRIGHTS (Linux 6.16)");
        }

        self.starts = self.starts.saturating_add(1);
        // Copies without CLOEXEC, for this one exec: the broker has one thread, so no other child can get them.
        let given = [theirs.as_fd(), self.csi.listener.as_fd(), self.registration.listener.as_fd(), work.as_fd()];
        let mut copies = Vec::new();
        for fd in given {
            copies.push(rustix::io::dup(fd).map_err(at("copy a descriptor"))?);
        }
        let numbers: Vec<_> = copies.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
        let inherited = format!("{}:{}:{}", std::process::id(), self.starts, numbers.join(","));
        let mut command = Command::new(&self.settings.worker);
        command.args(&self.settings.worker_args).env_clear().envs(self.settings.worker_env.iter().cloned());
        command.env(INHERITED, inherited).stdin(Stdio::null()).uid(WORKER_UID).gid(WORKER_UID);
        let child = command.spawn().map_err(at("start the worker"))?;
        Ok(Worker { child, socket: Some(socket), work, born: Instant::now(), kill_at: None, outbox: VecDeque::new() })
    }

    // --- packets ---

    fn receive(&mut self, buffer: &mut [u8]) {
        for _ in 0..16 {
            let Some(worker) = self.worker.as_mut().filter(|worker| worker.outbox.is_empty()) else { return };
            let Some(socket) = &worker.socket else { return };
            let length = match recv(socket, &mut *buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
                Ok((_, length)) if length > 0 => length,
                Err(Errno::AGAIN | Errno::INTR) => return,
                _ => {
                    // Deaf, it is of no use; but it may be on its way out, and its exit code says why.
                    worker.socket = None;
                    worker.end_by(LAST_WORDS);
                    return;
                }
            };
            let packet = buffer.get(..length.min(MAX_PACKET)).unwrap_or_default();
            let caller = Caller { start: self.starts, id: request_id(packet) };
            let request =
                if length > MAX_PACKET { Err(super::wire::WireError::TooLong(length)) } else { decode(packet) };
            match request {
                Ok(request) => self.handle(caller, request),
                Err(error) => self.reply(caller, Err(Denied::Invalid(error.to_string())), None),
            }
        }
    }

    fn handle(&mut self, caller: Caller, request: Request) {
        let verdict = match request.verb {
            Verb::Ready => self.ready(),
            Verb::Commit(commit) => self.commit(caller, &commit),
            Verb::Remove(volume) => self.remove(caller, &volume),
            Verb::Volumes { after } => {
                let from = after.map_or(Bound::Unbounded, Bound::Excluded);
                let page = self.volumes.range((from, Bound::Unbounded)).take(PAGE);
                Ok(Some(Answer::Volumes(page.map(|(_, standing)| standing.clone()).collect())))
            }
            Verb::Pods => match self.connect_pods() {
                Ok(socket) => return self.reply(caller, Ok(Answer::Pods), Some(socket)),
                Err(denied) => Err(denied),
            },
        };
        if let Some(answer) = verdict.transpose() {
            self.reply(caller, answer, None);
        }
    }

    fn reply(&mut self, caller: Caller, answer: Result<Answer, Denied>, fd: Option<OwnedFd>) {
        let Some(worker) = self.worker.as_mut().filter(|_| caller.start == self.starts) else { return };
        match encode(&Reply { id: caller.id, answer }) {
            Ok(packet) => worker.outbox.push_back((packet, fd)),
            Err(error) => error!(%error, "a reply could not be written"),
        }
        self.flush();
    }

    /// Sends what the worker's socket takes; never waits for it.
    fn flush(&mut self) {
        let Some(worker) = &mut self.worker else { return };
        let Some(socket) = &worker.socket else { return worker.outbox.clear() };
        while let Some((packet, fd)) = worker.outbox.front() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&fds));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(socket, &[IoSlice::new(packet)], &mut control, flags) {
                Err(Errno::AGAIN | Errno::INTR) => return,
                _ => drop(worker.outbox.pop_front()), // to a worker that is gone nothing can be said
            }
        }
    }

    // --- verbs ---

    fn ready(&mut self) -> Verdict {
        let path = self.settings.registration_dir.join(format!("{DRIVER}-reg.sock"));
        if self.registration.path != path {
            self.registration.rename(path).map_err(at("show the registration socket"))?;
        }
        Ok(Some(Answer::Ready))
    }

    fn commit(&mut self, caller: Caller, commit: &Commit) -> Verdict {
        let Some(worker) = &self.worker else { return Err(Denied::Busy) };
        let layout = Layout::of(commit, usage(&worker.work).map_err(at("stat the work tmpfs"))?.page)?;
        let id = &commit.volume;
        if self.is_busy(id) {
            return Err(Denied::Busy);
        }
        match self.kubelet.place(id)? {
            Place::Unprepared => Err(Denied::NotPrepared("its directory is missing".into())),
            Place::Bare(parent) => {
                self.volumes.remove(id); // if one stood, somebody else unmounted it
                self.afford(id, layout.room((0, 0)).0)?;
                let since = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |age| age.as_secs());
                publish(&parent, &worker.work, commit, &layout, self.noswap, since)?;
                self.learn(id);
                Ok(Some(Answer::Published))
            }
            Place::Ours(mounted) => {
                let record = &mounted.record;
                if record.owner != commit.owner {
                    return Err(Denied::OwnerChanged);
                }
                let same = (record.key, record.tag) == (commit.key, commit.tag);
                if same && record.generation == mounted.generation {
                    if record.note == commit.note {
                        return Ok(Some(Answer::Unchanged));
                    }
                    let fork = self.fork(|_| annotate(&mounted, &commit.note))?;
                    self.pend(fork, id, UPDATE_TIME, Then::Answer(caller, Answer::Unchanged));
                    return Ok(None);
                }
                let size = layout.room((mounted.usage.used, mounted.usage.inodes_used)).0;
                self.afford(id, size.max(mounted.usage.size))?;
                let fork = self.fork(|work| match work {
                    Some(work) => update(&mounted, &work, commit, &layout),
                    None => Err(Denied::Busy),
                })?;
                if let Some(standing) = self.volumes.get_mut(id) {
                    standing.size = standing.size.max(size); // charged while it is under way
                }
                self.pend(fork, id, UPDATE_TIME, Then::Answer(caller, Answer::Swapped));
                Ok(None)
            }
        }
    }

    fn remove(&mut self, caller: Caller, id: &VolumeId) -> Verdict {
        if self.forks.iter().any(|pending| pending.volume == *id && matches!(pending.then, Then::Detach(..))) {
            return Err(Denied::Busy);
        }
        match self.kubelet.place(id)? {
            Place::Unprepared => {}
            Place::Bare(parent) => remove_bare(&parent)?,
            Place::Ours(mounted) if self.is_busy(id) => {
                // A child hangs behind an application's lock, and a lookup here would hang behind the child.
                self.orphan(id);
                let fork = self.fork(|_| overwrite(&mounted))?;
                self.pend(fork, id, OVERWRITE_TIME, Then::Detach(caller, mounted));
                return Ok(None);
            }
            Place::Ours(mounted) => {
                if let Err(denied) = overwrite(&mounted) {
                    warn!(volume = %id, %denied, "removed without being overwritten");
                }
                detach(&mounted)?;
            }
        }
        self.volumes.remove(id);
        Ok(Some(Answer::Removed))
    }

    /// The kubelet's own pods API (KEP-4188), which only root may connect to.
    fn connect_pods(&self) -> Result<OwnedFd, Denied> {
        let step = at("connect to the kubelet's pods API");
        let path = self.settings.kubelet_dir.join("pods-api/pods-api.sock");
        let address = SocketAddrUnix::new(&path).map_err(&step)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK; // a full backlog is an error, not a wait
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(&step)?;
        connect(&socket, &address).map_err(&step)?;
        Ok(socket)
    }

    // --- volumes and the children that work on them ---

    /// Refuses what would take all volumes, at their worst, over the node's budget.
    fn afford(&self, id: &VolumeId, size: u64) -> Result<(), Denied> {
        let others = self.volumes.values().filter(|standing| standing.volume != *id).map(|standing| standing.size);
        let used = others.fold(0_u64, u64::saturating_add);
        let limit = self.settings.max_node_bytes;
        if used.saturating_add(size) > limit { Err(Denied::NodeFull { used, limit }) } else { Ok(()) }
    }

    fn learn(&mut self, id: &VolumeId) {
        match self.kubelet.place(id) {
            Ok(Place::Ours(mounted)) => self.remember(&mounted),
            Ok(_) => drop(self.volumes.remove(id)),
            Err(denied) => warn!(volume = %id, %denied, "left alone"),
        }
    }

    fn remember(&mut self, mounted: &Mounted) {
        let record = mounted.record.clone();
        let standing = Standing {
            volume: record.volume,
            owner: record.owner,
            generation: mounted.generation,
            bytes: record.bytes,
            size: mounted.usage.size,
            inodes: (mounted.usage.inodes_used, mounted.usage.inodes),
            since: record.since,
            key: record.key,
            note: record.note,
        };
        self.volumes.insert(standing.volume.clone(), standing);
    }

    fn is_busy(&self, id: &VolumeId) -> bool {
        self.forks.iter().any(|pending| pending.volume == *id && !matches!(pending.then, Then::Orphaned))
    }

    fn tidy(&mut self, mounted: Box<Mounted>) {
        let id = mounted.record.volume.clone();
        match self.fork(|_| tidy(&mounted)) {
            Ok(fork) => self.pend(fork, &id, UPDATE_TIME, Then::Nothing),
            Err(denied) => warn!(volume = %id, %denied, "leftovers stay"),
        }
    }

    fn fork(&mut self, work: impl FnOnce(Option<OwnedFd>) -> Result<(), Denied>) -> Result<Fork, Denied> {
        // In the child, the worker's socket is closed: a child that hangs must not keep it open when the broker dies.
        fork(|| work(self.worker.take().map(|worker| worker.work)))
    }

    fn pend(&mut self, fork: Fork, id: &VolumeId, time: Duration, then: Then) {
        let deadline = Some(Instant::now() + time);
        self.forks.push(Pending { fork, volume: id.clone(), deadline, then });
    }

    /// Gives up the children that work on a volume that goes.
    fn orphan(&mut self, id: &VolumeId) {
        let mut told = Vec::new();
        for pending in self.forks.iter_mut().filter(|pending| pending.volume == *id) {
            pending.fork.kill();
            if let Then::Answer(caller, _) = std::mem::replace(&mut pending.then, Then::Orphaned) {
                told.push(caller);
            }
        }
        for caller in told {
            self.reply(caller, Err(Denied::Busy), None);
        }
    }

    /// Buries children that ended and gives up those that take too long.
    fn tend_forks(&mut self) {
        let now = Instant::now();
        let (mut ended, mut late) = (Vec::new(), Vec::new());
        for mut pending in std::mem::take(&mut self.forks) {
            if let Some(result) = pending.fork.ended() {
                ended.push((pending, result));
                continue;
            }
            if pending.deadline.is_some_and(|deadline| now >= deadline) {
                pending.fork.kill();
                pending.deadline = None;
                let then = match &pending.then {
                    Then::Detach(..) => Then::Orphaned,
                    _ => Then::Nothing,
                };
                late.push(std::mem::replace(&mut pending.then, then));
            }
            self.forks.push(pending);
        }
        for then in late {
            match then {
                Then::Answer(caller, _) => self.reply(caller, Err(Denied::Timeout), None),
                Then::Detach(caller, mounted) => self.finish_remove(caller, &mounted, Err(Denied::Timeout)),
                Then::Nothing | Then::Orphaned => {}
            }
        }
        for (pending, result) in ended {
            let id = &pending.volume;
            match pending.then {
                Then::Answer(caller, answer) => {
                    self.learn(id);
                    self.reply(caller, result.map(|()| answer), None);
                }
                Then::Detach(caller, mounted) => self.finish_remove(caller, &mounted, result),
                Then::Nothing => {
                    self.learn(id);
                    if let Err(denied) = result {
                        warn!(volume = %id, %denied, "an update or a cleaning did not end as it should");
                    }
                    // A child that was given up ends where the kernel let it: what it left goes now.
                    if pending.deadline.is_none()
                        && let Ok(Place::Ours(mounted)) = self.kubelet.place(id)
                    {
                        self.tidy(mounted);
                    }
                }
                Then::Orphaned => {}
            }
        }
    }

    fn finish_remove(&mut self, caller: Caller, mounted: &Mounted, overwritten: Result<(), Denied>) {
        let id = &mounted.record.volume;
        if let Err(denied) = overwritten {
            warn!(volume = %id, %denied, "removed without being overwritten");
        }
        let answer = detach(mounted).map(|()| Answer::Removed);
        if answer.is_ok() {
            self.volumes.remove(id);
        }
        self.reply(caller, answer, None);
    }
}
