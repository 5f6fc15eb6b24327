//! Where pod facts come from and where events go, over real connections to servers that say what a test tells them.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use prost::Message;
use sealmount::events::Events;
use sealmount::metrics::Metrics;
use sealmount::pods::kubelet::{Connect, proto};
use sealmount::pods::{Pods, PodsError, PodsFrom, StartError, api};
use sealmount::policy::facts::{Kind, PodFacts};
use sealmount::request::{PodRef, PodUid};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Status;

use crate::lab::apiserver::{POD_JSON, POD_PROTOBUF, status};
use crate::lab::{ApiServer, Authority, KubeletPods, Reply, Server};

const UID: &str = "0b0c3c4e-1d6a-4a58-9b8e-4f8a6f1c2d3e";
const OTHER: &str = "1b0c3c4e-1d6a-4a58-9b8e-4f8a6f1c2d3e";

fn who() -> PodRef {
    PodRef {
        namespace: "payments".into(),
        name: "api-0".into(),
        uid: PodUid::parse(UID).unwrap(),
        service_account: "payments".into(),
    }
}

fn pod() -> Value {
    serde_json::from_str(POD_JSON).unwrap()
}

fn kubelet_pod() -> proto::Pod {
    proto::Pod::decode(POD_PROTOBUF).unwrap()
}

fn no_kubelet() -> Connect {
    Connect::new(|| async { Err(std::io::ErrorKind::NotFound.into()) })
}

async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    for _ in 0..1500 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not seen in 30 s: {what}");
}

async fn watching(server: &ApiServer) {
    until("a watch", || async { server.watching() > 0 }).await;
}

/// Waits until the cache answers: a server has taken a watch before the client knows.
async fn cached(server: &ApiServer, pods: &Pods) {
    until("an answer from the cache", || async {
        let asked = server.counts().2;
        pods.get(&who()).await.is_ok() && server.counts().2 == asked
    })
    .await;
}

async fn from_api(server: &ApiServer) -> Pods {
    let client = api::client_of(server.config()).unwrap();
    Pods::start(&PodsFrom::Api, "node-1", Some(client), no_kubelet()).await.unwrap()
}

fn has(facts: &Result<Arc<PodFacts>, PodsError>, ephemeral: &str) -> bool {
    let containers = facts.as_ref().map(|facts| facts.containers.clone()).unwrap_or_default();
    containers.iter().any(|container| container.kind == Kind::Ephemeral && container.name == ephemeral)
}

/// The recorded pod with one more ephemeral container.
fn debugged(name: &str) -> Value {
    let mut pod = pod();
    let more = json!({"name": name, "image": "registry.example/busybox:1"});
    pod["spec"]["ephemeralContainers"].as_array_mut().unwrap().push(more);
    pod
}

#[tokio::test]
async fn api_a_watched_pod_needs_no_request() {
    let server = ApiServer::start().await;
    server.put(&pod());
    let pods = from_api(&server).await;
    // The first question may come before the first list: it waits for it.
    let facts = pods.get(&who()).await.unwrap();
    assert_eq!(facts.pod, who());
    assert_eq!(facts.containers[0].running_uid, Some(1000));
    watching(&server).await;
    server.put(&debugged("second"));
    until("the change", || async { has(&pods.get(&who()).await, "second") }).await;
    assert_eq!(server.counts(), (1, 1, 0), "{:?}", server.seen());
}

#[tokio::test]
async fn api_lists_in_pages() {
    let server = ApiServer::start().await;
    for index in 0..120 {
        let mut pod = pod();
        pod["metadata"]["name"] = json!(format!("api-{index}"));
        pod["metadata"]["uid"] = json!(format!("uid-{index}"));
        server.put(&pod);
    }
    let pods = from_api(&server).await;
    for index in [0, 50, 119] {
        let uid = PodUid::parse(&format!("uid-{index}")).unwrap();
        pods.get(&PodRef { name: format!("api-{index}"), uid, ..who() }).await.unwrap();
    }
    assert_eq!((server.counts().0, server.counts().2), (3, 0), "{:?}", server.seen());
}

