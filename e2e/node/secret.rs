//! Volumes from a Kubernetes Secret: published, read by one UID, swapped, kept, unpublished.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tonic::Code;

use crate::lab::kubelet::{Kubelet, PodSpec, is_mounted};
use crate::lab::node::{Node, Options};

const CONFIG: &str = "version: 1\n";
const CANARY: &str = "canary-5f0c2b-hunter2";

pub(crate) fn pod(name: &str) -> PodSpec {
    PodSpec::new(name, "node-a").secret("db", &[("username", "app"), ("password", CANARY)])
}

async fn start() -> (Node, Kubelet) {
    Node::start(Options::new(CONFIG)).await
}

/// Files and links of a volume with owner, mode and content, sorted, without the generation's own name.
pub(crate) fn tree(target: &Path) -> Vec<String> {
    fn walk(at: &Path, shown: &str, out: &mut Vec<String>) {
        for entry in fs::read_dir(at).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let meta = fs::symlink_metadata(entry.path()).unwrap();
            let generation = name.starts_with("..") && name != "..data";
            let path = format!("{shown}/{}", if generation { "..gen" } else { &name });
            let (uid, gid, mode) = (meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777);
            if meta.is_dir() {
                out.push(format!("{path}/ {uid}:{gid} {mode:04o}"));
                walk(&entry.path(), &path, out);
            } else if meta.is_symlink() {
                let to = fs::read_link(entry.path()).unwrap().into_os_string().into_string().unwrap();
                out.push(format!("{path} -> {}", if name == "..data" { "..gen" } else { &to }));
            } else {
                let text = fs::read_to_string(entry.path()).unwrap();
                out.push(format!("{path} {uid}:{gid} {mode:04o} {text}"));
            }
        }
    }
    let mut out = Vec::new();
    walk(target, "", &mut out);
    out.sort();
    out
}

pub(crate) fn read(kubelet: &Kubelet, pod: &PodSpec, file: &str) -> String {
    fs::read_to_string(kubelet.target(pod, "creds").join(file)).unwrap()
}

#[tokio::test]
async fn every_key_becomes_a_file_that_only_the_owner_can_read() {
    let (_node, kubelet) = start().await;
    let pod = pod("whole");
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    let target = kubelet.target(&pod, "creds");
    let meta = fs::metadata(&target).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777), (1000, 0, 0o500));
    assert_eq!(
        tree(&target),
        [
            "/..data -> ..gen".to_owned(),
            "/..gen/ 1000:0 0500".to_owned(),
            format!("/..gen/password 1000:0 0400 {CANARY}"),
            "/..gen/username 1000:0 0400 app".to_owned(),
            "/password -> ..data/password".to_owned(),
            "/username -> ..data/username".to_owned(),
        ]
    );
    let info = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = info.lines().find(|line| line.contains(target.to_str().unwrap())).unwrap();
    for option in ["ro,", "nosuid", "nodev", "noexec", " - tmpfs sealmount ", "noswap"] {
        assert!(line.contains(option), "{option} is missing: {line}");
    }
    kubelet.unpublish(&pod, "creds").await.unwrap();
    assert!(kubelet.is_gone(&pod, "creds"));
    kubelet.unpublish(&pod, "creds").await.unwrap();
}

#[tokio::test]
async fn files_pick_rename_and_decode_keys() {
    let (_node, kubelet) = start().await;
    let pod = PodSpec::new("picks", "node-a")
        .secret("db", &[("username", "app"), ("password", CANARY), ("store.b64", "AAEC\n")])
        .attribute("files", "tls/user: '#username'\nstore: {from: '#store.b64', decode: base64}\nnone: {from: '#absent', optional: true}\n");
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    assert_eq!(read(&kubelet, &pod, "tls/user"), "app");
    assert_eq!(read(&kubelet, &pod, "store"), "\0\u{1}\u{2}");
    let target = kubelet.target(&pod, "creds");
    assert!(!target.join("none").exists() && !target.join("password").exists());
}

