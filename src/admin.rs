//! What root on the node may ask: `sealmount status`, over the CSI socket, which only root can open. The CSI
//! specification wants no other file beside that socket.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::transport::Endpoint;
use tonic::{Request, Response, Status};

use crate::health::Health;
use crate::publish::{Publisher, VolumeStatus, unix};

/// How long the broker may take to answer. Its longest verb copies one volume.
const BROKER_TIME: Duration = Duration::from_secs(2);
/// How long the answer as a whole may take: longer than the broker's, shorter than a probe's `timeoutSeconds` of 5.
pub const ANSWER_TIME: Duration = Duration::from_secs(4);

/// `sealmount.v1`, generated from `proto/admin.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, missing_debug_implementations, unreachable_pub)]
#[allow(unused_qualifications)]
pub mod proto {
    tonic::include_proto!("sealmount.v1");
}

use proto::admin_client::AdminClient;
use proto::admin_server::Admin;
use proto::{StatusRequest, StatusResponse, Volume};

/// The service of one worker.
#[allow(missing_debug_implementations)] // its publisher holds logins
pub struct AdminService {
    /// This node's name.
    pub node: String,
    /// The volumes.
    pub publisher: Arc<Publisher>,
    /// The worker's own state.
    pub health: Arc<Health>,
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.node.clone(),
            worker_restarts: self.health.worker_restarts,
            registered: self.health.registered.load(Ordering::Relaxed),
            config: self.health.config_fault(),
            config_in_force: self.publisher.has_config(),
            broker: self.broker_fault().await,
            volumes: self.publisher.status().into_iter().map(volume).collect(),
        }))
    }
}

impl AdminService {
    /// Empty, or why the broker does not answer.
    async fn broker_fault(&self) -> String {
        match timeout(BROKER_TIME, self.publisher.broker_answers()).await {
            Ok(Ok(())) => String::new(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", BROKER_TIME.as_secs()),
        }
    }
}

fn volume(status: VolumeStatus) -> Volume {
    let (failing_since, failing) = status.failing.map_or((0, String::new()), |(since, text)| (unix(since), text));
    Volume {
        namespace: status.pod.namespace,
        pod: status.pod.name,
        pod_uid: status.pod.uid.to_string(),
        volume: status.volume.name.to_string(),
        owner: status.owner.uid,
        connection: status.connection.unwrap_or_default(),
        since: unix(status.since),
        confirmed: unix(status.confirmed),
        failing_since,
        failing,
        refused: status.refused.unwrap_or_default(),
        stale: status.stale,
        bytes: status.bytes,
        generation: status.generation,
    }
}

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nobody serves the socket, or the caller is not root.
    #[error("cannot reach the driver at {socket} (is it running, and are you root?): {why}")]
    Unreachable {
        /// The socket.
        socket: String,
        /// What the system said.
        why: String,
    },
    /// The socket takes calls and nobody answers.
    #[error("no answer from the worker within {} s", .0.as_secs())]
    Silent(Duration),
    /// The driver answered with an error.
    #[error("the driver answered: {0}")]
    Answer(String),
}

/// Asks the driver behind `socket`, which must answer `within` this time.
pub async fn status(socket: &Path, within: Duration) -> Result<StatusResponse, AdminError> {
    timeout(within, ask(socket)).await.unwrap_or(Err(AdminError::Silent(within)))
}

async fn ask(socket: &Path) -> Result<StatusResponse, AdminError> {
    let path = socket.to_owned();
    let connect = tower::service_fn(move |_| {
        let path = path.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    // The address is never used: the connector goes to the socket.
    let channel = Endpoint::from_static("http://localhost").connect_with_connector(connect).await.map_err(|error| {
        let why = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        AdminError::Unreachable { socket: socket.display().to_string(), why }
    })?;
    let answer = AdminClient::new(channel).status(StatusRequest {}).await;
    Ok(answer.map_err(|status| AdminError::Answer(status.message().to_owned()))?.into_inner())
}
