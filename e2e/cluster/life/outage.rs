//! Something the driver or the kubelet talks to is away.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{MOUNT, READY, namespace, reads, restarts};
use crate::cluster::{Cluster, is_ready, until};
use crate::install::payments;
use crate::pods::{app, from_vault, pod, simple};

fn vault_pod(name: &str) -> serde_json::Value {
    let volume = from_vault("db", "password: secret/data/payments/db#password");
    let mut it = pod(name, &[app(&["password"])], &[volume]);
    it["spec"]["serviceAccountName"] = json!("api");
    it
}

pub(super) async fn vault_at_start(cluster: &mut Cluster) -> String {
    payments(cluster).await;
    let password = cluster.canary();
    cluster.bao.write_kv2("secret", "payments/db", &json!({"password": password})).await;
    cluster.bao.stop();
    let begun = Instant::now();
    cluster.kube.apply("payments", &vault_pod("waits").to_string()).await;
    let event = cluster.kube.event("payments", "waits", "SM3", Duration::from_secs(90)).await;
    assert!(event.message.contains("prod"), "the event names the connection: {}", event.message);
    let left = cluster.times.outage.saturating_sub(begun.elapsed());
    tokio::time::sleep(left).await;
    let waits = cluster.kube.pod("payments", "waits").await.expect("the pod");
    assert!(!is_ready(&waits));
    cluster.bao.start_again().await;
    let back = Instant::now();
    cluster.kube.ready("payments", "waits", Duration::from_secs(180)).await;
    let seconds = back.elapsed().as_secs_f32();
    reads(cluster, "payments", "waits", &password).await;
    format!("{}; ready {seconds:.0} s after it was back", super::code(&event.message))
}

pub(super) async fn vault_later(cluster: &mut Cluster) -> String {
    payments(cluster).await;
    let password = cluster.canary();
    cluster.bao.write_kv2("secret", "payments/db", &json!({"password": password})).await;
    cluster.kube.apply("payments", &vault_pod("keeps").to_string()).await;
    cluster.kube.ready("payments", "keeps", READY).await;
    cluster.bao.stop();
    let begun = Instant::now();
    cluster.kubelet.stop();
    cluster.kubelet.start();
    until("the node is ready again", Duration::from_secs(60), async || {
        cluster.kube.run("get node node1").await.contains(" Ready")
    })
    .await;
    // The node's old status says Ready before the new kubelet serves.
    until("the kubelet runs commands in containers", Duration::from_secs(60), async || {
        cluster.kube.exec("payments", "keeps", "app", &["kill", "-TERM", "1"]).await.code == 0
    })
    .await;
    // Its first sync after a restart publishes every volume anew; only then does it start containers again.
    until("the container runs again", cluster.times.republished(), async || {
        let pod = cluster.kube.pod("payments", "keeps").await.unwrap_or_default();
        restarts(&pod) == 1 && is_ready(&pod)
    })
    .await;
    let seconds = begun.elapsed().as_secs_f32();
    reads(cluster, "payments", "keeps", &password).await;
    let limit = cluster.times.stale_after + cluster.times.republished();
    cluster.kube.event("payments", "keeps", "SealmountStale", limit).await;
    let stale = super::metric(cluster, "sealmount_stale_volumes").await;
    assert!(stale >= 1.0, "the metric counts it: {stale}");
    tokio::time::sleep(cluster.times.outage.saturating_sub(begun.elapsed())).await;
    reads(cluster, "payments", "keeps", &password).await;
    cluster.bao.start_again().await;
    let next = cluster.canary();
    cluster.bao.write_kv2("secret", "payments/db", &json!({"password": next})).await;
    until("the new content is there", Duration::from_secs(120), async || {
        cluster.reads("payments", "keeps", "app", &format!("{MOUNT}/password")).await == Ok(next.clone())
    })
    .await;
    format!("kubelet and container restarted within {seconds:.0} s, content stayed")
}

pub(super) async fn containerd(cluster: &mut Cluster) -> String {
    let (namespace, password) = namespace(cluster, "runtime").await;
    cluster.kube.apply(&namespace, &simple("stays").to_string()).await;
    cluster.kube.ready(&namespace, "stays", READY).await;
    cluster.containerd.stop();
    cluster.containerd.start();
    until("containerd serves", READY, async || {
        cluster.reads(&namespace, "stays", "app", &format!("{MOUNT}/password")).await.is_ok()
    })
    .await;
    reads(cluster, &namespace, "stays", &password).await;
    cluster.kube.apply(&namespace, &simple("next").to_string()).await;
    cluster.kube.ready(&namespace, "next", Duration::from_secs(120)).await;
    reads(cluster, &namespace, "next", &password).await;
    let stays = cluster.kube.pod(&namespace, "stays").await.expect("the pod");
    assert_eq!(restarts(&stays), 0);
    "the pod ran on; the next one starts".to_owned()
}

pub(super) async fn api_server(cluster: &mut Cluster) -> String {
    let (namespace, password) = namespace(cluster, "control").await;
    payments(cluster).await;
    let of_vault = cluster.canary();
    cluster.bao.write_kv2("secret", "payments/db", &json!({"password": of_vault})).await;
    cluster.kube.apply(&namespace, &simple("stays").to_string()).await;
    cluster.kube.apply("payments", &vault_pod("stays").to_string()).await;
    let mut pods = Vec::new();
    for (namespace, expected) in [(namespace.as_str(), &password), ("payments", &of_vault)] {
        let pod = cluster.kube.ready(namespace, "stays", READY).await;
        let id = pod["status"]["containerStatuses"][0]["containerID"].as_str().expect("an id");
        pods.push((id.trim_start_matches("containerd://").to_owned(), expected));
    }
    cluster.apiserver.stop();
    // kubectl has nobody to ask; the runtime has.
    let begun = Instant::now();
    let mut reads_in_outage = 0;
    while begun.elapsed() < cluster.times.outage {
        let path = format!("{MOUNT}/password");
        for (id, expected) in &pods {
            let args = ["-n", "k8s.io", "tasks", "exec", "--exec-id", "look", id, "cat", &path];
            let output = crate::kube::run("ctr", &args, "").await;
            let error = String::from_utf8_lossy(&output.stderr);
            assert_eq!(String::from_utf8_lossy(&output.stdout), expected.as_str(), "{error}");
        }
        reads_in_outage += 1;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    cluster.apiserver.start();
    until("the API server serves", Duration::from_secs(60), async || {
        cluster.kube.try_run("get --raw /readyz").await.is_ok_and(|it| it == "ok")
    })
    .await;
    cluster.kube.apply(&namespace, &simple("next").to_string()).await;
    cluster.kube.ready(&namespace, "next", Duration::from_secs(120)).await;
    reads(cluster, &namespace, "next", &password).await;
    for namespace in [namespace.as_str(), "payments"] {
        let stays = cluster.kube.pod(namespace, "stays").await.expect("the pod");
        assert_eq!(restarts(&stays), 0);
    }
    format!(
        "{} s; from Secret and Vault read {reads_in_outage} times meanwhile; the next pod starts",
        cluster.times.outage.as_secs()
    )
}
