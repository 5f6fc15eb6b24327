//! The Vault room against a real OpenBao, and against recorded replies for what no real server can be made to say.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use sealmount::config::expand::{Expand, NamePattern, PathPattern};
use sealmount::config::{
    Allow, Auth, Config, Connection, Limits, Method, NO_TOKEN, NOT_ALLOWED, RefreshBounds, Requests, ShareLogin,
    UNKNOWN_CONNECTION,
};
use sealmount::policy::facts::{Container, Csi, Kind, Mount, PodFacts, Profiles, Source, Volume};
use sealmount::policy::{Grant, Rules, judge};
use sealmount::request::files::Files;
use sealmount::request::{Claim, Code, DRIVER, PodRef, PodUid, Publish, Token, VolumeId, VolumeName};
use sealmount::secret::{SecretBytes, SecretText};
use sealmount::source::{Blame, Origin, Payload, SourceError, Sources, codes};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::lab::{Authority, Identity, Issuer, OpenBao, Reply, Seen, Server};

const AUDIENCE: &str = "vault-lab";
/// Stands in every body that must never reach a message.
const CANARY: &str = "canary-7f3d91";

fn pod() -> Identity {
    numbered(0)
}

fn numbered(number: u32) -> Identity {
    Identity {
        namespace: "payments".into(),
        pod: format!("api-{number}"),
        pod_uid: format!("0b0c3c4e-1d6a-4a58-9b8e-{number:012}"),
        service_account: "api".into(),
        service_account_uid: "5d1c1d86-6c7a-4a0e-8a8e-2b2c1f0a9e11".into(),
    }
}

fn connection(address: &str, ca_pem: &str, method: Method) -> Connection {
    let any = || vec![NamePattern::Any];
    Connection {
        name: "prod".into(),
        default: true,
        address: address.into(),
        redirect_to: Vec::new(),
        ca_pem: ca_pem.into(),
        server_name: None,
        namespace: None,
        auth: Auth {
            method,
            mount: if method == Method::Kubernetes { "kubernetes" } else { "jwt" }.into(),
            audience: AUDIENCE.into(),
            role: Some("payments".into()),
        },
        allow: vec![Allow {
            namespaces: any(),
            service_accounts: any(),
            roles: any(),
            paths: vec![PathPattern::parse("*").unwrap()],
        }],
        refresh: RefreshBounds {
            default: Duration::from_secs(1800),
            min: Duration::from_secs(60),
            max: Duration::from_secs(86_400),
        },
        max_token_ttl: Duration::from_secs(3600),
        share_login: ShareLogin::ServiceAccount,
        timeout: Duration::from_secs(10),
        max_reply: 2 << 20,
        requests: Requests { at_once: 8, per_second: 1000 },
    }
}

fn config(connection: Connection) -> Config {
    Config { connections: BTreeMap::from([(connection.name.clone(), connection)]), ..Config::default() }
}

/// A valid pod's publish, and the grant that policy gives it.
fn publish(pod: &Identity, issuer: &Issuer, files: Option<&str>) -> (Grant, Publish) {
    let reference = PodRef {
        namespace: pod.namespace.clone(),
        name: pod.pod.clone(),
        uid: PodUid::parse(&pod.pod_uid).unwrap(),
        service_account: pod.service_account.clone(),
    };
    let volume = VolumeId { pod: reference.uid.clone(), name: VolumeName::parse("db").unwrap() };
    let files = files.map(|text| Files::parse(text).unwrap());
    let claim = Claim { readers: None, uid: None, vault: None, role: None, refresh: None, files, digest: [7; 32] };
    let facts = PodFacts {
        pod: reference.clone(),
        node: "node-1".into(),
        annotations: Vec::new(),
        host_pid: false,
        host_ipc: false,
        host_network: false,
        share_process_namespace: false,
        automount_token: Some(false),
        run_as_user: None,
        profiles: Profiles::default(),
        runtime_class: None,
        containers: vec![Container {
            name: "app".into(),
            kind: Kind::Regular,
            index: 0,
            image: "app:1".into(),
            run_as_user: Some(1000),
            privileged: false,
            added: Vec::new(),
            drops_all: true,
            escalation: Some(false),
            unmasked_proc: false,
            profiles: Profiles::default(),
            target: None,
            env: Vec::new(),
            env_vault: Vec::new(),
            devices: Vec::new(),
            extended_resources: Vec::new(),
            claims: Vec::new(),
            mounts: vec![Mount { volume: "db".into(), path: "/secrets".into(), read_only: true, sub_path: None }],
            running_uid: None,
        }],
        volumes: vec![Volume {
            name: "db".into(),
            source: Source::Csi(Csi {
                driver: DRIVER.into(),
                read_only: true,
                fs_type: None,
                secret: None,
                attributes: [7; 32],
            }),
        }],
    };
    let (grant, _) = judge(&volume, &claim, &facts, &Rules::default(), SystemTime::now()).expect("a valid pod");
    let token = Token {
        jwt: SecretText::new(issuer.token(pod, AUDIENCE)),
        expires: SystemTime::now() + Duration::from_secs(3600),
        service_account_uid: pod.service_account_uid.clone(),
    };
    let tokens = BTreeMap::from([(AUDIENCE.to_owned(), token)]);
    (grant, Publish { volume, pod: reference, claim, secret: None, tokens })
}

