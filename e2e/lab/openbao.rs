//! A real OpenBao with TLS, an audit log and storage that outlives a stop.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::node::{children, signal_process};
use super::{Authority, Daemon, Identity, Issuer, Server, program};

/// The server, initialised and unsealed; it ends with this value.
pub struct OpenBao {
    dir: TempDir,
    host: String,
    port: u16,
    daemon: Daemon,
    authority: Arc<Authority>,
    key: String,
    root: String,
    http: reqwest::Client,
    reviews: Vec<Server>,
}

impl OpenBao {
    /// A new server on a free port of the loopback address.
    pub async fn start() -> Self {
        Self::start_with(Arc::new(Authority::new())).await
    }

    /// A new server whose certificate `authority` signs.
    pub async fn start_with(authority: Arc<Authority>) -> Self {
        Self::start_at(authority, "127.0.0.1", free_port()).await
    }

    /// A new server on this address of the machine, which is `vault.example` too.
    pub async fn start_at(authority: Arc<Authority>, host: &str, port: u16) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let server = authority.server_for(&[host, "127.0.0.1", "localhost", "vault.example"]);
        for (name, text) in [("ca.pem", authority.pem()), ("tls.crt", &server.certificate), ("tls.key", &server.key)] {
            std::fs::write(dir.path().join(name), text).expect("write a certificate");
        }
        std::fs::create_dir(dir.path().join("raft")).expect("create the storage");
        std::fs::write(dir.path().join("bao.hcl"), config(dir.path(), host, port)).expect("write the config");
        let http = client(authority.pem());
        let daemon = spawn(dir.path());
        let mut bao = Self {
            dir,
            host: host.to_owned(),
            port,
            daemon,
            authority,
            key: String::new(),
            root: String::new(),
            http,
            reviews: Vec::new(),
        };
        bao.wait("sys/seal-status", |status, _| status == 200).await;
        let init = bao.root("PUT", "sys/init", &json!({"secret_shares": 1, "secret_threshold": 1})).await;
        bao.key = text(&init["keys_base64"][0]);
        bao.root = text(&init["root_token"]);
        bao.unseal().await;
        bao
    }

    /// `https://HOST:PORT`.
    pub fn address(&self) -> String {
        format!("https://{}:{}", self.host, self.port)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The certificate authority to trust, PEM.
    pub fn ca_pem(&self) -> &str {
        self.authority.pem()
    }

    /// A file with [`Self::ca_pem`].
    pub fn ca_file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// The root token.
    pub fn root_token(&self) -> &str {
        &self.root
    }

    /// The audit log: one JSON object a line, a request and its response each.
    pub fn audit_log(&self) -> PathBuf {
        self.dir.path().join("audit.log")
    }

    /// The requests in the audit log whose operation and path are these.
    pub fn audited(&self, operation: &str, path: &str) -> usize {
        let log = std::fs::read_to_string(self.audit_log()).unwrap_or_default();
        let entries = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        entries
            .filter(|entry| entry["type"] == "request")
            .filter(|entry| entry["request"]["operation"] == operation && entry["request"]["path"] == path)
            .count()
    }

    /// Kills the server; what it stored stays.
    pub fn stop(&mut self) {
        self.daemon.stop();
    }

    /// Stops it from running: it takes connections and answers nothing, until [`Self::go_on`].
    pub fn hang(&self) {
        signal_process(self.process(), Signal::STOP).expect("stop OpenBao");
    }

    /// Lets it run again.
    pub fn go_on(&self) {
        signal_process(self.process(), Signal::CONT).expect("continue OpenBao");
    }

    fn process(&self) -> u32 {
        let name = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        children(self.daemon.id()).into_iter().find(|pid| name(pid).trim() == "bao").expect("OpenBao runs")
    }

    /// Starts it on the same port again, sealed as after any start, and unseals it.
    pub async fn start_again(&mut self) {
        self.daemon = spawn(self.dir.path());
        self.wait("sys/seal-status", |status, _| status == 200).await;
        self.unseal().await;
    }

    /// Seals it: everything answers 503.
    pub async fn seal(&self) {
        self.root("PUT", "sys/seal", &Value::Null).await;
    }

    /// Unseals it and waits until it serves.
    pub async fn unseal(&self) {
        self.root("PUT", "sys/unseal", &json!({"key": self.key})).await;
        self.wait("sys/mounts", |status, _| status == 200).await;
    }

    /// A call with the root token; panics unless it succeeds. Gives the body, or null.
    pub async fn root(&self, method: &str, path: &str, body: &Value) -> Value {
        for _ in 0..200 {
            let (status, reply) = self.call(&self.root, method, path, body).await.expect("OpenBao answers");
            if (200..300).contains(&status) {
                return reply;
            }
            // On a busy machine raft's only member loses its lease and votes for itself again.
            assert!(reply.to_string().contains("local node not active"), "{method} {path}: {status} {reply}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{method} {path}: OpenBao has no leader");
    }

    /// A call with any token, or none if it is empty; `None` if nothing answers.
    pub async fn call(&self, token: &str, method: &str, path: &str, body: &Value) -> Option<(u16, Value)> {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let mut request = self.http.request(method, format!("{}/v1/{path}", self.address()));
        if !token.is_empty() {
            request = request.header("X-Vault-Token", token);
        }
        if !body.is_null() {
            request = request.body(body.to_string());
        }
        let reply = request.send().await.ok()?;
        let status = reply.status().as_u16();
        let bytes = reply.bytes().await.ok()?;
        Some((status, serde_json::from_slice(&bytes).unwrap_or_default()))
    }

    async fn wait(&self, path: &str, ready: impl Fn(u16, &Value) -> bool) {
        for _ in 0..600 {
            if let Some((status, body)) = self.call(&self.root, "GET", path, &Value::Null).await
                && ready(status, &body)
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        panic!("OpenBao does not serve {path}; its log ends: {}", &log[log.len().saturating_sub(2000)..]);
    }

    /// Mounts a secrets engine: `kv` with version 1 or 2 in the options, `database`, ...
    pub async fn mount(&self, path: &str, body: &Value) {
        self.root("POST", &format!("sys/mounts/{path}"), body).await;
    }

    /// Mounts KV 2 at `secret` and KV 1 at `kv1`.
    pub async fn mount_kv(&self) {
        self.mount("secret", &json!({"type": "kv", "options": {"version": "2"}})).await;
        self.mount("kv1", &json!({"type": "kv", "options": {"version": "1"}})).await;
        for mount in ["secret", "kv1"] {
            // A fresh KV 2 mount says 400 "upgrading" for a moment.
            self.wait(&format!("{mount}/config"), |status, _| status != 400).await;
        }
    }

    /// Writes a KV 2 secret, the whole object, and gives its version: `write_kv2("secret", "payments/db", ...)`.
    pub async fn write_kv2(&self, mount: &str, path: &str, data: &Value) -> u64 {
        let reply = self.root("POST", &format!("{mount}/data/{path}"), &json!({"data": data})).await;
        reply["data"]["version"].as_u64().expect("a version")
    }

    /// Writes a KV 1 secret.
    pub async fn write_kv1(&self, mount: &str, path: &str, data: &Value) {
        self.root("POST", &format!("{mount}/{path}"), data).await;
    }

    /// A policy that may read these paths (in Vault's own syntax).
    pub async fn policy(&self, name: &str, read: &[&str]) {
        let rules: String =
            read.iter().map(|path| format!("path \"{path}\" {{ capabilities = [\"read\"] }}\n")).collect();
        self.root("PUT", &format!("sys/policies/acl/{name}"), &json!({"policy": rules})).await;
    }

    /// The `jwt` auth method at `mount`, trusting `issuer`.
    pub async fn jwt_auth(&self, mount: &str, issuer: &Issuer) {
        self.root("POST", &format!("sys/auth/{mount}"), &json!({"type": "jwt"})).await;
        let config = json!({"jwt_validation_pubkeys": [issuer.public_key_pem()]});
        self.root("POST", &format!("auth/{mount}/config"), &config).await;
    }

    /// An engine whose replies have leases, without a database: RabbitMQ's, at `rabbitmq`, with the role `payments`.
    /// `backend` is what stands in for the broker's HTTP API.
    pub async fn mount_leases(&self, backend: &str) {
        self.mount("rabbitmq", &json!({"type": "rabbitmq"})).await;
        let config = json!({
            "connection_uri": backend, "username": "root", "password": "x", "verify_connection": false,
        });
        self.root("POST", "rabbitmq/config/connection", &config).await;
        self.root("POST", "rabbitmq/roles/payments", &json!({"tags": "administrator"})).await;
    }

    /// A role of a `jwt` mount, for one service account, with `more` settings (`token_ttl`, `token_type`, ...).
    pub async fn jwt_role(
        &self,
        mount: &str,
        role: &str,
        pod: &Identity,
        audience: &str,
        policies: &[&str],
        more: &Value,
    ) {
        let mut body = json!({
            "role_type": "jwt",
            "user_claim": "sub",
            "bound_audiences": [audience],
            "bound_subject": format!("system:serviceaccount:{}:{}", pod.namespace, pod.service_account),
            "token_policies": policies,
            "token_ttl": "10m",
        });
        merge(&mut body, more);
        self.root("POST", &format!("auth/{mount}/role/{role}"), &body).await;
    }

    /// The `kubernetes` auth method at `mount`, with a TokenReview endpoint that trusts `issuer`.
    pub async fn kubernetes_auth(&mut self, mount: &str, issuer: &Arc<Issuer>) {
        let review = issuer.token_review(&self.authority);
        self.root("POST", &format!("sys/auth/{mount}"), &json!({"type": "kubernetes"})).await;
        let config = json!({
            "kubernetes_host": review.address(),
            "kubernetes_ca_cert": self.authority.pem(),
            "token_reviewer_jwt": "the lab's TokenReview endpoint asks for none",
            "disable_local_ca_jwt": true,
        });
        self.root("POST", &format!("auth/{mount}/config"), &config).await;
        self.reviews.push(review);
    }

    /// A role of a `kubernetes` mount, for one service account, with `more` settings.
    pub async fn kubernetes_role(
        &self,
        mount: &str,
        role: &str,
        pod: &Identity,
        audience: &str,
        policies: &[&str],
        more: &Value,
    ) {
        let mut body = json!({
            "bound_service_account_names": [pod.service_account],
            "bound_service_account_namespaces": [pod.namespace],
            "audience": audience,
            "token_policies": policies,
            "token_ttl": "10m",
        });
        merge(&mut body, more);
        self.root("POST", &format!("auth/{mount}/role/{role}"), &body).await;
    }

    /// How many tokens are alive, the root token included.
    pub async fn tokens(&self) -> usize {
        let list = self.root("LIST", "auth/token/accessors", &Value::Null).await;
        list["data"]["keys"].as_array().map_or(0, Vec::len)
    }
}

fn merge(into: &mut Value, more: &Value) {
    for (key, value) in more.as_object().into_iter().flatten() {
        into[key] = value.clone();
    }
}

fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

fn spawn(dir: &Path) -> Daemon {
    let config = format!("-config={}", dir.join("bao.hcl").display());
    Daemon::spawn(&program("bao"), &["server", &config], &dir.join("log"))
}

fn config(dir: &Path, host: &str, port: u16) -> String {
    let (dir, cluster) = (dir.display(), free_port());
    // The audit device stands here because this version takes none over its API.
    format!(
        r#"
        storage "raft" {{
          path = "{dir}/raft"
          node_id = "lab"
          performance_multiplier = 1
        }}
        listener "tcp" {{
          address = "{host}:{port}"
          tls_cert_file = "{dir}/tls.crt"
          tls_key_file = "{dir}/tls.key"
        }}
        audit "file" "lab" {{
          options {{
            file_path = "{dir}/audit.log"
          }}
        }}
        api_addr = "https://{host}:{port}"
        cluster_addr = "https://127.0.0.1:{cluster}"
        ui = false
        "#
    )
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

fn client(ca_pem: &str) -> reqwest::Client {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).expect("a certificate")).expect("an authority");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    reqwest::Client::builder()
        .no_proxy()
        .tls_backend_preconfigured(tls)
        .timeout(Duration::from_secs(10))
        .build()
        .expect("a client")
}
