//! What a pod's owner is told: events on the pod, in `kubectl describe pod`.
//!
//! Telling never delays a volume: a bounded queue is emptied by a task of its own, and what does not fit is counted.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{debug, info, warn};

use crate::metrics::Metrics;
use crate::request::{DRIVER, PodRef};

/// The longest note, in bytes (kubernetes, pkg/apis/core/validation/events.go, `NoteLengthLimit`).
const MAX_NOTE: usize = 1024;
/// Events that wait to be sent.
const QUEUE: usize = 256;
/// The pace of sending.
const PACE: Duration = Duration::from_millis(200);
/// The same event is not told again for so long.
const AGAIN: Duration = Duration::from_secs(10 * 60);
/// How many told events are remembered.
const REMEMBERED: usize = 1024;
/// How many of them may be one pod's: its author can change what is said of it, and must not take the others' places.
const OF_ONE_POD: usize = 32;
/// The longest one attempt to send may take.
const SEND_TIME: Duration = Duration::from_secs(5);
/// Pauses before further attempts, where another attempt may help.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

/// Tells pods' owners. A clone tells through the same queue.
#[derive(Clone)]
pub struct Events(Arc<Inner>);

struct Inner {
    queue: Option<mpsc::Sender<Note>>,
    told: Mutex<Told>,
    metrics: Metrics,
    sender: Option<JoinHandle<()>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Note {
    pod: PodRef,
    kind: &'static str,
    reason: &'static str,
    text: String,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(sender) = &self.sender {
            sender.abort();
        }
    }
}

impl Events {
    /// Sends events by `client` from the node of this name, on the current tokio runtime. Without a client they are
    /// only logged.
    pub fn new(client: Option<Client>, node: String, metrics: Metrics) -> Self {
        let (queue, sender) = match client {
            Some(client) => {
                let (queue, notes) = mpsc::channel(QUEUE);
                (Some(queue), Some(tokio::spawn(send(client, node, notes, metrics.clone()))))
            }
            None => (None, None),
        };
        Self(Arc::new(Inner { queue, told: Mutex::default(), metrics, sender }))
    }

    /// Tells of something that the pod's owner or the platform team has to look at. `reason` is one word in
    /// CamelCase; `note` is cut at 1024 bytes and holds no secret byte.
    pub fn warning(&self, pod: &PodRef, reason: &'static str, note: String) {
        self.tell(pod, "Warning", reason, note);
    }

    /// Tells of something that went well again.
    pub fn normal(&self, pod: &PodRef, reason: &'static str, note: String) {
        self.tell(pod, "Normal", reason, note);
    }

    fn tell(&self, pod: &PodRef, kind: &'static str, reason: &'static str, text: String) {
        let note = Note { pod: pod.clone(), kind, reason, text: fit(text) };
        let mut told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.lately(&note, Instant::now()) {
            return;
        }
        if told.of_pod(&note.pod) >= OF_ONE_POD {
            self.0.metrics.event_dropped();
            debug!(pod = %note.pod, reason, "an event was dropped: this pod has had many");
            return;
        }
        match &self.0.queue {
            None => info!(pod = %note.pod, uid = %note.pod.uid, kind, reason, note = note.text, "event"),
            Some(queue) => {
                if queue.try_send(note.clone()).is_err() {
                    // Not remembered: it may be told when there is room.
                    self.0.metrics.event_dropped();
                    debug!(pod = %note.pod, reason, "an event was dropped: too many wait");
                    return;
                }
            }
        }
        told.remember(note, Instant::now());
    }
}

/// What was told lately, oldest first.
#[derive(Default)]
struct Told {
    notes: HashSet<Arc<Note>>,
    order: VecDeque<(Instant, Arc<Note>)>,
}