async fn fetch_for(
    sources: &Sources,
    config: &Config,
    pod: &Identity,
    issuer: &Issuer,
    files: &str,
) -> Result<Payload, SourceError> {
    let (grant, publish) = publish(pod, issuer, Some(files));
    sources.fetch(&grant, &publish, config, Instant::now() + Duration::from_secs(20)).await
}

/// Names and contents as text.
fn shown(payload: &Payload) -> Vec<(String, String)> {
    let text = |bytes: &SecretBytes| String::from_utf8(bytes.expose().to_vec()).unwrap();
    payload.files.iter().map(|(name, bytes)| (name.as_str().to_owned(), text(bytes))).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

/// An OpenBao with both auth methods, KV of both versions and a role `payments` for the lab's pods.
struct Lab {
    bao: OpenBao,
    issuer: Arc<Issuer>,
}

impl Lab {
    async fn start() -> Self {
        let mut bao = OpenBao::start().await;
        let issuer = Arc::new(Issuer::new());
        bao.mount_kv().await;
        bao.write_kv2("secret", "payments/db", &json!({"username": "app", "password": "p/w"})).await;
        bao.policy("payments", &["secret/data/payments/*", "kv1/payments/*", "rabbitmq/creds/*"]).await;
        bao.jwt_auth("jwt", &issuer).await;
        bao.kubernetes_auth("kubernetes", &issuer).await;
        let lab = Self { bao, issuer };
        lab.roles(&Value::Null).await;
        lab
    }

    /// The role at both mounts, with more settings.
    async fn roles(&self, more: &Value) {
        self.bao.jwt_role("jwt", "payments", &pod(), AUDIENCE, &["payments"], more).await;
        self.bao.kubernetes_role("kubernetes", "payments", &pod(), AUDIENCE, &["payments"], more).await;
    }

    fn config(&self, method: Method) -> Config {
        config(connection(&self.bao.address(), self.bao.ca_pem(), method))
    }

    async fn fetch(&self, sources: &Sources, config: &Config, files: &str) -> Result<Payload, SourceError> {
        fetch_for(sources, config, &pod(), &self.issuer, files).await
    }

    /// Waits until Vault holds so many tokens: revocations run in the background.
    async fn tokens_fall_to(&self, count: usize) {
        for _ in 0..100 {
            if self.bao.tokens().await == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{} tokens are left, not {count}", self.bao.tokens().await);
    }
}

fn assert_code(result: Result<Payload, SourceError>, code: Code) -> SourceError {
    let error = result.map(|payload| shown(&payload)).expect_err(code.0);
    assert_eq!(error.fault.code, code, "{error}");
    assert!(!error.to_string().contains(CANARY), "{error}");
    error
}

/// The lab's own floor: logins by both methods work against the real server, and it keeps its data across a stop.
#[tokio::test]
async fn lab_openbao_logs_in_and_keeps_its_data() {
    let mut bao = OpenBao::start().await;
    let issuer = Arc::new(Issuer::new());
    bao.mount_kv().await;
    bao.write_kv2("secret", "payments/db", &json!({"username": "app"})).await;
    bao.policy("payments", &["secret/data/payments/*"]).await;
    bao.jwt_auth("jwt", &issuer).await;
    bao.jwt_role("jwt", "payments", &pod(), "vault-lab", &["payments"], &Value::Null).await;
    bao.kubernetes_auth("kubernetes", &issuer).await;
    bao.kubernetes_role("kubernetes", "payments", &pod(), "vault-lab", &["payments"], &Value::Null).await;
    for mount in ["jwt", "kubernetes"] {
        for (audience, expected) in [("vault-lab", 200), ("elsewhere", 403)] {
            let body = json!({"role": "payments", "jwt": issuer.token(&pod(), audience)});
            let (status, reply) = bao.call("", "POST", &format!("auth/{mount}/login"), &body).await.unwrap();
            // The jwt method says 400 where the kubernetes method says 403.
            assert!(status == expected || (expected == 403 && status == 400), "{mount} {audience}: {status} {reply}");
        }
    }
    bao.stop();
    assert!(bao.call("", "GET", "sys/health", &Value::Null).await.is_none());
    bao.start_again().await;
    let secret = bao.root("GET", "secret/data/payments/db", &Value::Null).await;
    assert_eq!(secret["data"]["data"]["username"], "app");
    assert_eq!(bao.audited("read", "secret/data/payments/db"), 1);
}

#[tokio::test]
async fn reads_both_kinds_of_kv_by_both_logins() {
    let lab = Lab::start().await;
    lab.bao.write_kv2("secret", "payments/db", &json!({"username": "app", "password": "new", "port": 5432})).await;
    lab.bao.write_kv2("secret", "payments/tls", &json!({"tls.crt": "CERT", "tls.key": "KEY", "gone": null})).await;
    lab.bao.write_kv1("kv1", "payments/a%20b%3F%23+%C3%BC", &json!({"key": "odd"})).await;
    let files = r#"
        username: secret/data/payments/db#username
        old: secret/data/payments/db?version=1#password
        port: secret/data/payments/db#port
        odd: {path: "kv1/payments/a b?#+ü", key: key}
        tls/: secret/data/payments/tls#*
        tls/tls.crt: {from: secret/data/payments/tls#tls.crt, optional: true}
        db.url: {template: "pg://{{ username }}:{{ p | urlencode }}@db:{{ port }}/{{ files['tls/tls.crt'] }}", with: {p: "secret/data/payments/db?version=1#password"}}
        absent: {from: secret/data/payments/nothing#key, optional: true}
        no-key: {from: secret/data/payments/tls#gone, optional: true}
    "#;
    for method in [Method::Kubernetes, Method::Jwt] {
        let sources = Sources::default();
        let payload = lab.fetch(&sources, &lab.config(method), files).await.unwrap();
        let expected = [
            ("db.url", "pg://app:p%2Fw@db:5432/CERT"),
            ("odd", "odd"),
            ("old", "p/w"),
            ("port", "5432"),
            ("tls/tls.crt", "CERT"),
            ("tls/tls.key", "KEY"),
            ("username", "app"),
        ];
        assert_eq!(shown(&payload), pairs(&expected), "{method:?}");
        let versions =
            [("secret/data/payments/db", 2), ("secret/data/payments/db", 1), ("secret/data/payments/tls", 1)];
        let versions = versions.map(|(path, version)| (path.to_owned(), version));
        assert_eq!(payload.origin, Origin::Versions(versions.to_vec()));
    }
}

#[tokio::test]
async fn nothing_there_is_its_own_error_and_optional_leaves_the_file_out() {
    let lab = Lab::start().await;
    for (path, end) in [("deleted", "delete"), ("destroyed", "destroy")] {
        lab.bao.write_kv2("secret", &format!("payments/{path}"), &json!({"key": CANARY})).await;
        let body = json!({"versions": [1]});
        lab.bao.root("POST", &format!("secret/{end}/payments/{path}"), &body).await;
    }
    lab.bao.write_kv2("secret", "payments/empty", &json!({})).await;
    lab.bao.write_kv2("secret", "payments/nested", &json!({"a/b": CANARY, "c": 1})).await;
    lab.bao.policy("payments", &["secret/*", "kv1/payments/*"]).await;
    let (sources, config) = (Sources::default(), lab.config(Method::Kubernetes));
    for (entry, code, hint) in [
        ("secret/data/payments/nothing#key", codes::NOT_FOUND, "nothing at secret/data/payments/nothing"),
        ("secret/data/payments/db#paswort", codes::MISSING_KEY, "no key \"paswort\""),
        ("secret/data/payments/db?version=9#username", codes::NOT_FOUND, "check the path and the version"),
        ("secret/payments/db#username", codes::NOT_FOUND, "write secret/data/payments/db"),
        ("secret/data/payments/deleted#key", codes::DELETED, "was deleted"),
        ("secret/data/payments/destroyed#key", codes::DELETED, "was destroyed"),
    ] {
        let error = assert_code(lab.fetch(&sources, &config, &format!("f: {entry}")).await, code);
        assert!(error.to_string().contains(hint), "{error}");
        assert_eq!((error.blame, error.fault.field.as_str()), (Blame::Pod, "volumeAttributes.files[\"f\"]"));
        let optional = format!("f: {{from: '{entry}', optional: true}}\nu: secret/data/payments/db#username");
        let payload = lab.fetch(&sources, &config, &optional).await.unwrap();
        assert_eq!(shown(&payload), pairs(&[("u", "app")]), "{entry}");
    }
    for (files, code) in [
        ("d/: secret/data/payments/empty#*", codes::NO_KEYS),
        ("d/: secret/data/payments/nested#*", codes::BAD_FILE_NAME),
        ("f: {path: kv1/payments/data/x, version: 1, key: k}", codes::NO_VERSIONS),
    ] {
        lab.bao.write_kv1("kv1", "payments/data/x", &json!({"k": CANARY})).await;
        assert_code(lab.fetch(&sources, &config, files).await, code);
    }
}

#[tokio::test]
async fn refusals_of_vault_name_role_and_path() {
    let lab = Lab::start().await;
    let (sources, config) = (Sources::default(), lab.config(Method::Kubernetes));
    let error = assert_code(lab.fetch(&sources, &config, "f: secret/data/other/db#key").await, codes::FORBIDDEN);
    assert!(error.to_string().contains("role \"payments\" read secret/data/other/db"), "{error}");
    // 403 is not "missing".
    let optional = "f: {from: secret/data/other/db#key, optional: true}";
    assert_code(lab.fetch(&sources, &config, optional).await, codes::FORBIDDEN);
    for method in [Method::Kubernetes, Method::Jwt] {
        let mut other = lab.config(method);
        other.connections.get_mut("prod").unwrap().auth.role = Some("nobody".into());
        let error =
            assert_code(lab.fetch(&sources, &other, "f: secret/data/payments/db#username").await, codes::LOGIN_REFUSED);
        assert!(error.to_string().contains(AUDIENCE), "{error}");
        other.connections.get_mut("prod").unwrap().auth.mount = "elsewhere".into();
        let error = lab.fetch(&sources, &other, "f: secret/data/payments/db#username").await.map(drop).unwrap_err();
        assert!([codes::LOGIN_REFUSED, codes::NO_AUTH_METHOD].contains(&error.fault.code), "{error}");
        assert_eq!(error.blame, Blame::Platform);
    }
    let mut stranger = pod();
    stranger.service_account = "web".into();
    let files = "f: secret/data/payments/db#username";
    assert_code(fetch_for(&sources, &config, &stranger, &lab.issuer, files).await, codes::LOGIN_REFUSED);
}

/// What the platform's file forbids is found before anything is sent: here nothing listens at the address.
#[tokio::test]
async fn the_platforms_file_decides_before_any_request() {
    let (sources, issuer) = (Sources::default(), Issuer::new());
    let nowhere = Server::plain(|_| Reply::status(500));
    let mut prod = connection(&nowhere.address(), "", Method::Kubernetes);
    prod.allow[0].paths = vec![PathPattern::parse("secret/data/{{ pod.namespace }}/*").unwrap()];
    let config = config(prod);
    let files = "f: secret/data/other/db#key";
    assert_code(fetch_for(&sources, &config, &pod(), &issuer, files).await, NOT_ALLOWED);
    let allowed = "f: secret/data/payments/db#key";
    let deadline = Instant::now() + Duration::from_secs(5);
    let (grant, mut tokenless) = publish(&pod(), &issuer, Some(allowed));
    tokenless.tokens.clear();
    assert_code(sources.fetch(&grant, &tokenless, &config, deadline).await, NO_TOKEN);
    let (grant, mut unknown) = publish(&pod(), &issuer, Some(allowed));
    unknown.claim.vault = Some("production".into());
    assert_code(sources.fetch(&grant, &unknown, &config, deadline).await, UNKNOWN_CONNECTION);
    let template = "f: {template: '{% for x in y %}{% endfor %}', with: {y: secret/data/payments/db#key}}";
    assert_code(fetch_for(&sources, &config, &pod(), &issuer, template).await, codes::BAD_TEMPLATE);
    assert!(nowhere.seen().is_empty());
}

#[tokio::test]
async fn pods_of_a_service_account_share_a_login_and_a_read_under_way() {
    let lab = Lab::start().await;
    let before = lab.bao.tokens().await;
    let files = "f: secret/data/payments/db#username";
    let logins = |mount: &str| lab.bao.audited("update", &format!("auth/{mount}/login"));
    let reads = || lab.bao.audited("read", "secret/data/payments/db");

    let (sources, config) = (Sources::default(), lab.config(Method::Kubernetes));
    let pods: Vec<Identity> = (0..10).map(numbered).collect();
    let all = join_all(pods.iter().map(|pod| fetch_for(&sources, &config, pod, &lab.issuer, files))).await;
    assert!(all.into_iter().all(|payload| shown(&payload.unwrap()) == pairs(&[("f", "app")])));
    assert_eq!((logins("kubernetes"), reads()), (1, 1));
    // What landed is not kept: the next one reads again, with the same login.
    lab.fetch(&sources, &config, files).await.unwrap();
    assert_eq!((logins("kubernetes"), reads()), (1, 2));
    // The login stands until its last user is gone.
    for pod in &pods[1..] {
        sources.forget(&publish(pod, &lab.issuer, None).0.volume().clone());
    }
    assert_eq!(lab.bao.tokens().await, before + 1);
    sources.forget(publish(&pods[0], &lab.issuer, None).0.volume());
    lab.tokens_fall_to(before).await;

    // A role of the jwt method can bind claims of the pod: nothing is shared, and the login ends with the reads.
    let config = lab.config(Method::Jwt);
    let all = join_all(pods.iter().map(|pod| fetch_for(&sources, &config, pod, &lab.issuer, files))).await;
    assert!(all.into_iter().all(|payload| shown(&payload.unwrap()) == pairs(&[("f", "app")])));
    assert_eq!((logins("jwt"), reads()), (10, 12));
    lab.tokens_fall_to(before).await;

    // The same where the platform wants it.
    let mut config = lab.config(Method::Kubernetes);
    config.connections.get_mut("prod").unwrap().share_login = ShareLogin::Pod;
    join_all(pods.iter().map(|pod| fetch_for(&sources, &config, pod, &lab.issuer, files))).await;
    assert_eq!((logins("kubernetes"), reads()), (11, 22));
    lab.tokens_fall_to(before).await;
    // Another service account of the same name, made anew, logs in for itself.
    let config = lab.config(Method::Kubernetes);
    lab.fetch(&sources, &config, files).await.unwrap();
    let mut anew = pod();
    anew.service_account_uid = "ffffffff-6c7a-4a0e-8a8e-2b2c1f0a9e11".into();
    fetch_for(&sources, &config, &anew, &lab.issuer, files).await.unwrap();
    assert_eq!(logins("kubernetes"), 13);
    sources.close(Instant::now() + Duration::from_secs(10)).await;
    assert_eq!(lab.bao.tokens().await, before);
}

#[tokio::test]
async fn tokens_of_every_kind() {
    let lab = Lab::start().await;
    let before = lab.bao.tokens().await;
    for path in ["a", "b", "c", "d", "e"] {
        lab.bao.write_kv1("kv1", &format!("payments/{path}"), &json!({"k": path})).await;
    }
    let files =
        "a: kv1/payments/a#k\nb: kv1/payments/b#k\nc: kv1/payments/c#k\nd: kv1/payments/d#k\ne: kv1/payments/e#k";
    let expected = pairs(&[("a", "a"), ("b", "b"), ("c", "c"), ("d", "d"), ("e", "e")]);
    for more in [
        json!({"token_num_uses": 2}),
        json!({"token_num_uses": 1}),
        json!({"token_num_uses": 0, "token_type": "batch"}),
    ] {
        lab.roles(&more).await;
        for method in [Method::Kubernetes, Method::Jwt] {
            let sources = Sources::default();
            let payload = lab.fetch(&sources, &lab.config(method), files).await.unwrap();
            assert_eq!(shown(&payload), expected, "{more} {method:?}");
            sources.close(Instant::now() + Duration::from_secs(10)).await;
            lab.tokens_fall_to(before).await;
        }
    }
    // Only what was left of the tokens with two uses, whose fifth read left one: revoking a batch token is an error.
    assert_eq!(lab.bao.audited("update", "auth/token/revoke-self"), 2);

    // A token that would outlive max_token_ttl is not used, and not left behind.
    for ttl in ["2h", "0"] {
        lab.roles(&json!({"token_ttl": ttl, "token_type": "service", "token_num_uses": 0})).await;
        let sources = Sources::default();
        let error = assert_code(lab.fetch(&sources, &lab.config(Method::Jwt), files).await, codes::TOKEN_TTL);
        assert!(error.to_string().contains("set token_ttl to 3600s or less on the role"), "{error}");
        lab.tokens_fall_to(before).await;
    }

    // A standing login that someone revoked is made anew, once.
    lab.roles(&json!({"token_ttl": "10m"})).await;
    let (sources, config) = (Sources::default(), lab.config(Method::Kubernetes));
    lab.fetch(&sources, &config, files).await.unwrap();
    lab.bao.root("PUT", "sys/leases/revoke-prefix/auth/kubernetes", &Value::Null).await;
    let logins = lab.bao.audited("update", "auth/kubernetes/login");
    assert_eq!(shown(&lab.fetch(&sources, &config, files).await.unwrap()), expected);
    assert_eq!(lab.bao.audited("update", "auth/kubernetes/login"), logins + 1);
    // A connection that the platform changed gives its logins up.
    let mut changed = lab.config(Method::Kubernetes);
    changed.connections.get_mut("prod").unwrap().timeout = Duration::from_secs(9);
    lab.fetch(&sources, &changed, files).await.unwrap();
    assert_eq!(lab.bao.audited("update", "auth/kubernetes/login"), logins + 2);
    lab.tokens_fall_to(before + 1).await;
}

/// A real engine with leases: its backend is recorded, and sees the user go when the lease is revoked.
#[tokio::test]
async fn a_lease_is_refused_and_revoked() {
    let lab = Lab::start().await;
    let backend = Server::plain(|seen: &Seen| Reply::status(if seen.method == "GET" { 200 } else { 204 }));
    lab.bao.mount_leases(&backend.address()).await;
    let before = lab.bao.tokens().await;
    for (method, count) in [(Method::Kubernetes, 1), (Method::Jwt, 2)] {
        let sources = Sources::default();
        let result = lab.fetch(&sources, &lab.config(method), "f: rabbitmq/creds/payments#password").await;
        let error = assert_code(result, codes::LEASED);
        assert_eq!(error.blame, Blame::Pod);
        lab.tokens_fall_to(before).await;
        let mut gone = 0;
        for _ in 0..100 {
            gone = backend.seen().iter().filter(|seen| seen.method == "DELETE").count();
            if gone == count {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(gone, count, "{method:?}");
    }
}

#[tokio::test]
async fn an_outage_is_said_as_such_and_ends() {
    let mut lab = Lab::start().await;
    let (sources, config) = (Sources::default(), lab.config(Method::Kubernetes));
    let files = "f: secret/data/payments/db#username";
    let briefly = |lab: &Lab| {
        let (grant, publish) = publish(&pod(), &lab.issuer, Some(files));
        let (sources, config) = (&sources, &config);
        async move { sources.fetch(&grant, &publish, config, Instant::now() + Duration::from_secs(2)).await }
    };
    briefly(&lab).await.unwrap();
    lab.bao.seal().await;
    let error = assert_code(briefly(&lab).await, codes::SEALED);
    assert_eq!(error.blame, Blame::Away(None));
    lab.bao.unseal().await;
    briefly(&lab).await.unwrap();
    lab.bao.stop();
    let error = assert_code(briefly(&lab).await, codes::UNREACHABLE);
    assert_eq!(error.blame, Blame::Away(None));
    assert!(error.to_string().contains("connection \"prod\" cannot be reached: connection refused"), "{error}");
    // Pods that wait for one login learn the cause as well, not only that time ran out.
    let fresh = Sources::default();
    let all = join_all((0..5).map(|_| async {
        let (grant, publish) = publish(&pod(), &lab.issuer, Some(files));
        fresh.fetch(&grant, &publish, &config, Instant::now() + Duration::from_secs(2)).await
    }));
    all.await.into_iter().for_each(|result| drop(assert_code(result, codes::UNREACHABLE)));
    // Vault comes back while the call still tries.
    let (waiting, ()) = tokio::join!(lab_fetch(&sources, &config, &lab.issuer, files), lab.bao.start_again());
    assert_eq!(shown(&waiting.unwrap()), pairs(&[("f", "app")]));
}

async fn lab_fetch(
    sources: &Sources,
    config: &Config,
    issuer: &Arc<Issuer>,
    files: &str,
) -> Result<Payload, SourceError> {
    fetch_for(sources, config, &pod(), issuer, files).await
}

/// A Vault whose replies a test writes; it logs everybody in.
fn recorded(authority: &Authority, read: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Server {
    Server::start(&authority.server(), move |seen: &Seen| match seen.path.as_str() {
        "/v1/auth/kubernetes/login" => login_reply(),
        "/v1/auth/token/revoke-self" => Reply::status(204),
        _ => read(seen),
    })
}

fn login_reply() -> Reply {
    let auth = json!({"client_token": "s.token", "lease_duration": 600, "token_type": "service", "num_uses": 0});
    Reply::json(200, &json!({"lease_id": "", "data": null, "auth": auth}))
}

fn secret_reply() -> Reply {
    Reply::json(200, &json!({"lease_id": "", "data": {"k": "value"}}))
}

async fn from_recorded(config: &Config) -> Result<Payload, SourceError> {
    let (grant, publish) = publish(&pod(), &Issuer::new(), Some("f: kv1/payments/db#k"));
    Sources::default().fetch(&grant, &publish, config, Instant::now() + Duration::from_secs(3)).await
}

#[tokio::test]
async fn each_bad_reply_is_its_own_error_and_none_is_quoted() {
    let authority = Authority::new();
    let html = format!("<html>{CANARY}</html>");
    let errors = || Reply::json(400, &json!({"errors": [CANARY]}));
    let with_status = move |status| Reply { status, ..errors() };
    type Case = (Box<dyn Fn() -> Reply + Send + Sync>, Code, Blame);
    let away = Blame::Away(None);
    let soon = Blame::Away(Some(Duration::from_secs(77)));
    let cases: Vec<Case> = vec![
        (Box::new(move || with_status(429)), codes::QUOTA, away),
        (Box::new(move || with_status(429).header("retry-after", "77")), codes::QUOTA, soon),
        (Box::new(move || with_status(503)), codes::SEALED, away),
        (Box::new(move || with_status(500)), codes::SERVER_ERROR, away),
        (Box::new(move || with_status(502)), codes::SERVER_ERROR, away),
        (Box::new(move || with_status(412)), codes::LAGGING, away),
        (Box::new(move || with_status(400)), codes::NOT_READABLE, Blame::Pod),
        (Box::new(move || with_status(405)), codes::NOT_READABLE, Blame::Pod),
        (Box::new(move || with_status(403)), codes::FORBIDDEN, Blame::Platform),
        (Box::new(move || with_status(418)), codes::STATUS, Blame::Platform),
        (Box::new(move || with_status(404)), codes::NOT_FOUND, Blame::Pod),
        (Box::new(move || Reply::text(200, &html)), codes::NOT_A_REPLY, Blame::Platform),
        (Box::new(|| Reply::text(200, "")), codes::EMPTY_REPLY, Blame::Pod),
        (Box::new(|| Reply::status(204)), codes::EMPTY_REPLY, Blame::Pod),
        (Box::new(|| Reply::text(200, "{\"data\":null}")), codes::EMPTY_REPLY, Blame::Pod),
        (Box::new(|| Reply::json(200, &json!({"data": [CANARY]}))), codes::NOT_AN_OBJECT, Blame::Pod),
        (Box::new(|| Reply::json(200, &json!({"lease_id": CANARY, "data": {"k": CANARY}}))), codes::LEASED, Blame::Pod),
        (Box::new(|| Reply::text(200, &CANARY.repeat(10_000))), codes::REPLY_TOO_LARGE, Blame::Platform),
        (Box::new(|| secret_reply().cut(20)), codes::CUT, away),
        (Box::new(|| secret_reply().after(Duration::from_secs(2))), codes::SLOW, away),
        (
            Box::new(|| Reply::status(307).header("location", "https://elsewhere.example:8200/v1/kv1/payments/db")),
            codes::REDIRECTED,
            Blame::Platform,
        ),
        (Box::new(|| Reply::status(307).header("location", "/v1/kv1/other")), codes::REDIRECTED, Blame::Platform),
        (Box::new(|| Reply::status(307).header("location", "/v1/kv1/payments/db")), codes::REDIRECTED, Blame::Platform),
    ];
    let check = cases.into_iter().map(|(reply, code, blame)| {
        let server = recorded(&authority, move |_| reply());
        let mut prod = connection(&server.address(), authority.pem(), Method::Kubernetes);
        prod.max_reply = 100_000;
        prod.timeout = Duration::from_millis(700);
        let config = config(prod);
        async move {
            let error = assert_code(from_recorded(&config).await, code);
            assert_eq!(error.blame, blame, "{error}");
            drop(server);
        }
    });
    join_all(check).await;
}

#[tokio::test]
async fn what_may_pass_is_tried_again() {
    let authority = Authority::new();
    for trouble in [
        |_: &Seen| Reply::status(429).header("retry-after", "1"),
        |_: &Seen| Reply::status(412),
        |_: &Seen| Reply::status(503),
        |_: &Seen| Reply::status(403),
        |_: &Seen| secret_reply().cut(5),
    ] {
        let tries = AtomicUsize::new(0);
        let server = recorded(&authority, move |seen| match tries.fetch_add(1, Ordering::Relaxed) {
            0 => trouble(seen),
            _ => secret_reply(),
        });
        let config = config(connection(&server.address(), authority.pem(), Method::Kubernetes));
        assert_eq!(shown(&from_recorded(&config).await.unwrap()), pairs(&[("f", "value")]));
    }
    // A login that is refused for a moment: Vault says 403 also while the API server is away.
    let tries = AtomicUsize::new(0);
    let server = Server::start(&authority.server(), move |seen: &Seen| match seen.path.as_str() {
        "/v1/auth/kubernetes/login" if tries.fetch_add(1, Ordering::Relaxed) == 0 => Reply::status(403),
        "/v1/auth/kubernetes/login" => login_reply(),
        _ => secret_reply(),
    });
    let config = config(connection(&server.address(), authority.pem(), Method::Kubernetes));
    assert_eq!(shown(&from_recorded(&config).await.unwrap()), pairs(&[("f", "value")]));
}

#[tokio::test]
async fn a_login_without_a_token_is_refused() {
    let authority = Authority::new();
    for body in ["", "{}", "<html>", "{\"auth\":null}", "{\"auth\":{\"client_token\":5}}"] {
        let server = Server::start(&authority.server(), move |_| Reply::text(200, body));
        let config = config(connection(&server.address(), authority.pem(), Method::Kubernetes));
        assert_code(from_recorded(&config).await, codes::NO_VAULT_TOKEN);
    }
    // Numbers and texts that would not fit a clock or a header.
    for (token, ttl, code) in [("t", u64::MAX, codes::TOKEN_TTL), ("a\nb", 60, codes::UNUSABLE)] {
        let auth = json!({"auth": {"client_token": token, "lease_duration": ttl}});
        let server = Server::start(&authority.server(), move |_| Reply::json(200, &auth));
        let config = config(connection(&server.address(), authority.pem(), Method::Kubernetes));
        assert_code(from_recorded(&config).await, code);
    }
}

#[tokio::test]
async fn a_redirect_goes_only_where_the_platform_allows() {
    let authority = Authority::new();
    let active = Arc::new(recorded(&authority, |_| secret_reply()));
    let to = active.address();
    let standby = Server::start(&authority.server(), move |seen: &Seen| {
        Reply::status(307).header("location", &format!("{to}{}", seen.path))
    });
    let mut prod = connection(&standby.address(), authority.pem(), Method::Kubernetes);
    prod.namespace = Some(Expand::parse("teams/{{ pod.namespace }}").unwrap());
    assert_code(from_recorded(&config(prod.clone())).await, codes::REDIRECTED);
    assert!(active.seen().is_empty());
    prod.redirect_to = vec![active.address()];
    assert_eq!(shown(&from_recorded(&config(prod)).await.unwrap()), pairs(&[("f", "value")]));
    let seen = active.seen();
    assert_eq!(seen.iter().map(|seen| seen.method.as_str()).take(2).collect::<Vec<_>>(), ["POST", "GET"]);
    assert!(!seen[0].body.is_empty());
    assert_eq!(seen[1].header("x-vault-token"), Some("s.token"));
    assert!(seen.iter().all(|seen| seen.header("x-vault-namespace") == Some("teams/payments")));
}

#[tokio::test]
async fn trust_is_the_ca_file_and_nothing_else() {
    let authority = Authority::new();
    let good = recorded(&authority, |_| secret_reply());
    let other = Authority::new();
    let error = assert_code(
        from_recorded(&config(connection(&good.address(), other.pem(), Method::Kubernetes))).await,
        codes::UNTRUSTED,
    );
    assert_eq!((error.blame, error.fault.field.as_str()), (Blame::Platform, "platform file: connections.prod.ca_file"));
    let text = error.to_string();
    assert!(text.contains("\"prod\"") && text.contains("another CA"), "{text}");

    let expired = Server::start(&authority.expired(), |_| secret_reply());
    let at = |server: &Server| connection(&server.address(), authority.pem(), Method::Kubernetes);
    let error = assert_code(from_recorded(&config(at(&expired))).await, codes::UNTRUSTED);
    assert!(error.to_string().contains("expired"), "{error}");

    let mut named = at(&good);
    named.server_name = Some("vault.example".into());
    assert_eq!(shown(&from_recorded(&config(named.clone())).await.unwrap()), pairs(&[("f", "value")]));
    assert!(good.seen().iter().all(|seen| seen.header("host").is_some_and(|host| host.starts_with("vault.example:"))));
    named.server_name = Some("other.example".into());
    let error = assert_code(from_recorded(&config(named)).await, codes::UNTRUSTED);
    assert!(error.to_string().contains("another name"), "{error}");

    let loopback = Server::plain(|seen: &Seen| match seen.path.as_str() {
        "/v1/auth/kubernetes/login" => login_reply(),
        _ => secret_reply(),
    });
    let loopback = connection(&loopback.address(), "", Method::Kubernetes);
    assert_eq!(shown(&from_recorded(&config(loopback)).await.unwrap()), pairs(&[("f", "value")]));

    let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://{}", plain.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = plain.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let error = from_recorded(&config(connection(&address, authority.pem(), Method::Kubernetes))).await;
    assert!(assert_code(error, codes::UNTRUSTED).to_string().contains("does not speak TLS"));
    assert_code(
        from_recorded(&config(connection(&good.address(), "no certificate", Method::Kubernetes))).await,
        codes::UNTRUSTED,
    );
}

/// The tests above, run again with every variable set that a client of Vault or of HTTP is known to obey.
#[test]
fn the_environment_changes_nothing() {
    for test in
        ["vault::trust_is_the_ca_file_and_nothing_else", "vault::a_redirect_goes_only_where_the_platform_allows"]
    {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", test]);
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"] {
            child.env(name, "http://127.0.0.1:9");
        }
        for prefix in ["VAULT", "BAO"] {
            child.env(format!("{prefix}_ADDR"), "https://127.0.0.1:9");
            child.env(format!("{prefix}_TOKEN"), "s.other");
            child.env(format!("{prefix}_NAMESPACE"), "other");
            child.env(format!("{prefix}_SKIP_VERIFY"), "1");
            child.env(format!("{prefix}_CACERT"), "/nonexistent");
            child.env(format!("{prefix}_CLIENT_TIMEOUT"), "0");
        }
        let output = child.env("SSL_CERT_FILE", "/nonexistent").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }
}

#[tokio::test]
async fn a_secret_alone_and_mixed_with_vault() {
    let (sources, issuer) = (Sources::default(), Issuer::new());
    let data = |keys: &[(&str, &str)]| -> BTreeMap<String, SecretBytes> {
        keys.iter().map(|(key, value)| ((*key).to_owned(), SecretBytes::new(value.as_bytes().to_vec()))).collect()
    };
    let secret = || data(&[("tls.crt", "CERT"), ("tls.key", "KEY"), ("p12.b64", " eHg=\n"), ("bad", "not base64!")]);
    let deadline = || Instant::now() + Duration::from_secs(5);
    let from = async |files: Option<&str>, config: &Config| {
        let (grant, mut publish) = publish(&pod(), &issuer, files);
        publish.secret = Some(secret());
        sources.fetch(&grant, &publish, config, deadline()).await
    };
    let none = Config::default();
    let whole = [("bad", "not base64!"), ("p12.b64", " eHg=\n"), ("tls.crt", "CERT"), ("tls.key", "KEY")];
    let payload = from(None, &none).await.unwrap();
    assert_eq!((shown(&payload), payload.origin), (pairs(&whole), Origin::None));

    let files = r##"
        ./: "#*"
        key.p12: {from: "#p12.b64", decode: base64}
        tls.crt: "#tls.key"
        no: {from: "#nothing", optional: true}
        both: {template: "{{ c }}{{ files['key.p12'] }}", with: {c: "#tls.crt"}}
    "##;
    let expected = [
        ("bad", "not base64!"),
        ("both", "CERTxx"),
        ("key.p12", "xx"),
        ("p12.b64", " eHg=\n"),
        ("tls.crt", "KEY"),
        ("tls.key", "KEY"),
    ];
    assert_eq!(shown(&from(Some(files), &none).await.unwrap()), pairs(&expected));

    // An entry written out wins over one expanded, also when it is optional and there is nothing for it.
    let absent = r##"{"./": "#*", bad: {from: "#nothing", optional: true}}"##;
    assert_eq!(shown(&from(Some(absent), &none).await.unwrap()), pairs(&whole[1..]));

    for (files, code) in [
        ("f: '#nothing'", codes::MISSING_KEY),
        ("f: {from: '#bad', decode: base64}", codes::NOT_BASE64),
        ("f: {template: '{{ g }}'}\ng: '#bad'\nh: {template: '{{ x }}'}", codes::TEMPLATE_FAILED),
        ("f: {template: '{{ g'}\ng: '#bad'", codes::BAD_TEMPLATE),
        ("./: '#*'\ntls.crt/x: '#bad'", codes::COLLISION),
    ] {
        assert_code(from(Some(files), &none).await, code);
    }
    let small = Config { limits: Limits { volume_bytes: 5, files: 256 }, ..Config::default() };
    assert_code(from(None, &small).await, codes::OVER_LIMITS);
    assert_code(from(Some("f: {template: '{{ g }}{{ g }}'}\ng: '#tls.crt'"), &small).await, codes::TEMPLATE_FAILED);
    let few = Config { limits: Limits { volume_bytes: 1 << 20, files: 3 }, ..Config::default() };
    assert_code(from(None, &few).await, codes::OVER_LIMITS);

    let authority = Authority::new();
    let server = recorded(&authority, |_| secret_reply());
    let config = config(connection(&server.address(), authority.pem(), Method::Kubernetes));
    let mixed = "crt: '#tls.crt'\nk: kv1/payments/db#k\nd/: kv1/payments/db#*\nt: {template: '{{ crt }}-{{ k }}'}";
    let expected = [("crt", "CERT"), ("d/k", "value"), ("k", "value"), ("t", "CERT-value")];
    assert_eq!(shown(&from(Some(mixed), &config).await.unwrap()), pairs(&expected));
    // One path is read once, however many entries take a key of it.
    assert_eq!(server.seen().iter().filter(|seen| seen.method == "GET").count(), 1);
}
