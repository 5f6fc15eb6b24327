//! Where pod facts come from.

use std::sync::Arc;

use crate::policy::facts::PodFacts;
use crate::request::{PodRef, PodUid};

/// Why there are no facts of a pod.
#[derive(Debug, thiserror::Error)]
pub enum PodsError {
    /// The place facts come from is away: try again.
    #[error("pod facts are not to be had now: {0}")]
    Away(String),
    /// No such pod (yet).
    #[error("pod {0} is not known on this node")]
    Unknown(PodRef),
    /// Another pod has the name now.
    #[error("pod {pod} is another pod now (UID {found})")]
    Replaced {
        /// Who was asked for.
        pod: PodRef,
        /// Who is there.
        found: PodUid,
    },
    /// It is bound to another node.
    #[error("pod {pod} is bound to node {node}")]
    Elsewhere {
        /// Who was asked for.
        pod: PodRef,
        /// Its node.
        node: String,
    },
    /// A pod's description could not be read.
    #[error("pod {pod}: {fault}")]
    Unreadable {
        /// Who was asked for.
        pod: PodRef,
        /// What is wrong with it.
        fault: String,
    },
}

/// A source of pod facts, with its cache.
#[derive(Debug)]
pub struct Pods {}

impl Pods {
    /// The facts of `pod`, from the cache if a watch holds it.
    pub async fn get(&self, pod: &PodRef) -> Result<Arc<PodFacts>, PodsError> {
        Err(PodsError::Unknown(pod.clone()))
    }
}
