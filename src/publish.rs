//! The story, top to bottom: claim, grant, payload, published. And published again, and unpublished.
//!
//! One lock a volume; nothing here waits for another volume. A first publish is refused or fails whole; once a
//! volume stands, nothing but an unpublish takes its content away (the promise P2 and P3).

mod guard;
mod volume;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::broker::client::{Client, ClientError, Content};
use crate::broker::wire::{Answer, Standing as OnNode};
use crate::config::Config;
use crate::events::Events;
use crate::metrics::{Metrics, Outcome};
use crate::pods::{Pods, PodsError};
use crate::policy::facts::PodFacts;
use crate::policy::{self, Grant, Warning};
use crate::request::{Claim, Fault, PodRef, Publish, Refresh, VolumeId, summary};
use crate::schedule::{Interval, Pace};
use crate::secret::{Tag, TagKey};
use crate::source::{Blame, Payload, SourceError, Sources};
use volume::{Note, Slot, Volume, adopt, jitter, locked, secret_tag, tag_of};

pub use volume::{VolumeStatus, unix};

/// How long one fetch may try, in all: the kubelet gives a call 120 s, and a retriable code before that guarantees
/// an unpublish (design 5.5).
const FETCH_FOR: Duration = Duration::from_secs(30);

/// How long the refresh of a standing volume may try: it is tried again when [`Pace`] says, and until it has failed
/// nobody is told that the source is away.
const REFRESH_FOR: Duration = Duration::from_secs(15);

/// How long a publish of a standing volume waits for its refresh before it answers OK with the old content. The
/// refresh goes on. A kubelet that restarts while Vault is away publishes all volumes of the node again and starts
/// no container before it has its answers.
const REFRESH_IN_CALL: Duration = Duration::from_secs(2);

/// First publishes that may wait for Vault at one time. Less than the calls a worker takes at one time: what needs no
/// Vault, an unpublish above all, must find a place while Vault is away.
const WAITING_FOR_VAULT: usize = 128;

/// Why a volume was not published or removed. One variant a step.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The pod's facts are not to be had, or are another pod's.
    #[error(transparent)]
    Pods(Box<PodsError>),
    /// The pod is built so that the promise cannot hold.
    #[error("{}", summary(.0))]
    Refused(Vec<Fault>),
    /// The source gave nothing.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The broker did not do it.
    #[error(transparent)]
    Broker(#[from] ClientError),
    /// The platform's file was not valid when the driver started.
    #[error("the platform file is not valid; the driver's log and `sealmount status` say why")]
    NoConfig,
    /// As many volumes as may wait for Vault are waiting.
    #[error("{WAITING_FOR_VAULT} other volumes of this node wait for Vault; this one is tried again")]
    Crowded,
    /// An unpublish of the same volume came in between.
    #[error("the volume was unpublished while it was published")]
    Unpublished,
    /// The operation's task ended without an answer.
    #[error("the operation ended without an answer; it is tried again")]
    Lost,
}

/// Everything a publish needs. Cheap to share, one a worker.
#[allow(missing_debug_implementations)] // its sources hold logins
pub struct Publisher {
    config: Mutex<Option<Arc<Config>>>,
    pods: Pods,
    sources: Sources,
    broker: Client,
    events: Events,
    metrics: Metrics,
    slots: Mutex<BTreeMap<VolumeId, Arc<Slot>>>,
    waiting: Arc<Semaphore>,
}

impl Publisher {
    /// A publisher that knows the volumes that stand already: their content is adopted by its note, without a fetch.
    ///
    /// Without a config nothing new is published until [`Publisher::reload`] brings one.
    pub fn new(
        config: Option<Config>,
        pods: Pods,
        sources: Sources,
        broker: Client,
        events: Events,
        metrics: Metrics,
        standing: Vec<OnNode>,
    ) -> Self {
        let slots = standing.into_iter().map(|found| {
            let volume = adopt(&found);
            (found.volume.clone(), Slot::new(Some(volume), &found.volume))
        });
        let slots = Mutex::new(slots.collect());
        let waiting = Arc::new(Semaphore::new(WAITING_FOR_VAULT));
        let config = Mutex::new(config.map(Arc::new));
        let publisher = Self { config, pods, sources, broker, events, metrics, slots, waiting };
        publisher.count();
        publisher
    }

