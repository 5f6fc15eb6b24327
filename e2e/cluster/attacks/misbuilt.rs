//! Pods that an injector or an author builds so that a neighbour could read: refused with sealmount, whatever the
//! platform file says. Each is tried all the same, on a driver that was built to waive what is never waived.

use serde_json::{Value, json};

use super::scene::{
    APP, COLUMNS, MARKS, NAMESPACE, Scene, app, capable, container, mesh, mount, native, neighbour, path, plain_root,
    pod, proxy,
};
use super::table::{self, Got, Row};
use crate::chart::{back, revision, rolled_out, upgrade};
use crate::cluster::Cluster;
use crate::images;

const OURS: [&str; 1] = ["sealed"];
/// Never waived but by that build, and two that may be.
const WAIVED: [&str; 8] = ["SM123", "SM130", "SM131", "SM132", "SM150", "SM160", "SM161", "SM162"];
const BY_SOCKET: &str = "pidfd_getfd from the app, found by its unix socket (SO_PEERPIDFD), no shared processes";

/// What the driver says of each pod as it ships.
struct Refused {
    mount: Got,
    sub_path: Got,
    twin: Got,
    init: Got,
    shared: Got,
    host: Got,
    mesh: Got,
    privileged: Got,
    tracer: Got,
}

pub(super) async fn run(cluster: &mut Cluster) -> String {
    let scene = Scene::new(cluster).await;
    let refused = refused(&scene).await;
    let before = revision().await;
    waive(scene.cluster).await;
    let mut rows = mounts(&scene, &refused).await;
    rows.extend(shared_processes(&scene, &refused.shared).await);
    rows.push(host_processes(&scene, &refused.host).await);
    rows.push(mesh_uid(&scene, &refused.mesh).await);
    rows.extend(by_socket(&scene, &refused).await);
    back(scene.cluster, &before).await;
    table::add(rows)
}

/// Puts that build on the node, with a platform file that waives all of these here.
async fn waive(cluster: &Cluster) {
    let waivers: Vec<_> = WAIVED
        .iter()
        .map(|code| {
            json!({"code": code, "namespace": NAMESPACE, "until": "2099-12-31", "reason": "the lab shows the attack"})
        })
        .collect();
    let file = cluster.dir.join("tmp/waive.json");
    let values = json!({"image": {"tag": images::WAIVING_TAG}, "config": {"policy": {"waivers": waivers}}});
    std::fs::write(&file, values.to_string()).expect("write the values");
    upgrade(cluster, &["-f", &file.display().to_string()]).await;
    rolled_out(cluster).await;
}

async fn refused(scene: &Scene<'_>) -> Refused {
    let sidecar = || Some(native(mesh("istio-proxy", 15000)));
    let one = async |name: &str, injected: Option<Value>, containers: &[Value], change: fn(&mut Value), field: &str| {
        let mut pod = pod(&format!("refused-{name}"), &OURS, injected, containers);
        change(&mut pod["spec"]);
        scene.refused(&pod, field).await
    };
    let same = |_: &mut Value| ();
    let share: fn(&mut Value) = |spec| spec["shareProcessNamespace"] = json!(true);
    let on_host: fn(&mut Value) = |spec| spec["hostPID"] = json!(true);
    let privileged = [app(&OURS), privileged("root")];
    let tracer = [app(&OURS), capable("tracer", 0, &["SYS_PTRACE"])];
    let neighbours = [app(&OURS), neighbour("neighbour", 1337)];
    let twins = [app(&OURS), also(neighbour("twin", APP), mount("sealed"))];
    let by_proxy = "SM130 spec.initContainers[1].volumeMounts[3]";
    let context = |container: &str, field: &str| format!("{container}.securityContext.{field}");
    Refused {
        mount: one("mount", proxy_of(mount("sealed")), &[app(&OURS)], same, by_proxy).await,
        sub_path: one("subpath", proxy_of(by_sub_path("sealed")), &[app(&OURS)], same, by_proxy).await,
        twin: one("twin", None, &twins, same, "SM130 spec.containers[1].volumeMounts[1]").await,
        init: one("init", Some(thief(&OURS)), &[app(&OURS)], same, "SM130 spec.initContainers[1].volumeMounts[1]")
            .await,
        shared: one("shared", sidecar(), &[app(&OURS)], share, "SM131 spec.shareProcessNamespace").await,
        host: one("host", None, &neighbours, on_host, "SM132 spec.hostPID").await,
        mesh: one("uid", with_app_uid(), &[app(&OURS)], same, &context("SM123 spec.containers[0]", "runAsUser")).await,
        privileged: one("privileged", None, &privileged, same, &context("SM160 spec.containers[1]", "privileged"))
            .await,
        tracer: one("tracer", None, &tracer, same, &context("SM162 spec.containers[1]", "capabilities.add[0]")).await,
    }
}

