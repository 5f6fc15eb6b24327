//! Attacks that succeed against sealmount so far, each with the issue that closes it; and what closes beside them.

use std::time::Duration;

use serde_json::json;

use super::ordinary::{from_vault, role_without_audience};
use super::scene::{
    APP, COLUMNS, NAMESPACE, READY, Scene, app, capable, mesh, mount, native, neighbour, plain_root, pod, proxy,
};
use super::table::{self, Got, Row};
use crate::cluster::{Cluster, until};
use crate::images;

const POD: &str = "exposed";
const TOKEN: &str = "/run/vault-token/token";
/// The issue that refuses these pods.
const REFUSE: &str = "C";

pub(super) async fn run(cluster: &mut Cluster) -> String {
    let scene = Scene::new(cluster).await;
    let mut mesh = mesh("istio-proxy", 15000);
    let mounts = mesh["volumeMounts"].as_array_mut().expect("mounts");
    mounts.push(json!({"name": "vault-token", "mountPath": "/run/vault-token"}));
    let (mut host, mut bare) = (plain_root("host"), neighbour("host-bare", 0));
    for container in [&mut host, &mut bare] {
        let mounts = container["volumeMounts"].as_array_mut().expect("mounts");
        mounts.push(json!({"name": "kubelet", "mountPath": "/host", "mountPropagation": "HostToContainer"}));
    }
    let neighbours = [app(&COLUMNS), capable("tracer", 0, &["SYS_PTRACE"]), neighbour("twin", APP), host, bare];
    let mut exposed = pod(POD, &COLUMNS, Some(native(mesh)), &neighbours);
    exposed["spec"]["volumes"].as_array_mut().expect("volumes").extend([
        json!({"name": "kubelet", "hostPath": {"path": "/var/lib/kubelet"}}),
        json!({"name": "vault-token", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "audience": "vault-prod", "expirationSeconds": 600}},
        ]}}),
    ]);
    let running = scene.start(&exposed).await;
    let tracer = scene.each(POD, "tracer", &["peer", "app", "%"]).await;
    let twin = scene.each(POD, "twin", &["peer", "app", "%"]).await;
    let host = by_host_path(&scene, "host").await;
    let bare = by_host_path(&scene, "host-bare").await;
    let debug = debugged(&scene).await;
    let socket = async |path: &str| match scene.line(POD, "host", &["connect", path]).await {
        Ok(_) => Got::Gain("CONNECTED"),
        Err(errno) => Got::Denied(errno),
    };
    let kubelet = socket("/host/device-plugins/kubelet.sock").await;
    let sockets = [kubelet.clone(), kubelet, socket("/host/plugins/csi.sealmount.io/csi.sock").await];
    role_without_audience(&scene).await;
    let proxy = proxy(&running, 15000);
    let token = [
        from_vault(&scene, &proxy, "usual", "usual", 0, super::ordinary::TOKEN).await,
        Got::Nothing,
        from_vault(&scene, &proxy, "payments", "db", 2, TOKEN).await,
    ];
    let by_socket = "pidfd_getfd from the app, found by its unix socket (SO_PEERPIDFD), no shared processes";
    table::add(vec![
        Row::open(2, "kubectl debug with a volumeMount, root", debug, REFUSE),
        Row::open(4, "the kubelet's directory by hostPath, root with the usual capabilities", host, REFUSE),
        Row::new(4, "the kubelet's directory by hostPath, root without capabilities", bare),
        Row::open(8, &format!("root with SYS_PTRACE: {by_socket}"), tracer, REFUSE),
        Row::open(8, &format!("a neighbour with the app's UID: {by_socket}"), twin, REFUSE),
        Row::open(12, "the driver's CSI socket by hostPath, root (the kubelet's own)", sockets, REFUSE),
        Row::open(13, "Envoy asks Vault with a projected token of the role's audience", token, REFUSE),
    ])
}

/// Searches the kubelet's directory for each column's file.
async fn by_host_path(scene: &Scene<'_>, container: &str) -> [Got; 3] {
    let places = ["kubernetes.io~empty-dir/usual", "kubernetes.io~secret/native", "kubernetes.io~csi/sealed/mount"];
    let one = async |column: usize| {
        let end = format!("volumes/{}/password", places[column]);
        scene.attack(POD, container, column, &["below", "/host/pods", &end]).await
    };
    let (usual, native, sealed) = tokio::join!(one(0), one(1), one(2));
    [usual, native, sealed]
}

/// An ephemeral container that mounts all three: the kubelet asks no driver before it runs.
async fn debugged(scene: &Scene<'_>) -> [Got; 3] {
    let kube = scene.cluster.kube;
    let custom = scene.cluster.dir.join("tmp/debug.json");
    let mounts: Vec<_> = COLUMNS.iter().map(|it| mount(it)).collect();
    let container = json!({"imagePullPolicy": "Never", "volumeMounts": mounts, "securityContext": {"runAsUser": 0}});
    std::fs::write(&custom, container.to_string()).expect("write the container");
    kube.run(&format!(
        "debug -n {NAMESPACE} {POD} --image={} --container=debugger --profile=general --custom={} -- /bin/app pause",
        images::APP,
        custom.display()
    ))
    .await;
    until("the debug container runs", READY.max(Duration::from_secs(30)), async || {
        let pod = kube.pod(NAMESPACE, POD).await.unwrap_or_default();
        !pod["status"]["ephemeralContainerStatuses"][0]["state"]["running"].is_null()
    })
    .await;
    scene.each(POD, "debugger", &["read", "/run/{}/password"]).await
}
