//! Every attack of the analysis, tried by a real Envoy and its like in real pods: the same in the usual way, against a
//! Secret volume in the application only, and against sealmount.

mod debug;
mod misbuilt;
mod ordinary;
mod refused;
mod scene;
mod table;

use crate::cluster::Cluster;
use crate::runner::{Check, check};

pub(crate) use refused::WAIVED;
pub(crate) use table::into_readme;

pub(crate) static CHECKS: &[Check] = &[
    check!("attacks in an ordinary pod with Envoy, twice", ordinary::run),
    check!("attacks in pods that are built so that they could succeed", misbuilt::run),
    check!("attacks that need a refusal succeed where it is waived", refused::run),
    check!("attacks by debug containers are refused, and told where they are not", debug::run),
    check!("the table of the attacks is written", written),
];

/// The attacks of the analysis.
const LAST: u32 = 13;

async fn written(cluster: &mut Cluster) -> String {
    table::write(&cluster.project, &cluster.version, CHECKS.len() - 1, LAST)
}