#[tokio::test]
async fn api_a_pod_the_watch_has_not_brought_is_asked_for() {
    let server = ApiServer::start().await;
    let pods = from_api(&server).await;
    assert!(matches!(pods.get(&who()).await, Err(PodsError::Unknown(_))));
    watching(&server).await;
    server.put_silently(&pod());
    assert_eq!(pods.get(&who()).await.unwrap().pod, who());
    assert_eq!(server.counts().2, 2, "{:?}", server.seen());
}

#[tokio::test]
async fn api_an_ended_watch_goes_on_where_it_was() {
    let server = ApiServer::start().await;
    server.put(&pod());
    let pods = from_api(&server).await;
    watching(&server).await;
    server.hang_up();
    server.put(&debugged("while-away"));
    until("the change", || async { has(&pods.get(&who()).await, "while-away") }).await;
    watching(&server).await;
    assert_eq!(server.counts().0, 1, "listed again without need: {:?}", server.seen());
    cached(&server, &pods).await;
    let asked = server.counts().2;
    server.put(&debugged("after"));
    until("the next change", || async { has(&pods.get(&who()).await, "after") }).await;
    assert_eq!(server.counts().2, asked, "asked although watched: {:?}", server.seen());
}

#[tokio::test]
async fn api_history_that_is_gone_is_listed_anew() {
    let server = ApiServer::start().await;
    server.put(&pod());
    let pods = from_api(&server).await;
    watching(&server).await;
    // Gone from the list, and no DELETED is ever told.
    server.compact();
    let mut other = pod();
    other["metadata"]["uid"] = json!(OTHER);
    server.put_silently(&other);
    until("a second list", || async { server.counts().0 == 2 }).await;
    watching(&server).await;
    let replaced = PodRef { uid: PodUid::parse(OTHER).unwrap(), ..who() };
    until("the new pod", || async { pods.get(&replaced).await.is_ok() }).await;
    assert!(matches!(pods.get(&who()).await, Err(PodsError::Replaced { found, .. }) if found.as_str() == OTHER));
}

#[tokio::test]
async fn api_away_is_retriable_and_ends() {
    let mut server = ApiServer::start().await;
    server.put(&pod());
    let pods = from_api(&server).await;
    pods.get(&who()).await.unwrap();
    server.stop().await;
    // Nothing is given out from a cache that may be stale.
    until("the outage", || async { matches!(pods.get(&who()).await, Err(PodsError::Away(_))) }).await;
    server.put_silently(&debugged("meanwhile"));
    server.start_again().await;
    until("the server's return", || async { has(&pods.get(&who()).await, "meanwhile") }).await;
    watching(&server).await;
    server.put(&debugged("watched"));
    until("the watch", || async { has(&pods.get(&who()).await, "watched") }).await;
}

#[tokio::test]
async fn api_a_watch_that_is_refused_is_listed_anew() {
    let server = ApiServer::start().await;
    server.put(&pod());
    let pods = from_api(&server).await;
    watching(&server).await;
    server.refuse_always(Some((500, &status(500, "InternalError", "etcd").to_string())));
    server.hang_up();
    until("a refused watch", || async { server.counts().1 == 2 }).await;
    assert!(matches!(pods.get(&who()).await, Err(PodsError::Away(text)) if text.contains("etcd")));
    server.put_silently(&debugged("meanwhile"));
    server.refuse_always(None);
    until("a watch after a list", || async { server.counts().0 >= 2 && server.watching() > 0 }).await;
    cached(&server, &pods).await;
    let asked = server.counts().2;
    until("the change", || async { has(&pods.get(&who()).await, "meanwhile") }).await;
    server.put(&debugged("watched"));
    until("the watch", || async { has(&pods.get(&who()).await, "watched") }).await;
    assert_eq!(server.counts().2, asked, "asked although watched: {:?}", server.seen());
}

