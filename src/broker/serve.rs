//! The broker: one thread, one poll. It supervises the worker, answers its verbs, and waits for nobody.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::io::{self, IoSlice};
use std::ops::Bound;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with, socketpair,
};
use rustix::process::umask;
use tracing::{error, info, warn};

use super::layout::Layout;
use super::mounts::{knows_noswap, refuse_descriptors, tmpfs, usage};
use super::volume::{
    At, Content, Fork, Kubelet, Mounted, Place, annotate, detach, fork, overwrite, publish, remove_bare, tidy, update,
};
use super::wire::{
    Answer, Commit, Denied, MAX_PACKET, PAGE, Reply, Request, Standing, Verb, WireError, decode, encode, request_id,
};
use super::{INHERITED, REGISTRATION_REFUSED, WORKER_UID};
use crate::harden;
use crate::request::{DRIVER, Owner, VolumeId};

/// An update that takes longer waits for an application's lock.
const UPDATE_TIME: Duration = Duration::from_secs(5);
/// How long the start waits for leftovers to be cleaned.
const TIDY_TIME: Duration = Duration::from_secs(1);
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
    /// A path of the settings cannot be used.
    #[error("{}: {error}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The kernel refused something every broker needs.
    #[error("{0}; Linux 5.15 or later is needed, and root in the first user namespace")]
    System(#[from] Denied),
}

/// Becomes the broker: returns after SIGTERM or SIGINT, or if it cannot start. Volumes stay in either case. To be
/// called before the process has a second thread.
pub fn run(settings: Settings) -> Result<(), BrokerError> {
    harden::broker()?;
    let mask: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD].into_iter().collect();
    mask.thread_block().at("block signals")?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).at("make a signalfd")?;
    let noswap = swap_is_safe(settings.allow_swap)?;
    let kubelet = Kubelet::open(&settings.kubelet_dir)
        .map_err(|error| BrokerError::Path { path: settings.kubelet_dir.clone(), error })?;
    let csi = Endpoint::bind(&settings.csi_socket)?;
    let registration = Endpoint::bind(&hidden(&settings.registration_dir))?;
    let now = Instant::now();
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
        start_at: now,
        next_check: now,
        stopping: false,
    };
    broker.relearn()?;
    broker.serve();
    Ok(())
}

