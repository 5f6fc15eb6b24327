//! What worker and broker say to each other: one message a packet, a version byte then postcard.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::request::{FileName, Owner, VolumeId};

/// The first byte of every packet.
pub const VERSION: u8 = 1;
/// The longest packet, in bytes (surface 4).
pub const MAX_PACKET: usize = 128 * 1024;
/// The longest note, in bytes.
pub const MAX_NOTE: usize = 1024;

/// The most volumes on one page of [`Answer::Volumes`]: each is below 1 400 bytes, so a page fits a packet.
pub const PAGE: usize = 64;

/// Why bytes are no packet, or a message cannot be one. Neither side ends for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than [`MAX_PACKET`].
    #[error("a packet of {0} bytes is longer than {MAX_PACKET}")]
    TooLong(usize),
    /// Another version, or nothing at all.
    #[error("the packet is not of version {VERSION}")]
    Version,
    /// Not a message, or more than one.
    #[error("the packet does not hold exactly one message")]
    Malformed,
}

/// A message as a packet.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let packet = postcard::to_extend(message, vec![VERSION]).map_err(|_| WireError::Malformed)?;
    if packet.len() > MAX_PACKET { Err(WireError::TooLong(packet.len())) } else { Ok(packet) }
}

/// A packet's message. The types check themselves while they are read, so what comes out is valid by itself.
pub fn decode<T: DeserializeOwned>(packet: &[u8]) -> Result<T, WireError> {
    if packet.len() > MAX_PACKET {
        return Err(WireError::TooLong(packet.len()));
    }
    let Some((&VERSION, body)) = packet.split_first() else { return Err(WireError::Version) };
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(WireError::Malformed),
    }
}

/// The id a broken request carries, if it can be read, so that its sender learns of the refusal.
pub fn request_id(packet: &[u8]) -> u64 {
    packet.get(1..).and_then(|body| postcard::take_from_bytes(body).ok()).map_or(0, |(id, _)| id)
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{PodUid, VolumeName};

    fn volume() -> VolumeId {
        VolumeId { pod: PodUid::parse("0a1b").unwrap(), name: VolumeName::parse("db").unwrap() }
    }

    fn commit(files: Vec<(FileName, u64)>) -> Request {
        let owner = Owner { uid: 1000, gid: 0 };
        let (key, tag, note) = ([1; 32], [2; 32], vec![3; MAX_NOTE]);
        let commit = Commit { volume: volume(), owner, volume_bytes: 1 << 20, work: 4, files, key, tag, note };
        Request { id: 77, verb: Verb::Commit(commit) }
    }

    #[test]
    fn a_request_comes_out_as_it_went_in() {
        let packet = encode(&commit(vec![(FileName::parse("tls/key").unwrap(), 5)])).unwrap();
        assert_eq!(request_id(&packet), 77);
        let Verb::Commit(back) = decode::<Request>(&packet).unwrap().verb else { panic!("another verb") };
        assert_eq!(back.volume, volume());
        assert_eq!(back.files, vec![(FileName::parse("tls/key").unwrap(), 5)]);
    }

    #[test]
    fn the_largest_request_and_the_largest_page_fit() {
        let files = (0..256).map(|i| (FileName::parse(&format!("{i:0253}")).unwrap(), u64::MAX)).collect();
        encode(&commit(files)).unwrap();
        let standing = Standing {
            volume: VolumeId {
                pod: PodUid::parse(&"f".repeat(64)).unwrap(),
                name: VolumeName::parse(&"v".repeat(63)).unwrap(),
            },
            owner: Owner { uid: u32::MAX, gid: u32::MAX },
            generation: u64::MAX,
            bytes: u64::MAX,
            size: u64::MAX,
            inodes: (u64::MAX, u64::MAX),
            since: u64::MAX,
            key: [0xff; 32],
            note: vec![0xff; MAX_NOTE],
        };
        encode(&Reply { id: u64::MAX, answer: Ok(Answer::Volumes(vec![standing; PAGE])) }).unwrap();
    }

    #[test]
    fn a_name_that_is_not_valid_is_no_packet() {
        let good = encode(&commit(vec![(FileName::parse("xx").unwrap(), 5)])).unwrap();
        let at = good.windows(2).position(|pair| pair == b"xx").unwrap();
        for bad in [b"..", b"./", b"a\0", b"\n\n", b"\xff\xff"] {
            let mut packet = good.clone();
            packet[at..at + 2].copy_from_slice(bad);
            assert_eq!(decode::<Request>(&packet).unwrap_err(), WireError::Malformed, "{bad:?}");
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let good = encode(&commit(vec![(FileName::parse("a").unwrap(), 5)])).unwrap();
        for end in 0..good.len() {
            assert!(decode::<Request>(&good[..end]).is_err());
            request_id(&good[..end]);
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut packet = good.clone();
                packet[at] ^= 1 << bit;
                let _ = decode::<Request>(&packet);
                let _ = decode::<Reply>(&packet);
            }
        }
        let mut long = good.clone();
        long.push(0);
        assert_eq!(decode::<Request>(&long).unwrap_err(), WireError::Malformed);
        let mut other = good;
        other[0] = 2;
        assert_eq!(decode::<Request>(&other).unwrap_err(), WireError::Version);
        assert_eq!(decode::<Request>(&[VERSION; MAX_PACKET + 1]).unwrap_err(), WireError::TooLong(MAX_PACKET + 1));
        assert!(encode(&commit(vec![(FileName::parse(&"n".repeat(253)).unwrap(), 5); 600])).is_err());
    }
}