#[tokio::test]
async fn api_refusals_are_told_and_unreadable_answers_are_not_repeated() {
    let server = ApiServer::start().await;
    server.put(&pod());
    let forbidden = status(403, "Forbidden", "pods is forbidden: User \"system:serviceaccount:x:y\" cannot get");
    server.refuse_always(Some((403, &forbidden.to_string())));
    let pods = from_api(&server).await;
    let Err(PodsError::Away(text)) = pods.get(&who()).await else { panic!("a refusal is no pod") };
    assert!(text.contains("403") && text.contains("pods is forbidden"), "{text}");
    server.refuse_always(Some((200, "{\"kind\":\"Pod\",\"metadata\":\"CANARY")));
    let Err(PodsError::Away(text)) = pods.get(&who()).await else { panic!("garbage is no pod") };
    assert!(text.contains("cannot be read") && !text.contains("CANARY"), "{text}");
    server.refuse_always(None);
    pods.get(&who()).await.unwrap();
}

#[tokio::test]
async fn api_pods_of_others_are_refused() {
    let server = ApiServer::start().await;
    let pods = from_api(&server).await;
    let mut other = pod();
    other["metadata"]["uid"] = json!(OTHER);
    server.put(&other);
    assert!(matches!(pods.get(&who()).await, Err(PodsError::Replaced { found, .. }) if found.as_str() == OTHER));
    let mut elsewhere = pod();
    elsewhere["spec"]["nodeName"] = json!("node-2");
    server.put(&elsewhere);
    assert!(matches!(pods.get(&who()).await, Err(PodsError::Elsewhere { node, .. }) if node == "node-2"));
    let mut unbound = pod();
    unbound["spec"].as_object_mut().unwrap().remove("nodeName");
    server.put(&unbound);
    assert!(matches!(pods.get(&who()).await, Err(PodsError::Elsewhere { .. })));
    let mut account = pod();
    account["spec"]["serviceAccountName"] = json!("admin");
    server.put(&account);
    until("the service account", || async {
        matches!(pods.get(&who()).await, Err(PodsError::Unreadable { fault, .. }) if fault.contains("admin"))
    })
    .await;
    let mut root = pod();
    root["spec"]["containers"][0]["securityContext"]["runAsUser"] = json!(-1);
    server.put(&root);
    until("the fault", || async {
        matches!(pods.get(&who()).await, Err(PodsError::Unreadable { fault, .. }) if fault.contains("-1 is no UID"))
    })
    .await;
    server.delete("payments", "api-0");
    until("the deletion", || async { matches!(pods.get(&who()).await, Err(PodsError::Unknown(_))) }).await;
}

#[tokio::test]
async fn api_no_proxy_is_used() {
    let server = ApiServer::start().await;
    server.put(&pod());
    // What HTTPS_PROXY would have set.
    let mut config = server.config();
    config.proxy_url = Some("http://127.0.0.1:1".parse().unwrap());
    let client = api::client_of(config).unwrap();
    let pods = Pods::start(&PodsFrom::Api, "node-1", Some(client), no_kubelet()).await.unwrap();
    pods.get(&who()).await.unwrap();
}

#[tokio::test]
async fn api_a_kubeconfig_is_taken() {
    let server = ApiServer::start().await;
    server.put(&pod());
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("kubeconfig");
    std::fs::write(&path, server.kubeconfig()).unwrap();
    let client = api::client(Some(&path)).await.unwrap();
    let pods = Pods::start(&PodsFrom::Api, "node-1", client, no_kubelet()).await.unwrap();
    pods.get(&who()).await.unwrap();
    assert!(api::client(Some(&directory.path().join("none"))).await.is_err());
}

