//! What the driver counts, and the HTTP listener that shows it. The names are public surface: `docs/metrics.md`.
//!
//! No series carries a pod's or a volume's name: a node's series stay few, and a scrape tells nobody which secrets
//! there are.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use http::{Method, Request, Response, StatusCode, header};
use hyper::body::{Body, Bytes};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tracing::debug;

use crate::request::Code;

/// What came of one NodePublishVolume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The volume was published.
    Published,
    /// It stood; new content was swapped in.
    Swapped,
    /// It stood, was fetched again, and the content was the same.
    Unchanged,
    /// It stood and nothing was due.
    NotDue,
    /// It stood; a refusal or a source that is away left the old content in place.
    Kept,
    /// It was refused: the pod or the platform's file must change.
    Refused,
    /// It failed and may be tried again.
    Failed,
}

impl Outcome {
    const ALL: [Self; 7] =
        [Self::Published, Self::Swapped, Self::Unchanged, Self::NotDue, Self::Kept, Self::Refused, Self::Failed];
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        let text = match self {
            Self::Published => "published",
            Self::Swapped => "swapped",
            Self::Unchanged => "unchanged",
            Self::NotDue => "not_due",
            Self::Kept => "kept",
            Self::Refused => "refused",
            Self::Failed => "failed",
        };
        EncodeLabelValue::encode(&text, encoder)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCode {
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BySource {
    source: &'static str,
    connection: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByResult {
    result: &'static str,
}

/// From a keep-alive read on the same node to the 30 s a call may spend on retrying (design 5.5), in seconds.
const FETCH_BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0, 30.0];

/// All series. A clone counts into the same ones.
#[derive(Clone)]
pub struct Metrics(Arc<Series>);

struct Series {
    registry: Registry,
    publishes: Family<ByOutcome, Counter>,
    refusals: Family<ByCode, Counter>,
    waived: Family<ByCode, Counter>,
    fetches: Family<BySource, Histogram>,
    reloads: Family<ByResult, Counter>,
    events_dropped: Counter,
    worker_restarts: Counter,
    standing: Gauge,
    stale: Gauge,
    content_age: Gauge<f64, AtomicU64>,
    /// When the oldest content was last known to be current; the age is reckoned at each scrape.
    oldest: Mutex<Option<SystemTime>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All series at zero.
    pub fn new() -> Self {
        let publishes = Family::default();
        for outcome in Outcome::ALL {
            drop(publishes.get_or_create(&ByOutcome { outcome }));
        }
        let reloads = Family::default();
        for result in ["ok", "failed"] {
            drop(reloads.get_or_create(&ByResult { result }));
        }
        let mut series = Series {
            registry: Registry::with_prefix("sealmount"),
            publishes,
            refusals: Family::default(),
            waived: Family::default(),
            fetches: Family::new_with_constructor(|| Histogram::new(FETCH_BUCKETS)),
            reloads,
            events_dropped: Counter::default(),
            worker_restarts: Counter::default(),
            standing: Gauge::<i64, AtomicI64>::default(),
            stale: Gauge::<i64, AtomicI64>::default(),
            content_age: Gauge::default(),
            oldest: Mutex::new(None),
        };
        let to = &mut series.registry;
        to.register("publishes", "NodePublishVolume calls by outcome", series.publishes.clone());
        to.register("refusals", "Refusals by code; one call may be refused by several", series.refusals.clone());
        to.register("waived_refusals", "Refusals that a waiver of the platform's file turned", series.waived.clone());
        to.register("fetch_seconds", "Time of one fetch of a volume's content", series.fetches.clone());
        to.register("config_reloads", "Reloads of the platform's file by result", series.reloads.clone());
        to.register("events_dropped", "Pod events that were not sent", series.events_dropped.clone());
        to.register("worker_restarts", "Times the worker was started again", series.worker_restarts.clone());
        to.register("standing_volumes", "Volumes that stand on this node", series.standing.clone());
        to.register("stale_volumes", "Volumes whose content could not be refreshed in time", series.stale.clone());
        to.register(
            "content_age_seconds",
            "Time since the oldest content on this node was known to be current; 0 without volumes",
            series.content_age.clone(),
        );
        Self(Arc::new(series))
    }

    /// Counts a NodePublishVolume.
    pub fn publish(&self, outcome: Outcome) {
        self.0.publishes.get_or_create(&ByOutcome { outcome }).inc();
    }

    /// Counts a refusal.
    pub fn refusal(&self, code: Code) {
        self.0.refusals.get_or_create(&ByCode { code: code.0 }).inc();
    }

    /// Counts a refusal that a waiver turned into a warning.
    pub fn waived(&self, code: Code) {
        self.0.waived.get_or_create(&ByCode { code: code.0 }).inc();
    }

    /// Counts a fetch, successful or not. `source` is `kubernetes` or `vault`; `connection` is empty for `kubernetes`.
    pub fn fetch(&self, source: &'static str, connection: &str, took: Duration) {
        let labels = BySource { source, connection: connection.to_owned() };
        self.0.fetches.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Counts a reload of the platform's file.
    pub fn config_reload(&self, ok: bool) {
        let result = if ok { "ok" } else { "failed" };
        self.0.reloads.get_or_create(&ByResult { result }).inc();
    }

    /// Counts a pod event that was not sent.
    pub fn event_dropped(&self) {
        self.0.events_dropped.inc();
    }

    /// Sets how often the worker was started again; the worker learns it when it starts.
    pub fn set_worker_restarts(&self, count: u64) {
        self.0.worker_restarts.inner().store(count, Ordering::Relaxed);
    }

    /// Sets how many volumes stand, how many of them are stale, and when the oldest content was known to be current.
    pub fn set_volumes(&self, standing: usize, stale: usize, oldest: Option<SystemTime>) {
        self.0.standing.set(i64::try_from(standing).unwrap_or(i64::MAX));
        self.0.stale.set(i64::try_from(stale).unwrap_or(i64::MAX));
        *self.0.oldest.lock().unwrap_or_else(PoisonError::into_inner) = oldest;
    }

    /// All series in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let oldest = *self.0.oldest.lock().unwrap_or_else(PoisonError::into_inner);
        // A clock set back gives no negative age.
        let age = oldest.and_then(|at| SystemTime::now().duration_since(at).ok()).unwrap_or_default();
        self.0.content_age.set(age.as_secs_f64());
        let mut text = String::new();
        // Writing into a String does not fail.
        let _ = encode(&mut text, &self.0.registry);
        text
    }
}

/// What one client may take.
#[derive(Clone, Copy)]
struct Bounds {
    /// The most scrapes at once; more wait to be accepted.
    connections: usize,
    /// The longest a connection may take from its accept to its end.
    connection_time: Duration,
}

const BOUNDS: Bounds = Bounds { connections: 8, connection_time: Duration::from_secs(10) };
/// The longest header of a request, in bytes: the least the server takes.
const HEADER_BYTES: usize = 8192;

/// Serves `GET /metrics` on `listener`, and 404 or 405 for anything else, until `shutdown` completes.
/// One request a connection.
pub async fn serve(listener: TcpListener, metrics: Metrics, shutdown: impl Future<Output = ()>) {
    serve_within(BOUNDS, listener, metrics, shutdown).await;
}

async fn serve_within(bounds: Bounds, listener: TcpListener, metrics: Metrics, shutdown: impl Future<Output = ()>) {
    let mut shutdown = pin!(shutdown);
    let places = Arc::new(Semaphore::new(bounds.connections));
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let place = Arc::clone(&places).acquire_owned().await.ok();
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            () = &mut shutdown => return,
            accepted = accepted => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: accept would fail again at once.
                debug!(%error, "a scrape could not be accepted");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let metrics = metrics.clone();
        tokio::spawn(async move {
            let _place = place;
            let answer = service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&request, &metrics))));
            let connection = http1::Builder::new()
                .max_buf_size(HEADER_BYTES)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), answer);
            match tokio::time::timeout(bounds.connection_time, connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(%error, "a scrape failed"),
                Err(_) => debug!("a scrape took too long"),
            }
        });
    }
}

