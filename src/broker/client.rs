//! The worker's side of the broker: many calls over one socket, told apart by their ids.

use std::collections::HashMap;
use std::env;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, fstat, fstatfs, mkdirat, openat, unlinkat};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketType, recvmsg, send, sockopt,
};
use rustix::rand::GetRandomFlags;
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use super::INHERITED;
use super::wire::{Answer, Commit, Denied, MAX_PACKET, Reply, Request, Standing, Verb, decode, encode};
use crate::harden;
use crate::request::{FileName, Owner, VolumeId};
use crate::secret::{SecretBytes, Tag, TagKey};

/// What a worker is started with; taken over once, before anything else opens a file.
#[derive(Debug)]
pub struct Inherited {
    /// The broker's process id, for [`harden::Confinement`].
    pub broker: i32,
    /// How many workers this broker has started, this one included.
    pub starts: u64,
    /// To the broker.
    pub socket: OwnedFd,
    /// Where the kubelet calls the driver; not blocking.
    pub csi: UnixListener,
    /// Where the kubelet asks who the driver is; not blocking.
    pub registration: UnixListener,
    /// The root of the work tmpfs.
    pub work: OwnedFd,
}

/// Why the process cannot be a worker.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// Not started by the broker.
    #[error("only the broker starts a worker: run sealmount node")]
    Absent,
    /// A descriptor is not what it should be.
    #[error("the inherited {0} is not usable")]
    Descriptor(&'static str),
}

impl Inherited {
    /// Takes over what the broker passed, checking what each descriptor is. Works once a process.
    pub fn take() -> Result<Self, InheritError> {
        #[allow(clippy::disallowed_methods)] // no setting: it names descriptors, as sd_listen_fds(3) has it
        let text = env::var(INHERITED).map_err(|_| InheritError::Absent)?;
        let mut parts = text.split(':');
        let broker = parts.next().and_then(|pid| pid.parse().ok()).ok_or(InheritError::Absent)?;
        let starts = parts.next().and_then(|starts| starts.parse().ok()).ok_or(InheritError::Absent)?;
        let mut numbers = parts.next().unwrap_or_default().split(',').map(str::parse);
        let mut adopt = |what: &'static str| match numbers.next() {
            Some(Ok(number)) => harden::adopt(number).map_err(|_| InheritError::Descriptor(what)),
            _ => Err(InheritError::Descriptor(what)),
        };
        let (socket, csi) = (adopt("broker socket")?, adopt("CSI socket")?);
        let (registration, work) = (adopt("registration socket")?, adopt("work directory")?);

        let kind = |fd: &OwnedFd| sockopt::socket_type(fd);
        let listens = |fd: &OwnedFd| kind(fd) == Ok(SocketType::STREAM) && sockopt::socket_acceptconn(fd) == Ok(true);
        if kind(&socket) != Ok(SocketType::SEQPACKET) {
            return Err(InheritError::Descriptor("broker socket"));
        }
        for (listener, what) in [(&csi, "CSI socket"), (&registration, "registration socket")] {
            if !listens(listener) {
                return Err(InheritError::Descriptor(what));
            }
        }
        if !fstat(&work).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory) {
            return Err(InheritError::Descriptor("work directory"));
        }
        Ok(Self { broker, starts, socket, csi: csi.into(), registration: registration.into(), work })
    }
}

/// Why the broker did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The broker is gone; so is this worker, in a moment.
    #[error("the broker is gone")]
    Gone,
    /// It refused.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The content could not be handed over.
    #[error("the work tmpfs: {0}")]
    Work(String),
}

/// A whole content for one volume.
#[allow(missing_debug_implementations)] // holds secrets
pub struct Content<'a> {
    /// The volume.
    pub volume: &'a VolumeId,
    /// Who owns the files.
    pub owner: Owner,
    /// `limits.volume_bytes`.
    pub volume_bytes: u64,
    /// The files, no name twice.
    pub files: &'a [(FileName, SecretBytes)],
    /// The volume's key: one a volume, made at its first publish and read from [`Standing::key`] afterwards.
    pub key: TagKey,
    /// The tag of the files under `key`: whoever commits has compared it already.
    pub tag: Tag,
    /// What to know after a restart, at most [`super::wire::MAX_NOTE`] bytes.
    pub note: Vec<u8>,
}