/// Envoy with one mount more.
fn proxy_of(extra: Value) -> Option<Value> {
    Some(native(also(mesh("istio-proxy", 15000), extra)))
}

/// Envoy with the application's UID.
fn with_app_uid() -> Option<Value> {
    let mut mesh = mesh("istio-proxy", 15000);
    mesh["securityContext"]["runAsUser"] = json!(APP);
    mesh["securityContext"]["runAsGroup"] = json!(APP);
    Some(native(mesh))
}

fn privileged(name: &str) -> Value {
    let mut container = neighbour(name, 0);
    container["securityContext"] = json!({"runAsUser": 0, "privileged": true});
    container
}

/// A container of a pod with one mount more.
fn also(mut container: Value, mount: Value) -> Value {
    container["volumeMounts"].as_array_mut().expect("mounts").push(mount);
    container
}

fn by_sub_path(column: &str) -> Value {
    let sub_path = if column == "usual" { "..1/password" } else { "password" };
    json!({"name": column, "mountPath": format!("/sub/{column}"), "subPath": sub_path})
}

/// An init container that takes away what it reads.
fn thief(columns: &[&str]) -> Value {
    let copy: Vec<String> = columns.iter().map(|it| format!("cat {} > /run/usual/by-init-{it}", path(it))).collect();
    let mut thief = plain_root("init");
    thief["command"] = json!(["/bin/busybox", "sh", "-c", copy.join(" && ")]);
    columns.iter().filter(|it| **it != "usual").fold(thief, |thief, column| also(thief, mount(column)))
}

/// The three columns, one after the other: a process has one tracer.
async fn three(one: impl AsyncFn(usize) -> Got) -> [Got; 3] {
    [one(0).await, one(1).await, one(2).await]
}

/// Row 2: the proxy's container, or an init container, mounts the volume too.
async fn mounts(scene: &Scene<'_>, refused: &Refused) -> Vec<Row> {
    let injected = also(also(mesh("istio-proxy", 15000), mount("native")), mount("sealed"));
    let shell = COLUMNS.iter().fold(neighbour("shell", 1337), |shell, column| also(shell, by_sub_path(column)));
    let twin = also(also(neighbour("twin", APP), mount("native")), mount("sealed"));
    let mut injected = pod("injected", &COLUMNS, Some(native(injected)), &[app(&COLUMNS), shell, twin]);
    injected["spec"]["initContainers"].as_array_mut().expect("init containers").push(thief(&COLUMNS));
    let running = scene.start(&injected).await;
    let by_envoy = scene.by_envoy(&proxy(&running, 15000), "/run/{}/password").await;
    let by_sub_path = scene.each("injected", "shell", &["read", "/sub/{}"]).await;
    let by_twin = scene.each("injected", "twin", &["read", "/run/{}/password"]).await;
    let by_init = scene.each("injected", "shell", &["read", "/run/usual/by-init-{}"]).await;
    vec![
        Row::refused(2, "Envoy's container mounts the volume too (userVolumeMount)", by_envoy, &refused.mount),
        Row::refused(2, "the same by subPath", by_sub_path, &refused.sub_path),
        Row::refused(2, "the same in a neighbour with the app's UID", by_twin, &refused.twin),
        Row::refused(2, "the same in an init container, root", by_init, &refused.init),
    ]
}

