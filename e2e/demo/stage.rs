//! What the story is played on: OpenBao with secrets, the node, the pod and its three volumes, the two containers.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::attacks::Column;
use crate::lab::envoy::{Envoy, Place, Upstream, carry};
use crate::lab::kubelet::{Kubelet, PodSpec};
use crate::lab::node::Node;
use crate::lab::pod::{Bind, Container, Sandbox, User};
use crate::lab::{Identity, Issuer, OpenBao};

pub(crate) const APP_UID: u32 = 1000;
const NODE: &str = "node-a";
/// The audience of the connection, which no other token of the pod has.
pub(crate) const VAULT_AUDIENCE: &str = "vault-prod";
/// The audience of the token every container of a pod holds.
const DEFAULT_AUDIENCE: &str = "https://kubernetes.default.svc";
const TOKEN_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The application: opens the current generation, reads both files of it, and says when a pair is new, mixed or not
/// whole. `cd -P` pins one generation; if that one goes away meanwhile the application opens the next, once.
const APP: &str = r#"
# The values end without a newline: read says 1 then, but has them.
line() { value=; read -r value < "$1" || [ -n "$value" ]; }
pair() { cd -P /etc/creds/..data && line username && user=$value && line password && word=$value; }
seen= reads=0
while :; do
    turn=0
    while [ $turn -lt 25 ]; do
        if pair 2> /dev/null || pair 2> /dev/null; then
            now="${user%%-*} ${word%%-*}"
            reads=$((reads + 1))
        else
            now=missing
        fi
        if [ "$now" != "$seen" ]; then seen=$now; echo "set $now"; fi
        turn=$((turn + 1))
    done
    echo "reads $reads"
    sleep 0.02
done
"#;

/// Everything that runs. Dropped in this order: containers before the network they share, the node last.
pub(crate) struct Stage {
    pub(crate) app: Container,
    pub(crate) envoy: Envoy,
    pub(crate) sandbox: Sandbox,
    pub(crate) bao: OpenBao,
    pub(crate) kubelet: Kubelet,
    pub(crate) node: Node,
}

/// What must not be found anywhere but in the application's files.
pub(crate) struct Canaries {
    pub(crate) usual: String,
    pub(crate) secret: String,
    pub(crate) first: String,
    pub(crate) second: String,
    pub(crate) api_key: String,
    pub(crate) token: String,
}

/// The pod of the demo: `app` mounts all three volumes, `envoy` only the one of the usual way.
pub(crate) fn pod(name: &str) -> PodSpec {
    let mount = |name: &str, path: &str| json!({"name": name, "mountPath": path, "readOnly": true});
    PodSpec::new(name, NODE)
        .attribute("for", "app")
        .attribute("vault", "prod")
        .attribute(
            "files",
            "username: secret/data/payments/db#username\npassword: secret/data/payments/db#password\napi-key: \"#api-key\"\n",
        )
        .attribute("refresh", "1s")
        .set("/spec/volumes/1", json!({"name": "usual", "emptyDir": {"medium": "Memory"}}))
        .set("/spec/volumes/2", json!({"name": "native", "secret": {"secretName": "native"}}))
        .set("/spec/containers/0/volumeMounts/1", mount("usual", "/vault/secrets"))
        .set("/spec/containers/0/volumeMounts/2", mount("native", "/etc/native"))
        .set("/spec/containers/1/volumeMounts", json!([mount("usual", "/vault/secrets")]))
}

fn identity(pod: &PodSpec) -> Identity {
    Identity {
        namespace: pod.namespace().into(),
        pod: pod.name().into(),
        pod_uid: pod.uid().into(),
        service_account: pod.service_account().into(),
        service_account_uid: "5d1c6a52-9a0e-4c7b-8f52-8f4c1d0f3a11".into(),
    }
}

/// The pod with the token that the kubelet gets for it and hands to the driver.
pub(crate) fn with_token(pod: PodSpec, issuer: &Issuer) -> PodSpec {
    let jwt = issuer.token(&identity(&pod), VAULT_AUDIENCE);
    pod.token(VAULT_AUDIENCE, &jwt, SystemTime::now() + Duration::from_secs(3600))
}

/// Secrets, a policy and two roles: `payments` wants the connection's own audience, `usual` takes the token that lies
/// in every container. Gives that token.
pub(crate) async fn open_vault(bao: &OpenBao, issuer: &Issuer, pod: &PodSpec, canaries: &Canaries) -> String {
    let who = identity(pod);
    bao.mount_kv().await;
    bao.write_kv2("secret", "payments/db", &pair(1, &canaries.first)).await;
    bao.write_kv2("secret", "payments/usual", &pair(1, &canaries.usual)).await;
    bao.policy("payments", &["secret/data/payments/*"]).await;
    bao.jwt_auth("jwt", issuer).await;
    for (role, audience) in [("payments", VAULT_AUDIENCE), ("usual", DEFAULT_AUDIENCE)] {
        bao.jwt_role("jwt", role, &who, audience, &["payments"], &json!({})).await;
    }
    issuer.token(&who, DEFAULT_AUDIENCE)
}