#[tokio::test]
async fn api_the_server_must_prove_itself() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let server = Server::start(&authority.server(), |seen| match seen.path.contains("/namespaces/") {
        true => Reply::text(200, POD_JSON),
        false => Reply::json(500, &status(500, "InternalError", "no lists here")),
    });
    for (ca, skip, trusted) in [(&authority, false, true), (&stranger, false, false), (&stranger, true, false)] {
        let ca = base64::engine::general_purpose::STANDARD.encode(ca.pem());
        let cluster = match skip {
            true => json!({"server": server.address(), "insecure-skip-tls-verify": true}),
            false => json!({"server": server.address(), "certificate-authority-data": ca}),
        };
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "lab", "user": {"token": "t0ken"}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        });
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("kubeconfig");
        std::fs::write(&path, text.to_string()).unwrap();
        let client = api::client(Some(&path)).await.unwrap();
        let pods = Pods::start(&PodsFrom::Api, "node-1", client, no_kubelet()).await.unwrap();
        let seen = server.seen().len();
        match (pods.get(&who()).await, trusted) {
            (Ok(facts), true) => assert_eq!(facts.pod, who()),
            (Err(PodsError::Away(text)), false) => {
                assert!(text.contains("certificate") && !text.contains("t0ken"), "{text}");
                assert_eq!(server.seen().len(), seen, "a request, and its token, went to a stranger");
            }
            (answer, _) => panic!("{answer:?} with {text}"),
        }
    }
    assert!(server.seen().iter().all(|seen| seen.header("authorization") == Some("Bearer t0ken")));
}

struct Kubelet {
    server: KubeletPods,
    _directory: TempDir,
}

fn kubelet() -> Kubelet {
    let directory = TempDir::new().unwrap();
    Kubelet { server: KubeletPods::start(&directory.path().join("pods-api.sock")), _directory: directory }
}

async fn from_kubelet(server: &KubeletPods) -> Pods {
    Pods::start(&PodsFrom::Kubelet, "node-1", None, server.connect()).await.unwrap()
}

/// The recorded pod with one more ephemeral container.
fn kubelet_debugged(name: &str) -> proto::Pod {
    let mut pod = kubelet_pod();
    let common = proto::Container { name: name.into(), ..Default::default() };
    let more = proto::EphemeralContainer { common: Some(common), target_container_name: String::new() };
    pod.spec.as_mut().unwrap().ephemeral_containers.push(more);
    pod
}

#[tokio::test]
async fn kubelet_a_watched_pod_needs_no_request() {
    let Kubelet { server, _directory } = kubelet();
    server.put(&kubelet_pod());
    let pods = from_kubelet(&server).await;
    assert_eq!(pods.get(&who()).await.unwrap().pod, who());
    server.put(&kubelet_debugged("second"));
    until("the change", || async { has(&pods.get(&who()).await, "second") }).await;
    assert_eq!(server.counts(), (1, 0));
    // It may have been a change of a pod that is known: all are listed anew.
    server.tell_garbage();
    server.put(&kubelet_debugged("third"));
    until("the change after garbage", || async { has(&pods.get(&who()).await, "third") }).await;
    until("a new watch", || async { server.counts().0 == 2 }).await;
    server.delete(UID);
    until("the deletion", || async { matches!(pods.get(&who()).await, Err(PodsError::Unknown(_))) }).await;
}

#[tokio::test]
async fn kubelet_a_call_before_its_event_is_answered() {
    let Kubelet { server, _directory } = kubelet();
    let pods = from_kubelet(&server).await;
    assert!(matches!(pods.get(&who()).await, Err(PodsError::Unknown(_))));
    server.put_silently(&kubelet_pod());
    assert_eq!(pods.get(&who()).await.unwrap().pod, who());
    assert_eq!(server.counts(), (1, 2));
}

#[tokio::test]
async fn kubelet_a_list_that_does_not_end_is_not_waited_for() {
    let Kubelet { server, _directory } = kubelet();
    server.endless(true);
    server.put(&kubelet_pod());
    let pods = from_kubelet(&server).await;
    pods.get(&who()).await.unwrap();
    assert_eq!(server.counts(), (1, 1), "what is gathered before INITIAL_SYNC_COMPLETE is no answer yet");
}

