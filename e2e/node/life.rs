//! The driver's own life: registration, callers, the platform file, status, metrics, and what it says of itself.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use rustix::process::Signal;
use rustix::thread::set_thread_res_uid;
use sealmount::csi::proto::csi::{GetPluginInfoRequest, ProbeRequest, identity_client::IdentityClient};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

use crate::lab::kubelet::{PodSpec, dial, inode};
use crate::lab::node::{Node, Options, binary, signal_process};
use crate::lab::{ApiServer, canary};
use crate::secret::{pod, read};

pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) async fn until(what: &str, node: &Node, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !holds().await {
        assert!(Instant::now() < end, "{what} did not come to hold:\n{}", node.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn status(node: &Node) -> String {
    let out = Command::new(binary()).arg("status").arg("--csi-socket").arg(node.csi_socket()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

pub(crate) async fn metrics(node: &Node) -> String {
    let mut stream = tokio::net::TcpStream::connect(node.metrics()).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

#[tokio::test]
async fn a_socket_that_was_removed_comes_back_and_registers_again() {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let pod = pod("kept");
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    for socket in [kubelet.registration_socket(SOON).await.unwrap(), node.csi_socket()] {
        let before = inode(&socket);
        // Kept open by another name: an inode that is free may be given out again.
        let kept = node.dir().join("kept");
        fs::rename(&socket, &kept).unwrap();
        until("a new socket", &node, async || inode(&socket).is_some_and(|now| Some(now) != before)).await;
        kubelet.register(SOON).await.unwrap();
        kubelet.publish(&pod, "creds").await.unwrap();
        fs::remove_file(kept).unwrap();
    }
    assert_eq!(read(&kubelet, &pod, "username"), "app");
}

#[tokio::test]
async fn a_refused_registration_is_tried_again_with_a_new_socket() {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let socket = kubelet.registration_socket(SOON).await.unwrap();
    let before = inode(&socket);
    // Kept by another name: an inode that is free may be given out again.
    fs::hard_link(&socket, node.dir().join("kept")).unwrap();
    kubelet.refuse_registration(SOON, "no such CSIDriver").await.unwrap();
    until("a new socket", &node, async || inode(&socket).is_some_and(|now| Some(now) != before)).await;
    kubelet.register(SOON).await.unwrap();
    assert!(node.log().contains("no such CSIDriver"), "{}", node.log());
    assert!(status(&node).contains("registered, worker restarts 1"), "{}", status(&node));
}

#[tokio::test]
async fn a_kubelet_that_restarts_registers_and_publishes_again() {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let pod = pod("again");
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    let restarted = node.kubelet();
    restarted.register(SOON).await.unwrap();
    restarted.publish(&pod, "creds").await.unwrap();
    assert_eq!(node.mounts().len(), 1);
    restarted.unpublish(&pod, "creds").await.unwrap();
}

#[tokio::test]
async fn the_registration_socket_is_hidden_until_the_driver_serves() {
    let node = Node::spawn(Options::new("version: 1\n"));
    let kubelet = node.kubelet();
    // The first connection that the registry's visible name allows is answered at once.
    let info = kubelet.register(SOON).await.unwrap();
    assert_eq!(info.endpoint, node.csi_socket().to_str().unwrap());
    let names = fs::read_dir(node.registration_dir()).unwrap();
    let names: Vec<_> = names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names, ["csi.sealmount.io@reg.sock"]);
}

/// What `sealmount probe` says: `Err` with its line where the exit code is 1.
fn probe(node: &Node, what: &str) -> Result<(), String> {
    let out = Command::new(binary()).args(["probe", what, "--csi-socket"]).arg(node.csi_socket()).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    match out.status.code() {
        Some(0) => Ok(()),
        Some(1) if said.lines().count() == 1 => Err(said),
        code => panic!("{code:?}: {said}"),
    }
}

#[tokio::test]
async fn the_probes_fail_for_what_they_are_about_and_for_nothing_else() {
    let mut node = Node::spawn(Options::new("version: 1\n"));
    let kubelet = node.kubelet();
    until("it serves", &node, async || probe(&node, "live").is_ok()).await;
    let said = probe(&node, "ready").unwrap_err();
    assert!(said.contains("the kubelet has not registered the driver"), "{said}");
    kubelet.register(SOON).await.unwrap();
    assert_eq!(probe(&node, "ready"), Ok(()));

    // Stopped processes hold their sockets: the calls are taken and stay without an answer.
    for (process, says) in
        [(node.worker().unwrap(), "no answer from the worker"), (node.broker(), "the half that mounts")]
    {
        signal_process(process, Signal::STOP).unwrap();
        let said = probe(&node, "live").unwrap_err();
        signal_process(process, Signal::CONT).unwrap();
        assert!(said.contains(says), "{said}");
        until("it is live again", &node, async || probe(&node, "live").is_ok()).await;
    }
    assert_eq!(probe(&node, "ready"), Ok(()));

    // A running driver keeps the file it has and stays ready; one that starts with the bad one has none.
    node.write_config("version: 1\nlimits: {filse: 3}\n");
    until("the fault", &node, async || status(&node).contains("was not taken")).await;
    assert_eq!((probe(&node, "live"), probe(&node, "ready")), (Ok(()), Ok(())));
    node.restart(Signal::TERM);
    kubelet.register(SOON).await.unwrap();
    until("the fault", &node, async || probe(&node, "ready").is_err_and(|said| said.contains("filse"))).await;
    assert_eq!(probe(&node, "live"), Ok(()));
}

#[tokio::test]
async fn a_new_node_has_no_directory_for_the_socket_yet() {
    let mut node = Node::spawn(Options::new("version: 1\n"));
    node.stop(Signal::TERM);
    let directory = node.csi_socket().parent().unwrap().to_owned();
    fs::remove_dir(&directory).unwrap();
    node.launch();
    node.kubelet().register(SOON).await.unwrap();
    assert_eq!(fs::metadata(directory).unwrap().permissions().mode() & 0o007, 0);
}

#[tokio::test]
async fn only_root_may_call() {
    let (node, _kubelet) = Node::start(Options::new("version: 1\n")).await;
    let socket = node.csi_socket();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut identity = IdentityClient::new(dial(&socket).await.unwrap());
    assert_eq!(identity.probe(ProbeRequest {}).await.unwrap().into_inner().ready, Some(true));
    // Opened wide by mistake: the caller's credentials still tell.
    let mut dir: &Path = &socket;
    while let Some(parent) = dir.parent().filter(|parent| parent.starts_with(node.dir())) {
        fs::set_permissions(parent, fs::Permissions::from_mode(0o755)).unwrap();
        dir = parent;
    }
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let answer = std::thread::spawn(move || {
        let uid = rustix::process::Uid::from_raw(1000);
        set_thread_res_uid(uid, uid, uid).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut identity = IdentityClient::new(dial(&socket).await.unwrap());
            identity.get_plugin_info(GetPluginInfoRequest {}).await
        })
    });
    assert_eq!(answer.join().unwrap().unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_bad_platform_file_keeps_the_old_one_and_says_so() {
    let (node, kubelet) = Node::start(Options::new("version: 1\nlimits: {volume_bytes: 8KiB}\n")).await;
    node.write_config("version: 1\nlimits: {volume_bytes: 8KiB, filse: 3}\nstale_aftre: 1m\n");
    until("the fault", &node, async || status(&node).contains("was not taken")).await;
    let log = node.log();
    assert!(log.contains("filse") && log.contains("stale_aftre"), "all faults at once: {log}");
    let large = PodSpec::new("large", "node-a").secret("db", &[("k", &"x".repeat(9000))]);
    kubelet.admit(&large);
    assert_eq!(kubelet.publish(&large, "creds").await.unwrap_err().code(), Code::InvalidArgument);
    node.write_config("version: 1\nlimits: {volume_bytes: 16KiB}\n");
    until("the new file", &node, async || !status(&node).contains("was not taken")).await;
    kubelet.publish(&large, "creds").await.unwrap();
    // SIGHUP reads it at once, without a change.
    let reads = |node: &Node| node.log().matches("was read again").count();
    let before = reads(&node);
    node.signal(Signal::HUP);
    until("a reload", &node, async || reads(&node) > before).await;
}

#[tokio::test]
async fn without_a_valid_file_what_stands_is_kept_and_nothing_new_is_published() {
    let (mut node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let (old, new) = (pod("old"), pod("new"));
    kubelet.admit(&old);
    kubelet.admit(&new);
    kubelet.publish(&old, "creds").await.unwrap();
    node.write_config("version: 2\n");
    node.restart(Signal::TERM);
    kubelet.register(SOON).await.unwrap();
    kubelet.publish(&old, "creds").await.unwrap();
    assert_eq!(read(&kubelet, &old, "username"), "app");
    let status = kubelet.publish(&new, "creds").await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().contains("platform file"), "{}", status.message());
    kubelet.unpublish(&old, "creds").await.unwrap();
}

#[tokio::test]
async fn check_config_prints_all_faults_and_fails() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sealmount.yaml");
    let check = || {
        let out = Command::new(binary()).args(["node", "--check-config", "--config"]).arg(&file).output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap())
    };
    fs::write(&file, "version: 1\nlimits: {filse: 3}\nstale_aftre: 1m\n").unwrap();
    let (code, out) = check();
    assert_eq!(code, Some(1));
    assert!(out.contains("filse") && out.contains("stale_aftre") && out.contains("files"), "{out}");
    fs::write(&file, "version: 1\n").unwrap();
    assert_eq!(check().0, Some(0));
}

#[tokio::test]
async fn facts_that_are_away_fail_the_new_and_keep_the_old() {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let (old, new) = (pod("old"), pod("new"));
    kubelet.admit(&old);
    kubelet.publish(&old, "creds").await.unwrap();
    kubelet.forget(&old);
    kubelet.publish(&old, "creds").await.unwrap();
    assert_eq!(read(&kubelet, &old, "username"), "app");
    let status = kubelet.publish(&new, "creds").await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(node.mounts().len(), 1);
}

#[tokio::test]
async fn a_pod_replaced_by_one_of_its_name_is_refused() {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let (first, second) = (pod("twin"), pod("twin"));
    kubelet.admit(&second);
    let status = kubelet.publish(&first, "creds").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("another pod"), "{}", status.message());
    assert_eq!(node.mounts().len(), 0);
}

#[tokio::test]
async fn content_nobody_confirms_is_reported_as_stale_and_fresh_again() {
    let (node, kubelet) = Node::start(Options::new("version: 1\nstale_after: 1s\n")).await;
    let pod = pod("stale");
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    until("stale", &node, async || status(&node).contains("STALE")).await;
    assert!(metrics(&node).await.contains("sealmount_stale_volumes 1"), "{}", metrics(&node).await);
    assert!(node.log().contains("SealmountStale"), "{}", node.log());
    assert_eq!(read(&kubelet, &pod, "username"), "app");
    kubelet.publish(&pod, "creds").await.unwrap();
    assert!(!status(&node).contains("STALE"), "{}", status(&node));
    assert!(metrics(&node).await.contains("sealmount_stale_volumes 0"));
}

/// Nothing the driver says or writes outside its volumes holds the needle.
pub(crate) async fn kept_out(node: &Node, needle: &str) {
    let places = [("log", node.log()), ("status", status(node)), ("metrics", metrics(node).await)];
    for (place, text) in places {
        assert!(!text.contains(needle), "{place} holds the canary:\n{text}");
    }
    for place in ["config", "manifests", "kubelet/plugins", "kubelet/plugins_registry", "node.log"] {
        let found = canary::in_files(&node.dir().join(place), &[needle.as_bytes()]).unwrap();
        assert_eq!(found, [0], "{place} holds the canary");
    }
}

#[tokio::test]
async fn no_canary_is_found_outside_the_volume_and_none_in_memory_afterwards() {
    const NEEDLE: &str = "canary-3d94aa-zQ7wLx";
    let (node, kubelet) = Node::start(Options::new("version: 1\nlog: {level: debug}\n")).await;
    let secret = |name: &str| PodSpec::new(name, "node-a").secret("db", &[("username", "app"), ("password", NEEDLE)]);
    let mut good = secret("good");
    let bad = secret("bad").set("/spec/hostPID", true.into());
    kubelet.admit(&good);
    kubelet.admit(&bad);
    kubelet.publish(&good, "creds").await.unwrap();
    let status = kubelet.publish(&bad, "creds").await.unwrap_err();
    assert!(!status.message().contains(NEEDLE), "{}", status.message());
    kept_out(&node, NEEDLE).await;
    good.secrets.get_mut("db").unwrap().insert("password".into(), format!("{NEEDLE}-2"));
    kubelet.publish(&good, "creds").await.unwrap();
    kubelet.unpublish(&good, "creds").await.unwrap();
    kept_out(&node, NEEDLE).await;
    let pids = [node.broker(), node.worker().unwrap()];
    until("clean memory", &node, async || {
        pids.iter().all(|pid| canary::in_memory(*pid, &[NEEDLE.as_bytes()]).unwrap() == [0])
    })
    .await;
}

#[tokio::test]
async fn an_unpublish_does_not_wait_for_an_api_server_that_hangs() {
    // It takes connections, by its backlog, and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = format!("https://{}", silent.local_addr().unwrap());
    let ca = base64::engine::general_purpose::STANDARD.encode(crate::lab::Authority::new().pem());
    let kubeconfig = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "x", "users": [],
        "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority-data": ca}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": ""}}],
    });
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let file = dir.path().join("kubeconfig");
    fs::write(&file, kubeconfig.to_string()).unwrap();
    let options = Options::new("version: 1\n").arg("--pods-from").arg("api").arg("--kubeconfig");
    let (node, kubelet) = Node::start(options.arg(file.to_str().unwrap())).await;
    let pod = pod("asks");
    kubelet.prepare(&pod, "creds");
    let unpublish = async {
        // Long enough for the call to ask for facts, far shorter than any answer.
        tokio::time::sleep(Duration::from_millis(300)).await;
        kubelet.unpublish(&pod, "creds").await
    };
    let (published, removed) = tokio::join!(kubelet.call_publish(kubelet.request(&pod, "creds")), unpublish);
    removed.unwrap();
    // Unavailable would say that it was waited for.
    assert_eq!(published.unwrap_err().code(), Code::Aborted);
    assert_eq!(node.mounts().len(), 0);
}

