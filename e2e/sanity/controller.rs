//! The stub that gives the suite a volume. It tests nothing and is tested by nothing.

use tonic::{Request, Response, Status};

/// Generated from `controller.proto`, for this test only.
#[allow(missing_docs, clippy::all, clippy::pedantic, missing_debug_implementations, unreachable_pub, dead_code)]
#[allow(unused_qualifications)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/sanity/csi.v1.rs"));
}

use proto::controller_server::{Controller, ControllerServer};
use proto::controller_service_capability::rpc;
use proto::{
    ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse, ControllerServiceCapability,
    CreateVolumeRequest, CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse, Volume,
};

/// Every volume it creates is the one inline volume of the test's pod.
pub(crate) struct Stub {
    volume_id: String,
}

impl Stub {
    /// Answers with this volume id.
    pub(crate) fn new(volume_id: String) -> Self {
        Self { volume_id }
    }

    /// For a server.
    pub(crate) fn service(self) -> ControllerServer<Self> {
        ControllerServer::new(self)
    }
}

#[tonic::async_trait]
impl Controller for Stub {
    async fn create_volume(&self, _: Request<CreateVolumeRequest>) -> Result<Response<CreateVolumeResponse>, Status> {
        let volume = Volume { volume_id: self.volume_id.clone(), ..Volume::default() };
        Ok(Response::new(CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(&self, _: Request<DeleteVolumeRequest>) -> Result<Response<DeleteVolumeResponse>, Status> {
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let create = proto::controller_service_capability::Rpc { r#type: rpc::Type::CreateDeleteVolume.into() };
        let capability =
            ControllerServiceCapability { r#type: Some(proto::controller_service_capability::Type::Rpc(create)) };
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities: vec![capability] }))
    }
}