impl Told {
    fn lately(&mut self, note: &Note, now: Instant) -> bool {
        while self.order.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) >= AGAIN) {
            self.forget_oldest();
        }
        self.notes.contains(note)
    }

    fn of_pod(&self, pod: &PodRef) -> usize {
        self.order.iter().filter(|(_, note)| note.pod.uid == pod.uid).count()
    }

    fn remember(&mut self, note: Note, now: Instant) {
        if self.order.len() >= REMEMBERED {
            self.forget_oldest();
        }
        let note = Arc::new(note);
        self.notes.insert(Arc::clone(&note));
        self.order.push_back((now, note));
    }

    fn forget_oldest(&mut self) {
        if let Some((_, oldest)) = self.order.pop_front() {
            self.notes.remove(&oldest);
        }
    }
}

/// One line of at most [`MAX_NOTE`] bytes.
fn fit(text: String) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.len() <= MAX_NOTE {
        return text;
    }
    let end = '…';
    let mut cut = String::with_capacity(MAX_NOTE);
    for c in text.chars() {
        if cut.len() + c.len_utf8() + end.len_utf8() > MAX_NOTE {
            break;
        }
        cut.push(c);
    }
    cut.push(end);
    cut
}

async fn send(client: Client, node: String, mut notes: mpsc::Receiver<Note>, metrics: Metrics) {
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    while let Some(note) = notes.recv().await {
        pace.tick().await;
        match post(&client, &event(&note, &node)).await {
            Ok(()) => failing = false,
            Err(error) => {
                metrics.event_dropped();
                // Said once an outage, not once an event.
                if failing {
                    debug!(pod = %note.pod, reason = note.reason, error, "an event could not be sent");
                } else {
                    warn!(pod = %note.pod, reason = note.reason, error, "an event could not be sent");
                }
                failing = true;
            }
        }
    }
}