/// A driver that has its pod facts from this API server, by a kubeconfig in `dir`.
pub(crate) fn watching(api: &ApiServer, dir: &Path, options: Options) -> Options {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let file = dir.join("kubeconfig");
    // The worker reads no CA of the system's; this server speaks plain HTTP.
    let mut kubeconfig: Value = serde_json::from_str(&api.kubeconfig()).unwrap();
    let ca = base64::engine::general_purpose::STANDARD.encode(crate::lab::Authority::new().pem());
    kubeconfig["clusters"][0]["cluster"]["certificate-authority-data"] = json!(ca);
    fs::write(&file, kubeconfig.to_string()).unwrap();
    options.arg("--pods-from").arg("api").arg("--kubeconfig").arg(file.to_str().unwrap())
}

#[tokio::test]
async fn a_pod_that_changes_under_its_volume_is_told_at_once_and_keeps_it() {
    let api = ApiServer::start().await;
    let waiver = "{code: SM170, namespace: payments, container: logs, until: 2099-12-31, reason: moves in March}";
    let options = Options::new(&format!("version: 1\npolicy: {{waivers: [{waiver}]}}\n"));
    let dir = tempfile::tempdir().unwrap();
    let (node, kubelet) = Node::start(watching(&api, dir.path(), options)).await;
    let logs = json!({
        "name": "logs", "image": "registry.example/logs:1", "securityContext": {"runAsUser": 1001},
        "volumeMounts": [{"name": "host", "mountPath": "/host"}],
    });
    let pod = pod("watched");
    let pod = pod.set("/spec/volumes/1", json!({"name": "host", "hostPath": {"path": "/run"}}));
    let mut pod = pod.set("/spec/containers/2", logs);
    api.put(&pod.manifest);
    kubelet.publish(&pod, "creds").await.unwrap();
    let told = async |reason: &str, said: &str| {
        let events = api.events();
        let of_pod = |event: &&Value| event["involvedObject"]["name"] == "watched" && event["reason"] == reason;
        events.iter().filter(of_pod).any(|event| event["message"].as_str().unwrap().contains(said))
    };
    until("the waived refusal", &node, async || told("SealmountWaived", "SM170 spec.volumes[1].hostPath.path").await)
        .await;
    until("its metric", &node, async || {
        metrics(&node).await.contains("sealmount_waived_refusals_total{code=\"SM170\"} 1")
    })
    .await;

    // A label matters not; a debug container that mounts the volume does, and no publish comes meanwhile.
    pod = pod.set("/metadata/labels/version", json!("2"));
    api.put(&pod.manifest);
    let debugger = json!({
        "name": "debugger", "image": "busybox", "volumeMounts": [{"name": "creds", "mountPath": "/mnt"}],
    });
    let pod = pod.set("/spec/ephemeralContainers", json!([debugger]));
    api.put(&pod.manifest);
    let field = "SM130 spec.ephemeralContainers[0].volumeMounts[0]";
    until("the refusal", &node, async || told("SealmountRefused", field).await).await;
    assert!(status(&node).contains("SM130"), "{}", status(&node));
    let page = metrics(&node).await;
    assert!(page.contains("sealmount_refusals_total{code=\"SM130\"} 1"), "{page}");
    assert!(node.log().contains("would be refused now, and is kept"), "{}", node.log());
    assert_eq!(read(&kubelet, &pod, "username"), "app");
    // Told once, however often it is published.
    for _ in 0..3 {
        kubelet.publish(&pod, "creds").await.unwrap();
    }
    assert!(metrics(&node).await.contains("sealmount_refusals_total{code=\"SM130\"} 1"));
    kubelet.unpublish(&pod, "creds").await.unwrap();
}
