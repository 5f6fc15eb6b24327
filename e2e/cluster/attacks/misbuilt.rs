//! Pods that an injector or an author builds so that a neighbour could read: they run in the usual way and with a Secret
//! volume, and are refused with sealmount.

use serde_json::{Value, json};

use super::scene::{APP, NAMESPACE, Scene, app, capable, mesh, mount, native, neighbour, path, plain_root, pod, proxy};
use super::table::{self, Got, Row};
use crate::cluster::Cluster;

const BOTH: [&str; 2] = ["usual", "native"];
const OURS: [&str; 1] = ["sealed"];

pub(super) async fn run(cluster: &mut Cluster) -> String {
    let scene = Scene::new(cluster).await;
    let mut rows = mounts(&scene).await;
    rows.extend(shared_processes(&scene).await);
    rows.push(host_processes(&scene).await);
    rows.push(mesh_uid(&scene).await);
    table::add(rows)
}

/// Another mount of a container.
fn also(mut container: Value, mount: Value) -> Value {
    container["volumeMounts"].as_array_mut().expect("mounts").push(mount);
    container
}

fn by_sub_path(column: &str) -> Value {
    json!({"name": column, "mountPath": format!("/sub/{column}"), "subPath": "password"})
}

/// An init container that takes away what it reads.
fn thief(columns: &[&str]) -> Value {
    let copy: Vec<String> = columns.iter().map(|it| format!("cp {} /run/usual/by-init-{it}", path(it))).collect();
    let mut thief = plain_root("init");
    thief["command"] = json!(["/bin/busybox", "sh", "-c", copy.join(" && ")]);
    columns.iter().filter(|it| **it != "usual").fold(thief, |thief, column| also(thief, mount(column)))
}

/// Row 2: the proxy's container, or an init container, mounts the volume too.
async fn mounts(scene: &Scene<'_>) -> Vec<Row> {
    let proxy_of = |extra: Value| Some(native(also(mesh("istio-proxy", 15000), extra)));
    let mut injected = pod("injected", &BOTH, proxy_of(mount("native")), &[app(&BOTH)]);
    let firsts = injected["spec"]["initContainers"].as_array_mut().expect("init containers");
    firsts.push(thief(&BOTH));
    let mut shell = neighbour("shell", 1337);
    for column in BOTH {
        let sub_path = if column == "usual" { "..1/password" } else { "password" };
        let mut mount = by_sub_path(column);
        mount["subPath"] = json!(sub_path);
        shell = also(shell, mount);
    }
    injected["spec"]["containers"].as_array_mut().expect("containers").push(shell);
    let running = scene.start(&injected).await;
    let [usual, secret, _] = two(async |column| match proxy(&running, 15000).read(&path(BOTH[column])).await {
        Ok(bytes) if bytes == scene.values[column].as_bytes() => Got::read(),
        other => Got::Odd(format!("{other:?}")),
    })
    .await;
    let refused = pod("refused-mount", &OURS, proxy_of(mount("sealed")), &[app(&OURS)]);
    let mounted = [usual, secret, scene.refused(&refused, "SM130").await];

    let [usual, secret, _] = two(async |column| {
        scene.attack("injected", "shell", column, &["read", &format!("/sub/{}", BOTH[column])]).await
    })
    .await;
    let refused = pod("refused-subpath", &OURS, proxy_of(by_sub_path("sealed")), &[app(&OURS)]);
    let sub_path = [usual, secret, scene.refused(&refused, "SM130").await];

    let [usual, secret, _] = two(async |column| {
        scene.attack("injected", "shell", column, &["read", &format!("/run/usual/by-init-{}", BOTH[column])]).await
    })
    .await;
    let refused = pod("refused-init", &OURS, Some(thief(&OURS)), &[app(&OURS)]);
    let by_init = [usual, secret, scene.refused(&refused, "SM130").await];
    vec![
        Row::new(2, "Envoy's container mounts the volume too (userVolumeMount)", mounted),
        Row::new(2, "the same by subPath", sub_path),
        Row::new(2, "the same in an init container, root", by_init),
    ]
}

/// The two columns whose pods run.
async fn two(one: impl AsyncFn(usize) -> Got) -> [Got; 3] {
    // One after the other: a process has one tracer.
    [one(0).await, one(1).await, Got::Nothing]
}

