//! Vault away, slow or wrong: a first publish fails with a code that says who must act, and a volume that stands keeps
//! what it has.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};
use tonic::Code;

use crate::lab::kubelet::{PodSpec, is_mounted};
use crate::lab::node::{Node, Options};
use crate::lab::{ApiServer, Authority, Issuer, Reply, Seen, Server};
use crate::life::{kept_out, metrics, status, until, watching};
use crate::openbao::{AUDIENCE, Vault, connection, none_in_memory, options, platform, pod, refused};
use crate::secret::{pod as secret_pod, read};

/// Stands in every secret and in every body of an error.
const NEEDLE: &str = "canary-d20b97-Xk3Vha";
/// The longest a connection here lets one request take.
const TIMEOUT: &str = "2s";

/// A Vault whose answers a test writes: it logs everybody in, and a read's path names what goes wrong while it is
/// broken.
fn recorded(authority: &Authority, elsewhere: String, broken: Arc<AtomicBool>) -> Server {
    Server::start(&authority.server(), move |seen: &Seen| {
        let body = json!({"errors": [NEEDLE]});
        let secret = |text: &str| Reply::json(200, &json!({"data": {"k": format!("{NEEDLE}{text}")}}));
        let what = seen.path.strip_prefix("/v1/kv1/payments/");
        match what {
            None if seen.path.ends_with("/login") => {
                Reply::json(200, &json!({"auth": {"client_token": "s.recorded", "lease_duration": 600}}))
            }
            None => Reply::status(204),
            Some(_) if !broken.load(Ordering::Relaxed) => secret(""),
            Some("busy") => Reply::json(429, &body),
            Some("asks") => Reply::json(429, &body).header("retry-after", "600"),
            Some("forbidden") => Reply::json(403, &body),
            Some("lags") => Reply::json(412, &body),
            Some("error") => Reply::json(500, &body),
            Some("gateway") => Reply::text(502, &format!("<html>{NEEDLE}</html>")),
            Some("cut") => secret("").cut(30),
            Some("slow") => secret("").after(Duration::from_secs(4)),
            Some("redirect") => Reply::json(307, &body).header("location", &format!("{elsewhere}{}", seen.path)),
            Some("huge") => secret(&NEEDLE.repeat(10_000)),
            Some(other) => panic!("{other} is no trouble"),
        }
    })
}

/// An address where nothing listens.
fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("https://{}", listener.local_addr().unwrap())
}

fn to(address: &str, ca_file: &str) -> Value {
    let mut connection = connection(address, "jwt");
    connection["ca_file"] = json!(ca_file);
    connection["timeout"] = json!(TIMEOUT);
    connection["max_reply"] = json!("64KiB");
    connection
}

fn with_files(config: &Value, bao: &str, recorded: &Authority) -> Options {
    options(config, bao).file("recorded.pem", recorded.pem()).file("other.pem", Authority::new().pem())
}

/// A pod that reads one key through a connection.
fn reads(issuer: &Issuer, connection: &str, path: &str) -> PodSpec {
    let name = format!("{connection}-{}", path.rsplit('/').next().unwrap());
    pod(issuer, &name, &format!("k: {path}#k\n")).attribute("vault", connection)
}

const SECRET: &str = "secret/data/payments/canary";

async fn vault() -> Vault {
    let vault = Vault::start().await;
    vault.bao.write_kv2("secret", "payments/canary", &json!({"k": NEEDLE})).await;
    vault
}