type Waiting = HashMap<u64, oneshot::Sender<(Result<Answer, Denied>, Option<OwnedFd>)>>;

#[derive(Debug)]
struct Shared {
    /// Tokio has no type for SEQPACKET; of this one only its readiness is used.
    socket: UnixDatagram,
    work: OwnedFd,
    /// One permit is a page and an inode of the work tmpfs.
    room: Arc<Semaphore>,
    pages: u32,
    page: u64,
    next: AtomicU64,
    /// `None` once the broker is gone.
    waiting: Mutex<Option<Waiting>>,
    gone: watch::Sender<bool>,
}

/// The broker, as the worker sees it. Clones share one socket.
#[derive(Debug, Clone)]
pub struct Client(Arc<Shared>);

impl Client {
    /// Speaks over `socket` and hands content over in `work`. To be called inside a tokio runtime.
    pub fn new(socket: OwnedFd, work: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let stat = fstatfs(&work)?;
        let shared = Arc::new(Shared {
            socket: UnixDatagram::from_std(socket.into())?,
            work,
            room: Arc::new(Semaphore::new(usize::try_from(stat.f_blocks).unwrap_or(0).min(Semaphore::MAX_PERMITS))),
            pages: u32::try_from(stat.f_blocks).unwrap_or(u32::MAX),
            page: u64::try_from(stat.f_bsize).unwrap_or(4096),
            next: AtomicU64::new(1),
            waiting: Mutex::new(Some(HashMap::new())),
            gone: watch::Sender::new(false),
        });
        tokio::spawn(receive(Arc::clone(&shared)));
        Ok(Self(shared))
    }

    /// Says that both sockets are served now.
    pub async fn ready(&self) -> Result<(), ClientError> {
        self.call(self.id(), Verb::Ready).await.map(drop)
    }

    /// A key for a volume's first publish that nobody can guess. Asked of the kernel without a library between: what
    /// falls back to /dev/urandom would find it closed.
    pub fn new_key() -> Result<TagKey, ClientError> {
        let mut key = [0; 32];
        // Up to 256 bytes come whole (getrandom(2)).
        rustix::rand::getrandom(&mut key, GetRandomFlags::empty())
            .map_err(|error| ClientError::Work(format!("no random bytes: {error}")))?;
        Ok(TagKey(key))
    }

    /// Publishes a volume, or swaps its content: [`Answer::Published`], [`Answer::Swapped`] or [`Answer::Unchanged`].
    /// Waits for room in the work tmpfs, which is emptied again in every case.
    pub async fn commit(&self, content: Content<'_>) -> Result<Answer, ClientError> {
        let id = self.id();
        let _handed = self.hand_over(id, content.files).await?;
        let files = content.files.iter().map(|(name, bytes)| (name.clone(), bytes.len() as u64)).collect();
        let commit = Commit {
            volume: content.volume.clone(),
            owner: content.owner,
            volume_bytes: content.volume_bytes,
            work: id,
            files,
            key: content.key.0,
            tag: content.tag.0,
            note: content.note,
        };
        self.call(id, Verb::Commit(commit)).await.map(|(answer, _)| answer)
    }

    /// Overwrites, unmounts and removes a volume; one that does not stand is removed already.
    pub async fn remove(&self, volume: &VolumeId) -> Result<(), ClientError> {
        self.call(self.id(), Verb::Remove(volume.clone())).await.map(drop)
    }

    /// Every volume that stands on this node.
    pub async fn volumes(&self) -> Result<Vec<Standing>, ClientError> {
        let mut all: Vec<Standing> = Vec::new();
        loop {
            let after = all.last().map(|standing| standing.volume.clone());
            match self.call(self.id(), Verb::Volumes { after }).await?.0 {
                Answer::Volumes(page) if !page.is_empty() => all.extend(page),
                _ => return Ok(all),
            }
        }
    }

    /// A connected, non-blocking socket to the kubelet's pods API.
    pub async fn pods(&self) -> Result<OwnedFd, ClientError> {
        let missing = || ClientError::Work("the reply carried no socket".into());
        self.call(self.id(), Verb::Pods).await?.1.ok_or_else(missing)
    }

