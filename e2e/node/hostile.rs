//! What a hostile pod author can write: each is refused with its code, and nothing is mounted.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use sealmount::csi::proto::csi::NodePublishVolumeRequest;
use tonic::Code;

use crate::lab::kubelet::{Kubelet, PodSpec};
use crate::lab::node::{Node, Options};
use crate::secret::pod;

const CANARY: &str = "canary-77e1a9-author";

/// Publishes a valid pod of which `change` breaks one thing in the call; returns code and message.
async fn refused(
    node: &Node,
    kubelet: &Kubelet,
    pod: &PodSpec,
    change: impl FnOnce(&mut NodePublishVolumeRequest),
) -> (Code, String) {
    kubelet.admit(pod);
    let status = kubelet.publish_with(pod, "creds", change).await.unwrap_err();
    assert_eq!(node.mounts(), Vec::<PathBuf>::new(), "something is mounted after {status:?}");
    assert!(!status.message().contains("canary"), "{}", status.message());
    assert!(!node.log().contains("canary"), "{}", node.log());
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn what_the_kubelet_says_cannot_be_planted() {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    // Each breaks one thing in a valid call; the text that must stand in the message names it.
    type Change = (&'static str, Box<dyn FnOnce(&mut NodePublishVolumeRequest)>);
    let foreign = "0b8f2d1c-0000-4000-8000-00000000beef";
    let changes: Vec<Change> = vec![
        ("volume_id", Box::new(|request| request.volume_id = format!("csi-{}", "0".repeat(64)))),
        (
            "target",
            Box::new(|request| request.target_path = request.target_path.replace("/pods/", "/plugins/../pods/")),
        ),
        (
            "target",
            Box::new(|request| {
                request.target_path = request.target_path.replace("kubernetes.io~csi", "kubernetes.io~empty-dir");
            }),
        ),
        (
            "pod.uid",
            Box::new(|request| {
                request.volume_context.insert("csi.storage.k8s.io/pod.uid".into(), foreign.into());
            }),
        ),
        (
            "csi.storage.k8s.io/planted",
            Box::new(|request| {
                request.volume_context.insert("csi.storage.k8s.io/planted".into(), "x".into());
            }),
        ),
        (
            "ephemeral",
            Box::new(|request| {
                request.volume_context.insert("csi.storage.k8s.io/ephemeral".into(), "false".into());
            }),
        ),
        (
            "pod.namespace",
            Box::new(|request| {
                request.volume_context.remove("csi.storage.k8s.io/pod.namespace");
            }),
        ),
        (
            "tokens",
            Box::new(|request| {
                let tokens = format!("{{\"vault\":{{\"token\":\"{CANARY}\"}}}}");
                request.volume_context.insert("csi.storage.k8s.io/serviceAccount.tokens".into(), tokens);
            }),
        ),
        ("readOnly", Box::new(|request| request.readonly = false)),
        (
            "unknwon",
            Box::new(|request| {
                request.volume_context.insert("unknwon".into(), "x".into());
            }),
        ),
    ];
    for (index, (named, change)) in changes.into_iter().enumerate() {
        let pod = pod(&format!("planted-{index}"));
        let (code, message) = refused(&node, &kubelet, &pod, change).await;
        assert_eq!(code, Code::InvalidArgument, "{named}: {message}");
        assert!(message.starts_with("SM"), "{named}: {message}");
        assert!(message.contains(named), "{named} is not named: {message}");
        assert!(kubelet.is_gone(&pod, "creds"), "{named}");
    }
}

#[tokio::test]
async fn another_pods_token_is_refused() {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let issuer = crate::lab::Issuer::new();
    let mine = pod("mine");
    let other = pod("other");
    let whose = crate::lab::Identity {
        namespace: other.namespace().to_owned(),
        service_account: other.service_account().to_owned(),
        pod: other.name().to_owned(),
        pod_uid: other.uid().to_owned(),
        service_account_uid: "5a5a5a5a-0000-4000-8000-000000000001".to_owned(),
    };
    let jwt = issuer.token(&whose, "vault-prod");
    let mine = mine.token("vault-prod", &jwt, SystemTime::now() + Duration::from_secs(3600));
    let (code, message) = refused(&node, &kubelet, &mine, |_| {}).await;
    assert_eq!(code, Code::InvalidArgument, "{message}");
    assert!(message.contains("token"), "{message}");
    assert!(!message.contains(&jwt));
}

#[tokio::test]
async fn the_files_attribute_is_parsed_within_bounds() {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let bomb = {
        let mut text = String::from("a: &a ['#k', '#k']\n");
        for level in 1..30 {
            let (before, name) = (char::from(b'a' + (level - 1) % 26), char::from(b'a' + level % 26));
            text.push_str(&format!("{name}{level}: &{name} [*{before}, *{before}]\n"));
        }
        text
    };
    let long = "n".repeat(254);
    let huge = format!("a: '#{}'\n", "k".repeat(33 * 1024));
    let many: String = (0..257).map(|index| format!("f{index}: '#username'\n")).collect();
    let cases: Vec<(&str, String)> = vec![
        ("alias bomb", bomb),
        ("huge", huge),
        ("too many", many),
        ("long name", format!("{long}: '#username'\n")),
        ("parent", "../escape: '#username'\n".into()),
        ("inner parent", "a/../b: '#username'\n".into()),
        ("absolute", "/etc/passwd: '#username'\n".into()),
        ("NUL", "\"a\\0b\": '#username'\n".into()),
        ("control", "\"a\\u0007b\": '#username'\n".into()),
        ("own name", "..data: '#username'\n".into()),
        ("collision", "a: '#username'\na/b: '#password'\n".into()),
        ("twice", "a: '#username'\na: '#password'\n".into()),
        ("merge", "<<: {a: '#username'}\n".into()),
        ("tag", "a: !!binary '#username'\n".into()),
        ("two documents", "a: '#username'\n---\nb: '#password'\n".into()),
        ("comment", "a: #username\n".into()),
        ("unknown field", "a: {form: '#username'}\n".into()),
        ("no yaml", "{{{{".into()),
    ];
    for (index, (what, files)) in cases.into_iter().enumerate() {
        let pod = pod(&format!("files-{index}")).attribute("files", &files);
        let (code, message) = refused(&node, &kubelet, &pod, |_| {}).await;
        assert_eq!(code, Code::InvalidArgument, "{what}: {message}");
        assert!(message.starts_with("SM0"), "{what}: {message}");
        assert!(message.chars().count() <= 800, "{what}: {} characters", message.chars().count());
        assert!(kubelet.is_gone(&pod, "creds"), "{what}");
    }
}

#[tokio::test]
async fn what_the_call_says_must_be_what_the_admitted_pod_says() {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let pod = pod("differs");
    let (code, message) = refused(&node, &kubelet, &pod, |request| {
        request.volume_context.insert("uid".into(), "4321".into());
    })
    .await;
    assert_eq!(code, Code::FailedPrecondition, "{message}");
    assert!(message.contains("SM1"), "{message}");
}

#[tokio::test]
async fn a_link_in_the_path_is_not_followed() {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let pod = pod("linked");
    kubelet.admit(&pod);
    let away = node.dir().join("away");
    std::fs::create_dir(&away).unwrap();
    kubelet.prepare(&pod, "creds");
    let parent = kubelet.parent(&pod, "creds");
    std::fs::copy(parent.join("vol_data.json"), away.join("vol_data.json")).unwrap();
    std::fs::remove_dir_all(&parent).unwrap();
    symlink(&away, &parent).unwrap();
    let status = kubelet.call_publish(kubelet.request(&pod, "creds")).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    assert!(!away.join("mount").exists());
}
