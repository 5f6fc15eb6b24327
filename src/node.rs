//! Joins the worker's parts. The only file that knows every concrete type.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tower::ServiceBuilder;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::timeout::TimeoutLayer;

use crate::admin::AdminService;
use crate::admin::proto::admin_server::AdminServer;
use crate::broker::client::{Client, ClientError, Inherited};
use crate::config::{self, Config};
use crate::csi::identity::IdentityService;
use crate::csi::layers::{CallerIsRoot, RedactedTrace};
use crate::csi::node::NodeService;
use crate::csi::parse;
use crate::csi::proto::csi::identity_server::IdentityServer;
use crate::csi::proto::csi::node_server::NodeServer;
use crate::csi::proto::registration::registration_server::RegistrationServer;
use crate::events::Events;
use crate::health::Health;
use crate::log;
use crate::metrics::{self, Metrics};
use crate::pods::{Pods, PodsFrom, StartError, api, kubelet};
use crate::publish::Publisher;
use crate::registration::RegistrationService;
use crate::source::Sources;

/// Calls at work at one time; more wait. A node has at most a few hundred volumes, and each call holds its request.
const CALLS_AT_ONCE: usize = 256;
/// Below the kubelet's 120 s, so that it hears a reason and not a broken connection.
const CALL_DEADLINE: Duration = Duration::from_secs(110);
/// The largest request: a Secret is at most 1 MiB, and its text may be escaped nowhere on the way.
const MAX_REQUEST: usize = 4 * 1024 * 1024;
/// How often the platform file is looked at. A ConfigMap takes about a minute to arrive anyway.
const LOOK_AT_CONFIG: Duration = Duration::from_secs(2);
/// How often content is looked at for staleness.
const LOOK_FOR_STALE: Duration = Duration::from_secs(1);
/// How long the end waits for calls under way, and then for logins to be revoked.
const END_WITHIN: Duration = Duration::from_secs(5);

/// What the command line says.
#[derive(Debug)]
pub struct Options {
    /// The platform team's file.
    pub config: Option<PathBuf>,
    /// How to reach the API server, instead of the pod's own ServiceAccount.
    pub kubeconfig: Option<PathBuf>,
    /// The kubelet's root directory.
    pub kubelet_dir: PathBuf,
    /// The CSI socket, as the host names it.
    pub csi_socket: PathBuf,
    /// This node's name.
    pub node_name: String,
    /// Where pod facts come from.
    pub pods_from: PodsFrom,
    /// Where /metrics is served.
    pub listen: SocketAddr,
}

impl Options {
    /// The directories the worker reads from, beside what every program needs: nothing else can be opened later.
    pub fn readable(&self) -> Vec<PathBuf> {
        let config = self.config.as_deref().and_then(Path::parent);
        let kubeconfig = self.kubeconfig.as_deref().and_then(Path::parent);
        let manifests = match &self.pods_from {
            PodsFrom::Manifest(dir) => Some(dir.as_path()),
            PodsFrom::Auto | PodsFrom::Kubelet | PodsFrom::Api => None,
        };
        [config, kubeconfig, manifests].into_iter().flatten().map(Path::to_owned).collect()
    }
}

