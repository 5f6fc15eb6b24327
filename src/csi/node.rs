//! The Node service: parse, hand to [`crate::publish`], answer. Each failed call is logged here, once.

use std::sync::Arc;

use tonic::{Code, Request, Response, Status};

use super::proto::csi::node_server::Node;
use super::proto::csi::node_service_capability::rpc::Type as RpcType;
use super::proto::csi::node_service_capability::{Rpc, Type};
use super::proto::csi::volume_usage::Unit;
use super::proto::csi::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse,
    NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
    NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest,
    NodeUnstageVolumeResponse, VolumeUsage,
};
use super::{parse, status};
use crate::metrics::{Metrics, Outcome};
use crate::publish::{PublishError, Publisher};

/// The service of one worker.
#[allow(missing_debug_implementations)] // its publisher holds logins
pub struct NodeService {
    /// What a call is checked against.
    pub node: parse::Node,
    /// This node's name, as the kubelet knows it.
    pub name: String,
    /// The story.
    pub publisher: Arc<Publisher>,
    /// Counts outcomes.
    pub metrics: Metrics,
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let parsed = match parse::publish(request.into_inner(), &self.node) {
            Ok(parsed) => parsed,
            Err(faults) => {
                for fault in &faults {
                    self.metrics.refusal(fault.code);
                }
                let answer = status::malformed(&faults);
                tracing::warn!(code = ?answer.code(), "publish: {}", answer.message());
                self.metrics.publish(Outcome::Refused);
                return Err(answer);
            }
        };
        let (pod, volume) = (parsed.pod.clone(), parsed.volume.name.clone());
        match self.publisher.publish(parsed).await {
            Ok(outcome) => {
                self.metrics.publish(outcome);
                Ok(Response::new(NodePublishVolumeResponse {}))
            }
            Err(error) => {
                let answer = status::of(&error);
                tracing::warn!(%pod, %volume, code = ?answer.code(), "publish: {}", answer.message());
                let outcome = outcome(answer.code());
                // Refusals of the rules are counted where they are found, also for volumes that stand.
                if let PublishError::Source(source) = &error
                    && outcome == Outcome::Refused
                {
                    self.metrics.refusal(source.fault.code);
                }
                self.metrics.publish(outcome);
                Err(answer)
            }
        }
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let volume = parse::unpublish(&request.into_inner(), &self.node).map_err(|faults| {
            let answer = status::malformed(&faults);
            tracing::warn!(code = ?answer.code(), "unpublish: {}", answer.message());
            answer
        })?;
        match self.publisher.unpublish(volume.clone()).await {
            Ok(()) => Ok(Response::new(NodeUnpublishVolumeResponse {})),
            Err(error) => {
                let answer = status::of(&error);
                tracing::warn!(%volume, code = ?answer.code(), "unpublish: {}", answer.message());
                Err(answer)
            }
        }
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        if request.volume_id.is_empty() || request.volume_path.is_empty() {
            return Err(Status::invalid_argument("volume_id and volume_path are required"));
        }
        // What is not a path of a volume here is not known, which comes before what is wrong with it (csi-sanity).
        let unknown = || Status::not_found("no such volume is published at this path");
        let volume = parse::stats(&request, &self.node).ok_or_else(unknown)?;
        let usage = self.publisher.usage(&volume).await.map_err(|error| Status::unavailable(error.to_string()))?;
        let found = usage.ok_or_else(unknown)?;
        let (inodes, most) = found.inodes;
        Ok(Response::new(NodeGetVolumeStatsResponse {
            usage: vec![usage_of(Unit::Bytes, found.size, found.bytes), usage_of(Unit::Inodes, most, inodes)],
        }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let stats = Rpc { r#type: RpcType::GetVolumeStats.into() };
        Ok(Response::new(NodeGetCapabilitiesResponse {
            capabilities: vec![NodeServiceCapability { r#type: Some(Type::Rpc(stats)) }],
        }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse { node_id: self.name.clone(), max_volumes_per_node: 0 }))
    }

    async fn node_stage_volume(
        &self,
        _: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        Err(Status::unimplemented("inline volumes are not staged"))
    }

    async fn node_unstage_volume(
        &self,
        _: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        Err(Status::unimplemented("inline volumes are not staged"))
    }

    async fn node_expand_volume(
        &self,
        _: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        Err(Status::unimplemented("a volume's size follows its content"))
    }
}

fn usage_of(unit: Unit, total: u64, used: u64) -> VolumeUsage {
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let available = number(total.saturating_sub(used));
    VolumeUsage { unit: unit.into(), total: number(total), used: number(used), available }
}

fn outcome(code: Code) -> Outcome {
    match code {
        Code::FailedPrecondition | Code::InvalidArgument => Outcome::Refused,
        _ => Outcome::Failed,
    }
}
