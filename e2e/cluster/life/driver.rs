//! The driver goes and comes; pods notice nothing, or wait.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{MOUNT, READY, namespace, reads, restarts, set_driver};
use crate::cluster::{Cluster, SYSTEM, until};
use crate::pods::{app, from_secret, simple, spec};

const CSI_SOCKET: &str = "/var/lib/kubelet/plugins/csi.sealmount.io/csi.sock";

pub(super) async fn deleted_meanwhile(cluster: &mut Cluster) -> String {
    let (namespace, _) = namespace(cluster, "away").await;
    cluster.kube.apply(&namespace, &simple("ends").to_string()).await;
    cluster.kube.ready(&namespace, "ends", READY).await;
    set_driver(cluster, false).await;
    cluster.kube.run(&format!("delete pod -n {namespace} ends --wait=false")).await;
    until("the containers are gone", READY, async || {
        let pod = cluster.kube.pod(&namespace, "ends").await.expect("it waits for the driver");
        !pod["status"]["containerStatuses"][0]["state"]["terminated"].is_null()
    })
    .await;
    // The kubelet has tried to unmount by now; without the driver it cannot.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(cluster.kube.pod(&namespace, "ends").await.is_some(), "it ended without the driver");
    set_driver(cluster, true).await;
    let begun = Instant::now();
    until("the pod is gone", Duration::from_secs(150), async || cluster.kube.pod(&namespace, "ends").await.is_none())
        .await;
    format!("gone {:.1} s after the driver was back", begun.elapsed().as_secs_f32())
}

pub(super) async fn before_the_driver(cluster: &mut Cluster) -> String {
    let (namespace, password) = namespace(cluster, "early").await;
    set_driver(cluster, false).await;
    cluster.kube.apply(&namespace, &simple("early").to_string()).await;
    let message = "driver name csi.sealmount.io not found in the list of registered CSI drivers";
    cluster.kube.event(&namespace, "early", message, READY).await;
    assert!(include_str!("../../../README.md").contains(message), "the README's table has it");
    set_driver(cluster, true).await;
    let begun = Instant::now();
    cluster.kube.ready(&namespace, "early", Duration::from_secs(150)).await;
    let seconds = begun.elapsed().as_secs_f32();
    reads(cluster, &namespace, "early", &password).await;
    format!("ready {seconds:.1} s after the driver was")
}

/// A Deployment of `count` pods, each with the volume.
fn deployment(name: &str, count: usize) -> Value {
    let mut it = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": count, "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}},
        },
    });
    it["spec"]["template"]["spec"] = spec(&[app(&["password"])], &[from_secret("db", "db")]);
    it
}

async fn all_ready(cluster: &Cluster, namespace: &str, name: &str, limit: Duration) {
    let wait = format!("rollout status -n {namespace} deployment/{name} --timeout={}s", limit.as_secs());
    cluster.kube.run(&wait).await;
}

async fn list(cluster: &Cluster, namespace: &str, name: &str) -> Vec<Value> {
    let list = cluster.kube.json(&format!("get pods -n {namespace} -l app={name}")).await;
    list["items"].as_array().cloned().unwrap_or_default()
}

pub(super) async fn killed_in_a_start(cluster: &mut Cluster) -> String {
    let (namespace, password) = namespace(cluster, "start").await;
    let begun = Instant::now();
    cluster.kube.apply(&namespace, &deployment("many", 20).to_string()).await;
    let mut ready = 0;
    until("some of the pods have their volume", READY, async || {
        ready = list(cluster, &namespace, "many").await.iter().filter(|it| crate::cluster::is_ready(it)).count();
        ready >= 3
    })
    .await;
    assert!(ready < 20, "all had started: nothing was interrupted");
    cluster.kube.run(&format!("delete pods -n {SYSTEM} --all --grace-period=0 --force --wait=false")).await;
    all_ready(cluster, &namespace, "many", Duration::from_secs(240)).await;
    let seconds = begun.elapsed().as_secs_f32();
    let pods = list(cluster, &namespace, "many").await;
    assert_eq!(pods.len(), 20);
    for pod in &pods {
        assert_eq!(restarts(pod), 0);
        reads(cluster, &namespace, pod["metadata"]["name"].as_str().expect("a name"), &password).await;
    }
    format!("{ready} were ready; all 20 after {seconds:.0} s, none restarted")
}

