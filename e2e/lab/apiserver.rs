//! Two servers at the seam where pod facts come in: an API server that answers what a real one would say of pods and
//! events, and the kubelet's pods API. Both say what a test tells them, in the order it tells them.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Shutdown, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};

use futures_util::{Stream, StreamExt};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use prost::Message;
use sealmount::pods::kubelet::Connect;
use sealmount::pods::kubelet::proto::{
    self, EventType, GetPodRequest, GetPodResponse, WatchPodsEvent, WatchPodsRequest, pods_server,
};
use serde_json::{Value, json};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::{JoinHandle, JoinSet};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Status;

/// One pod as `kubectl get -o json`, and as a kubelet marshals it. How it was made stands in `recorded/pod.yaml`.
pub const POD_JSON: &str = include_str!("recorded/pod.json");
/// The same pod.
pub const POD_PROTOBUF: &[u8] = include_bytes!("recorded/pod.pb");

/// An API server for pods and events, without TLS. It ends with this value.
pub struct ApiServer {
    address: SocketAddr,
    state: Arc<Mutex<ApiState>>,
    task: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct ApiState {
    version: u64,
    /// Watches from before this version are answered 410.
    compacted: u64,
    pods: BTreeMap<(String, String), Value>,
    /// Every change with its version: a watch begins in the middle of it.
    history: Vec<(u64, Value)>,
    watches: Vec<UnboundedSender<Bytes>>,
    seen: Vec<String>,
    events: Vec<Value>,
    /// The next answers, whatever is asked: status and body.
    refusals: Vec<(u16, String)>,
    refuse_always: Option<(u16, String)>,
}

type Body = BoxBody<Bytes, Infallible>;

impl ApiServer {
    /// An empty one on a free port of the loopback address.
    pub async fn start() -> Self {
        let mut server = Self { address: ([127, 0, 0, 1], 0).into(), state: Arc::default(), task: None };
        server.start_again().await;
        server
    }

    /// Comes back on the same port with what it had.
    pub async fn start_again(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("the server's port");
        self.address = listener.local_addr().expect("an address");
        let state = Arc::clone(&self.state);
        self.task = Some(tokio::spawn(async move {
            // Ends the connections with the listener.
            let mut connections = JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let state = Arc::clone(&state);
                connections.spawn(async move {
                    let service = service_fn(|request| answer(request, Arc::clone(&state)));
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        }));
    }

    /// Goes away: no connection is left and none is taken.
    pub async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
        self.lock().watches.clear();
    }

    fn lock(&self) -> MutexGuard<'_, ApiState> {
        self.state.lock().expect("not poisoned")
    }

    /// The settings of a client.
    pub fn config(&self) -> kube::Config {
        kube::Config::new(format!("http://{}", self.address).parse().expect("an address"))
    }