#[tokio::test]
async fn a_missing_key_is_an_error_and_nothing_is_mounted() {
    let (node, kubelet) = start().await;
    let pod = pod("missing").attribute("files", "user: '#username'\nkey: '#absent'\n");
    kubelet.admit(&pod);
    let status = kubelet.publish(&pod, "creds").await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("absent"), "{}", status.message());
    assert!(kubelet.is_gone(&pod, "creds"));
    assert_eq!(node.mounts(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn a_publish_again_swaps_what_changed_and_nothing_else() {
    let (node, kubelet) = start().await;
    let mut pod = pod("swap");
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    let target = kubelet.target(&pod, "creds");
    let first = fs::read_link(target.join("..data")).unwrap();
    let mounts = node.mounts();
    kubelet.publish(&pod, "creds").await.unwrap();
    assert_eq!(fs::read_link(target.join("..data")).unwrap(), first, "the same bytes were swapped");
    let mut old = fs::File::open(target.join("username")).unwrap();
    pod.secrets.get_mut("db").unwrap().insert("username".into(), "next".into());
    kubelet.publish(&pod, "creds").await.unwrap();
    assert_ne!(fs::read_link(target.join("..data")).unwrap(), first);
    assert_eq!(read(&kubelet, &pod, "username"), "next");
    assert_eq!(node.mounts(), mounts, "a second mount was stacked");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut old, &mut text).unwrap();
    assert_eq!(text, "app", "an open file must go on reading the old bytes");
    pod.secrets.get_mut("db").unwrap().remove("password");
    kubelet.publish(&pod, "creds").await.unwrap();
    assert!(!target.join("password").exists(), "a key that is gone leaves no file");
}

#[tokio::test]
async fn a_refusal_that_appears_later_keeps_the_volume() {
    let (node, kubelet) = start().await;
    let pod = pod("later");
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    let worse = pod.clone().set("/spec/shareProcessNamespace", true.into());
    kubelet.admit(&worse);
    kubelet.publish(&worse, "creds").await.unwrap();
    assert_eq!(read(&kubelet, &pod, "password"), CANARY);
    assert!(node.log().contains("would be refused now"), "{}", node.log());
}

#[tokio::test]
async fn a_pod_whose_proxy_mounts_the_volume_is_refused_and_nothing_is_mounted() {
    let (node, kubelet) = start().await;
    let mount = serde_json::json!([{"name": "creds", "mountPath": "/secrets", "subPath": "password"}]);
    let pod = pod("shared").set("/spec/containers/1/volumeMounts", mount).attribute("for", "app");
    kubelet.admit(&pod);
    let status = kubelet.publish(&pod, "creds").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("SM1") && status.message().contains("containers[1]"), "{}", status.message());
    assert!(kubelet.is_gone(&pod, "creds"));
    assert_eq!(node.mounts(), Vec::<std::path::PathBuf>::new());
    assert!(!node.log().contains(CANARY));
}

#[tokio::test]
async fn every_restart_keeps_every_volume() {
    let (mut node, kubelet) = start().await;
    let pod = pod("kept");
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    let target = kubelet.target(&pod, "creds");
    let first = fs::read_link(target.join("..data")).unwrap();
    let worker = node.worker().unwrap();
    crate::lab::node::signal_process(worker, Signal::KILL).unwrap();
    // The call waits in the backlog for the next worker.
    let end = Instant::now() + Duration::from_secs(10);
    while kubelet.publish(&pod, "creds").await.is_err() {
        assert!(Instant::now() < end, "no worker came back:\n{}", node.log());
    }
    assert_ne!(node.worker(), Some(worker));
    assert_eq!(fs::read_link(target.join("..data")).unwrap(), first, "the same bytes were swapped");
    node.restart(Signal::KILL);
    kubelet.register(Duration::from_secs(20)).await.unwrap();
    assert_eq!(read(&kubelet, &pod, "password"), CANARY);
    kubelet.publish(&pod, "creds").await.unwrap();
    assert_eq!(fs::read_link(target.join("..data")).unwrap(), first, "the same bytes were swapped");
    node.restart(Signal::TERM);
    kubelet.register(Duration::from_secs(20)).await.unwrap();
    assert!(is_mounted(&target));
    kubelet.unpublish(&pod, "creds").await.unwrap();
    assert!(kubelet.is_gone(&pod, "creds"));
}
