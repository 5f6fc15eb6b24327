//! One exhaustive match from what went wrong to a gRPC code, since the code decides what the kubelet does next.
//!
//! After `Canceled`, `DeadlineExceeded`, `Unavailable`, `ResourceExhausted` and `Aborted` the kubelet is uncertain and
//! is sure to unpublish; after any other code of a first publish it forgets the volume and never unpublishes
//! (kubernetes, pkg/volume/csi/csi_client.go, `isFinalError`). So a code of the second kind is only given where
//! nothing is left behind. The message may become an Event: it holds no secret and no body of a reply.

use tonic::{Code, Status};

use crate::broker::client::ClientError;
use crate::broker::wire::Denied;
use crate::pods::PodsError;
use crate::publish::PublishError;
use crate::request::{Fault, summary};
use crate::source::Blame;

/// The faults of a request that could not be parsed.
pub fn malformed(faults: &[Fault]) -> Status {
    Status::invalid_argument(summary(faults))
}

/// What the kubelet is told.
pub fn of(error: &PublishError) -> Status {
    Status::new(code(error), error.to_string())
}

fn code(error: &PublishError) -> Code {
    match error {
        PublishError::Refused(_) => Code::FailedPrecondition,
        PublishError::Source(error) => match error.blame {
            Blame::Pod => Code::InvalidArgument,
            Blame::Platform => Code::FailedPrecondition,
            Blame::Away(_) => Code::Unavailable,
        },
        PublishError::Pods(error) => match **error {
            PodsError::Away(_) | PodsError::Unknown(_) => Code::Unavailable,
            PodsError::Replaced { .. } | PodsError::Elsewhere { .. } | PodsError::Unreadable { .. } => {
                Code::FailedPrecondition
            }
        },
        PublishError::Broker(error) => match error {
            // The commit may have been done: only an unpublish makes sure.
            ClientError::Gone => Code::Unavailable,
            ClientError::Work(_) => Code::ResourceExhausted,
            ClientError::Denied(denied) => denied_code(denied),
        },
        PublishError::NoConfig | PublishError::Crowded => Code::Unavailable,
        PublishError::Unpublished | PublishError::Lost => Code::Aborted,
    }
}

fn denied_code(denied: &Denied) -> Code {
    match denied {
        Denied::Busy | Denied::Timeout => Code::Aborted,
        Denied::NodeFull { .. } => Code::ResourceExhausted,
        Denied::TooLarge { .. } | Denied::Invalid(_) => Code::InvalidArgument,
        Denied::NotPrepared(_) | Denied::Foreign(_) | Denied::OwnerChanged => Code::FailedPrecondition,
        Denied::Source { .. } | Denied::System { .. } => Code::Internal,
    }
}
