//! The official suite for CSI drivers, beside the cluster: the same program on paths of its own.

use crate::cluster::Cluster;
use crate::runner::{Check, check};
use crate::sanity;

pub(crate) static CHECKS: &[Check] =
    &[check!("csi-sanity passes, but for what a node-only driver cannot have", passes)];

async fn passes(cluster: &mut Cluster) -> String {
    let summary = sanity::run(&cluster.programs.path("csi-sanity")).await;
    for rewrite in sanity::REWRITES {
        println!("       rewritten: {rewrite}");
    }
    let mut reasons: Vec<(&str, usize)> = Vec::new();
    for (_, reason) in &summary.skipped {
        match reasons.iter_mut().find(|(known, _)| known == reason) {
            Some((_, count)) => *count += 1,
            None => reasons.push((reason, 1)),
        }
    }
    for (reason, count) in reasons {
        println!("       skipped {count}: {reason}");
    }
    assert!(summary.failed.is_empty(), "{:#?}", summary.failed);
    // A suite that found nothing to run proves nothing.
    assert!(summary.passed >= 17, "only {} tests ran", summary.passed);
    format!("{} passed, {} skipped", summary.passed, summary.skipped.len())
}
