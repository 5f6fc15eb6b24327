//! How the kubelet learns of this driver: the plugin registration service, without a sidecar container.
//!
//! The kubelet finds the socket in its plugins_registry directory, asks GetInfo (one second), calls NodeGetInfo on the
//! CSI socket and says here how it went. A socket with a new inode makes it register again: so a refusal ends the
//! worker with a code of its own, and the broker binds anew.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use crate::csi::proto::registration::registration_server::Registration;
use crate::csi::proto::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use crate::request::DRIVER;

/// The registration service.
#[derive(Debug)]
pub struct RegistrationService {
    endpoint: String,
    registered: Arc<AtomicBool>,
    refused: mpsc::Sender<String>,
}

impl RegistrationService {
    /// `endpoint` is the CSI socket as a path on the host. `registered` follows what the kubelet says; a refusal is
    /// sent to `refused`.
    pub fn new(endpoint: String, registered: Arc<AtomicBool>, refused: mpsc::Sender<String>) -> Self {
        Self { endpoint, registered, refused }
    }
}

#[tonic::async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: DRIVER.to_owned(),
            endpoint: self.endpoint.clone(),
            // The CSI version as the kubelet counts it: "1.0.0", as every driver's registrar says.
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let said = request.into_inner();
        self.registered.store(said.plugin_registered, Ordering::Relaxed);
        if said.plugin_registered {
            tracing::info!("the kubelet registered this driver");
        } else {
            tracing::error!(error = said.error, "the kubelet refused to register this driver; trying again");
            // Full means that a refusal is on its way already.
            let _ = self.refused.try_send(said.error);
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