/// Whether volumes can be kept out of swap; an error if secrets could reach a disk and nobody allowed it.
fn swap_is_safe(allow_swap: bool) -> Result<bool, BrokerError> {
    let noswap = knows_noswap().at("make a tmpfs with fsopen")?;
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

/// The registration socket's name. The kubelet's client sends the socket's path, its slashes escaped, as HTTP/2's
/// `:authority` (kubernetes#112597 mended that for CSI calls only), and hyper refuses a host with a `%`. What stands
/// before an `@` is user information, where it is legal.
fn shown(dir: &Path) -> PathBuf {
    dir.join(format!("{DRIVER}@reg.sock"))
}

/// Its name until the worker is ready: the kubelet passes over names that start with a dot.
fn hidden(dir: &Path) -> PathBuf {
    dir.join(format!(".{DRIVER}@reg.sock"))
}

/// A listening socket and the file it was bound to.
struct Endpoint {
    path: PathBuf,
    inode: (u64, u64),
    listener: UnixListener,
}

impl Endpoint {
    fn bind(path: &Path) -> Result<Self, BrokerError> {
        let bind = || {
            if path.as_os_str().len() > 107 {
                return Err(io::Error::other("longer than the 107 bytes a socket's address holds: use a shorter path"));
            }
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let before = umask(Mode::RWXG | Mode::RWXO | Mode::XUSR); // 0600 from the first moment on
            let listener = UnixListener::bind(path);
            umask(before);
            let (listener, stat) = (listener?, fs::symlink_metadata(path)?);
            listener.set_nonblocking(true)?;
            Ok(Self { path: path.to_owned(), inode: (stat.dev(), stat.ino()), listener })
        };
        bind().map_err(|error| BrokerError::Path { path: path.to_owned(), error })
    }

    /// Whether the path still leads to this socket.
    fn stands(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|stat| (stat.dev(), stat.ino()) == self.inode)
    }

    fn remove(&self) {
        if self.stands() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

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

/// A verb whose answer comes later: to which worker, and to which of its requests.
#[derive(Clone, Copy)]
struct Caller {
    start: u64,
    id: u64,
}

/// A child at work, and what is to be done when it ended.
struct Pending {
    fork: Fork,
    volume: VolumeId,
    /// When it is given up and killed.
    deadline: Instant,
    given_up: bool,
    /// The volume is gone: it works on a superblock nobody reaches.
    orphaned: bool,
    caller: Waiting,
}

/// Who waits for a child, and what to say if it went well.
type Waiting = Option<(Caller, Answer)>;
/// An answer now, or `None` if it comes later.
type Verdict = Result<Option<Answer>, Denied>;

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
    stopping: bool,
}

impl Broker {
    /// Learns what stands after a restart. Leftovers are removed by children, as an application can hold a lock.
    fn relearn(&mut self) -> Result<(), Denied> {
        for volume in self.kubelet.candidates().at("read /proc/self/mountinfo")? {
            self.tidy(&volume);
        }
        info!(volumes = self.volumes.len(), "learned what stands");
        let until = Instant::now() + TIDY_TIME;
        while !self.forks.is_empty() && Instant::now() < until {
            self.wait(until);
            self.tend_forks();
        }
        Ok(())
    }

    fn serve(mut self) {
        let mut packet = vec![0; MAX_PACKET];
        while !(self.stopping && self.worker.is_none()) {
            self.tend_forks();
            self.tend_sockets();
            self.tend_worker();
            if self.wait(self.next_check) {
                self.receive(&mut packet);
            }
            self.flush();
        }
        self.registration.remove();
        self.csi.remove();
    }

    /// Waits for a signal, the worker, or the next thing that is due. Whether the worker has something to say.
    fn wait(&mut self, until: Instant) -> bool {
        let worker = self.worker.as_ref();
        let start = worker.map_or(Some(self.start_at), |worker| worker.kill_at);
        let forks = self.forks.iter().filter(|pending| !pending.given_up).map(|pending| pending.deadline);
        let due = forks.chain(start).fold(until, Instant::min).saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(due + Duration::from_millis(1)).ok(); // rounded up: not before it is due
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if let Some((worker, socket)) = worker.and_then(|worker| Some((worker, worker.socket.as_ref()?))) {
            fds.push(PollFd::new(socket, if worker.outbox.is_empty() { PollFlags::IN } else { PollFlags::OUT }));
        }
        let _ = poll(&mut fds, timeout.as_ref()); // whatever it says, the tending looks for itself
        let ready = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match i32::try_from(signal.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok()) {
                Some(Signal::SIGTERM | Signal::SIGINT) => {
                    info!("ending; the volumes stay");
                    self.stopping = true;
                    self.registration.remove(); // the kubelet takes the driver off its list
                    self.stop_worker();
                }
                // The platform's file is the worker's.
                Some(Signal::SIGHUP) => self.signal_worker(Signal::SIGHUP),
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
        if !(self.stopping || self.csi.stands() && self.registration.stands()) {
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
            worker.kill_at = Some(Instant::now() + STOP_TIME);
            self.signal_worker(Signal::SIGTERM);
        }
    }

    fn signal_worker(&self, signal: Signal) {
        if let Some(pid) = self.worker.as_ref().and_then(|worker| i32::try_from(worker.child.id()).ok()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Starts, ends and buries the worker.
    fn tend_worker(&mut self) {
        let now = Instant::now();
        let Some(worker) = &mut self.worker else {
            if !self.stopping && now >= self.start_at {
                match self.start_worker() {
                    Ok(worker) => self.worker = Some(worker),
                    Err(denied) => {
                        error!(%denied, "cannot start the worker");
                        self.pause();
                    }
                }
            }
            return;
        };
        if worker.kill_at.is_some_and(|at| now >= at) {
            let _ = worker.child.kill();
        }
        let Ok(Some(status)) = worker.child.try_wait() else { return };
        if worker.born.elapsed() >= BACKOFF_RESET {
            self.backoff = BACKOFF;
        }
        // One that closed its socket by itself was not asked to end.
        if worker.kill_at.is_none() || worker.socket.is_none() {
            error!(%status, "the worker ended; the volumes stay");
            self.pause();
        }
        self.worker = None; // and with it its work tmpfs
        if status.code() == Some(i32::from(REGISTRATION_REFUSED)) {
            self.rebind();
        }
    }

    fn pause(&mut self) {
        self.start_at = Instant::now() + self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
    }

    fn start_worker(&mut self) -> Result<Worker, Denied> {
        let pages = self.settings.work_bytes.div_ceil(4096);
        let room = (self.settings.work_bytes, pages.saturating_add(64));
        let owner = Owner { uid: WORKER_UID, gid: WORKER_UID };
        let mount = tmpfs("sealmount-work", room, "0700", owner, self.noswap).at("make the work tmpfs")?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let work = openat(&mount, ".", flags, Mode::empty()).at("open the work tmpfs")?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).at("make a socket pair")?;
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
            copies.push(rustix::io::dup(fd).at("copy a descriptor")?);
        }
        let numbers: Vec<_> = copies.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
        let inherited = format!("{}:{}:{}", std::process::id(), self.starts, numbers.join(","));
        let mut command = Command::new(&self.settings.worker);
        command.args(&self.settings.worker_args).env_clear().envs(self.settings.worker_env.iter().cloned());
        command.env(INHERITED, inherited).stdin(Stdio::null()).uid(WORKER_UID).gid(WORKER_UID);
        let child = command.spawn().at("start the worker")?;
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
                    worker.kill_at.get_or_insert_with(|| Instant::now() + LAST_WORDS);
                    return;
                }
            };
            let packet = buffer.get(..length.min(MAX_PACKET)).unwrap_or_default();
            let caller = Caller { start: self.starts, id: request_id(packet) };
            let whole = if length > MAX_PACKET { Err(WireError::TooLong(length)) } else { decode(packet) };
            match whole {
                Ok(request) => self.handle(caller, request),
                Err(error) => self.reply(caller, Err(Denied::Invalid(error.to_string())), None),
            }
        }
    }

    fn handle(&mut self, caller: Caller, request: Request) {
        let verdict = match request.verb {
            Verb::Ready => self.ready(),
            Verb::Commit(commit) => self.commit(caller, &commit),
            Verb::Remove(volume) => self.remove(&volume),
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
            let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
            let control = [ControlMessage::ScmRights(&fds)];
            let control = if fds.is_empty() { &[][..] } else { &control };
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(packet)], control, flags, None) {
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => return,
                _ => drop(worker.outbox.pop_front()), // to a worker that is gone nothing can be said
            }
        }
    }

    // --- verbs ---

    fn ready(&mut self) -> Verdict {
        let path = shown(&self.settings.registration_dir);
        if self.registration.path != path {
            fs::rename(&self.registration.path, &path).at("show the registration socket")?;
            self.registration.path = path;
        }
        Ok(Some(Answer::Ready))
    }

    fn commit(&mut self, caller: Caller, commit: &Commit) -> Verdict {
        let Some(worker) = &self.worker else { return Err(Denied::Busy) };
        let work = worker.work.try_clone().at("copy a descriptor")?;
        let layout = Layout::of(commit, usage(&work).at("stat the work tmpfs")?.page)?;
        let content = Content { commit, layout: &layout, work: &work };
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
                publish(&parent, &content, self.noswap, since)?;
                self.learn(id);
                Ok(Some(Answer::Published))
            }
            Place::Ours(mounted) => {
                let standing = &mounted.standing;
                if standing.owner != commit.owner {
                    return Err(Denied::OwnerChanged);
                }
                if (standing.key, mounted.tag) == (commit.key, Some(commit.tag)) {
                    if standing.note == commit.note {
                        return Ok(Some(Answer::Unchanged));
                    }
                    let fork = self.fork(|| annotate(&mounted, &content))?;
                    self.pend(fork, id, UPDATE_TIME, Some((caller, Answer::Unchanged)), false);
                    return Ok(None);
                }
                let size = layout.room((mounted.usage.used, mounted.usage.inodes_used)).0.max(standing.size);
                self.afford(id, size)?;
                let fork = self.fork(|| update(&mounted, &content))?;
                self.pend(fork, id, UPDATE_TIME, Some((caller, Answer::Swapped)), false);
                if let Some(standing) = self.volumes.get_mut(id) {
                    standing.size = size; // charged while it is under way
                }
                Ok(None)
            }
        }
    }

    fn remove(&mut self, id: &VolumeId) -> Verdict {
        match self.kubelet.place(id)? {
            Place::Unprepared => {}
            Place::Bare(parent) => remove_bare(&parent)?,
            Place::Ours(mounted) => {
                // A child that hangs behind an application's lock works on what nobody reaches from here on. A lookup
                // by the broker would hang behind it, so another child overwrites.
                let hung = self.orphan(id);
                let handle = detach(&mounted)?;
                let done = if hung {
                    self.fork(|| overwrite(&handle)).map(|fork| self.pend(fork, id, UPDATE_TIME, None, true))
                } else {
                    overwrite(&handle)
                };
                if let Err(denied) = done {
                    warn!(volume = %id, %denied, "removed without being overwritten");
                }
            }
        }
        self.volumes.remove(id);
        Ok(Some(Answer::Removed))
    }

    /// The kubelet's own pods API (KEP-4188), which only root may connect to.
    fn connect_pods(&self) -> Result<OwnedFd, Denied> {
        let path = self.settings.kubelet_dir.join("pods-api/pods-api.sock");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK; // a full backlog is an error, not a wait
        let connected = || {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            connect(&socket, &SocketAddrUnix::new(&path)?).map(|()| socket)
        };
        connected().at("connect to the kubelet's pods API")
    }

    // --- volumes and the children that work on them ---

    /// Refuses what would take all volumes, at their worst, over the node's budget.
    fn afford(&self, id: &VolumeId, size: u64) -> Result<(), Denied> {
        let others = self.volumes.values().filter(|standing| standing.volume != *id).map(|standing| standing.size);
        let used = others.fold(0_u64, u64::saturating_add);
        let limit = self.settings.max_node_bytes;
        if used.saturating_add(size) > limit { Err(Denied::NodeFull { used, limit }) } else { Ok(()) }
    }

    /// Takes what stands at a volume's place into account, if it is ours.
    fn learn(&mut self, id: &VolumeId) -> Option<Box<Mounted>> {
        match self.kubelet.place(id) {
            Ok(Place::Ours(mounted)) => {
                self.volumes.insert(id.clone(), mounted.standing.clone());
                return Some(mounted);
            }
            Ok(_) => drop(self.volumes.remove(id)),
            Err(denied) => warn!(volume = %id, %denied, "left alone"),
        }
        None
    }

    /// Whether a child works on a volume that still stands.
    fn is_busy(&self, id: &VolumeId) -> bool {
        self.forks.iter().any(|pending| pending.volume == *id && !pending.orphaned)
    }

    fn tidy(&mut self, id: &VolumeId) {
        let Some(mounted) = self.learn(id) else { return };
        match self.fork(|| tidy(&mounted)) {
            Ok(fork) => self.pend(fork, id, UPDATE_TIME, None, false),
            Err(denied) => warn!(volume = %id, %denied, "leftovers stay"),
        }
    }

    fn fork(&mut self, work: impl FnOnce() -> Result<(), Denied>) -> Result<Fork, Denied> {
        fork(|| {
            self.worker = None; // a child that hangs must not keep the worker's socket open when the broker dies
            work()
        })
    }

    fn pend(&mut self, fork: Fork, id: &VolumeId, time: Duration, caller: Waiting, orphaned: bool) {
        let (volume, deadline) = (id.clone(), Instant::now() + time);
        self.forks.push(Pending { fork, volume, deadline, given_up: false, orphaned, caller });
    }

    /// Gives up the children that work on a volume that goes; whether there were any.
    fn orphan(&mut self, id: &VolumeId) -> bool {
        let busy = self.is_busy(id);
        let mut told = Vec::new();
        for pending in self.forks.iter_mut().filter(|pending| pending.volume == *id) {
            pending.fork.kill();
            pending.orphaned = true;
            told.extend(pending.caller.take());
        }
        for (caller, _) in told {
            self.reply(caller, Err(Denied::Busy), None);
        }
        busy
    }

    /// Buries children that ended and gives up those that take too long.
    fn tend_forks(&mut self) {
        for mut pending in std::mem::take(&mut self.forks) {
            let ended = pending.fork.ended();
            let alive = ended.is_none();
            if alive && (pending.given_up || Instant::now() < pending.deadline) {
                self.forks.push(pending);
                continue;
            }
            if alive {
                pending.fork.kill();
            }
            let result = ended.unwrap_or(Err(Denied::Timeout));
            let broken = result == Err(Denied::Timeout);
            self.settle(&mut pending, result);
            if alive {
                pending.given_up = true;
                self.forks.push(pending);
            } else if broken && !pending.orphaned {
                self.tidy(&pending.volume); // it ended where the kernel let it
            }
        }
    }

    /// Does what was to be done after a child, and answers who waits for it.
    fn settle(&mut self, pending: &mut Pending, result: Result<(), Denied>) {
        let id = &pending.volume;
        if let Err(denied) = &result {
            warn!(volume = %id, %denied, "work on a volume did not end as it should");
        }
        self.learn(id);
        if let Some((caller, answer)) = pending.caller.take() {
            self.reply(caller, result.map(|()| answer), None);
        }
    }
}