#[tokio::test]
async fn kubelet_that_starts_is_awaited() {
    let Kubelet { server, _directory } = kubelet();
    server.starting(true);
    server.put(&kubelet_pod());
    let pods = from_kubelet(&server).await;
    let Err(PodsError::Away(text)) = pods.get(&who()).await else { panic!("a starting kubelet knows no pod") };
    assert!(text.contains("Kubelet is initializing"), "{text}");
    server.starting(false);
    until("the first list", || async { pods.get(&who()).await.is_ok() && server.counts().0 == 1 }).await;
}

#[tokio::test]
async fn kubelet_a_slow_stream_is_begun_again() {
    let Kubelet { server, _directory } = kubelet();
    let mut second = kubelet_pod();
    second.metadata.as_mut().unwrap().name = "api-1".into();
    second.metadata.as_mut().unwrap().uid = OTHER.into();
    let second_ref = PodRef { name: "api-1".into(), uid: PodUid::parse(OTHER).unwrap(), ..who() };
    server.put(&kubelet_pod());
    server.put(&second);
    let pods = from_kubelet(&server).await;
    pods.get(&second_ref).await.unwrap();
    // What the slow stream missed.
    server.delete_silently(OTHER);
    server.put_silently(&kubelet_debugged("missed"));
    server.end(&Status::resource_exhausted("watch client channel closed"));
    until("a second stream", || async { server.counts().0 == 2 }).await;
    until("the missed change", || async { has(&pods.get(&who()).await, "missed") }).await;
    until("the missed deletion", || async { matches!(pods.get(&second_ref).await, Err(PodsError::Unknown(_))) }).await;
    server.put(&kubelet_debugged("after"));
    until("the next change", || async { has(&pods.get(&who()).await, "after") }).await;
}

#[tokio::test]
async fn kubelet_away_is_retriable_and_ends() {
    let Kubelet { mut server, _directory } = kubelet();
    server.put(&kubelet_pod());
    let pods = from_kubelet(&server).await;
    pods.get(&who()).await.unwrap();
    server.stop().await;
    until("the outage", || async { matches!(pods.get(&who()).await, Err(PodsError::Away(_))) }).await;
    server.start_again();
    until("the kubelet's return", || async { pods.get(&who()).await.is_ok() }).await;
    until("the watch", || async { server.counts().0 == 2 }).await;
}

#[tokio::test]
async fn kubelet_a_replaced_pod_is_told_from_its_successor() {
    let Kubelet { server, _directory } = kubelet();
    let mut other = kubelet_pod();
    other.metadata.as_mut().unwrap().uid = OTHER.into();
    server.put(&other);
    let pods = from_kubelet(&server).await;
    assert!(matches!(pods.get(&who()).await, Err(PodsError::Replaced { found, .. }) if found.as_str() == OTHER));
    // The old pod, still known to the kubelet while it ends, is another answer than the new one.
    server.put_silently(&kubelet_pod());
    assert_eq!(pods.get(&who()).await.unwrap().pod, who());
}

#[tokio::test]
async fn auto_prefers_the_kubelet() {
    let Kubelet { mut server, _directory } = kubelet();
    let api_server = ApiServer::start().await;
    api_server.put(&pod());
    let client = || Some(api::client_of(api_server.config()).unwrap());
    server.starting(true);
    let pods = Pods::start(&PodsFrom::Auto, "node-1", client(), server.connect()).await.unwrap();
    assert!(matches!(pods.get(&who()).await, Err(PodsError::Away(_))), "a starting kubelet answers too");
    assert!(api_server.seen().is_empty());
    server.stop().await;
    let pods = Pods::start(&PodsFrom::Auto, "node-1", client(), server.connect()).await.unwrap();
    assert_eq!(pods.get(&who()).await.unwrap().pod, who());
    let none = Pods::start(&PodsFrom::Auto, "node-1", None, server.connect()).await;
    assert!(matches!(none, Err(StartError::NoSource(_))));
    let none = Pods::start(&PodsFrom::Api, "node-1", None, server.connect()).await;
    assert!(matches!(none, Err(StartError::NoApiServer)));
}

