//! Attacks that need more than a file's mode to fail: the pod is refused, and with its code waived they succeed.

use serde_json::{Value, json};

use super::ordinary::{from_vault, role_without_audience};
use super::scene::{APP, COLUMNS, NAMESPACE, READY, ROLE, Scene, app, mesh, native, neighbour, plain_root, pod, proxy};
use super::table::{self, Got, Row};
use crate::chart::{back, revision, rolled_out, upgrade};
use crate::cluster::Cluster;

const POD: &str = "exposed";
const TOKEN: &str = "/run/vault-token/token";
const OURS: [&str; 1] = ["sealed"];
/// What the platform file waives in this namespace: a code, and the only container it is waived for.
pub(crate) const WAIVED: [(&str, &str); 3] =
    [("SM170", "host-waived"), ("SM170", "bare-waived"), ("SM182", "istio-proxy")];

pub(super) async fn run(cluster: &mut Cluster) -> String {
    let scene = Scene::new(cluster).await;
    let mut rows = waivable(&scene).await;
    rows.push(same_uid(&scene).await);
    table::add(rows)
}

/// A container with the kubelet's directory.
fn with_host(mut container: Value) -> Value {
    let mounts = container["volumeMounts"].as_array_mut().expect("mounts");
    mounts.push(json!({"name": "kubelet", "mountPath": "/host", "mountPropagation": "HostToContainer"}));
    container
}

/// A container with a token of the role's audience.
fn with_token(mut container: Value) -> Value {
    let mounts = container["volumeMounts"].as_array_mut().expect("mounts");
    mounts.push(json!({"name": "vault-token", "mountPath": "/run/vault-token"}));
    container
}

/// The pod with what these containers mount.
fn exposed(mut pod: Value) -> Value {
    pod["spec"]["volumes"].as_array_mut().expect("volumes").extend([
        json!({"name": "kubelet", "hostPath": {"path": "/var/lib/kubelet"}}),
        json!({"name": "vault-token", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "audience": "vault-prod", "expirationSeconds": 600}},
        ]}}),
    ]);
    pod
}

/// Rows whose codes the platform team may waive: refused, and tried in a pod for which they are waived.
async fn waivable(scene: &Scene<'_>) -> Vec<Row> {
    let by_host = exposed(pod("refused-host-path", &OURS, None, &[app(&OURS), with_host(plain_root("host"))]));
    let by_host = scene.refused(&by_host, "SM170 spec.volumes[5].hostPath.path").await;
    let by_token = exposed(pod("refused-token", &OURS, None, &[app(&OURS), with_token(neighbour("shell", 1337))]));
    let by_token =
        scene.refused(&by_token, "SM182 spec.volumes[6].projected.sources[0].serviceAccountToken.audience").await;

    let neighbours = [app(&COLUMNS), with_host(plain_root("host-waived")), with_host(neighbour("bare-waived", 0))];
    let pod = pod(POD, &COLUMNS, Some(native(with_token(mesh("istio-proxy", 15000)))), &neighbours);
    let running = scene.start(&exposed(pod)).await;
    let told = scene.cluster.kube.event(NAMESPACE, POD, "SealmountWaived", READY).await;
    assert!(told.message.contains("waived (the lab shows the attack)"), "{told:?}");

    let host = by_host_path(scene, "host-waived").await;
    let bare = by_host_path(scene, "bare-waived").await;
    let socket = async |path: &str| match scene.line(POD, "host-waived", &["connect", path]).await {
        Ok(_) => Got::Gain("CONNECTED"),
        Err(errno) => Got::Denied(errno),
    };
    let kubelet = socket("/host/device-plugins/kubelet.sock").await;
    let sockets = [kubelet.clone(), kubelet, socket("/host/plugins/csi.sealmount.io/csi.sock").await];
    role_without_audience(scene).await;
    let proxy = proxy(&running, 15000);
    let token = [
        from_vault(scene, &proxy, "usual", "usual", 0, super::ordinary::TOKEN).await,
        Got::Nothing,
        from_vault(scene, &proxy, ROLE, "db", 2, TOKEN).await,
    ];
    vec![
        Row::refused(4, "the kubelet's directory by hostPath, root with the usual capabilities", host, &by_host),
        Row::refused(4, "the kubelet's directory by hostPath, root without capabilities", bare, &by_host),
        Row::refused(12, "the driver's CSI socket by hostPath, root (the kubelet's own)", sockets, &by_host),
        Row::refused(13, "Envoy asks Vault with a projected token of the role's audience", token, &by_token),
    ]
}

const BY_SOCKET: &str = "pidfd_getfd from the app, found by its unix socket (SO_PEERPIDFD), no shared processes";

/// Row 8: an ordinary neighbour with the app's UID is warned of, and refused where the platform file says so.
async fn same_uid(scene: &Scene<'_>) -> Row {
    scene.start(&pod("twins", &COLUMNS, None, &[app(&COLUMNS), neighbour("twin", APP)])).await;
    let warned = scene.cluster.kube.event(NAMESPACE, "twins", "SM150 ", READY).await;
    assert_eq!(warned.reason, "SealmountWarning");
    let seen = scene.each("twins", "twin", &["peer", "app", "%"]).await;
    let before = revision().await;
    upgrade(scene.cluster, &["--set", "config.policy.distinct_uids=true"]).await;
    rolled_out(scene.cluster).await;
    let twins = pod("refused-twin", &OURS, None, &[app(&OURS), neighbour("twin", APP)]);
    let refused = scene.refused(&twins, "SM150 spec.containers[1].securityContext.runAsUser").await;
    back(scene.cluster, &before).await;
    Row::refused(8, &format!("a neighbour with the app's UID (distinct_uids): {BY_SOCKET}"), seen, &refused)
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
