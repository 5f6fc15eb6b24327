//! Pods in a sandbox of their own kernel: gVisor, as the RuntimeClass that a platform team lists.

use std::time::Duration;

use serde_json::{Value, json};

use crate::chart::{back, revision, rolled_out, upgrade};
use crate::cluster::{Cluster, until};
use crate::images;
use crate::pods::{from_secret, pod};
use crate::runner::{Check, check};

pub(crate) static CHECKS: &[Check] = &[check!("gVisor: refused unless listed; the application alone reads", sandboxed)];

const READY: Duration = Duration::from_secs(60);
const NAMES: [&str; 3] = ["app", "proxy", "root"];

/// A container of the sandbox that waits for orders.
fn container(name: &str, mounts: Value) -> Value {
    let uid = match name {
        "app" => 1000,
        "proxy" => 1337,
        _ => 0,
    };
    json!({
        "name": name, "image": images::APP, "imagePullPolicy": "Never", "command": ["/bin/app", "pause"],
        "securityContext": {"runAsUser": uid}, "volumeMounts": mounts,
    })
}

fn in_sandbox(mut pod: Value) -> Value {
    pod["spec"]["runtimeClassName"] = json!("gvisor");
    pod
}

/// The pod with sealmount: only the application mounts the volume.
fn sealed(name: &str) -> Value {
    let mount = |name: &str| if name == "app" { json!([{"name": "db", "mountPath": "/s"}]) } else { json!([]) };
    let containers: Vec<_> = NAMES.iter().map(|name| container(name, mount(name))).collect();
    in_sandbox(pod(name, &containers, &[from_secret("db", "db")]))
}

async fn sandboxed(cluster: &mut Cluster) -> String {
    let first = cluster.canary();
    let namespace = cluster.namespace("gvisor", "privileged").await;
    cluster.secret(&namespace, "db", &[("password", &first)]).await;
    let class = json!({
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "gvisor"}, "handler": "runsc",
    });
    cluster.kube.apply("default", &class.to_string()).await;

    let field = "SM141 spec.runtimeClassName: runtime class gvisor is not listed";
    match cluster.kube.try_apply(&namespace, &sealed("unlisted").to_string()).await {
        Err(error) => assert!(error.contains(field), "{error}"),
        Ok(_) => drop(cluster.kube.event(&namespace, "unlisted", field, READY).await),
    }
    cluster.kube.run(&format!("delete pod -n {namespace} unlisted --ignore-not-found --grace-period=0")).await;

    // Without: an agent's way, a volume that all three share.
    let shared = json!([{"name": "shared", "mountPath": "/s"}]);
    let mut usual: Vec<_> = NAMES.iter().map(|name| container(name, shared.clone())).collect();
    usual[0]["command"] = json!(["/bin/busybox", "sh", "-c", "echo known > /s/password; exec /bin/app pause"]);
    usual[0]["securityContext"]["runAsUser"] = json!(0);
    let usual = in_sandbox(pod("usual", &usual, &[json!({"name": "shared", "emptyDir": {}})]));
    cluster.kube.apply(&namespace, &usual.to_string()).await;
    cluster.kube.ready(&namespace, "usual", READY).await;
    for name in NAMES {
        let read = cluster.reads(&namespace, "usual", name, "/s/password").await;
        assert_eq!(read.as_deref().map(str::trim), Ok("known"), "{name} reads what all share");
    }

    let before = revision().await;
    upgrade(cluster, &["--set", "config.policy.runtime_classes.gvisor.gate=off"]).await;
    rolled_out(cluster).await;
    cluster.kube.apply(&namespace, &sealed("sealed").to_string()).await;
    cluster.kube.ready(&namespace, "sealed", READY).await;
    let kernel = cluster.kube.exec(&namespace, "sealed", "app", &["cat", "/proc/version"]).await;
    assert!(
        !kernel.out.contains(std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release").trim()),
        "not in a sandbox: {kernel:?}"
    );
    assert_eq!(cluster.reads(&namespace, "sealed", "app", "/s/password").await, Ok(first.clone()));
    let mut denied = Vec::new();
    for name in ["proxy", "root"] {
        let read = cluster.reads(&namespace, "sealed", name, "/s/password").await;
        assert!(read.expect_err("no mount, no file").contains("No such file"), "{name}");
        denied.push(format!("{name} ENOENT"));
        let found = cluster.kube.exec(&namespace, "sealed", name, &["/bin/app", "roots", "/s/password"]).await;
        assert!(!found.out.contains(&first), "{name} found it by /proc: {found:?}");
    }
    let second = cluster.canary();
    cluster.secret(&namespace, "db", &[("password", &second)]).await;
    until("the sandbox sees the new content", cluster.times.republished(), async || {
        cluster.reads(&namespace, "sealed", "app", "/s/password").await == Ok(second.clone())
    })
    .await;
    cluster.kube.delete_pod(&namespace, "sealed").await;
    back(cluster, &before).await;
    format!("rotation seen inside; {}", denied.join(", "))
}