    /// Resolves when the broker is gone.
    pub async fn closed(&self) {
        let _ = self.0.gone.subscribe().wait_for(|gone| *gone).await;
    }

    fn id(&self) -> u64 {
        self.0.next.fetch_add(1, Ordering::Relaxed)
    }

    async fn call(&self, id: u64, verb: Verb) -> Result<(Answer, Option<OwnedFd>), ClientError> {
        let packet = encode(&Request { id, verb }).map_err(|error| Denied::Invalid(error.to_string()))?;
        let (sender, receiver) = oneshot::channel();
        match &mut *self.0.lock() {
            Some(waiting) => drop(waiting.insert(id, sender)),
            None => return Err(ClientError::Gone),
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let send = || send(&self.0.socket, &packet, flags).map_err(io::Error::from);
        self.0.socket.async_io(Interest::WRITABLE, send).await.map_err(|_| ClientError::Gone)?;
        let (answer, fd) = receiver.await.map_err(|_| ClientError::Gone)?;
        Ok((answer?, fd))
    }

    /// Writes the files as `<id>/<index>`.
    async fn hand_over(&self, id: u64, files: &[(FileName, SecretBytes)]) -> Result<Handed, ClientError> {
        let pages = files.iter().map(|(_, bytes)| (bytes.len() as u64).div_ceil(self.0.page).max(1)).sum::<u64>() + 1;
        let too_large = || ClientError::Work(format!("{pages} pages do not fit into it (--work-bytes)"));
        let pages = u32::try_from(pages).ok().filter(|pages| *pages <= self.0.pages).ok_or_else(too_large)?;
        let permit = Arc::clone(&self.0.room).acquire_many_owned(pages).await.map_err(|_| ClientError::Gone)?;

        let failed = |error: io::Error| ClientError::Work(error.to_string());
        let name = id.to_string();
        mkdirat(&self.0.work, &name, Mode::RWXU).map_err(|error| failed(error.into()))?;
        let handed = Handed { shared: Arc::clone(&self.0), name, files: files.len(), _permit: permit };
        for (index, (_, bytes)) in files.iter().enumerate() {
            handed.write(index, bytes).map_err(failed)?;
        }
        Ok(handed)
    }
}

impl Shared {
    /// A panic elsewhere cannot leave the map half changed.
    fn lock(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Content in the work tmpfs; removed when dropped, so that a call given up leaves nothing.
struct Handed {
    shared: Arc<Shared>,
    name: String,
    files: usize,
    _permit: OwnedSemaphorePermit,
}

impl Handed {
    fn path(&self, index: usize) -> String {
        format!("{}/{index}", self.name)
    }

    fn write(&self, index: usize, bytes: &SecretBytes) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.shared.work, self.path(index), flags, Mode::RUSR | Mode::WUSR)?;
        let mut rest = bytes.expose();
        while !rest.is_empty() {
            let count = rustix::io::write(&file, rest)?;
            rest = rest.get(count..).unwrap_or_default();
        }
        Ok(())
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        for index in 0..self.files {
            let _ = unlinkat(&self.shared.work, self.path(index), AtFlags::empty());
        }
        let _ = unlinkat(&self.shared.work, &self.name, AtFlags::REMOVEDIR);
    }
}

/// Hands each reply to who waits for it, until the broker is gone.
async fn receive(shared: Arc<Shared>) {
    let mut packet = vec![0; MAX_PACKET];
    loop {
        let received = shared.socket.async_io(Interest::READABLE, || receive_one(&shared.socket, &mut packet)).await;
        let Ok((length, fd)) = received else { break };
        let reply = packet.get(..length).map(decode::<Reply>);
        let Some(Ok(reply)) = reply.filter(|_| length > 0) else { break };
        let waiting = shared.lock().as_mut().and_then(|waiting| waiting.remove(&reply.id));
        if let Some(sender) = waiting {
            let _ = sender.send((reply.answer, fd)); // who gave up waiting does not want it
        }
    }
    *shared.lock() = None; // drops every sender: whoever waits learns that the broker is gone
    shared.gone.send_replace(true);
}

fn receive_one(socket: &UnixDatagram, packet: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(packet)], &mut control, flags)?;
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(Errno::MSGSIZE.into());
    }
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next().and_then(|mut fds| fds.next());
    Ok((message.bytes, fd))
}