pub(super) async fn hangs(cluster: &mut Cluster) -> String {
    let (namespace, _) = namespace(cluster, "hangs").await;
    cluster.kube.apply(&namespace, &deployment("standing", 1).to_string()).await;
    all_ready(cluster, &namespace, "standing", READY).await;
    let before = state(cluster, &namespace, "standing").await;
    // The half that mounts. That the probe asks both halves is tried on the program itself (e2e/node/life.rs).
    let driver = cluster.driver().await;
    let pid = *crate::chart::processes(&driver).keys().next().expect("a broker");
    let begun = Instant::now();
    kill_process(Pid::from_raw(pid.cast_signed()).expect("a process"), Signal::STOP).expect("stop it");
    cluster.kube.apply(&namespace, &simple("waits").to_string()).await;
    let name = driver["metadata"]["name"].as_str().expect("a name");
    // Four times its period and timeout, the time to end, and a busy machine.
    until("the container runs again", Duration::from_secs(180), async || {
        let now = cluster.kube.pod(SYSTEM, name).await.unwrap_or_default();
        restarts(&now) == restarts(&driver) + 1 && crate::cluster::is_ready(&now)
    })
    .await;
    let seconds = begun.elapsed().as_secs_f32();
    let event = cluster.kube.event(SYSTEM, name, "Liveness probe failed", READY).await;
    assert_eq!(event.reason, "Unhealthy");
    cluster.kube.ready(&namespace, "waits", Duration::from_secs(150)).await;
    assert_eq!(state(cluster, &namespace, "standing").await, before);
    format!("runs again after {seconds:.0} s")
}

/// What must not change: the pod, its container, and the file itself, by inode and generation.
async fn state(cluster: &Cluster, namespace: &str, name: &str) -> BTreeMap<String, String> {
    let mut states = BTreeMap::new();
    for pod in list(cluster, namespace, name).await {
        let pod_name = pod["metadata"]["name"].as_str().expect("a name");
        let script = format!("stat -L -c '%i %Y' {MOUNT}/password; sha256sum < {MOUNT}/password");
        let ran = cluster.kube.exec(namespace, pod_name, "app", &["sh", "-c", &script]).await;
        assert_eq!(ran.code, 0, "{pod_name}: {}", ran.err);
        let container = &pod["status"]["containerStatuses"][0]["containerID"];
        states.insert(pod_name.to_owned(), format!("{container} {} {}", restarts(&pod), ran.out));
    }
    states
}

pub(super) async fn update(cluster: &mut Cluster) -> String {
    let (namespace, _) = namespace(cluster, "update").await;
    cluster.kube.apply(&namespace, &deployment("standing", 30).to_string()).await;
    all_ready(cluster, &namespace, "standing", Duration::from_secs(240)).await;
    let before = state(cluster, &namespace, "standing").await;
    assert_eq!(before.len(), 30);
    // How long nobody takes connections.
    let done = Arc::new(AtomicBool::new(false));
    let watch = {
        let done = done.clone();
        std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            let mut since = None;
            while !done.load(Ordering::Relaxed) {
                if UnixStream::connect(CSI_SOCKET).is_ok() {
                    since = None;
                } else {
                    longest = longest.max(since.get_or_insert_with(Instant::now).elapsed());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            longest
        })
    };
    let churn = async {
        for number in 0..6 {
            let name = format!("churn{number}");
            cluster.kube.apply(&namespace, &simple(&name).to_string()).await;
            cluster.kube.ready(&namespace, &name, Duration::from_secs(150)).await;
            cluster.kube.run(&format!("delete pod -n {namespace} {name} --wait=false")).await;
        }
    };
    let roll = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        cluster.kube.run(&format!("rollout restart -n {SYSTEM} daemonset/sealmount")).await;
        cluster.kube.run(&format!("rollout status -n {SYSTEM} daemonset/sealmount --timeout=120s")).await;
    };
    tokio::join!(churn, roll);
    done.store(true, Ordering::Relaxed);
    let window = watch.join().expect("the watch");
    assert!(window > Duration::ZERO, "the driver was never away: nothing was updated");
    assert_eq!(state(cluster, &namespace, "standing").await, before);
    format!("nothing changed; {:.1} s without a driver", window.as_secs_f32())
}