fn answer<B: Body>(request: &Request<B>, metrics: &Metrics) -> Response<http_body_util::Full<Bytes>> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, metrics.encode()),
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, String::new()),
        _ => (StatusCode::NOT_FOUND, String::new()),
    };
    let mut response = Response::new(http_body_util::Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    if status == StatusCode::OK {
        let kind = header::HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
    }
    response
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    /// Every series with a sample, so that all are printed.
    fn touched() -> Metrics {
        let metrics = Metrics::new();
        metrics.publish(Outcome::Published);
        metrics.refusal(Code("SM101"));
        metrics.waived(Code("SM123"));
        metrics.fetch("vault", "prod", Duration::from_millis(7));
        metrics.config_reload(true);
        metrics.event_dropped();
        metrics.set_worker_restarts(3);
        metrics.set_volumes(5, 2, Some(SystemTime::now() - Duration::from_secs(90)));
        metrics
    }

    #[test]
    fn counts_what_it_is_told() {
        let text = touched().encode();
        for line in [
            "sealmount_publishes_total{outcome=\"published\"} 1",
            "sealmount_publishes_total{outcome=\"not_due\"} 0",
            "sealmount_refusals_total{code=\"SM101\"} 1",
            "sealmount_waived_refusals_total{code=\"SM123\"} 1",
            "sealmount_fetch_seconds_bucket{le=\"0.005\",source=\"vault\",connection=\"prod\"} 0",
            "sealmount_fetch_seconds_bucket{le=\"0.01\",source=\"vault\",connection=\"prod\"} 1",
            "sealmount_config_reloads_total{result=\"ok\"} 1",
            "sealmount_config_reloads_total{result=\"failed\"} 0",
            "sealmount_events_dropped_total 1",
            "sealmount_worker_restarts_total 3",
            "sealmount_standing_volumes 5",
            "sealmount_stale_volumes 2",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line:?} in\n{text}");
        }
        let age = text.lines().find_map(|line| line.strip_prefix("sealmount_content_age_seconds ")).unwrap();
        assert!(age.parse::<f64>().unwrap() >= 90.0, "{age}");
    }

    #[test]
    fn no_volume_has_no_age() {
        let metrics = touched();
        metrics.set_volumes(0, 0, None);
        assert!(metrics.encode().contains("sealmount_content_age_seconds 0.0\n"));
        metrics.set_volumes(1, 0, Some(SystemTime::now() + Duration::from_secs(60)));
        assert!(metrics.encode().contains("sealmount_content_age_seconds 0.0\n"));
    }

    /// Name, type, labels and meaning of each series, as `docs/metrics.md` has them.
    #[test]
    fn the_table_is_what_the_code_prints() {
        let text = touched().encode();
        let mut types = BTreeMap::new();
        let mut helps = BTreeMap::new();
        let mut labels: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for line in text.lines() {
            if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                types.insert(name.to_owned(), kind.to_owned());
            } else if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
                helps.insert(name.to_owned(), help.trim_end_matches('.').to_owned());
            } else if !line.starts_with('#') {
                let (sample, _) = line.rsplit_once(' ').unwrap();
                let (name, list) = sample.split_once('{').unwrap_or((sample, "}"));
                let name = ["_total", "_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
                let name = name.unwrap_or_else(|| sample.split('{').next().unwrap());
                let names = list.trim_end_matches('}').split(',').filter_map(|pair| pair.split_once('='));
                let names = names.map(|(name, _)| name.to_owned()).filter(|name| name != "le");
                labels.entry(name.to_owned()).or_default().extend(names);
            }
        }
        let printed: BTreeSet<String> = types
            .iter()
            .map(|(name, kind)| {
                let end = if kind == "counter" { "_total" } else { "" };
                let labels = labels[name].iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
                format!("| `{name}{end}` | {kind} | {labels} | {} |", helps[name])
            })
            .collect();
        let written: BTreeSet<String> = include_str!("../docs/metrics.md")
            .lines()
            .filter(|line| line.starts_with("| `sealmount_"))
            .map(str::to_owned)
            .collect();
        assert_eq!(printed, written);
    }

    async fn asked(request: &[u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let stopped = async move { drop(stopped.await) };
        let server = tokio::spawn(serve(listener, touched(), stopped));
        let mut stream = TcpStream::connect(address).await.unwrap();
        // The server may answer and close before it has read everything.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        stop.send(()).unwrap();
        server.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err(), "the listener is still there after the shutdown");
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn serves_metrics_and_nothing_else() {
        let found = asked(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(found.starts_with("HTTP/1.1 200 OK\r\n"), "{found}");
        assert!(found.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{found}");
        assert!(found.contains("sealmount_standing_volumes 5\n"), "{found}");
        let found = asked(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(found.starts_with("HTTP/1.1 404 "), "{found}");
        let found = asked(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n0").await;
        assert!(found.starts_with("HTTP/1.1 405 "), "{found}");
    }

    #[tokio::test]
    async fn a_header_too_large_is_refused() {
        let request = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(2 * HEADER_BYTES));
        let found = asked(request.as_bytes()).await;
        assert!(!found.contains("200 OK"), "{found}");
    }

    #[tokio::test]
    async fn a_silent_client_holds_no_place() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let bounds = Bounds { connections: 2, connection_time: Duration::from_secs(1) };
        let server = tokio::spawn(serve_within(bounds, listener, Metrics::new(), std::future::pending()));
        let mut silent = Vec::new();
        for _ in 0..bounds.connections {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        // Waits until one of the silent ones is dropped, and is served then.
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"));
        server.abort();
    }
}