    /// A kubeconfig file's text.
    pub fn kubeconfig(&self) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "lab", "user": {"token": "lab"}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        })
        .to_string()
    }

    /// Creates or changes a pod, and tells the watches.
    pub fn put(&self, pod: &Value) {
        let mut state = self.lock();
        let event = state.store(pod);
        state.tell(&event);
    }

    /// The same, but the watches hear of it only by what comes after.
    pub fn put_silently(&self, pod: &Value) {
        self.lock().store(pod);
    }

    /// Deletes a pod, and tells the watches.
    pub fn delete(&self, namespace: &str, name: &str) {
        let mut state = self.lock();
        if let Some(mut pod) = state.pods.remove(&(namespace.into(), name.into())) {
            state.version += 1;
            pod["metadata"]["resourceVersion"] = json!(state.version.to_string());
            let event = json!({"type": "DELETED", "object": pod});
            let version = state.version;
            state.history.push((version, event.clone()));
            state.tell(&event);
        }
    }

    /// Ends all watches, as a server that is restarted does.
    pub fn hang_up(&self) {
        self.lock().watches.clear();
    }

    /// Forgets the history: the watches end with 410 Gone, and so does each that asks for what was.
    pub fn compact(&self) {
        let mut state = self.lock();
        state.version += 1;
        state.compacted = state.version;
        state.history.clear();
        let status = status(410, "Expired", "too old resource version: 1 (2)");
        let event = json!({"type": "ERROR", "object": status});
        state.tell(&event);
        state.watches.clear();
    }

    /// Answers the next `count` requests with this status and body.
    pub fn refuse(&self, count: usize, status: u16, body: &str) {
        self.lock().refusals.extend(vec![(status, body.to_owned()); count]);
    }

    /// Answers every request with this, or as usual again.
    pub fn refuse_always(&self, answer: Option<(u16, &str)>) {
        self.lock().refuse_always = answer.map(|(status, body)| (status, body.to_owned()));
    }

    /// Method, path and query of all requests so far.
    pub fn seen(&self) -> Vec<String> {
        self.lock().seen.clone()
    }

    /// How many requests so far were lists, watches and GETs of one pod.
    pub fn counts(&self) -> (usize, usize, usize) {
        let state = self.lock();
        let count = |wanted: &dyn Fn(&str) -> bool| state.seen.iter().filter(|seen| wanted(seen)).count();
        (
            count(&|seen| seen.starts_with("GET /api/v1/pods?") && !seen.contains("watch=true")),
            count(&|seen| seen.contains("watch=true")),
            count(&|seen| seen.starts_with("GET /api/v1/namespaces/")),
        )
    }

    /// How many watches stand.
    pub fn watching(&self) -> usize {
        let mut state = self.lock();
        state.watches.retain(|watch| !watch.is_closed());
        state.watches.len()
    }

    /// The events that were created.
    pub fn events(&self) -> Vec<Value> {
        self.lock().events.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl ApiState {
    fn store(&mut self, pod: &Value) -> Value {
        self.version += 1;
        let mut pod = pod.clone();
        pod["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let text = |key: &str| pod["metadata"][key].as_str().expect("a name").to_owned();
        let known = self.pods.insert((text("namespace"), text("name")), pod.clone());
        let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
        let event = json!({"type": kind, "object": pod});
        self.history.push((self.version, event.clone()));
        event
    }

    fn tell(&mut self, event: &Value) {
        let line = Bytes::from(format!("{event}\n"));
        self.watches.retain(|watch| watch.send(line.clone()).is_ok());
    }
}

/// A Status object as an API server writes it.
pub fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

async fn answer(request: Request<Incoming>, state: Arc<Mutex<ApiState>>) -> Result<Response<Body>, Infallible> {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let mut state = state.lock().expect("not poisoned");
    state.seen.push(format!("{method} {path}?{query}"));
    if !state.refusals.is_empty() {
        let (status, text) = state.refusals.remove(0);
        return Ok(said(status, text));
    }
    if let Some((status, text)) = &state.refuse_always {
        return Ok(said(*status, text.clone()));
    }
    let parameter = |name: &str| {
        let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        value.map(|value| value.replace("%3D", "=").replace("%2F", "/"))
    };
    let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
    let reply = match (&method, &segments[..]) {
        (&Method::GET, ["api", "v1", "pods"]) => {
            let node =
                parameter("fieldSelector").and_then(|text| Some(text.strip_prefix("spec.nodeName=")?.to_owned()));
            let node = node.expect("a list of the whole cluster's pods");
            let here = |pod: &Value| pod["spec"]["nodeName"] == json!(node);
            if parameter("watch").as_deref() == Some("true") {
                let since: u64 = parameter("resourceVersion").and_then(|text| text.parse().ok()).expect("a version");
                if since < state.compacted {
                    return Ok(said(410, status(410, "Expired", "too old resource version").to_string()));
                }
                let (to, lines) = unbounded_channel();
                for (_, event) in state.history.iter().filter(|(at, _)| *at > since) {
                    if here(&event["object"]) {
                        let _ = to.send(Bytes::from(format!("{event}\n")));
                    }
                }
                state.watches.push(to);
                let lines = tokio_stream::wrappers::UnboundedReceiverStream::new(lines);
                let body = StreamBody::new(lines.map(|line| Ok::<_, Infallible>(Frame::data(line))));
                return Ok(Response::new(BodyExt::boxed(body)));
            }
            let pods: Vec<&Value> = state.pods.values().filter(|pod| here(pod)).collect();
            let from: usize = parameter("continue").and_then(|text| text.parse().ok()).unwrap_or(0);
            let limit: usize = parameter("limit").and_then(|text| text.parse().ok()).unwrap_or(usize::MAX);
            let end = from.saturating_add(limit).min(pods.len());
            let mut metadata = json!({"resourceVersion": state.version.to_string()});
            if end < pods.len() {
                metadata["continue"] = json!(end.to_string());
            }
            (200, json!({"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": &pods[from..end]}))
        }
        (&Method::GET, ["api", "v1", "namespaces", namespace, "pods", name]) => {
            match state.pods.get(&((*namespace).to_owned(), (*name).to_owned())) {
                Some(pod) => (200, pod.clone()),
                None => (404, status(404, "NotFound", &format!("pods \"{name}\" not found"))),
            }
        }
        (&Method::POST, ["api", "v1", "namespaces", namespace, "events"]) => {
            let event: Value = serde_json::from_slice(&body).expect("an event");
            assert_eq!(event["metadata"]["namespace"], json!(namespace));
            state.events.push(event.clone());
            (201, event)
        }
        _ => (404, status(404, "NotFound", "the server could not find the requested resource")),
    };
    Ok(said(reply.0, reply.1.to_string()))
}

fn said(code: u16, text: String) -> Response<Body> {
    let mut response = Response::new(BodyExt::boxed(Full::new(Bytes::from(text))));
    *response.status_mut() = StatusCode::from_u16(code).expect("a status");
    response
}

/// The kubelet's pods API on a socket of its own. It ends with this value.
pub struct KubeletPods {
    socket: PathBuf,
    state: Arc<Mutex<KubeletState>>,
    connections: Arc<Mutex<Vec<std::os::unix::net::UnixStream>>>,
    task: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct KubeletState {
    pods: BTreeMap<String, proto::Pod>,
    watches: Vec<UnboundedSender<Result<WatchPodsEvent, Status>>>,
    starting: bool,
    /// The first list is not ended.
    endless: bool,
    /// Streams begun and GetPod calls so far.
    counts: (usize, usize),
}

impl KubeletPods {
    /// One that knows no pod yet, on `socket`.
    pub fn start(socket: &Path) -> Self {
        let mut server =
            Self { socket: socket.to_owned(), state: Arc::default(), connections: Arc::default(), task: None };
        server.start_again();
        server
    }

    /// Comes back with what it had.
    pub fn start_again(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        let listener = UnixListener::bind(&self.socket).expect("the socket");
        let service = pods_server::PodsServer::new(Service(Arc::clone(&self.state)));
        let connections = Arc::clone(&self.connections);
        // The server's connections outlive it: what closes them is kept.
        let incoming = UnixListenerStream::new(listener).map(move |stream| {
            let stream = stream?.into_std()?;
            connections.lock().expect("not poisoned").push(stream.try_clone()?);
            UnixStream::from_std(stream)
        });
        self.task = Some(tokio::spawn(async move {
            let server = tonic::transport::Server::builder().add_service(service);
            let _ = server.serve_with_incoming(incoming).await;
        }));
    }

    /// Goes away with its socket.
    pub async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
        let _ = std::fs::remove_file(&self.socket);
        for connection in self.connections.lock().expect("not poisoned").drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
        self.lock().watches.clear();
    }

    /// Connects as the broker does.
    pub fn connect(&self) -> Connect {
        let socket = self.socket.clone();
        Connect::new(move || UnixStream::connect(socket.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, KubeletState> {
        self.state.lock().expect("not poisoned")
    }

    /// Whether every call is answered FailedPrecondition, as by a kubelet that starts.
    pub fn starting(&self, starting: bool) {
        self.lock().starting = starting;
    }

    /// Whether INITIAL_SYNC_COMPLETE stays out.
    pub fn endless(&self, endless: bool) {
        self.lock().endless = endless;
    }

    /// Adds or changes a pod, and tells the streams.
    pub fn put(&self, pod: &proto::Pod) {
        let kind = self.put_silently(pod);
        self.tell(kind, pod);
    }

    /// The same without telling.
    pub fn put_silently(&self, pod: &proto::Pod) -> EventType {
        let uid = pod.metadata.as_ref().expect("metadata").uid.clone();
        let known = self.lock().pods.insert(uid, pod.clone());
        if known.is_some() { EventType::Modified } else { EventType::Added }
    }

    /// Removes a pod, and tells the streams.
    pub fn delete(&self, uid: &str) {
        if let Some(pod) = self.delete_silently(uid) {
            // All that the kubelet sends of it.
            let metadata =
                pod.metadata.map(|metadata| proto::ObjectMeta { annotations: Default::default(), ..metadata });
            self.tell(EventType::Deleted, &proto::Pod { metadata, spec: None, status: None });
        }
    }

    /// The same without telling.
    pub fn delete_silently(&self, uid: &str) -> Option<proto::Pod> {
        self.lock().pods.remove(uid)
    }

    fn tell(&self, kind: EventType, pod: &proto::Pod) {
        self.send(&Ok(WatchPodsEvent { r#type: kind.into(), pod: pod.encode_to_vec() }));
    }

    /// Sends an event that is no pod.
    pub fn tell_garbage(&self) {
        self.send(&Ok(WatchPodsEvent { r#type: EventType::Added.into(), pod: vec![0xff; 8] }));
    }

    /// Ends all streams with this.
    pub fn end(&self, status: &Status) {
        self.send(&Err(status.clone()));
        self.lock().watches.clear();
    }

    fn send(&self, event: &Result<WatchPodsEvent, Status>) {
        self.lock().watches.retain(|watch| watch.send(event.clone()).is_ok());
    }

    /// Streams begun, and GetPod calls, so far.
    pub fn counts(&self) -> (usize, usize) {
        self.lock().counts
    }
}

impl Drop for KubeletPods {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

struct Service(Arc<Mutex<KubeletState>>);

impl Service {
    fn ready(&self) -> Result<MutexGuard<'_, KubeletState>, Status> {
        let state = self.0.lock().expect("not poisoned");
        if state.starting {
            return Err(Status::failed_precondition("Kubelet is initializing"));
        }
        Ok(state)
    }
}

#[tonic::async_trait]
impl pods_server::Pods for Service {
    type WatchPodsStream = Pin<Box<dyn Stream<Item = Result<WatchPodsEvent, Status>> + Send>>;

    async fn watch_pods(
        &self,
        _: tonic::Request<WatchPodsRequest>,
    ) -> Result<tonic::Response<Self::WatchPodsStream>, Status> {
        let mut state = self.ready()?;
        state.counts.0 += 1;
        let (to, events) = unbounded_channel();
        for pod in state.pods.values() {
            let _ = to.send(Ok(WatchPodsEvent { r#type: EventType::Added.into(), pod: pod.encode_to_vec() }));
        }
        if !state.endless {
            let _ = to.send(Ok(WatchPodsEvent { r#type: EventType::InitialSyncComplete.into(), pod: Vec::new() }));
        }
        state.watches.push(to);
        let events = tokio_stream::wrappers::UnboundedReceiverStream::new(events);
        Ok(tonic::Response::new(Box::pin(events)))
    }

    async fn get_pod(&self, request: tonic::Request<GetPodRequest>) -> Result<tonic::Response<GetPodResponse>, Status> {
        let mut state = self.ready()?;
        state.counts.1 += 1;
        let uid = request.into_inner().pod_uid;
        match state.pods.get(&uid) {
            Some(pod) => Ok(tonic::Response::new(GetPodResponse { pod: pod.encode_to_vec() })),
            None => Err(Status::not_found(format!("pod with UID {uid} not found"))),
        }
    }
}
