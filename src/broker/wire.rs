//! What worker and broker say to each other: one message a packet, a version byte then postcard.

use serde::{Deserialize, Serialize};

use crate::request::{FileName, Owner, VolumeId};

/// The first byte of every packet.
pub const VERSION: u8 = 1;
/// The longest packet, in bytes (surface 4).
pub const MAX_PACKET: usize = 128 * 1024;
/// The longest note, in bytes.
pub const MAX_NOTE: usize = 1024;

/// A packet from the worker.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the worker; the reply carries it.
    pub id: u64,
    /// What is asked.
    pub verb: Verb,
}

/// What the worker may ask.
#[derive(Debug, Serialize, Deserialize)]
pub enum Verb {
    /// The worker serves both sockets now: the registration socket may appear.
    Ready,
    /// Publish a volume, or swap its content.
    Commit(Commit),
    /// Overwrite, unmount and remove a volume.
    Remove(VolumeId),
    /// A connected socket to the kubelet's pods API; the descriptor rides on the reply.
    Pods,
    /// The volumes that stand, after the given one in the order of their ids.
    Volumes {
        /// The last one already known; `None` for the first page.
        after: Option<VolumeId>,
    },
}

/// A whole content, whose bytes lie in the work tmpfs as `<work>/<index>` in the order of `files`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Commit {
    /// The volume.
    pub volume: VolumeId,
    /// Who owns the files. Must not change while the volume stands.
    pub owner: Owner,
    /// The most content bytes the platform's file allows a volume.
    pub volume_bytes: u64,
    /// The directory below the work tmpfs.
    pub work: u64,
    /// Names and exact lengths.
    pub files: Vec<(FileName, u64)>,
    /// Key of `tag`.
    pub key: [u8; 32],
    /// HMAC of names and bytes.
    pub tag: [u8; 32],
    /// What the worker wants to know after a restart; at most [`MAX_NOTE`] bytes, opaque to the broker.
    pub note: Vec<u8>,
}

/// The broker's reply.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    /// The request's.
    pub id: u64,
    /// What came of it.
    pub answer: Result<Answer, Denied>,
}

/// A verb's success.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Ready was taken.
    Ready,
    /// The volume stands now.
    Published,
    /// The content was swapped.
    Swapped,
    /// The same content already stands; a changed note was stored.
    Unchanged,
    /// The volume is gone, or never was.
    Removed,
    /// The descriptor rides on this packet.
    Pods,
    /// One page; empty after the last.
    Volumes(Vec<Standing>),
}

/// A volume that stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The volume.
    pub volume: VolumeId,
    /// Who owns the files.
    pub owner: Owner,
    /// Counts the swaps, from 1.
    pub generation: u64,
    /// Content bytes.
    pub bytes: u64,
    /// Size of the superblock, in bytes: what the node's budget is charged.
    pub size: u64,
    /// Inodes in use and the most there can be.
    pub inodes: (u64, u64),
    /// Unix seconds of the first publish.
    pub since: u64,
    /// Key of the tag.
    pub key: [u8; 32],
    /// As committed.
    pub note: Vec<u8>,
}

/// Why the broker did not do it. Nothing changed unless a variant says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Denied {
    /// The packet or a field of it is not valid.
    #[error("the request is not valid: {0}")]
    Invalid(String),
    /// Another update of this volume is under way.
    #[error("another operation on this volume is under way")]
    Busy,
    /// The kubelet has not prepared this volume for this driver.
    #[error("the kubelet has not prepared this volume: {0}")]
    NotPrepared(String),
    /// Something that is not ours stands at the target path; it was left alone.
    #[error("something that is not this driver's stands at the target path: {0}")]
    Foreign(String),
    /// The owner differs from that of the standing volume.
    #[error("the volume stands with another owner")]
    OwnerChanged,
    /// The content is larger than a volume may be.
    #[error("{need} bytes are more than the {limit} a volume may hold (limits.volume_bytes)")]
    TooLarge {
        /// Bytes needed.
        need: u64,
        /// The limit.
        limit: u64,
    },
    /// The node's budget is used up.
    #[error("the node's budget for volumes is used up ({used} of {limit} bytes; --max-node-bytes)")]
    NodeFull {
        /// Bytes charged to standing volumes.
        used: u64,
        /// The limit.
        limit: u64,
    },
    /// What the worker wrote is not what it announced.
    #[error("the work file {index} is not what was announced: {why}")]
    Source {
        /// Its index.
        index: u32,
        /// What differs.
        why: String,
    },
    /// The update did not end in time: an application holds the volume's directory. The old content stands.
    #[error("the update did not end in time; the old content stands")]
    Timeout,
    /// A system call failed.
    #[error("{step}: {error}")]
    System {
        /// The step.
        step: String,
        /// The error's text.
        error: String,
    },
}
