//! Vault through the whole driver: a pod's own token, a real OpenBao, real mounts.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::lab::kubelet::{Kubelet, PodSpec, is_final};
use crate::lab::node::{Node, Options, signal_process};
use crate::lab::{Authority, Identity, Issuer, OpenBao, Reply, Seen, Server, canary};
use crate::life::{SOON, kept_out, metrics, status, until};
use crate::secret::{read, tree};

pub(crate) const AUDIENCE: &str = "vault-prod";

/// A connection of the platform's file: the role `payments` may read below `secret/data/payments` and `kv1/payments`.
/// `method` is also the mount.
pub(crate) fn connection(address: &str, method: &str) -> Value {
    json!({
        "address": address,
        "ca_file": "ca.pem",
        "auth": {"method": method, "mount": method, "audience": AUDIENCE, "role": "payments"},
        "allow": [{
            "namespaces": ["payments"], "service_accounts": ["payments"], "roles": ["payments"],
            "paths": ["secret/data/{{ pod.namespace }}/*", "kv1/{{ pod.namespace }}/*"], "methods": ["read"],
        }],
        "refresh": {"default": "30m", "min": "1s", "max": "24h"},
    })
}

/// The platform's file, in JSON, which is YAML: connections by name.
pub(crate) fn platform(connections: &[(&str, Value)]) -> Value {
    let connections: serde_json::Map<_, _> =
        connections.iter().map(|(name, connection)| ((*name).to_owned(), connection.clone())).collect();
    json!({"version": 1, "connections": connections})
}

pub(crate) fn options(config: &Value, ca_pem: &str) -> Options {
    Options::new(&config.to_string()).file("ca.pem", ca_pem)
}

/// A pod as its token names it.
fn identity(pod: &PodSpec) -> Identity {
    Identity {
        namespace: pod.namespace().into(),
        pod: pod.name().into(),
        pod_uid: pod.uid().into(),
        service_account: pod.service_account().into(),
        service_account_uid: "5d1c1d86-6c7a-4a0e-8a8e-2b2c1f0a9e11".into(),
    }
}

/// A valid pod, whose volume reads `files` through connection `prod` with the pod's own token.
pub(crate) fn pod(issuer: &Issuer, name: &str, files: &str) -> PodSpec {
    let pod = PodSpec::new(name, "node-a").attribute("vault", "prod").attribute("files", files);
    let jwt = issuer.token(&identity(&pod), AUDIENCE);
    pod.token(AUDIENCE, &jwt, SystemTime::now() + Duration::from_secs(3600))
}

/// An OpenBao with both auth methods, KV of both versions, and the role `payments` for the pods here.
pub(crate) struct Vault {
    pub(crate) bao: OpenBao,
    pub(crate) issuer: Arc<Issuer>,
}

impl Vault {
    pub(crate) async fn start() -> Self {
        let mut bao = OpenBao::start().await;
        let issuer = Arc::new(Issuer::new());
        bao.mount_kv().await;
        bao.write_kv2("secret", "payments/db", &json!({"username": "app", "password": "p/w"})).await;
        bao.policy("payments", &["secret/data/payments/*", "kv1/payments/*", "rabbitmq/creds/*"]).await;
        bao.jwt_auth("jwt", &issuer).await;
        bao.kubernetes_auth("kubernetes", &issuer).await;
        let anyone = identity(&PodSpec::new("any", "node-a"));
        bao.jwt_role("jwt", "payments", &anyone, AUDIENCE, &["payments"], &Value::Null).await;
        bao.kubernetes_role("kubernetes", "payments", &anyone, AUDIENCE, &["payments"], &Value::Null).await;
        Self { bao, issuer }
    }

    /// A node whose only connection, `prod`, leads here.
    async fn node(&self, method: &str) -> (Node, Kubelet) {
        Node::start(options(&platform(&[("prod", connection(&self.bao.address(), method))]), self.bao.ca_pem())).await
    }

    fn pod(&self, name: &str, files: &str) -> PodSpec {
        pod(&self.issuer, name, files)
    }

