//! Installs the driver and connects the Vault with the README's own commands, and runs the README's own pods.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cluster::{Cluster, SYSTEM, VAULT, until};
use crate::kube::run;
use crate::machine::NODE_ADDRESS;
use crate::readme::Section;
use crate::runner::{Check, check};

pub(crate) static CHECKS: &[Check] = &[
    check!("helm install with default values, as the README says", install),
    check!("the README's commands connect an OpenBao", connect),
    check!("the README's pods run, from a Secret and from OpenBao", pods),
    check!("the README's call of check finds nothing to refuse in them", checked),
    check!("helm upgrade, as the README says", upgraded),
    check!("a token of the API server's audience is refused by that role", automounted_token),
];

/// Runs the README's commands in the project's directory, as a user does; they must succeed.
pub(crate) async fn shell(cluster: &Cluster, script: &str) -> String {
    try_shell(cluster, script).await.unwrap_or_else(|said| panic!("{script}\n{said}"))
}

/// The same; an error is what they printed. The program `sealmount`, which the shell gets as `$0`, is on `PATH`.
pub(crate) async fn try_shell(cluster: &Cluster, script: &str) -> Result<String, String> {
    let authority = cluster.bao.ca_file().display().to_string();
    let program = std::env::var("SEALMOUNT_BIN").expect("SEALMOUNT_BIN names the driver");
    let setup = format!(
        "set -eu; cd '{}'; PATH=\"$PATH:${{0%/*}}\"; export BAO_ADDR='{}' BAO_TOKEN='{}' BAO_CACERT='{authority}'\n",
        cluster.project.display(),
        cluster.bao.address(),
        cluster.bao.root_token(),
    );
    let output = run("sh", &["-c", &format!("{setup}{script}"), &program], "").await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    if output.status.success() { Ok(out) } else { Err(out + &err) }
}

async fn install(cluster: &mut Cluster) -> String {
    shell(cluster, &Section::of("Install").all("sh")[0]).await;
    let driver = cluster.driver().await;
    let containers = driver["spec"]["containers"].as_array().map_or(0, Vec::len);
    assert_eq!(containers, 1, "one container, no registrar and no liveness sidecar");
    let from = if cluster.at_least(37) { "kubelet" } else { "api" };
    let args = driver["spec"]["containers"][0]["args"].to_string();
    assert!(args.contains(&format!("--pods-from={from}")), "{args}");
    // Before any Vault is connected.
    let secret = cluster.canary();
    cluster.namespace("payments", "privileged").await;
    cluster.secret("payments", "db", &[("password", &secret)]).await;
    cluster.kube.apply("payments", &Section::of("Use").all("yaml")[0]).await;
    cluster.kube.ready("payments", "from-secret", Duration::from_secs(60)).await;
    assert_eq!(cluster.reads("payments", "from-secret", "app", "/run/secrets/db/password").await, Ok(secret));
    // The next commands make the namespace anew. The pod's shell does not listen to SIGTERM.
    cluster.kube.run("delete pod from-secret -n payments --grace-period=1 --timeout=60s").await;
    cluster.kube.run("delete namespace payments --timeout=60s").await;
    format!("one container; pod facts from the {from}; the README's pod with a Secret runs")
}

async fn connect(cluster: &mut Cluster) -> String {
    cluster.bao.mount_kv().await;
    let section = Section::of("Connect a Vault");
    let scripts = section.all("sh");
    let [reviewer, role, proof, upgrade] = &scripts[..] else {
        panic!("the README's section has {} scripts, not 4", scripts.len())
    };
    shell(cluster, reviewer).await;
    shell(cluster, role).await;
    let (_, grant) = role.split_once("bao write auth/kubernetes/role/").expect("the role");
    let grant = format!("bao delete auth/kubernetes/role/payments-api\nbao write auth/kubernetes/role/{grant}");
    for (change, expected) in [
        (grant.replace("audience=vault-prod", ""), "ANY TOKEN LOGS IN: set the role's audience\n"),
        (grant, "refused, as it should be\n"),
        ("BAO_ADDR=https://127.0.0.1:1".to_owned(), "no token logs in, which proves nothing: "),
    ] {
        let said = shell(cluster, &format!("{change}\necho =\n{proof}")).await;
        let (_, said) = said.split_once("=\n").expect("just printed");
        assert!(said.starts_with(expected), "{said}");
    }
    // The README's files, beside which the user stands.
    let place = cluster.dir.join("tmp");
    fs::write(place.join("vault.yaml"), section.only("yaml")).expect("write the values");
    fs::write(place.join("ca.pem"), cluster.bao.ca_pem()).expect("write the CA");
    let project = cluster.project.display().to_string();
    let upgrade = upgrade.replace("deploy/chart", &format!("{project}/deploy/chart"));
    shell(cluster, &format!("cd '{}'\n{upgrade}", place.display())).await;
    let waivers: Vec<_> = crate::attacks::WAIVED
        .iter()
        .map(|(code, container)| {
            json!({
                "code": code, "namespace": "payments", "container": container,
                "until": "2099-12-31", "reason": "the lab shows the attack",
            })
        })
        .collect();
    // What only the lab has: no DNS, little time, and attacks to show.
    let lab = json!({
        "hostAliases": [{"ip": NODE_ADDRESS, "hostnames": [VAULT]}],
        "config": {
            "stale_after": format!("{}s", cluster.times.stale_after.as_secs()),
            "connections": {"prod": {"refresh": {"default": "10s", "min": "5s"}}},
            "policy": {"waivers": waivers},
        },
        "metrics": {"enabled": true},
        // There the driver's own refusals are looked at.
        "admission": {"excludeNamespaces": ["payments", "init"]},
    });
    fs::write(place.join("lab.json"), lab.to_string()).expect("write the values");
    let script = format!(
        "helm upgrade sealmount deploy/chart -n {SYSTEM} --reuse-values -f '{}'\n\
         kubectl -n {SYSTEM} rollout status daemonset/sealmount --timeout=60s",
        place.join("lab.json").display()
    );
    shell(cluster, &script).await;
    let driver = cluster.kube.json("get csidriver csi.sealmount.io").await;
    assert_eq!(driver["spec"]["tokenRequests"], json!([{"audience": "vault-prod"}]));
    let in_secrets = &driver["spec"]["serviceAccountTokenInSecrets"];
    assert_eq!(in_secrets == &json!(true), cluster.at_least(35), "{in_secrets}");
    "kubernetes auth by TokenReview; the driver has its audience".to_owned()
}