/// [`until`] over everything that a call may try for, and more.
async fn eventually(what: &str, node: &Node, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(90);
    while !holds().await {
        assert!(Instant::now() < end, "{what} did not come to hold:\n{}\n{}", status(node), node.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_first_publish_fails_with_a_code_of_its_own_and_nothing_is_mounted() {
    let (vault, sealed, authority) = (vault().await, vault().await, Authority::new());
    sealed.bao.seal().await;
    let elsewhere = Server::start(&authority.server(), |_| Reply::status(500));
    let expired = Server::start(&authority.expired(), |_| Reply::status(500));
    let broken = Arc::new(AtomicBool::new(true));
    let server = recorded(&authority, elsewhere.address(), Arc::clone(&broken));
    // Nothing was sent to a server that is not trusted, and that with the pod's token least of all.
    let silent = Server::start(&authority.server(), |_| Reply::status(500));
    let mut prod = to(&vault.bao.address(), "ca.pem");
    prod["allow"][0]["paths"] = json!(["secret/data/*"]);
    let mut roleless = prod.clone();
    roleless["auth"]["role"] = json!("nobody");
    roleless["allow"][0]["roles"] = json!(["nobody"]);
    let mut mountless = prod.clone();
    mountless["auth"]["mount"] = json!("elsewhere");
    let config = platform(&[
        ("prod", prod),
        ("roleless", roleless),
        ("mountless", mountless),
        ("nowhere", to(&nowhere(), "ca.pem")),
        ("sealed", to(&sealed.bao.address(), "sealed.pem")),
        ("distrusted", to(&silent.address(), "other.pem")),
        ("expired", to(&expired.address(), "recorded.pem")),
        ("recorded", to(&server.address(), "recorded.pem")),
    ]);
    let options = with_files(&config, vault.bao.ca_pem(), &authority).file("sealed.pem", sealed.bao.ca_pem());
    let (node, kubelet) = Node::start(options).await;
    let tokens = vault.bao.tokens().await;
    let of = |connection: &str, path: &str| reads(&vault.issuer, connection, path);
    let cases = [
        (of("nowhere", SECRET), "SM320", Code::Unavailable),
        (of("sealed", SECRET), "SM327", Code::Unavailable),
        (of("distrusted", SECRET), "SM321", Code::FailedPrecondition),
        (of("expired", SECRET), "SM321", Code::FailedPrecondition),
        (of("prod", "secret/data/other/db"), "SM360", Code::FailedPrecondition),
        (of("roleless", SECRET), "SM340", Code::FailedPrecondition),
        // OpenBao says 403 where there is no auth method, so as not to tell.
        (of("mountless", SECRET), "SM34", Code::FailedPrecondition),
        (of("recorded", "kv1/payments/busy"), "SM326", Code::Unavailable),
        (of("recorded", "kv1/payments/asks"), "SM326", Code::Unavailable),
        (of("recorded", "kv1/payments/lags"), "SM330", Code::Unavailable),
        (of("recorded", "kv1/payments/error"), "SM328", Code::Unavailable),
        (of("recorded", "kv1/payments/gateway"), "SM328", Code::Unavailable),
        (of("recorded", "kv1/payments/cut"), "SM323", Code::Unavailable),
        (of("recorded", "kv1/payments/slow"), "SM322", Code::Unavailable),
        (of("recorded", "kv1/payments/redirect"), "SM325", Code::FailedPrecondition),
        (of("recorded", "kv1/payments/huge"), "SM324", Code::FailedPrecondition),
    ];
    join_all(cases.iter().map(async |(pod, code, grpc)| {
        let status = refused(&kubelet, pod, code).await;
        assert_eq!(status.code(), *grpc, "{status:?}");
        assert!(!status.message().contains(NEEDLE), "{status:?}");
        // After an uncertain code the kubelet is sure to unpublish.
        if *grpc == Code::Unavailable {
            kubelet.unpublish(pod, "creds").await.unwrap();
            assert!(kubelet.is_gone(pod, "creds"));
        }
    }))
    .await;
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    let asked = |what: &str| server.seen().iter().filter(|seen| seen.path.ends_with(what)).count();
    assert!(asked("/busy") > 1, "what may pass was not tried again");
    assert_eq!((asked("/asks"), asked("/redirect"), asked("/huge")), (1, 1, 1));
    assert!([elsewhere.seen(), silent.seen(), expired.seen()].iter().all(Vec::is_empty));
    kept_out(&node, NEEDLE).await;
    let needles: Vec<_> = cases.iter().map(|(pod, ..)| pod.tokens[AUDIENCE].0.rsplit_once('.').unwrap().1).collect();
    none_in_memory(&node, &[&[NEEDLE], &needles[..]].concat()).await;
    until("the number of tokens", &node, async || vault.bao.tokens().await == tokens).await;
    // The same pods, once the one thing is mended.
    broken.store(false, Ordering::Relaxed);
    sealed.bao.unseal().await;
    for pod in cases.iter().map(|(pod, ..)| pod).filter(|pod| pod.name().starts_with("recorded")) {
        kubelet.publish(pod, "creds").await.unwrap();
        assert_eq!(read(&kubelet, pod, "k"), NEEDLE);
    }
}

/// One pod for each thing that goes wrong, all of them published before and mended together afterwards.
#[tokio::test]
async fn a_volume_that_stands_keeps_its_content_says_so_and_recovers_by_itself() {
    let (mut stopped, sealed, authority) = (vault().await, vault().await, Authority::new());
    let elsewhere = Server::start(&authority.server(), |_| Reply::status(500));
    let expired = Server::start(&authority.expired(), |_| Reply::status(500));
    let broken = Arc::new(AtomicBool::new(false));
    let server = recorded(&authority, elsewhere.address(), Arc::clone(&broken));
    let config = |distrusted: &str, expired: &str| {
        let mut config = platform(&[
            ("stopped", to(&stopped.bao.address(), "ca.pem")),
            ("sealed", to(&sealed.bao.address(), "sealed.pem")),
            ("distrusted", to(&server.address(), distrusted)),
            ("expired", to(expired, "recorded.pem")),
            ("recorded", to(&server.address(), "recorded.pem")),
        ]);
        config["stale_after"] = json!("1s");
        config
    };
    let whole = config("recorded.pem", &server.address());
    let spoilt = config("other.pem", &expired.address());
    let options = with_files(&whole, stopped.bao.ca_pem(), &authority).file("sealed.pem", sealed.bao.ca_pem());
    let (node, kubelet) = Node::start(options).await;
    // Each OpenBao knows the tokens of its own issuer only.
    let of =
        |vault: &Vault, connection: &str, path: &str| reads(&vault.issuer, connection, path).attribute("refresh", "1s");
    let stop = of(&stopped, "stopped", SECRET);
    let seal = of(&sealed, "sealed", SECRET);
    let asks = of(&stopped, "recorded", "kv1/payments/asks");
    let mut cases = vec![
        (stop.clone(), "SM320"),
        (seal.clone(), "SM327"),
        (of(&stopped, "distrusted", "kv1/payments/trust"), "SM321"),
        (of(&stopped, "expired", "kv1/payments/expired"), "SM321"),
        (asks.clone(), "SM326"),
    ];
    for (what, code) in [
        ("busy", "SM326"),
        ("forbidden", "SM360"),
        ("lags", "SM330"),
        ("error", "SM328"),
        ("cut", "SM323"),
        ("slow", "SM322"),
        ("redirect", "SM325"),
        ("huge", "SM324"),
    ] {
        cases.push((of(&stopped, "recorded", &format!("kv1/payments/{what}")), code));
    }
    for (pod, _) in &cases {
        kubelet.admit(pod);
        kubelet.publish(pod, "creds").await.unwrap();
    }
    let publish_all = async || {
        for done in join_all(cases.iter().map(|(pod, _)| kubelet.publish(pod, "creds"))).await {
            done.unwrap();
        }
        assert!(cases.iter().all(|(pod, _)| read(&kubelet, pod, "k").starts_with(NEEDLE)));
    };

    stopped.bao.stop();
    sealed.bao.seal().await;
    broken.store(true, Ordering::Relaxed);
    node.write_config(&spoilt.to_string());
    node.signal(Signal::HUP);
    eventually("every volume failing and stale", &node, async || {
        publish_all().await;
        let lines: Vec<String> = status(&node).lines().map(str::to_owned).collect();
        cases.iter().all(|(pod, code)| {
            let at = lines.iter().position(|line| line.contains(&format!("payments/{} ", pod.name()))).unwrap();
            let below = lines.get(at + 1).map_or("", String::as_str);
            lines[at].contains("STALE") && below.contains("failing since") && below.contains(code)
        })
    })
    .await;
    let count = cases.len();
    assert!(metrics(&node).await.contains(&format!("sealmount_stale_volumes {count}")), "{}", metrics(&node).await);
    for (pod, code) in &cases {
        let log = node.log();
        let told = |what: &str| log.lines().any(|line| line.contains(what) && line.contains(pod.uid()));
        assert!(told("SealmountStale") || told("the content was last confirmed"), "{code}:\n{log}");
        assert!(told("the old content stays"), "{code}:\n{log}");
        assert!(is_mounted(&kubelet.target(pod, "creds")));
    }
    assert!(node.log().contains("SealmountStale") && node.log().contains("SealmountRefreshFailed"), "{}", node.log());
    kept_out(&node, NEEDLE).await;
    // A server that asks for ten minutes is left alone, however often the kubelet comes.
    let asked = || server.seen().iter().filter(|seen| seen.path.ends_with("/asks")).count();
    let before = asked();
    for _ in 0..30 {
        kubelet.publish(&asks, "creds").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(asked(), before);
    assert!(elsewhere.seen().is_empty() && expired.seen().is_empty());

    stopped.bao.start_again().await;
    sealed.bao.unseal().await;
    for vault in [&stopped, &sealed] {
        vault.bao.write_kv2("secret", "payments/canary", &json!({"k": format!("{NEEDLE}-2")})).await;
    }
    broken.store(false, Ordering::Relaxed);
    node.write_config(&whole.to_string());
    node.signal(Signal::HUP);
    eventually("every volume current again", &node, async || {
        publish_all().await;
        let text = status(&node);
        // All but the one whose server asked for time.
        text.matches("failing since").count() == 1 && text.matches("STALE").count() == 1
    })
    .await;
    assert_eq!([&stop, &seal].map(|pod| read(&kubelet, pod, "k")), [(); 2].map(|()| format!("{NEEDLE}-2")));
    assert!(metrics(&node).await.contains("sealmount_stale_volumes 1"));
    assert!(node.log().contains("SealmountFresh"), "{}", node.log());
    for done in join_all(cases.iter().map(|(pod, _)| kubelet.unpublish(pod, "creds"))).await {
        done.unwrap();
    }
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    kept_out(&node, NEEDLE).await;
    none_in_memory(&node, &[NEEDLE]).await;
}

#[tokio::test]
async fn an_unpublish_does_not_wait_for_a_vault_that_hangs() {
    let vault = vault().await;
    let before = vault.bao.tokens().await;
    for method in ["jwt", "kubernetes"] {
        let config = platform(&[("prod", connection(&vault.bao.address(), method))]);
        let (node, kubelet) = Node::start(options(&config, vault.bao.ca_pem())).await;
        let standing = reads(&vault.issuer, "prod", SECRET).attribute("refresh", "1s");
        let [fresh, other] = [(); 2].map(|()| reads(&vault.issuer, "prod", SECRET));
        for pod in [&standing, &fresh, &other] {
            kubelet.admit(pod);
        }
        kubelet.publish(&standing, "creds").await.unwrap();
        vault.bao.hang();
        // Due by then: the refresh hangs, the call does not.
        tokio::time::sleep(Duration::from_secs(1)).await;
        kubelet.publish(&standing, "creds").await.unwrap();
        assert_eq!(read(&kubelet, &standing, "k"), NEEDLE);
        let waiting = kubelet.publish(&fresh, "creds");
        let unpublish = async {
            // The publish is under way by then.
            tokio::time::sleep(Duration::from_millis(500)).await;
            for pod in [&fresh, &standing] {
                // The request itself may take ten seconds, and the retries thirty: this has to come before both.
                let done = tokio::time::timeout(Duration::from_secs(8), kubelet.unpublish(pod, "creds")).await;
                done.expect("the unpublish waits for Vault").unwrap();
                assert!(kubelet.is_gone(pod, "creds"));
            }
        };
        let (published, ()) = tokio::join!(waiting, unpublish);
        let status = published.unwrap_err();
        assert_eq!(status.code(), Code::Aborted, "{status:?}");
        assert_eq!(node.mounts(), Vec::<PathBuf>::new());
        kept_out(&node, NEEDLE).await;
        vault.bao.go_on();
        // What was on its way when nobody wanted it any more leaves no login behind.
        kubelet.publish(&other, "creds").await.unwrap();
        kubelet.unpublish(&other, "creds").await.unwrap();
        until("the number of tokens", &node, async || vault.bao.tokens().await == before).await;
        none_in_memory(&node, &[NEEDLE]).await;
    }
}

#[tokio::test]
async fn a_login_that_nobody_waits_for_any_more_is_revoked_when_it_comes() {
    let authority = Authority::new();
    let server = Server::start(&authority.server(), |seen: &Seen| match seen.path.ends_with("/login") {
        true => Reply::json(200, &json!({"auth": {"client_token": "s.late", "lease_duration": 600}}))
            .after(Duration::from_secs(2)),
        false => Reply::status(204),
    });
    let issuer = Issuer::new();
    for method in ["jwt", "kubernetes"] {
        let config = platform(&[("prod", connection(&server.address(), method))]);
        let (node, kubelet) = Node::start(options(&config, authority.pem())).await;
        let pod = reads(&issuer, "prod", SECRET);
        kubelet.admit(&pod);
        let count = |what: &str| server.seen().iter().filter(|seen| seen.path.ends_with(what)).count();
        let before = (count("/login"), count("/revoke-self"));
        let (published, ()) = tokio::join!(kubelet.publish(&pod, "creds"), async {
            until("the login", &node, async || count("/login") > before.0).await;
            kubelet.unpublish(&pod, "creds").await.unwrap();
        });
        assert_eq!(published.unwrap_err().code(), Code::Aborted);
        until("the token's end", &node, async || count("/revoke-self") > before.1).await;
        assert_eq!((count("/login"), count("/revoke-self")), (before.0 + 1, before.1 + 1));
        assert!(server.seen().iter().all(|seen| !seen.path.contains("canary")), "a read for nobody");
    }
}

#[tokio::test]
async fn a_pod_that_changes_while_vault_is_slow_is_judged_as_it_is_by_then() {
    let (authority, issuer, api) = (Authority::new(), Issuer::new(), ApiServer::start().await);
    let server = recorded(&authority, String::new(), Arc::new(AtomicBool::new(true)));
    let mut slow = to(&server.address(), "recorded.pem");
    slow["timeout"] = json!("20s");
    let dir = tempfile::tempdir().unwrap();
    let options = with_files(&platform(&[("recorded", slow)]), authority.pem(), &authority);
    let (node, kubelet) = Node::start(watching(&api, dir.path(), options)).await;
    let pod = reads(&issuer, "recorded", "kv1/payments/slow");
    api.put(&pod.manifest);
    let debugger = json!([{"name": "debugger", "image": "b", "volumeMounts": [{"name": "creds", "mountPath": "/m"}]}]);
    let debugged = pod.clone().set("/spec/ephemeralContainers", debugger);
    let change = async {
        let asked = async || server.seen().iter().any(|seen| seen.path.ends_with("/slow"));
        until("Vault is asked", &node, asked).await;
        api.put(&debugged.manifest);
    };
    let (published, ()) = tokio::join!(kubelet.publish(&pod, "creds"), change);
    let refused = published.unwrap_err();
    assert!(refused.message().contains("SM130 spec.ephemeralContainers[0].volumeMounts[0]"), "{refused:?}");
    assert_eq!(node.mounts().len(), 0);
}

/// More volumes than the driver takes calls at one time wait for a Vault that hangs.
#[tokio::test]
async fn what_needs_no_vault_never_waits_for_those_that_do() {
    let vault = vault().await;
    let mut config = platform(&[("prod", connection(&vault.bao.address(), "kubernetes"))]);
    config["limits"] = json!({"volume_bytes": "64KiB"});
    let (node, kubelet) = Node::start(options(&config, vault.bao.ca_pem())).await;
    let pods: Vec<_> = (0..260).map(|_| reads(&vault.issuer, "prod", SECRET)).collect();
    let [calm, gone] = ["calm", "gone"].map(secret_pod);
    pods.iter().chain([&calm, &gone]).for_each(|pod| kubelet.admit(pod));
    kubelet.publish(&gone, "creds").await.unwrap();
    vault.bao.hang();
    let all = join_all(pods.iter().map(|pod| kubelet.publish(pod, "creds")));
    let others = async {
        // All have asked by then; none is answered for as long as one request may take, which is ten seconds.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let others = async {
            kubelet.publish(&calm, "creds").await.unwrap();
            kubelet.unpublish(&gone, "creds").await.unwrap();
            kubelet.register(Duration::from_secs(1)).await.unwrap();
        };
        tokio::time::timeout(Duration::from_secs(6), others).await.expect("others wait for Vault");
        vault.bao.go_on();
    };
    let (all, ()) = tokio::join!(all, others);
    for status in all.into_iter().filter_map(Result::err) {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    }
    // Who was turned away comes again, as the kubelet does.
    for pod in &pods {
        kubelet.publish(pod, "creds").await.unwrap();
    }
    assert_eq!(node.mounts().len(), pods.len() + 1);
}
