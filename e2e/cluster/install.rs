//! Installs the driver as a platform team does.

use crate::cluster::Cluster;
use crate::runner::{Check, check};

pub(crate) static CHECKS: &[Check] = &[check!("helm install with default values", default_values)];

async fn default_values(cluster: &mut Cluster) -> String {
    let chart = cluster.project.join("deploy/chart").display().to_string();
    let args = ["install", "sealmount", &chart, "-n", "sealmount-system", "--create-namespace"];
    let output = crate::kube::run("helm", &args, "").await;
    assert!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    let driver = cluster.driver().await;
    driver["metadata"]["name"].as_str().unwrap().to_owned()
}