async fn post(client: &Client, event: &Event) -> Result<(), String> {
    let namespace = event.metadata.namespace.as_deref().unwrap_or_default();
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    let mut pauses = PAUSES.iter();
    loop {
        let error = match timeout(SEND_TIME, events.create(&PostParams::default(), event)).await {
            Ok(Ok(_)) => return Ok(()),
            // An attempt before this one was taken, and its answer was lost.
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => return Ok(()),
            Ok(Err(kube::Error::Api(status))) if status.code < 500 && status.code != 429 => {
                return Err(format!("the API server says {} {}: {}", status.code, status.reason, status.message));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("the API server did not answer in {SEND_TIME:?}"),
        };
        match pauses.next() {
            Some(pause) => sleep(*pause).await,
            None => return Err(error),
        }
    }
}

/// The event as the API server takes it.
fn event(note: &Note, node: &str) -> Event {
    // Names are unique on this node by time and count; two nodes never tell of one pod in the same nanosecond.
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = Timestamp::now();
    let count = COUNT.fetch_add(1, Ordering::Relaxed) & 0xffff;
    let stem: String = note.pod.name.chars().take(200).collect();
    let stem = stem.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    let name = format!("{stem}.{:x}{count:04x}", now.as_nanosecond());
    Event {
        metadata: ObjectMeta { name: Some(name), namespace: Some(note.pod.namespace.clone()), ..ObjectMeta::default() },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(note.pod.namespace.clone()),
            name: Some(note.pod.name.clone()),
            uid: Some(note.pod.uid.to_string()),
            ..ObjectReference::default()
        },
        type_: Some(note.kind.to_owned()),
        reason: Some(note.reason.to_owned()),
        message: Some(note.text.clone()),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        source: Some(EventSource { component: Some(DRIVER.to_owned()), host: Some(node.to_owned()) }),
        reporting_component: Some(DRIVER.to_owned()),
        reporting_instance: Some(node.to_owned()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::PodUid;

    fn note(text: &str) -> Note {
        let pod = PodRef {
            namespace: "payments".into(),
            name: "api-0".into(),
            uid: PodUid::parse("u-1").unwrap(),
            service_account: "payments".into(),
        };
        Note { pod, kind: "Warning", reason: "SealmountStale", text: text.into() }
    }

    #[test]
    fn the_same_is_told_once_in_ten_minutes() {
        let mut told = Told::default();
        let start = Instant::now();
        assert!(!told.lately(&note("a"), start));
        told.remember(note("a"), start);
        assert!(told.lately(&note("a"), start + AGAIN - Duration::from_secs(1)));
        assert!(!told.lately(&note("b"), start));
        assert!(!told.lately(&note("a"), start + AGAIN));
        assert!(told.notes.is_empty() && told.order.is_empty());
    }

    #[tokio::test]
    async fn one_pod_does_not_take_the_places_of_others() {
        let metrics = Metrics::new();
        let (queue, mut notes) = mpsc::channel(QUEUE);
        let told = Mutex::default();
        let events = Events(Arc::new(Inner { queue: Some(queue), told, metrics: metrics.clone(), sender: None }));
        let talks = note("").pod;
        let other = PodRef { uid: PodUid::parse("u-2").unwrap(), ..talks.clone() };
        for number in 0..=OF_ONE_POD {
            events.warning(&talks, "SealmountWarning", number.to_string());
        }
        events.warning(&other, "SealmountWarning", "other".into());
        assert!(metrics.encode().contains("sealmount_events_dropped_total 1\n"));
        for number in 0..OF_ONE_POD {
            assert_eq!(notes.recv().await.unwrap().text, number.to_string());
        }
        assert_eq!(notes.recv().await.unwrap().text, "other");
    }

    #[test]
    fn memory_of_what_was_told_is_bounded() {
        let mut told = Told::default();
        let start = Instant::now();
        for index in 0..=REMEMBERED {
            told.remember(note(&index.to_string()), start);
        }
        assert_eq!((told.notes.len(), told.order.len()), (REMEMBERED, REMEMBERED));
        assert!(!told.lately(&note("0"), start));
        assert!(told.lately(&note("1"), start));
    }

    #[test]
    fn a_note_is_one_line_of_at_most_1024_bytes() {
        assert_eq!(fit("a\nb\tc".into()), "a b c");
        assert_eq!(fit("x".repeat(1024)), "x".repeat(1024));
        let cut = fit("ä".repeat(600));
        assert!(cut.len() <= 1024 && cut.ends_with("ä…"), "{} bytes", cut.len());
    }

    #[test]
    fn names_are_valid_and_unique() {
        let mut long = note("a");
        long.pod.name = format!("{}-{}", "a".repeat(199), "b".repeat(50));
        let (one, two) = (event(&long, "n").metadata.name.unwrap(), event(&long, "n").metadata.name.unwrap());
        assert_ne!(one, two);
        assert!(one.len() <= 253, "{} bytes", one.len());
        for label in one.split('.') {
            assert!(label.starts_with(|c: char| c.is_ascii_alphanumeric()), "{one}");
            assert!(label.ends_with(|c: char| c.is_ascii_alphanumeric()), "{one}");
        }
    }

    #[tokio::test]
    async fn what_does_not_fit_is_counted_and_may_be_told_later() {
        let metrics = Metrics::new();
        let (queue, mut notes) = mpsc::channel(1);
        let events = Events(Arc::new(Inner {
            queue: Some(queue),
            told: Mutex::default(),
            metrics: metrics.clone(),
            sender: None,
        }));
        let pod = note("").pod;
        events.warning(&pod, "SealmountStale", "a".into());
        events.warning(&pod, "SealmountStale", "a".into());
        events.warning(&pod, "SealmountStale", "b".into());
        assert!(metrics.encode().contains("sealmount_events_dropped_total 1\n"));
        assert_eq!(notes.recv().await.unwrap().text, "a");
        events.warning(&pod, "SealmountStale", "b".into());
        assert_eq!(notes.recv().await.unwrap().text, "b");
        assert!(metrics.encode().contains("sealmount_events_dropped_total 1\n"));
    }
}