/// Rows 4 and 8: all processes of the pod are in one process namespace.
async fn shared_processes(scene: &Scene<'_>, refused: &Got) -> Vec<Row> {
    let mut app_with_environment = app(&COLUMNS);
    app_with_environment["env"] =
        json!([{"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "usual", "key": "password"}}}]);
    let containers = [
        app_with_environment,
        neighbour("twin", APP),
        capable("root", 0, &["SYS_ADMIN", "SYS_PTRACE", "SYS_CHROOT", "SETUID"]),
    ];
    let mut shared = pod("shared", &COLUMNS, Some(native(mesh("istio-proxy", 15000))), &containers);
    shared["spec"]["shareProcessNamespace"] = json!(true);
    scene.start(&shared).await;
    let mut rows = Vec::new();
    for (number, what, attack) in [
        (4, "`/proc/PID/root`", ["roots", "/run/{}/password"]),
        (4, "`/proc/PID/environ` (usual way: env)", ["environ", "%"]),
        (4, "`/proc/PID/mem`", ["memory", "%"]),
        (8, "ptrace", ["ptrace", "%"]),
        (8, "pidfd_getfd", ["getfd", "%"]),
        (8, "process_vm_readv", ["vm-readv", "%"]),
    ] {
        let seen = scene.each("shared", "twin", &attack).await;
        let text = format!("shareProcessNamespace, a neighbour with the app's UID: {what}");
        rows.push(Row::refused(number, &text, seen, refused));
    }
    let seen = three(async |column| {
        let script = format!(
            "for d in /proc/[0-9]*; do tr '\\0' ' ' < $d/cmdline | grep -q '^/bin/app own' && \
             exec nsenter -t ${{d#/proc/}} -m -S {APP} /bin/cat {}; done",
            path(COLUMNS[column])
        );
        let ran = scene.cluster.kube.exec(NAMESPACE, "shared", "root", &["sh", "-c", &script]).await;
        if ran.out == scene.values[column] { Got::read() } else { Got::Odd(format!("{ran:?}")) }
    });
    rows.push(Row::refused(
        8,
        "shareProcessNamespace, root with SYS_ADMIN: nsenter as the app's UID",
        seen.await,
        refused,
    ));
    rows
}

/// Row 8: the node's processes.
async fn host_processes(scene: &Scene<'_>, refused: &Got) -> Row {
    let mut on_host = pod("host-pid", &COLUMNS, None, &[app(&COLUMNS), neighbour("twin", APP)]);
    on_host["spec"]["hostPID"] = json!(true);
    scene.start(&on_host).await;
    let seen = scene.each("host-pid", "twin", &["roots", "/run/{}/password"]).await;
    Row::refused(8, "hostPID, a neighbour with the app's UID: `/proc/PID/root`", seen, refused)
}

/// Row 11: the proxy has the application's UID, and the volume beside it.
async fn mesh_uid(scene: &Scene<'_>, refused: &Got) -> Row {
    scene.start(&pod("mesh-uid", &COLUMNS, with_app_uid(), &[app(&COLUMNS)])).await;
    let seen =
        three(async |column| scene.attack("mesh-uid", "istio-proxy", column, &["peer", "app", MARKS[column]]).await);
    Row::refused(11, &format!("a mesh proxy with the app's UID: {BY_SOCKET}"), seen.await, refused)
}

/// Row 8: no process is shared: root with a right finds the application by its unix socket, and by no process number.
async fn by_socket(scene: &Scene<'_>, refused: &Refused) -> Vec<Row> {
    let tracers = [app(&COLUMNS), capable("tracer", 0, &["SYS_PTRACE"]), privileged("root")];
    scene.start(&pod("traced", &COLUMNS, None, &tracers)).await;
    let tracer = three(async |column| scene.attack("traced", "tracer", column, &["peer", "app", MARKS[column]]).await);
    let tracer = tracer.await;
    let root = three(async |column| scene.attack("traced", "root", column, &["peer", "app", MARKS[column]]).await);
    let mut rows = vec![
        Row::refused(8, &format!("root with SYS_PTRACE: {BY_SOCKET}"), tracer, &refused.tracer),
        Row::refused(8, &format!("a privileged neighbour: {BY_SOCKET}"), root.await, &refused.privileged),
    ];
    // The usual way: an agent, and processes that are shared.
    let agent = container("agent", 1337, &["/bin/app", "agent", "agent", "8100", "/run/usual/password"]);
    let mut fetched = pod("fetched", &["usual"], None, &[agent, capable("tracer", 0, &["SYS_PTRACE"])]);
    fetched["spec"]["shareProcessNamespace"] = json!(true);
    scene.start(&fetched).await;
    for (what, attack) in [("ptrace", "ptrace"), ("process_vm_readv", "vm-readv")] {
        let seen = three(async |column| {
            let pod = if column == 0 { "fetched" } else { "traced" };
            scene.attack(pod, "tracer", column, &[attack, MARKS[column]]).await
        });
        let text = format!("root with SYS_PTRACE: {what}, no shared processes (usual way: an agent, shared processes)");
        rows.push(Row::refused(8, &text, seen.await, &refused.tracer));
    }
    rows
}
