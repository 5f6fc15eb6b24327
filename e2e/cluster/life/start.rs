//! How fast pods start, many at once and one beside its like.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use super::namespace;
use crate::cluster::Cluster;
use crate::pods::{app, from_secret, pod, simple};

pub(super) async fn hundred(cluster: &mut Cluster) -> String {
    let (namespace, password) = namespace(cluster, "hundred").await;
    let items: Vec<Value> = (0..100).map(|number| simple(&format!("pod{number}"))).collect();
    let begun = Instant::now();
    cluster.kube.apply(&namespace, &json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()).await;
    cluster.kube.run(&format!("wait -n {namespace} pods --all --for=condition=Ready --timeout=300s")).await;
    let seconds = begun.elapsed().as_secs_f32();
    for ten in (0..100).step_by(10) {
        let names: Vec<String> = (ten..ten + 10).map(|number| format!("pod{number}")).collect();
        let reads = names.iter().map(|name| super::reads(cluster, &namespace, name, &password));
        futures_util::future::join_all(reads).await;
    }
    let standing = super::metric(cluster, "sealmount_standing_volumes").await;
    assert!(standing >= 100.0, "{standing}");
    format!("all ready after {seconds:.0} s, all read")
}

/// From the creation of a pod until its status says ready, then has it deleted.
async fn time_to_ready(api: &Api<Pod>, manifest: Value) -> Duration {
    let pod: Pod = serde_json::from_value(manifest).expect("a pod");
    let name = pod.metadata.name.clone().expect("a name");
    let begun = Instant::now();
    api.create(&PostParams::default(), &pod).await.expect("create the pod");
    let taken = loop {
        let status = api.get(&name).await.expect("get the pod").status.unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default();
        if conditions.iter().any(|it| it.type_ == "Ready" && it.status == "True") {
            break begun.elapsed();
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{name} is not ready");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    api.delete(&name, &DeleteParams::default()).await.expect("delete the pod");
    // Its end goes on beside the next pod's start, of whichever kind that is.
    tokio::time::sleep(Duration::from_millis(500)).await;
    taken
}

pub(super) async fn pairs(cluster: &mut Cluster) -> String {
    const PAIRS: usize = 30;
    let (namespace, _) = namespace(cluster, "pairs").await;
    let client = Client::try_default().await.expect("a client");
    let api: Api<Pod> = Api::namespaced(client, &namespace);
    let plain = |name: &str| {
        let volume = json!({"name": "db", "secret": {"secretName": "db", "defaultMode": 0o444}});
        pod(name, &[app(&["password"])], &[volume])
    };
    let ours = |name: &str| pod(name, &[app(&["password"])], &[from_secret("db", "db")]);
    let mut differences = Vec::new();
    let mut secret_times = Vec::new();
    for pair in 0..PAIRS {
        // Who is first changes, so that neither has the warmer caches.
        let (a, b) = if pair % 2 == 0 {
            let a = time_to_ready(&api, ours(&format!("ours{pair}"))).await;
            (a, time_to_ready(&api, plain(&format!("plain{pair}"))).await)
        } else {
            let b = time_to_ready(&api, plain(&format!("plain{pair}"))).await;
            (time_to_ready(&api, ours(&format!("ours{pair}"))).await, b)
        };
        differences.push(a.as_secs_f64() * 1000.0 - b.as_secs_f64() * 1000.0);
        secret_times.push(b.as_secs_f64() * 1000.0);
    }
    differences.sort_by(f64::total_cmp);
    secret_times.sort_by(f64::total_cmp);
    // The sign test's 95 % interval of a median of 30: the 10th and the 21st value.
    let (low, high) = (differences[9], differences[20]);
    let median = (differences[14] + differences[15]) / 2.0;
    format!(
        "median difference {median:+.0} ms (95 %: {low:+.0} to {high:+.0}) on {:.0} ms, {PAIRS} pairs",
        secret_times[PAIRS / 2]
    )
}