/// Both values carry the number of their set, so that a mixed pair shows.
pub(crate) fn pair(set: u32, canary: &str) -> Value {
    json!({"username": format!("{set}-payments"), "password": format!("{set}-{canary}")})
}

/// The platform team's file.
pub(crate) fn platform_file(bao: &OpenBao) -> String {
    format!(
        r#"version: 1
connections:
  prod:
    default: true
    address: {}
    ca_file: ca.pem
    auth: {{method: jwt, mount: jwt, audience: {VAULT_AUDIENCE}, role: payments}}
    allow:
    - namespaces: [payments]
      service_accounts: [payments]
      roles: [payments]
      paths: ["secret/data/{{{{ pod.namespace }}}}/*"]
      methods: [read]
    refresh: {{default: 1s, min: 1s, max: 1h}}
stale_after: 2s
"#,
        bao.address()
    )
}

/// The volumes of the two other columns, filled, and where all three are.
pub(crate) async fn volumes(
    node: &Node,
    kubelet: &Kubelet,
    pod: &PodSpec,
    bao: &OpenBao,
    default_token: &str,
    canaries: &Canaries,
) -> [Column; 3] {
    let below = node.kubelet_dir().join(format!("pods/{}/volumes", pod.uid()));
    let tmpfs = |kind: &str, name: &str, options: &str| {
        let dir = below.join(kind).join(name);
        DirBuilder::new().recursive(true).mode(0o750).create(&dir).unwrap();
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&dir).status().unwrap();
        assert!(status.success(), "cannot mount a tmpfs at {}", dir.display());
        dir
    };

    // The usual way: an agent logs in with the token of its container and writes into a volume both containers mount.
    let usual = tmpfs("kubernetes.io~empty-dir", "usual", "mode=0777,size=1m");
    let login = json!({"role": "usual", "jwt": default_token});
    let (_, reply) = bao.call("", "POST", "auth/jwt/login", &login).await.unwrap();
    let token = reply["auth"]["client_token"].as_str().unwrap();
    let (_, reply) = bao.call(token, "GET", "secret/data/payments/usual", &Value::Null).await.unwrap();
    write(&usual.join("password"), reply["data"]["data"]["password"].as_str().unwrap(), 0o644);
    chown(usual.join("password"), Some(100), Some(1000)).unwrap();

    // A Secret volume, as the kubelet's atomic writer lays it out.
    let native = tmpfs("kubernetes.io~secret", "native", "mode=1777,size=1m");
    let generation = native.join("..2026_01_01_00_00_00.1");
    DirBuilder::new().mode(0o755).create(&generation).unwrap();
    fs::set_permissions(&generation, fs::Permissions::from_mode(0o755)).unwrap();
    write(&generation.join("password"), &canaries.secret, 0o644);
    symlink("..2026_01_01_00_00_00.1", native.join("..data")).unwrap();
    symlink("..data/password", native.join("password")).unwrap();

    [
        Column { dir: "/vault/secrets", host: usual, canary: canaries.usual.clone() },
        Column { dir: "/etc/native", host: native, canary: canaries.secret.clone() },
        Column { dir: "/etc/creds", host: kubelet.target(pod, "creds"), canary: canaries.first.clone() },
    ]
}

fn write(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The directory that admission mounts into every container of the pod.
pub(crate) fn service_account(sandbox: &Sandbox, default_token: &str) -> PathBuf {
    let dir = sandbox.dir().join("token");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    write(&dir.join("token"), default_token, 0o644);
    dir
}

/// The application's container.
pub(crate) fn start_app(sandbox: &Sandbox, columns: &[Column; 3], tokens: &Path) -> Container {
    let mut binds: Vec<Bind> = columns.iter().map(|column| Bind::ro(&column.host, column.dir)).collect();
    binds.push(Bind::ro(tokens, TOKEN_DIR));
    sandbox.run("app", User::new(APP_UID), &binds, &["sh", "-c", APP])
}

/// Envoy's container; its way to OpenBao is a socket, since the pod's network has no route.
pub(crate) async fn start_envoy(
    sandbox: &Sandbox,
    columns: &[Column; 3],
    tokens: &Path,
    bao: &OpenBao,
    node: &Node,
) -> Envoy {
    let road = sandbox.dir().join("openbao.sock");
    carry(&road, bao.port());
    let binds =
        [Bind::ro(&columns[0].host, columns[0].dir), Bind::ro(tokens, TOKEN_DIR), Bind::ro(&road, "/openbao.sock")];
    let csi = node.csi_socket();
    let upstreams = [
        Upstream { name: "openbao", place: Place::Socket("/openbao.sock".into()), ca_pem: Some(bao.ca_pem()) },
        Upstream { name: "driver", place: Place::Socket(csi.to_owned()), ca_pem: None },
    ];
    Envoy::start(sandbox, &binds, &upstreams).await
}