/// Why a worker could not serve. One variant a step.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// An inherited descriptor is not what it should be.
    #[error("the inherited {what} cannot be used: {error}")]
    Inherited {
        /// Which.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// The broker does not answer.
    #[error("the broker does not answer: {0}")]
    Broker(#[from] ClientError),
    /// The metrics address is taken.
    #[error("cannot serve metrics on {address} (--listen): {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// The kernel takes no signal handler.
    #[error("cannot wait for signals: {0}")]
    Signal(io::Error),
    /// There is no client for the API server.
    #[error(transparent)]
    Client(api::ClientError),
    /// Pod facts cannot be had from where the flag says.
    #[error(transparent)]
    Pods(#[from] StartError),
    /// A server ended by itself.
    #[error("a server ended: {0}")]
    Server(tonic::transport::Error),
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was told to.
    Stopped,
    /// Without its broker it cannot publish.
    BrokerGone,
    /// The kubelet refused the registration: the sockets must be bound anew.
    RegistrationRefused,
}

/// Serves until told to stop, until the broker is gone, or until the kubelet refuses the driver.
pub async fn run(options: Options, inherited: Inherited) -> Result<End, NodeError> {
    let metrics = Metrics::new();
    // The first start is none again.
    let restarts = inherited.starts.saturating_sub(1);
    metrics.set_worker_restarts(restarts);
    let health = Arc::new(Health::new(restarts));
    let broker = Client::new(inherited.socket, inherited.work)
        .map_err(|error| NodeError::Inherited { what: "broker socket", error })?;

    let client = api::client(options.kubeconfig.as_deref()).await.map_err(NodeError::Client)?;
    let connect = kubelet::Connect::new({
        let broker = broker.clone();
        move || {
            let broker = broker.clone();
            async move {
                let socket = broker.pods().await.map_err(io::Error::other)?;
                UnixStream::from_std(socket.into())
            }
        }
    });
    let pods = Pods::start(&options.pods_from, &options.node_name, client.clone(), connect).await?;
    let events = Events::new(client, options.node_name.clone(), metrics.clone());
    let standing = broker.volumes().await?;
    let first = load(&options, &health, &metrics);
    let publisher =
        Arc::new(Publisher::new(first, pods, Sources::default(), broker.clone(), events, metrics.clone(), standing));

    let (stop, stopped) = watch::channel(false);
    let (refused, mut refusals) = mpsc::channel(1);
    let registration =
        RegistrationService::new(options.csi_socket.display().to_string(), Arc::clone(&health.registered), refused);
    let service = NodeService {
        node: parse::Node::new(options.kubelet_dir.clone()),
        name: options.node_name.clone(),
        publisher: Arc::clone(&publisher),
        metrics: metrics.clone(),
    };
    let admin = AdminService {
        node: options.node_name.clone(),
        publisher: Arc::clone(&publisher),
        health: Arc::clone(&health),
    };
    let layers =
        || ServiceBuilder::new().layer(RedactedTrace).layer(CallerIsRoot).layer(TimeoutLayer::new(CALL_DEADLINE));
    let csi = Server::builder()
        .layer(layers().layer(GlobalConcurrencyLimitLayer::new(CALLS_AT_ONCE)))
        .add_service(IdentityServer::new(IdentityService))
        .add_service(NodeServer::new(service).max_decoding_message_size(MAX_REQUEST))
        .add_service(AdminServer::new(admin))
        .serve_with_incoming_shutdown(incoming(inherited.csi, "CSI socket")?, until(stopped.clone()));
    // Without the limit: the kubelet waits a second for this answer, whatever else is at work.
    let registration = Server::builder()
        .layer(layers())
        .add_service(RegistrationServer::new(registration))
        .serve_with_incoming_shutdown(incoming(inherited.registration, "registration socket")?, until(stopped.clone()));
    let mut csi = tokio::spawn(csi);
    let mut registration = tokio::spawn(registration);
    tokio::spawn(metrics::serve(listen(options.listen).await?, metrics.clone(), until(stopped)));

    let mut terminate = signal(SignalKind::terminate()).map_err(NodeError::Signal)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(NodeError::Signal)?;
    let mut look_at_config = tokio::time::interval(LOOK_AT_CONFIG);
    let mut look_for_stale = tokio::time::interval(LOOK_FOR_STALE);
    let mut seen = options.config.as_deref().map(fingerprint);

    let guard = Arc::clone(&publisher);
    let mut guard = tokio::spawn(async move { guard.guard().await });

    if cfg!(feature = "waive-anything") {
        tracing::error!("this build may waive what is never waived: it is for the lab alone");
    }
    broker.ready().await?;
    tracing::info!(node = options.node_name, restarts, "serving");
    let end = loop {
        tokio::select! {
            _ = terminate.recv() => break Ok(End::Stopped),
            () = broker.closed() => break Ok(End::BrokerGone),
            Some(_) = refusals.recv() => break Ok(End::RegistrationRefused),
            ended = &mut csi => break ended_early(ended),
            ended = &mut registration => break ended_early(ended),
            // It never ends by itself: a worker that is started again guards again.
            _ = &mut guard => break Ok(End::Stopped),
            _ = hangup.recv() => reload(&options, &publisher, &health, &metrics),
            _ = look_at_config.tick() => {
                let now = options.config.as_deref().map(fingerprint);
                if now != seen {
                    seen = now;
                    reload(&options, &publisher, &health, &metrics);
                }
            }
            _ = look_for_stale.tick() => publisher.report_stale(),
        }
    };
    stop.send_replace(true);
    let _ = tokio::time::timeout(END_WITHIN, async {
        // One that ended already has been asked for its result, and must not be asked again.
        for server in [&mut csi, &mut registration].into_iter().filter(|server| !server.is_finished()) {
            let _ = server.await;
        }
    })
    .await;
    publisher.close(tokio::time::Instant::now() + END_WITHIN).await;
    end
}

/// The platform file at start. Without a valid one nothing new is published, but what stands is kept and unpublished:
/// those need no file.
fn load(options: &Options, health: &Health, metrics: &Metrics) -> Option<Config> {
    let of_node = |mut config: Config| {
        config.policy.kubelet_dir = options.kubelet_dir.display().to_string();
        config
    };
    let Some(path) = &options.config else { return Some(of_node(Config::default())) };
    match config::load(path) {
        Ok(config) => {
            log::set_level(config.log_level);
            metrics.config_reload(true);
            health.set_config_fault(String::new());
            Some(of_node(config))
        }
        Err(faults) => {
            metrics.config_reload(false);
            for fault in &faults {
                tracing::error!("{}: {fault}", path.display());
            }
            let first = faults.first().map(ToString::to_string).unwrap_or_default();
            let more =
                if faults.len() > 1 { format!(", and {} more in the log", faults.len() - 1) } else { String::new() };
            health.set_config_fault(format!("{first}{more}"));
            None
        }
    }
}

/// What tells that the platform file, or a file beside it, is another one: a ConfigMap's update replaces all of them.
fn fingerprint(config: &Path) -> Vec<(PathBuf, u64, i64, i64, u64)> {
    let dir = config.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let names = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let mut seen: Vec<_> = names
        .filter_map(|name| {
            let path = name.path();
            let stat = std::fs::metadata(&path).ok()?;
            Some((path, stat.ino(), stat.mtime(), stat.mtime_nsec(), stat.len()))
        })
        .collect();
    seen.sort();
    seen
}

/// A bad new file keeps the old one, and says so.
fn reload(options: &Options, publisher: &Publisher, health: &Health, metrics: &Metrics) {
    if options.config.is_none() {
        return;
    }
    match load(options, health, metrics) {
        Some(config) => {
            tracing::info!(connections = config.connections.len(), "the platform file was read again");
            publisher.reload(config);
        }
        None => tracing::error!("the new platform file is not valid: the old one stays in force"),
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, NodeError> {
    let listener = TcpListener::bind(address).await.map_err(|error| NodeError::Listen { address, error })?;
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "metrics");
    }
    Ok(listener)
}

fn incoming(listener: std::os::unix::net::UnixListener, what: &'static str) -> Result<UnixListenerStream, NodeError> {
    let listener = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
    Ok(UnixListenerStream::new(listener.map_err(|error| NodeError::Inherited { what, error })?))
}

async fn until(mut stopped: watch::Receiver<bool>) {
    // The sender lives as long as `run`: an error here means that it ended.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

fn ended_early(ended: Result<Result<(), tonic::transport::Error>, tokio::task::JoinError>) -> Result<End, NodeError> {
    match ended {
        Ok(Err(error)) => Err(NodeError::Server(error)),
        Ok(Ok(())) | Err(_) => Ok(End::Stopped),
    }
}