    fn config(&self) -> Result<Arc<Config>, PublishError> {
        locked(&self.config).clone().ok_or(PublishError::NoConfig)
    }

    /// Whether a platform file is in force; without one nothing new is published.
    pub fn has_config(&self) -> bool {
        locked(&self.config).is_some()
    }

    /// Takes a new file; calls under way end with the one they began with.
    pub fn reload(&self, config: Config) {
        *locked(&self.config) = Some(Arc::new(config));
    }

    /// Publishes a volume, or confirms and refreshes one that stands.
    ///
    /// Runs as a task of its own: a caller that hangs up must not leave a commit half known.
    pub async fn publish(self: &Arc<Self>, publish: Publish) -> Result<Outcome, PublishError> {
        let this = Arc::clone(self);
        let slot = this.slot(&publish.volume);
        let stands = slot.stands() && !*slot.leaving.borrow();
        // A refresh is under way that outlasted its call: the volume stands, which is all this call asks.
        if stands && slot.state.try_lock().is_err() {
            return Ok(Outcome::Kept);
        }
        // A volume that stands is answered soon in any case.
        let mut place = None;
        if !stands && publish.claim.reads_vault() {
            place = Arc::clone(&self.waiting).try_acquire_owned().ok();
            if place.is_none() {
                self.drop_slot(&publish.volume);
                return Err(PublishError::Crowded);
            }
        }
        let task = tokio::spawn(async move {
            let _place = place;
            this.publish_locked(&slot, publish).await
        });
        if !stands {
            return task.await.unwrap_or(Err(PublishError::Lost));
        }
        match tokio::time::timeout(REFRESH_IN_CALL, task).await {
            Ok(done) => done.unwrap_or(Err(PublishError::Lost)),
            Err(_) => Ok(Outcome::Kept),
        }
    }

    async fn publish_locked(&self, slot: &Slot, publish: Publish) -> Result<Outcome, PublishError> {
        let id = publish.volume.clone();
        let mut state = slot.state.lock().await;
        if *slot.leaving.borrow() {
            return Err(PublishError::Unpublished);
        }
        let done = match state.as_mut() {
            None => match self.first(slot, &publish).await {
                Ok(volume) => {
                    *state = Some(volume);
                    Ok(Outcome::Published)
                }
                Err(error) => {
                    self.sources.forget(&id);
                    Err(error)
                }
            },
            Some(volume) => Ok(self.again(slot, volume, &publish).await),
        };
        slot.show(&id, state.as_ref());
        if state.is_none() {
            self.drop_slot(&id);
        }
        drop(state);
        self.count();
        done
    }

    /// The first publish: everything or an error, after which nothing is left.
    async fn first(&self, slot: &Slot, publish: &Publish) -> Result<Volume, PublishError> {
        let config = self.config()?;
        let facts = self.facts(slot, publish).await?;
        let (grant, _) = self.granted(publish, &facts, &config)?;
        let interval = interval(&publish.claim, &config).map_err(|fault| self.refused(&publish.pod, vec![fault]))?;
        let payload = self.fetch(slot, &grant, publish, &config, FETCH_FOR).await?;
        // Half a minute may have gone by, and the pod may have got a debug container in it.
        let facts = self.pods.known(&publish.pod).unwrap_or(facts);
        let (grant, warnings) = self.granted(publish, &facts, &config)?;
        let key = Client::new_key()?;
        let tag = tag_of(&key, &payload);
        let now = SystemTime::now();
        let note = Note::new(publish, connection(publish, &config), now);
        self.commit(&grant, &config, (key, tag), &note, &payload).await?;
        let mut warned = BTreeSet::new();
        self.warn(&publish.volume, &publish.pod, warnings, &mut warned);
        let (owner, files) = (grant.owner().uid, payload.files.len());
        tracing::info!(pod = %publish.pod, volume = %publish.volume, owner, readers = ?grant.readers(), files, "published");
        Ok(Volume {
            pod: publish.pod.clone(),
            owner: grant.owner(),
            grant: Some(grant),
            key,
            tag: Some(tag),
            secret_tag: secret_tag(&key, publish),
            note: Some(note),
            since: now,
            confirmed: now,
            pace: Pace::new(interval, Instant::now(), jitter(&key)),
            failing: None,
            refused: None,
            claim: Some(publish.claim.clone()),
            judged: Some((facts, config)),
            warned,
            stale: false,
            bytes: bytes(&payload),
            generation: 1,
        })
    }