async fn pods(cluster: &mut Cluster) -> String {
    let (secret, vault) = (cluster.canary(), cluster.canary());
    if cluster.kube.pod("payments", "api").await.is_none() {
        payments(cluster).await;
    }
    cluster.secret("payments", "db", &[("username", "app"), ("password", &secret)]).await;
    let data = json!({"username": "app", "password": vault});
    cluster.bao.write_kv2("secret", "payments/db", &data).await;
    cluster.bao.write_kv2("secret", "payments/tls", &json!({"tls.crt": "a", "tls.key": "b"})).await;
    let section = Section::of("Use");
    let manifests = section.all("yaml");
    assert_eq!(manifests.len(), 2, "the README has two pods");
    for manifest in &manifests {
        cluster.kube.apply("payments", manifest).await;
    }
    let limit = Duration::from_secs(60);
    for name in ["from-secret", "from-vault"] {
        cluster.kube.ready("payments", name, limit).await;
    }
    assert_eq!(cluster.reads("payments", "from-secret", "app", "/run/secrets/db/password").await, Ok(secret));
    let url = format!("postgres://app:{vault}@db/pay");
    assert_eq!(cluster.reads("payments", "from-vault", "app", "/run/secrets/db/db.url").await, Ok(url));
    let key = cluster.reads("payments", "from-vault", "app", "/run/secrets/db/tls/tls.key").await;
    assert_eq!(key, Ok("b".to_owned()));
    let status = shell(cluster, &Section::of("Run").all("sh")[0]).await;
    assert!(status.contains("payments/from-vault") && status.contains("prod"), "{status}");
    status.lines().next().unwrap_or_default().to_owned()
}

async fn checked(cluster: &mut Cluster) -> String {
    let place = cluster.dir.join("tmp/user");
    fs::create_dir_all(place.join("my-app")).expect("a directory");
    let section = Section::of("Use");
    for (number, manifest) in section.all("yaml").iter().enumerate() {
        fs::write(place.join(format!("my-app/{number}.yaml")), manifest).expect("write the manifest");
    }
    let report = shell(cluster, &format!("cd '{}'\n{}", place.display(), section.only("sh"))).await;
    assert!(report.contains("from-secret") && report.contains("from-vault"), "{report}");
    assert!(report.contains("istio-proxy"), "{report}");
    report.lines().last().unwrap_or_default().to_owned()
}

async fn upgraded(cluster: &mut Cluster) -> String {
    let values = || shell(cluster, "helm get values sealmount -n sealmount-system -o json");
    let before = values().await;
    shell(cluster, &Section::of("Run").all("sh")[1]).await;
    assert_eq!(values().await, before, "an upgrade keeps the values");
    "the values stay".to_owned()
}

/// The namespace and role of the README's example, as `connect` made them: removed with every check's namespaces.
pub(crate) async fn payments(cluster: &Cluster) {
    until("the namespace of the check before is gone", Duration::from_secs(60), async || {
        cluster.kube.try_run("get namespace payments").await.is_err()
    })
    .await;
    cluster.namespace("payments", "privileged").await;
    cluster.kube.run("create serviceaccount api -n payments").await;
}

async fn automounted_token(cluster: &mut Cluster) -> String {
    payments(cluster).await;
    let login = async |audience: &str| {
        let audience = if audience.is_empty() { String::new() } else { format!("--audience={audience}") };
        let token = cluster.kube.run(&format!("create token api -n payments {audience}")).await;
        let body = json!({"role": "payments-api", "jwt": token.trim()});
        cluster.bao.call("", "POST", "auth/kubernetes/login", &body).await.expect("OpenBao answers")
    };
    let (status, body): (u16, Value) = login("vault-prod").await;
    assert_eq!(status, 200, "the role works at all: {body}");
    let (status, body) = login("").await;
    assert_eq!(status, 403, "{body}");
    "HTTP 403; with the connection's audience 200".to_owned()
}
