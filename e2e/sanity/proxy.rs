//! Between the suite and the driver: turns each request into the one a kubelet would send for a pod's inline volume.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::lab::kubelet::{Kubelet, PodSpec, dial};
use sealmount::csi::proto::csi::identity_client::IdentityClient;
use sealmount::csi::proto::csi::identity_server::Identity;
use sealmount::csi::proto::csi::node_server::Node;
use sealmount::csi::proto::csi::*;

/// The one volume of the pod.
const VOLUME: &str = "creds";

/// The proxy, for one pod.
#[derive(Clone)]
pub(crate) struct Proxy(Arc<Inner>);

struct Inner {
    kubelet: Kubelet,
    pod: PodSpec,
    /// The only target path the suite uses.
    suite_target: PathBuf,
}

impl Proxy {
    /// For the volume of `pod`; `suite_target` stands for its target path.
    pub(crate) fn new(kubelet: Kubelet, pod: PodSpec, suite_target: PathBuf) -> Self {
        Self(Arc::new(Inner { kubelet, pod, suite_target }))
    }

    /// The id a kubelet gives the volume.
    pub(crate) fn volume_id(&self) -> String {
        self.0.kubelet.request(&self.0.pod, VOLUME).volume_id
    }

    /// The suite's target becomes the kubelet's; any other path stays what it is.
    fn path(&self, path: &str) -> String {
        if Path::new(path) == self.0.suite_target {
            self.0.kubelet.target(&self.0.pod, VOLUME).display().to_string()
        } else {
            path.to_owned()
        }
    }
}

#[tonic::async_trait]
impl Identity for Proxy {
    async fn get_plugin_info(
        &self,
        request: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        IdentityClient::new(dial(&self.0.kubelet.endpoint()?).await?).get_plugin_info(request).await
    }

    async fn get_plugin_capabilities(
        &self,
        request: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let mut client = IdentityClient::new(dial(&self.0.kubelet.endpoint()?).await?);
        let mut reply = client.get_plugin_capabilities(request).await?;
        let service = plugin_capability::Service { r#type: plugin_capability::service::Type::ControllerService.into() };
        let capability = PluginCapability { r#type: Some(plugin_capability::Type::Service(service)) };
        reply.get_mut().capabilities.push(capability);
        Ok(reply)
    }

    async fn probe(&self, request: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        IdentityClient::new(dial(&self.0.kubelet.endpoint()?).await?).probe(request).await
    }
}

#[tonic::async_trait]
impl Node for Proxy {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let mut request = request.into_inner();
        request.target_path = self.path(&request.target_path);
        request.readonly = true;
        let as_kubelet = self.0.kubelet.request(&self.0.pod, VOLUME);
        request.volume_context.extend(as_kubelet.volume_context);
        self.0.kubelet.prepare(&self.0.pod, VOLUME);
        self.0.kubelet.csi().await?.node_publish_volume(request).await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let mut request = request.into_inner();
        request.target_path = self.path(&request.target_path);
        self.0.kubelet.csi().await?.node_unpublish_volume(request).await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let mut request = request.into_inner();
        request.volume_path = self.path(&request.volume_path);
        self.0.kubelet.csi().await?.node_get_volume_stats(request).await
    }

    async fn node_get_info(
        &self,
        request: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        self.0.kubelet.csi().await?.node_get_info(request).await
    }

    async fn node_get_capabilities(
        &self,
        request: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        self.0.kubelet.csi().await?.node_get_capabilities(request).await
    }

    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        self.0.kubelet.csi().await?.node_stage_volume(request).await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        self.0.kubelet.csi().await?.node_unstage_volume(request).await
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        self.0.kubelet.csi().await?.node_expand_volume(request).await
    }
}