    fn granted(
        &self,
        publish: &Publish,
        facts: &PodFacts,
        config: &Config,
    ) -> Result<(Grant, Vec<Warning>), PublishError> {
        policy::judge(&publish.volume, &publish.claim, facts, &config.policy, SystemTime::now())
            .map_err(|refusals| self.refused(&publish.pod, refusals))
    }

    /// A publish of a standing volume: it always ends well. What goes wrong is reported, and the old content stays.
    async fn again(&self, slot: &Slot, volume: &mut Volume, publish: &Publish) -> Outcome {
        // Without a valid file there is nothing to judge or fetch by; the volume stands.
        let Ok(config) = self.config() else { return Outcome::Kept };
        self.judge_again(slot, volume, publish, &config).await;
        if let Ok(interval) = interval(&publish.claim, &config) {
            volume.pace.set_interval(interval);
        }
        let vault = publish.claim.reads_vault();
        let secret = secret_tag(&volume.key, publish);
        let unknown = volume.note.as_ref().is_none_or(|note| note.digest != publish.claim.digest);
        let secret_changed = publish.secret.is_some() && secret != volume.secret_tag;
        if vault && !unknown && !secret_changed && !volume.pace.due(Instant::now()) {
            return Outcome::NotDue;
        }
        let grant = match &volume.grant {
            Some(grant) => grant.clone(),
            // The volume stands because a grant was given; a refusal since then is reported, not acted on (P3).
            None => Grant::standing(&publish.volume, &publish.pod, volume.owner),
        };
        match self.refresh(slot, volume, &grant, publish, &config).await {
            Ok(outcome) => {
                volume.secret_tag = secret;
                self.confirmed(&publish.volume, volume);
                if volume.refused.is_some() { Outcome::Kept } else { outcome }
            }
            Err(error) => {
                self.failed(&publish.volume, volume, &error);
                // A source that hangs keeps the volume's lock for most of the time: said now, not when it is free.
                self.note_stale(&publish.volume, volume, config.stale_after);
                Outcome::Kept
            }
        }
    }

    /// The source confirmed or changed a standing volume's content.
    fn confirmed(&self, id: &VolumeId, volume: &mut Volume) {
        volume.confirmed = SystemTime::now();
        volume.pace.confirm(Instant::now());
        if let Some((since, _)) = volume.failing.take() {
            tracing::info!(pod = %volume.pod, volume = %id, failing_since = unix(since), "refresh works again");
        }
        if std::mem::take(&mut volume.stale) {
            let text = format!("volume {}: the content is up to date again", id.name);
            self.events.normal(&volume.pod, "SealmountFresh", text);
        }
    }

    /// A refresh failed: said where its readers look, and the old content stays.
    fn failed(&self, id: &VolumeId, volume: &mut Volume, error: &PublishError) {
        // The volume is leaving: nobody waits for its content.
        if matches!(error, PublishError::Unpublished) {
            return;
        }
        let text = error.to_string();
        tracing::warn!(pod = %volume.pod, volume = %id, "refresh failed; the old content stays: {text}");
        let note = format!("volume {}: the old content stays: {text}", id.name);
        self.events.warning(&volume.pod, "SealmountRefreshFailed", note);
        let since = volume.failing.take().map_or_else(SystemTime::now, |(since, _)| since);
        volume.failing = Some((since, text));
        let asked = match error {
            PublishError::Source(SourceError { blame: Blame::Away(asked), .. }) => *asked,
            _ => None,
        };
        volume.pace.fail(Instant::now(), asked);
    }

    /// Reports content that is stale by now, once. Gives whether it did.
    fn note_stale(&self, id: &VolumeId, volume: &mut Volume, after: Duration) -> bool {
        let age = volume.confirmed.elapsed().unwrap_or_default();
        if volume.stale || !volume.pace.stale(age, after) {
            return false;
        }
        volume.stale = true;
        let why = volume.failing.as_ref().map_or("the kubelet brought nothing new", |(_, text)| text.as_str());
        let text = format!("volume {}: the content was last confirmed {} s ago: {why}", id.name, age.as_secs());
        tracing::warn!(pod = %volume.pod, volume = %id, "{text}");
        self.events.warning(&volume.pod, "SealmountStale", text);
        true
    }

