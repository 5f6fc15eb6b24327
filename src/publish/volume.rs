//! One volume as the worker knows it: its place with its lock, its state while it stands, and its note.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::time::Instant;

use crate::broker::wire::{MAX_NOTE, Standing as OnNode};
use crate::config::Config;
use crate::policy::Grant;
use crate::policy::facts::PodFacts;
use crate::request::{Claim, Code, Owner, PodRef, Publish, VolumeId};
use crate::schedule::{Interval, Pace};
use crate::secret::{Tag, TagKey};
use crate::source::Payload;

/// A volume that stands, as the worker knows it.
pub(super) struct Volume {
    pub(super) pod: PodRef,
    pub(super) owner: Owner,
    /// `None` only between an adoption and the first publish after it, or when the pod refuses since.
    pub(super) grant: Option<Grant>,
    pub(super) key: TagKey,
    /// `None` after an adoption: the broker never tells tags.
    pub(super) tag: Option<Tag>,
    /// Tag of the Secret's data alone, to see a change of it in a volume that also reads Vault.
    pub(super) secret_tag: Option<Tag>,
    pub(super) note: Option<Note>,
    pub(super) since: SystemTime,
    pub(super) confirmed: SystemTime,
    pub(super) pace: Pace,
    /// The last failure since the content was confirmed, and when the first was.
    pub(super) failing: Option<(SystemTime, String)>,
    /// What the rules say against the pod now, reported once.
    pub(super) refused: Option<String>,
    /// What the pod asks for, once a publish has said it: what the guard judges by.
    pub(super) claim: Option<Claim>,
    /// The facts and the file of the last judgement: the same give the same.
    pub(super) judged: Option<(Arc<PodFacts>, Arc<Config>)>,
    /// The warnings its owner was told of, by code and field: their texts are the author's to change.
    pub(super) warned: BTreeSet<(Code, String)>,
    pub(super) stale: bool,
    pub(super) bytes: u64,
    pub(super) generation: u64,
}

/// One volume's place: its lock, and a word to whoever fetches under it that the volume is leaving.
pub(super) struct Slot {
    pub(super) state: AsyncMutex<Option<Volume>>,
    pub(super) leaving: watch::Sender<bool>,
    /// What [`super::Publisher::status`] reads without the lock; `Some` while the volume stands.
    pub(super) shown: Mutex<Option<VolumeStatus>>,
}

impl Slot {
    pub(super) fn new(volume: Option<Volume>, id: &VolumeId) -> Arc<Self> {
        let shown = Mutex::new(volume.as_ref().map(|volume| volume.status(id)));
        Arc::new(Self { state: AsyncMutex::new(volume), leaving: watch::Sender::new(false), shown })
    }

    pub(super) fn show(&self, id: &VolumeId, volume: Option<&Volume>) {
        *locked(&self.shown) = volume.map(|volume| volume.status(id));
    }

    pub(super) fn stands(&self) -> bool {
        locked(&self.shown).is_some()
    }
}

/// One line of `sealmount status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeStatus {
    /// The volume.
    pub volume: VolumeId,
    /// The pod.
    pub pod: PodRef,
    /// Owner of the files.
    pub owner: Owner,
    /// The Vault connection, if any entry comes from Vault.
    pub connection: Option<String>,
    /// First published.
    pub since: SystemTime,
    /// When the source last confirmed the content.
    pub confirmed: SystemTime,
    /// When the first failed refresh since then was, and what the last one said.
    pub failing: Option<(SystemTime, String)>,
    /// What the rules say against the pod by now.
    pub refused: Option<String>,
    /// Reported as stale.
    pub stale: bool,
    /// Content bytes.
    pub bytes: u64,
    /// Counts the swaps.
    pub generation: u64,
}

impl Volume {
    fn status(&self, id: &VolumeId) -> VolumeStatus {
        VolumeStatus {
            volume: id.clone(),
            pod: self.pod.clone(),
            owner: self.owner,
            connection: self.note.as_ref().and_then(|note| note.connection.clone()),
            since: self.since,
            confirmed: self.confirmed,
            failing: self.failing.clone(),
            refused: self.refused.clone(),
            stale: self.stale,
            bytes: self.bytes,
            generation: self.generation,
        }
    }
}

/// What survives a restart of everything, stored by the broker with the volume (design 3: the note).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) service_account: String,
    /// The claim's attributes digest: content is adopted only for the request it was made for.
    pub(super) digest: [u8; 32],
    /// The Vault connection, if any entry comes from Vault.
    pub(super) connection: Option<String>,
    /// Unix seconds when the source last confirmed the content.
    pub(super) confirmed: u64,
}

impl Note {
    pub(super) fn new(publish: &Publish, connection: Option<String>, confirmed: SystemTime) -> Self {
        Self {
            namespace: publish.pod.namespace.clone(),
            pod: publish.pod.name.clone(),
            service_account: publish.pod.service_account.clone(),
            digest: publish.claim.digest,
            connection,
            confirmed: unix(confirmed),
        }
    }

    /// Every part is bounded by Kubernetes' own limits on names (253 bytes), so this fits [`MAX_NOTE`]; where it
    /// does not, nothing is noted and a restart fetches again.
    pub(super) fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).ok().filter(|bytes| bytes.len() <= MAX_NOTE).unwrap_or_default()
    }
}

/// A volume found on the node at start. Its content is adopted as it is; how old it is, its note says.
pub(super) fn adopt(found: &OnNode) -> Volume {
    let note: Option<Note> = postcard::from_bytes(&found.note).ok();
    // A worker that was taken over may have noted anything: a time that cannot be is the time of now.
    let time = |seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or_else(SystemTime::now);
    let since = time(found.since);
    let confirmed = note.as_ref().map_or(since, |note| time(note.confirmed));
    let (namespace, name, service_account) = note
        .as_ref()
        .map_or_else(Default::default, |note| (note.namespace.clone(), note.pod.clone(), note.service_account.clone()));
    let interval = match &note {
        // The claim is not known before the kubelet publishes again: until then nothing is due.
        Some(note) if note.connection.is_some() => Interval::Never,
        _ => Interval::Kubelet,
    };
    let age = confirmed.elapsed().unwrap_or_default();
    let now = Instant::now();
    let key = TagKey(found.key);
    Volume {
        pod: PodRef { namespace, name, uid: found.volume.pod.clone(), service_account },
        owner: found.owner,
        grant: None,
        key,
        tag: None,
        secret_tag: None,
        note,
        since,
        confirmed,
        // A monotonic clock that began after the content was confirmed cannot say so: then it counts from now.
        pace: Pace::new(interval, now.checked_sub(age).unwrap_or(now), jitter(&key)),
        failing: None,
        refused: None,
        claim: None,
        judged: None,
        warned: BTreeSet::new(),
        stale: false,
        bytes: found.bytes,
        generation: found.generation,
    }
}

pub(super) fn tag_of(key: &TagKey, payload: &Payload) -> Tag {
    key.tag(payload.files.iter().map(|(name, bytes)| (name.as_str(), bytes)))
}

pub(super) fn secret_tag(key: &TagKey, publish: &Publish) -> Option<Tag> {
    let secret = publish.secret.as_ref()?;
    Some(key.tag(secret.iter().map(|(name, bytes)| (name.as_str(), bytes))))
}

/// A part of the volume's random key serves as its jitter: volumes published together do not fetch together.
pub(super) fn jitter(key: &TagKey) -> u8 {
    let [jitter, ..] = key.0;
    jitter
}

/// Whole seconds since 1970; 0 for a time before.
pub fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A panic while one of these short locks is held leaves a whole value behind, so its poison is no news.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