/// Rows 4 and 8: all processes of the pod are in one process namespace.
async fn shared_processes(scene: &Scene<'_>) -> Vec<Row> {
    let mut app_with_environment = app(&BOTH);
    app_with_environment["env"] =
        json!([{"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "usual", "key": "password"}}}]);
    let containers =
        [app_with_environment, neighbour("twin", APP), capable("root", 0, &["SYS_ADMIN", "SYS_PTRACE", "SYS_CHROOT"])];
    let share = |mut pod: Value| {
        pod["spec"]["shareProcessNamespace"] = json!(true);
        pod
    };
    let sidecar = || Some(native(mesh("istio-proxy", 15000)));
    scene.start(&share(pod("shared", &BOTH, sidecar(), &containers))).await;
    let refused = scene.refused(&share(pod("refused-shared", &OURS, sidecar(), &[app(&OURS)])), "SM131").await;
    let mut rows = Vec::new();
    for (number, what, attack) in [
        (4, "`/proc/PID/root`", ["roots", "/run/{}/password"]),
        (4, "`/proc/PID/environ` (usual way: env)", ["environ", "%"]),
        (4, "`/proc/PID/mem`", ["memory", "%"]),
        (8, "ptrace", ["ptrace", "%"]),
        (8, "pidfd_getfd", ["getfd", "%"]),
        (8, "process_vm_readv", ["vm-readv", "%"]),
    ] {
        let seen = two(async |column| {
            let argument = attack[1].replace("{}", BOTH[column]).replace('%', super::scene::MARKS[column]);
            scene.attack("shared", "twin", column, &[attack[0], &argument]).await
        });
        let [usual, secret, _] = seen.await;
        let text = format!("shareProcessNamespace, a neighbour with the app's UID: {what}");
        rows.push(Row::new(number, &text, [usual, secret, refused.clone()]));
    }
    let [usual, secret, _] = two(async |column| {
        let script = format!(
            "for d in /proc/[0-9]*; do tr '\\0' ' ' < $d/cmdline | grep -q '^/bin/app own' && \
             exec nsenter -t ${{d#/proc/}} -m /bin/cat {}; done",
            path(BOTH[column])
        );
        let ran = scene.cluster.kube.exec(NAMESPACE, "shared", "root", &["sh", "-c", &script]).await;
        if ran.out == scene.values[column] { Got::read() } else { Got::Odd(format!("{ran:?}")) }
    })
    .await;
    rows.push(Row::new(8, "shareProcessNamespace, root with SYS_ADMIN: nsenter", [usual, secret, refused]));
    rows
}

/// Row 8: the node's processes.
async fn host_processes(scene: &Scene<'_>) -> Row {
    let on_host = |mut pod: Value| {
        pod["spec"]["hostPID"] = json!(true);
        pod
    };
    scene.start(&on_host(pod("host-pid", &BOTH, None, &[app(&BOTH), capable("root", 0, &["SYS_PTRACE"])]))).await;
    let [usual, secret, _] =
        two(async |column| scene.attack("host-pid", "root", column, &["roots", &path(BOTH[column])]).await).await;
    let refused = on_host(pod("refused-host", &OURS, None, &[app(&OURS), neighbour("neighbour", 1337)]));
    let refused = scene.refused(&refused, "SM132").await;
    Row::new(8, "hostPID, root with SYS_PTRACE: `/proc/PID/root`", [usual, secret, refused])
}

/// Row 11: the proxy has the application's UID.
async fn mesh_uid(scene: &Scene<'_>) -> Row {
    let same = || {
        let mut mesh = mesh("istio-proxy", 15000);
        mesh["securityContext"]["runAsUser"] = json!(APP);
        Some(native(mesh))
    };
    let running = scene.start(&pod("mesh-uid", &BOTH, same(), &[app(&BOTH)])).await;
    let proxy = proxy(&running, 15000);
    let [usual, secret, _] = scene.by_envoy(&proxy, "/run/{}/password").await;
    let refused = scene.refused(&pod("refused-uid", &OURS, same(), &[app(&OURS)]), "SM123").await;
    Row::new(11, "a mesh proxy with the app's UID: read", [usual, secret, refused])
}