    /// Looks at a standing volume's pod again at a publish.
    async fn judge_again(&self, slot: &Slot, volume: &mut Volume, publish: &Publish, config: &Arc<Config>) {
        volume.claim = Some(publish.claim.clone());
        // What a note said of it may have been written by a worker that was taken over.
        volume.pod = publish.pod.clone();
        // Facts away are no reason to say anything about a volume that stands.
        let Ok(facts) = self.facts(slot, publish).await else { return };
        self.judge_standing(&publish.volume, volume, &facts, config);
    }

    /// Fetches a standing volume's content and swaps it in if it changed.
    async fn refresh(
        &self,
        slot: &Slot,
        volume: &mut Volume,
        grant: &Grant,
        publish: &Publish,
        config: &Arc<Config>,
    ) -> Result<Outcome, PublishError> {
        let payload = self.fetch(slot, grant, publish, config, REFRESH_FOR).await?;
        let tag = tag_of(&volume.key, &payload);
        // What the kubelet brings is compared in memory. What Vault confirms is noted, so that a restart knows its age.
        if volume.tag == Some(tag) && !publish.claim.reads_vault() {
            return Ok(Outcome::Unchanged);
        }
        let note = Note::new(publish, connection(publish, config), SystemTime::now());
        let answer = self.commit(grant, config, (volume.key, tag), &note, &payload).await?;
        volume.tag = Some(tag);
        volume.note = Some(note);
        if answer != Answer::Swapped {
            return Ok(Outcome::Unchanged);
        }
        volume.generation += 1;
        volume.bytes = bytes(&payload);
        tracing::info!(pod = %volume.pod, volume = %publish.volume, files = payload.files.len(), "content swapped");
        Ok(Outcome::Swapped)
    }

    /// The pod's facts, unless the volume leaves: an unpublish needs no API server, so it must not wait for one.
    async fn facts(&self, slot: &Slot, publish: &Publish) -> Result<Arc<PodFacts>, PublishError> {
        let mut leaving = slot.leaving.subscribe();
        tokio::select! {
            _ = leaving.wait_for(|leaving| *leaving) => Err(PublishError::Unpublished),
            facts = self.pods.get(&publish.pod) => facts.map_err(|error| PublishError::Pods(Box::new(error))),
        }
    }

    async fn fetch(
        &self,
        slot: &Slot,
        grant: &Grant,
        publish: &Publish,
        config: &Arc<Config>,
        within: Duration,
    ) -> Result<Payload, PublishError> {
        let mut leaving = slot.leaving.subscribe();
        let start = Instant::now();
        let payload = tokio::select! {
            // An unpublish needs no Vault, so it must not wait for one either.
            _ = leaving.wait_for(|leaving| *leaving) => return Err(PublishError::Unpublished),
            payload = self.sources.fetch(grant, publish, config, start + within) => payload,
        };
        let connection = connection(publish, config);
        let source = if connection.is_some() { "vault" } else { "kubernetes" };
        self.metrics.fetch(source, connection.as_deref().unwrap_or_default(), start.elapsed());
        Ok(payload?)
    }

    async fn commit(
        &self,
        grant: &Grant,
        config: &Config,
        (key, tag): (TagKey, Tag),
        note: &Note,
        payload: &Payload,
    ) -> Result<Answer, PublishError> {
        let content = Content {
            volume: grant.volume(),
            owner: grant.owner(),
            volume_bytes: config.limits.volume_bytes,
            key,
            tag,
            note: note.encode(),
            files: &payload.files,
        };
        Ok(self.broker.commit(content).await?)
    }

    /// Overwrites, unmounts and removes a volume; OK if there is none. Needs neither Vault nor the API server.
    pub async fn unpublish(self: &Arc<Self>, id: VolumeId) -> Result<(), PublishError> {
        let this = Arc::clone(self);
        tokio::spawn(async move { this.unpublish_locked(&id).await }).await.unwrap_or(Err(PublishError::Lost))
    }