fn events_to(server: &ApiServer) -> (Events, Metrics) {
    let metrics = Metrics::new();
    let client = api::client_of(server.config()).unwrap();
    (Events::new(Some(client), "node-1".into(), metrics.clone()), metrics)
}

#[tokio::test]
async fn events_name_the_pod_and_say_no_more_than_the_note() {
    let server = ApiServer::start().await;
    let (events, metrics) = events_to(&server);
    for _ in 0..3 {
        events.warning(&who(), "SealmountStale", "volume db: not refreshed since 12:00".into());
    }
    events.normal(&who(), "SealmountFresh", "x\ny".repeat(400));
    until("both events", || async { server.events().len() == 2 }).await;
    let all = server.events();
    let (stale, fresh) = (&all[0], &all[1]);
    assert_eq!(
        stale["involvedObject"],
        json!({"apiVersion": "v1", "kind": "Pod", "namespace": "payments", "name": "api-0", "uid": UID})
    );
    assert_eq!(stale["type"], "Warning");
    assert_eq!(stale["reason"], "SealmountStale");
    assert_eq!(stale["message"], "volume db: not refreshed since 12:00");
    assert_eq!(stale["source"], json!({"component": "csi.sealmount.io", "host": "node-1"}));
    assert_eq!(stale["reportingComponent"], "csi.sealmount.io");
    assert_eq!(stale["reportingInstance"], "node-1");
    assert_eq!(stale["metadata"]["namespace"], "payments");
    assert!(stale["metadata"]["name"].as_str().unwrap().starts_with("api-0."));
    assert_eq!((&stale["count"], &stale["firstTimestamp"]), (&json!(1), &stale["lastTimestamp"]));
    assert!(stale["firstTimestamp"].as_str().unwrap().ends_with('Z'));
    assert_eq!(fresh["type"], "Normal");
    let message = fresh["message"].as_str().unwrap();
    assert!(message.len() <= 1024 && !message.contains('\n'), "{} bytes", message.len());
    // The recorded pod holds one in an annotation: nothing but the note travels.
    assert!(POD_JSON.contains("CANARY") && !format!("{all:?}").contains("CANARY"));
    assert!(metrics.encode().contains("sealmount_events_dropped_total 0\n"));
}

#[tokio::test]
async fn events_are_tried_again_but_not_against_a_refusal() {
    let server = ApiServer::start().await;
    let (events, metrics) = events_to(&server);
    server.refuse(1, 500, &status(500, "InternalError", "etcd").to_string());
    events.warning(&who(), "SealmountStale", "first".into());
    until("the event", || async { server.events().len() == 1 }).await;
    server.refuse(1, 403, &status(403, "Forbidden", "events is forbidden").to_string());
    events.warning(&who(), "SealmountStale", "refused".into());
    events.warning(&who(), "SealmountStale", "last".into());
    until("the last event", || async { server.events().len() == 2 }).await;
    assert_eq!(server.events()[1]["message"], "last");
    assert!(metrics.encode().contains("sealmount_events_dropped_total 1\n"));
}

#[tokio::test]
async fn events_never_wait_for_the_api_server() {
    let mut server = ApiServer::start().await;
    let (events, metrics) = events_to(&server);
    server.stop().await;
    // Synchronous calls: were one to wait, this test would not end.
    for index in 0..1000 {
        events.warning(&who(), "SealmountStale", format!("{index}"));
    }
    let text = metrics.encode();
    let dropped = text.lines().find_map(|line| line.strip_prefix("sealmount_events_dropped_total ")).unwrap();
    assert!(dropped.parse::<u32>().unwrap() >= 700, "{dropped}");
}