    /// How many requests OpenBao has seen, of whatever kind. Their answers may be written later.
    fn requests(&self) -> usize {
        let log = fs::read_to_string(self.bao.audit_log()).unwrap();
        log.lines().filter(|line| line.contains("\"type\":\"request\"")).count()
    }

    fn logins(&self, mount: &str) -> usize {
        self.bao.audited("update", &format!("auth/{mount}/login"))
    }

    fn reads(&self, path: &str) -> usize {
        self.bao.audited("read", path)
    }

    async fn tokens_fall_to(&self, count: usize, node: &Node) {
        until("the number of tokens", node, async || self.bao.tokens().await == count).await;
    }
}

/// A first publish that must fail: its status. Nothing is mounted, and after a final code nothing is left at all.
pub(crate) async fn refused(kubelet: &Kubelet, pod: &PodSpec, codes: &str) -> Status {
    kubelet.admit(pod);
    let status = kubelet.publish(pod, "creds").await.expect_err(codes);
    assert!(status.message().contains(codes), "{codes} is not in: {status:?}");
    assert!(!kubelet.target(pod, "creds").exists(), "{codes}: something is left");
    assert_eq!(kubelet.is_gone(pod, "creds"), is_final(status.code()), "{status:?}");
    status
}

/// Neither process holds a needle any more, once its idle connections are closed.
pub(crate) async fn none_in_memory(node: &Node, needles: &[&str]) {
    let mut needles: Vec<_> = needles.iter().map(|needle| needle.as_bytes()).collect();
    // Both know this one: a search that finds nothing at all would prove nothing.
    needles.push(b"csi.sealmount.io");
    let end = Instant::now() + SOON;
    loop {
        let found = [node.broker(), node.worker().unwrap()].map(|pid| canary::in_memory(pid, &needles).unwrap());
        let clean = |counts: &Vec<usize>| matches!(counts.split_last(), Some((1.., others)) if others.iter().all(|count| *count == 0));
        if found.iter().all(clean) {
            return;
        }
        assert!(Instant::now() < end, "still in the memory of broker and worker: {found:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What the broker keeps with a volume: generation, tag and note. It changes with every commit.
fn kept(target: &Path) -> Vec<u8> {
    let mut value = vec![0; 4096];
    let length = rustix::fs::getxattr(target, "trusted.sealmount", &mut value).unwrap();
    value.truncate(length);
    value
}

#[tokio::test]
async fn a_pod_reads_what_it_asks_for_with_its_own_token() {
    let vault = Vault::start().await;
    vault.bao.write_kv2("secret", "payments/db", &json!({"username": "app", "password": "new"})).await;
    vault.bao.write_kv2("secret", "payments/tls", &json!({"tls.crt": "CERT", "tls.key": "KEY"})).await;
    vault.bao.write_kv1("kv1", "payments/app", &json!({"token": "one", "store": "AAEC\n"})).await;
    let (node, kubelet) = vault.node("jwt").await;
    let before = vault.bao.tokens().await;
    let files = r##"
user: secret/data/payments/db#username
old: secret/data/payments/db?version=1#password
kv1/token: {path: kv1/payments/app, key: token}
tls/: secret/data/payments/tls#*
store: {from: kv1/payments/app#store, decode: base64}
absent: {from: secret/data/payments/nothing#key, optional: true}
ca.crt: "#ca.crt"
db.url: {template: "pg://{{ user }}:{{ p | urlencode }}@db/{{ files['ca.crt'] }}", with: {p: "secret/data/payments/db?version=1#password"}}
"##;
    let pod = vault.pod("whole", files).secret("db", &[("ca.crt", "CA")]);
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    let target = kubelet.target(&pod, "creds");
    let file = |name: &str, text: &str| format!("/..gen/{name} 1000:0 0400 {text}");
    let mut expected = vec![
        file("user", "app"),
        file("old", "p/w"),
        file("kv1/token", "one"),
        file("tls/tls.crt", "CERT"),
        file("tls/tls.key", "KEY"),
        file("store", "\0\u{1}\u{2}"),
        file("ca.crt", "CA"),
        file("db.url", "pg://app:p%2Fw@db/CA"),
        "/..gen/ 1000:0 0500".into(),
        "/..gen/kv1/ 1000:0 0500".into(),
        "/..gen/tls/ 1000:0 0500".into(),
    ];
    expected.sort();
    let inside: Vec<_> = tree(&target).into_iter().filter(|line| line.starts_with("/..gen")).collect();
    assert_eq!(inside, expected);
    assert_eq!(fs::read_to_string(target.join("tls/tls.key")).unwrap(), "KEY");
    assert_eq!((vault.logins("jwt"), vault.reads("secret/data/payments/tls")), (1, 1));
    assert!(status(&node).contains("prod"), "{}", status(&node));
    // The login was this pod's own, and ended with its reads.
    vault.tokens_fall_to(before, &node).await;
    kubelet.unpublish(&pod, "creds").await.unwrap();
    assert!(kubelet.is_gone(&pod, "creds"));
    // OpenBao's own word on what is not there: nothing is mounted for a required entry that is missing.
    for (name, entry, code) in [
        ("gone", "secret/data/payments/nothing#key", "SM303"),
        ("key", "secret/data/payments/db#paswort", "SM301"),
        ("version", "secret/data/payments/db?version=9#password", "SM303"),
    ] {
        let files = format!("user: secret/data/payments/db#username\nf: {entry}\n");
        let status = refused(&kubelet, &vault.pod(name, &files), code).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    }
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    vault.tokens_fall_to(before, &node).await;
}

/// Each breaks exactly one thing of a pod that is published at the end.
#[tokio::test]
async fn what_the_platforms_file_forbids_is_not_mounted_and_not_asked_for() {
    let vault = Vault::start().await;
    let files = "user: secret/data/payments/db#username\n";
    let prod = || connection(&vault.bao.address(), "jwt");
    let change = |pointer: &str, value: Value| {
        let mut connection = prod();
        *connection.pointer_mut(pointer).unwrap() = value;
        connection
    };
    let connections = [
        ("prod", change("/allow/0/paths/0", json!("secret/data/{{ pod.namespace }}/db"))),
        ("roleless", change("/auth", json!({"method": "jwt", "mount": "jwt", "audience": AUDIENCE}))),
        ("named", change("/allow/0/paths", json!(["secret/data/{{ pod.name }}/*"]))),
        ("closed", change("/allow", json!([]))),
        ("others", change("/allow/0/service_accounts", json!(["web"]))),
        ("strangers", change("/allow/0/namespaces", json!(["shop"]))),
    ];
    let (node, kubelet) = Node::start(options(&platform(&connections), vault.bao.ca_pem())).await;
    let valid = |name: &str| vault.pod(name, files);
    let mut tokenless = valid("tokenless");
    tokenless.tokens.clear();
    let other = vault.issuer.token(&identity(&tokenless), "elsewhere");
    let before = vault.requests();
    for (pod, code) in [
        (valid("unknown").attribute("vault", "prd"), "SM201"),
        (valid("no-default").remove("/spec/volumes/0/csi/volumeAttributes/vault"), "SM202"),
        (valid("no-role").attribute("vault", "roleless"), "SM203"),
        (valid("path").attribute("files", "user: secret/data/payments/other#username\n"), "SM204"),
        (valid("role").attribute("role", "admin"), "SM204"),
        (valid("nobody").attribute("vault", "closed"), "SM204"),
        (valid("account").attribute("vault", "others"), "SM204"),
        (valid("namespace").attribute("vault", "strangers"), "SM204"),
        (valid("interval").attribute("refresh", "48h"), "SM205"),
        (valid("pay..ments").attribute("vault", "named"), "SM206"),
        (tokenless.clone(), "SM207"),
        (tokenless.clone().token("elsewhere", &other, SystemTime::now() + SOON), "SM207"),
    ] {
        let status = refused(&kubelet, &pod, code).await;
        assert!(is_final(status.code()), "{code}: {status:?}");
    }
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    assert_eq!(vault.requests(), before, "something was sent to OpenBao");
    let text = metrics(&node).await;
    for (code, count) in [("SM201", 1), ("SM204", 5), ("SM205", 1), ("SM207", 2)] {
        let line = format!("sealmount_refusals_total{{code=\"{code}\"}} {count}");
        assert!(text.contains(&line), "{line} is not in:\n{text}");
    }
    for pod in [
        valid("plain").attribute("role", "payments").attribute("refresh", "24h"),
        valid("with-role").attribute("vault", "roleless").attribute("role", "payments"),
        valid("payments").attribute("vault", "named"),
    ] {
        kubelet.admit(&pod);
        kubelet.publish(&pod, "creds").await.unwrap();
        assert_eq!(read(&kubelet, &pod, "user"), "app");
    }
}

/// Reads two files of one generation again and again, as an app does that holds `..data` open while it reads.
/// Gives how often it saw a generation, and every pair that did not match.
fn watch(target: PathBuf, over: Arc<AtomicBool>) -> thread::JoinHandle<(usize, Vec<(String, String)>)> {
    thread::spawn(move || {
        let (mut seen, mut torn) = (0, Vec::new());
        while !over.load(Ordering::Relaxed) {
            let generation = target.join(fs::read_link(target.join("..data")).unwrap());
            let pair = ["a", "b"].map(|name| fs::read_to_string(generation.join(name)).ok());
            match pair {
                [Some(a), Some(b)] if a == b => seen += 1,
                [Some(a), Some(b)] => torn.push((a, b)),
                // Gone under the reader's hands, which is so only when another has taken its place.
                _ => assert_ne!(target.join(fs::read_link(target.join("..data")).unwrap()), generation),
            }
        }
        (seen, torn)
    })
}

#[tokio::test]
async fn a_write_appears_after_the_interval_and_never_in_halves() {
    let vault = Vault::start().await;
    let (node, kubelet) = vault.node("jwt").await;
    let pair = |number: u32| json!({"a": number.to_string().repeat(3000), "b": number.to_string().repeat(3000)});
    vault.bao.write_kv2("secret", "payments/pair", &pair(0)).await;
    let files = "a: secret/data/payments/pair#a\nb: secret/data/payments/pair#b\n";
    let pod = vault.pod("soon", files).attribute("refresh", "1s");
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    let target = kubelet.target(&pod, "creds");
    let over = Arc::new(AtomicBool::new(false));
    let reader = watch(target.clone(), Arc::clone(&over));
    for number in 1..=4 {
        vault.bao.write_kv2("secret", "payments/pair", &pair(number)).await;
        let text = number.to_string().repeat(3000);
        until("the new content", &node, async || {
            kubelet.publish(&pod, "creds").await.unwrap();
            read(&kubelet, &pod, "a") == text
        })
        .await;
    }
    over.store(true, Ordering::Relaxed);
    let (seen, torn) = reader.join().unwrap();
    assert!(seen > 0 && torn.is_empty(), "{seen} {torn:?}");

    // The same content fetched again is no new generation, but its age begins anew.
    let (generation, before) = (fs::read_link(target.join("..data")).unwrap(), kept(&target));
    until("a fetch that changed nothing", &node, async || {
        kubelet.publish(&pod, "creds").await.unwrap();
        kept(&target) != before
    })
    .await;
    assert_eq!(fs::read_link(target.join("..data")).unwrap(), generation);

    // What is not due costs no request, and the broker hears nothing of it.
    let calm = vault.pod("later", files).attribute("refresh", "1h");
    kubelet.admit(&calm);
    kubelet.publish(&calm, "creds").await.unwrap();
    let target = kubelet.target(&calm, "creds");
    vault.bao.write_kv2("secret", "payments/pair", &pair(5)).await;
    vault.tokens_fall_to(1, &node).await;
    let not_due = async || {
        let text = metrics(&node).await;
        let count = text.lines().find_map(|line| line.strip_prefix("sealmount_publishes_total{outcome=\"not_due\"} "));
        count.unwrap().parse::<u32>().unwrap()
    };
    let calm_before = not_due().await;
    let (requests, before, inode) = (vault.requests(), kept(&target), fs::metadata(target.join("a")).unwrap().ino());
    for _ in 0..20 {
        kubelet.publish(&calm, "creds").await.unwrap();
    }
    assert_eq!((vault.requests(), kept(&target)), (requests, before));
    assert_eq!(fs::metadata(target.join("a")).unwrap().ino(), inode);
    assert_eq!(not_due().await, calm_before + 20);
}

#[tokio::test]
async fn pods_of_a_service_account_share_a_login_until_the_last_is_unpublished() {
    let vault = Vault::start().await;
    let (node, kubelet) = vault.node("kubernetes").await;
    let before = vault.bao.tokens().await;
    let pods: Vec<_> =
        (0..20).map(|number| vault.pod(&format!("twin-{number}"), "u: secret/data/payments/db#username\n")).collect();
    pods.iter().for_each(|pod| kubelet.admit(pod));
    // Nobody is answered before all have asked.
    vault.bao.hang();
    let all = join_all(pods.iter().map(|pod| kubelet.publish(pod, "creds")));
    let (all, ()) = tokio::join!(all, async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        vault.bao.go_on();
    });
    all.into_iter().for_each(|done| done.unwrap());
    assert!(pods.iter().all(|pod| read(&kubelet, pod, "u") == "app"));
    assert_eq!((vault.logins("kubernetes"), vault.reads("secret/data/payments/db")), (1, 1));
    for done in join_all(pods[1..].iter().map(|pod| kubelet.unpublish(pod, "creds"))).await {
        done.unwrap();
    }
    assert_eq!(vault.bao.tokens().await, before + 1);
    kubelet.unpublish(&pods[0], "creds").await.unwrap();
    vault.tokens_fall_to(before, &node).await;
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    // A driver that is told to end takes its login with it.
    kubelet.publish(&pods[0], "creds").await.unwrap();
    assert_eq!(vault.bao.tokens().await, before + 1);
    let mut node = node;
    node.stop(Signal::TERM);
    assert_eq!(vault.bao.tokens().await, before);
}

#[tokio::test]
async fn a_path_with_leases_is_refused_and_its_lease_revoked() {
    let vault = Vault::start().await;
    let backend = Server::plain(|seen: &Seen| Reply::status(if seen.method == "GET" { 200 } else { 204 }));
    vault.bao.mount_leases(&backend.address()).await;
    let before = vault.bao.tokens().await;
    let mut connection = connection(&vault.bao.address(), "kubernetes");
    connection["allow"][0]["paths"] = json!(["rabbitmq/creds/*"]);
    let (node, kubelet) = Node::start(options(&platform(&[("prod", connection)]), vault.bao.ca_pem())).await;
    let pod = vault.pod("leased", "f: rabbitmq/creds/payments#password\n");
    let status = refused(&kubelet, &pod, "SM364").await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    vault.tokens_fall_to(before, &node).await;
    let users = |method: &str| backend.seen().iter().filter(|seen| seen.method == method).count();
    until("the lease's end", &node, async || users("DELETE") == 1).await;
}

/// Publishes until the driver, which was just killed, answers.
async fn publish_again(kubelet: &Kubelet, pod: &PodSpec, node: &Node) {
    until("an answer", node, async || kubelet.publish(pod, "creds").await.is_ok()).await;
}

#[tokio::test]
async fn a_restart_of_anything_adopts_content_and_fetches_only_what_is_due() {
    let vault = Vault::start().await;
    let (mut node, kubelet) = vault.node("kubernetes").await;
    let write = async |number: u32| {
        for path in ["lazy", "eager"] {
            vault.bao.write_kv2("secret", &format!("payments/{path}"), &json!({"k": number.to_string()})).await;
        }
    };
    write(0).await;
    let lazy = vault.pod("lazy", "k: secret/data/payments/lazy#k\n").attribute("refresh", "1h");
    let eager = vault.pod("eager", "k: secret/data/payments/eager#k\n").attribute("refresh", "1s");
    for pod in [&lazy, &eager] {
        kubelet.admit(pod);
        kubelet.publish(pod, "creds").await.unwrap();
    }
    let before = kept(&kubelet.target(&lazy, "creds"));
    for number in 1..=3 {
        write(number).await;
        match number {
            1 => signal_process(node.worker().unwrap(), Signal::KILL).unwrap(),
            2 => node.restart(Signal::KILL),
            _ => node.restart(Signal::TERM),
        }
        if number > 1 {
            kubelet.register(SOON).await.unwrap();
        }
        publish_again(&kubelet, &lazy, &node).await;
        kubelet.publish(&lazy, "creds").await.unwrap();
        assert_eq!((read(&kubelet, &lazy, "k").as_str(), vault.reads("secret/data/payments/lazy")), ("0", 1));
        until("the refresh that is due", &node, async || {
            kubelet.publish(&eager, "creds").await.unwrap();
            read(&kubelet, &eager, "k") == number.to_string()
        })
        .await;
    }
    assert_eq!(kept(&kubelet.target(&lazy, "creds")), before);
    assert_eq!(node.mounts().len(), 2);
}

#[tokio::test]
async fn what_the_platform_forbids_later_is_reported_and_takes_nothing_away() {
    let vault = Vault::start().await;
    let (node, kubelet) = vault.node("jwt").await;
    let pod = vault.pod("kept", "k: secret/data/payments/db#username\n").attribute("refresh", "1s");
    kubelet.admit(&pod);
    kubelet.publish(&pod, "creds").await.unwrap();
    let mut rewritten = connection(&vault.bao.address(), "jwt");
    for (pointer, value, code) in [
        ("/refresh/min", json!("1m"), "SM205"),
        ("/allow", json!([]), "SM204"),
        ("/auth/audience", json!("vault-other"), "SM207"),
    ] {
        *rewritten.pointer_mut(pointer).unwrap() = value;
        node.write_config(&platform(&[("prod", rewritten.clone())]).to_string());
        node.signal(Signal::HUP);
        until(code, &node, async || {
            kubelet.publish(&pod, "creds").await.unwrap();
            status(&node).contains(code)
        })
        .await;
        rewritten = connection(&vault.bao.address(), "jwt");
    }
    node.write_config(&platform(&[]).to_string());
    node.signal(Signal::HUP);
    until("SM201", &node, async || {
        kubelet.publish(&pod, "creds").await.unwrap();
        status(&node).contains("SM201")
    })
    .await;
    assert_eq!(read(&kubelet, &pod, "k"), "app");
    node.write_config(&platform(&[("prod", rewritten)]).to_string());
    node.signal(Signal::HUP);
    vault.bao.write_kv2("secret", "payments/db", &json!({"username": "next"})).await;
    until("the new content", &node, async || {
        kubelet.publish(&pod, "creds").await.unwrap();
        read(&kubelet, &pod, "k") == "next"
    })
    .await;
    assert!(!status(&node).contains("SM2"), "{}", status(&node));
}

/// Variables that clients of Vault and of HTTP are known to obey.
#[tokio::test]
async fn the_environment_of_the_driver_changes_nothing() {
    let vault = Vault::start().await;
    vault.bao.write_kv2("secret", "other/db", &json!({"k": "v"})).await;
    let elsewhere = Server::plain(|_| Reply::status(500));
    let direct = Server::plain(|seen: &Seen| match seen.path.as_str() {
        "/v1/auth/jwt/login" => Reply::json(200, &json!({"auth": {"client_token": "s.t", "lease_duration": 60}})),
        _ => Reply::json(200, &json!({"data": {"k": "direct"}})),
    });
    let mut prod = connection(&vault.bao.address(), "jwt");
    prod["allow"][0]["paths"] = json!(["*"]);
    let mut distrusted = prod.clone();
    distrusted["ca_file"] = json!("other.pem");
    let mut plain = connection(&direct.address(), "jwt");
    plain["allow_insecure_loopback"] = json!(true);
    plain.as_object_mut().unwrap().remove("ca_file");
    let platform = platform(&[("prod", prod), ("distrusted", distrusted), ("plain", plain)]);
    let mut options = options(&platform, vault.bao.ca_pem()).file("other.pem", Authority::new().pem());
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"] {
        options = options.env(name, &elsewhere.address());
    }
    for prefix in ["VAULT", "BAO"] {
        for (name, value) in [
            ("ADDR", elsewhere.address().as_str()),
            ("TOKEN", vault.bao.root_token()),
            ("NAMESPACE", "other"),
            ("SKIP_VERIFY", "1"),
            ("CACERT", "/nonexistent"),
            ("CLIENT_TIMEOUT", "0"),
        ] {
            options = options.env(&format!("{prefix}_{name}"), value);
        }
    }
    let (_node, kubelet) = Node::start(options.env("SSL_CERT_FILE", "/nonexistent")).await;
    let files = "k: secret/data/payments/db#username\n";
    let good = vault.pod("good", files);
    let plain = vault.pod("plain", "k: kv1/payments/db#k\n").attribute("vault", "plain");
    for (pod, content) in [(&good, "app"), (&plain, "direct")] {
        kubelet.admit(pod);
        kubelet.publish(pod, "creds").await.unwrap();
        assert_eq!(read(&kubelet, pod, "k"), content);
    }
    refused(&kubelet, &vault.pod("trust", files).attribute("vault", "distrusted"), "SM321").await;
    // The root token of the environment could read this.
    refused(&kubelet, &vault.pod("root", "k: secret/data/other/db#k\n"), "SM360").await;
    assert!(elsewhere.seen().is_empty());
}

#[tokio::test]
async fn no_canary_of_vault_is_found_outside_the_volume_and_none_in_memory_afterwards() {
    const NEEDLE: &str = "canary-81c4e7-nWq5Tz";
    let vault = Vault::start().await;
    let secret = |text: &str| json!({"k": format!("{NEEDLE}{text}"), "b64": "bad base64!", "n": {"m": NEEDLE}});
    vault.bao.write_kv2("secret", "payments/canary", &secret("")).await;
    for method in ["jwt", "kubernetes"] {
        let mut platform = platform(&[("prod", connection(&vault.bao.address(), method))]);
        platform["log"] = json!({"level": "debug"});
        let (node, kubelet) = Node::start(options(&platform, vault.bao.ca_pem())).await;
        let path = "secret/data/payments/canary";
        let files = format!("k: {path}#k\nn: {path}#n\nt: {{template: '{{{{ k | b64encode }}}}'}}\n");
        let good = vault.pod("good", &files).attribute("refresh", "1s");
        kubelet.admit(&good);
        kubelet.publish(&good, "creds").await.unwrap();
        let bad = format!("k: {path}#k\nd: {{from: {path}#b64, decode: base64}}\n");
        let status = refused(&kubelet, &vault.pod("bad", &bad), "SM305").await;
        let jwt = good.tokens[AUDIENCE].0.clone();
        assert!(!status.message().contains(NEEDLE), "{}", status.message());
        vault.bao.write_kv2("secret", "payments/canary", &secret("-2")).await;
        until("the new content", &node, async || {
            kubelet.publish(&good, "creds").await.unwrap();
            read(&kubelet, &good, "k").ends_with("-2")
        })
        .await;
        kept_out(&node, NEEDLE).await;
        kubelet.unpublish(&good, "creds").await.unwrap();
        kept_out(&node, NEEDLE).await;
        kept_out(&node, &jwt).await;
        none_in_memory(&node, &[NEEDLE, jwt.rsplit_once('.').unwrap().1]).await;
    }
}