    async fn unpublish_locked(&self, id: &VolumeId) -> Result<(), PublishError> {
        let slot = self.slot(id);
        slot.leaving.send_replace(true);
        let mut state = slot.state.lock().await;
        let removed = self.broker.remove(id).await;
        if removed.is_ok() {
            if let Some(volume) = state.take() {
                tracing::info!(pod = %volume.pod, volume = %id, "unpublished");
            }
            slot.show(id, None);
            self.sources.forget(id);
            // Whoever waits for the old slot's lock finds it leaving; the next publish begins with a new slot.
            locked(&self.slots).remove(id);
        } else {
            // It still stands, and the kubelet comes again.
            slot.leaving.send_replace(false);
        }
        drop(state);
        self.count();
        Ok(removed?)
    }

    /// Whether a volume stands, with its usage, for NodeGetVolumeStats: from the broker, since the worker sees no
    /// published volume.
    pub async fn usage(&self, id: &VolumeId) -> Result<Option<OnNode>, ClientError> {
        Ok(self.broker.volumes().await?.into_iter().find(|found| found.volume == *id))
    }

    /// Every volume that stands, in the order of their ids.
    pub fn status(&self) -> Vec<VolumeStatus> {
        let slots: Vec<_> = locked(&self.slots).values().cloned().collect();
        slots.iter().filter_map(|slot| locked(&slot.shown).clone()).collect()
    }

    /// Asks the broker something that changes nothing: whether it answers at all.
    pub async fn broker_answers(&self) -> Result<(), ClientError> {
        self.broker.volumes().await.map(drop)
    }

    /// Looks for content whose source has been silent for longer than it may, and reports it once.
    pub fn report_stale(&self) {
        let Ok(after) = self.config().map(|config| config.stale_after) else { return };
        let slots: Vec<_> = locked(&self.slots).iter().map(|(id, slot)| (id.clone(), slot.clone())).collect();
        for (id, slot) in slots {
            // Whoever holds the lock is refreshing it right now.
            let Ok(mut state) = slot.state.try_lock() else { continue };
            let Some(volume) = state.as_mut() else { continue };
            if self.note_stale(&id, volume, after) {
                slot.show(&id, Some(volume));
            }
        }
        self.count();
    }

    /// Ends what only this process can end: its logins.
    pub async fn close(&self, deadline: Instant) {
        self.sources.close(deadline).await;
    }

    fn refused(&self, pod: &PodRef, refusals: Vec<Fault>) -> PublishError {
        for refusal in &refusals {
            self.metrics.refusal(refusal.code);
        }
        self.events.warning(pod, "SealmountRefused", summary(&refusals));
        PublishError::Refused(refusals)
    }

    fn slot(&self, id: &VolumeId) -> Arc<Slot> {
        Arc::clone(locked(&self.slots).entry(id.clone()).or_insert_with(|| Slot::new(None, id)))
    }

    /// Forgets an empty slot, unless somebody else came for it meanwhile: they hold the same lock.
    fn drop_slot(&self, id: &VolumeId) {
        let mut slots = locked(&self.slots);
        if slots.get(id).is_some_and(|slot| Arc::strong_count(slot) <= 2) {
            slots.remove(id);
        }
    }

    fn count(&self) {
        let (mut standing, mut stale, mut oldest) = (0, 0, None);
        for slot in locked(&self.slots).values() {
            if let Some(volume) = &*locked(&slot.shown) {
                standing += 1;
                stale += usize::from(volume.stale);
                oldest = Some(oldest.map_or(volume.confirmed, |oldest: SystemTime| oldest.min(volume.confirmed)));
            }
        }
        self.metrics.set_volumes(standing, stale, oldest);
    }
}

/// The connection's name, if any entry comes from Vault and the platform's file has it.
fn connection(publish: &Publish, config: &Config) -> Option<String> {
    let vault = publish.claim.reads_vault().then(|| config.connection(&publish.claim));
    vault.and_then(Result::ok).map(|connection| connection.name.clone())
}

/// What drives the volume's refreshes. An interval outside the connection's bounds is a fault of the pod's.
fn interval(claim: &Claim, config: &Config) -> Result<Interval, Fault> {
    if !claim.reads_vault() {
        return Ok(Interval::Kubelet);
    }
    let refresh = config.connection(claim).and_then(|connection| connection.refresh(claim));
    refresh.map(|refresh| match refresh {
        Refresh::Every(every) => Interval::Every(every),
        Refresh::Never => Interval::Never,
    })
}

fn bytes(payload: &Payload) -> u64 {
    payload.files.iter().map(|(_, bytes)| bytes.len() as u64).sum()
}
