//! Life under a real kubelet: starts, ends, restarts, outages, rotations.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cluster::{Cluster, SYSTEM, until};
use crate::install::payments;
use crate::pods::{APP_UID, MOUNT, app, container, from_secret, from_vault, pod, simple, spec};
use crate::runner::{Check, beside, check};

mod driver;
mod outage;
mod start;

pub(crate) static CHECKS: &[Check] = &[
    check!("a pod starts; restricted level, read-only root, no root", first_start),
    check!("a pod with 8 volumes", eight_volumes),
    beside!("a container crashes and finds its files again", crash),
    beside!("an init container that `for` names reads, beside the app", init_container),
    beside!("a pod in a user namespace (hostUsers: false)", user_namespace),
    beside!("a mistyped attribute is an event that says the right name", mistyped),
    beside!("a reader that runs with another UID than its files is told which", other_uid),
    beside!("a Secret that is not UTF-8: the message of the README's table", not_utf8),
    beside!("Job and CronJob pods end", jobs),
    beside!("a StatefulSet's pod is replaced under its name", stateful_set),
    beside!("new content reaches an app that watches ..data, from Secret and Vault", rotation),
    beside!("a subPath mount keeps what it bound, through every rotation", sub_path),
    beside!("a Secret deleted under a running pod: content stays, reported as stale", secret_deleted),
    check!("a pod is deleted while the driver is away, and ends when it is back", driver::deleted_meanwhile),
    check!("a pod that comes before the driver waits, and starts", driver::before_the_driver),
    check!("the driver's pod is deleted while 20 pods start", driver::killed_in_a_start),
    check!("a rolling update with 30 volumes in use and pods that come and go", driver::update),
    check!("the driver hangs: the liveness probe ends its container, pods notice nothing", driver::hangs),
    check!("OpenBao away at the start: an event says so, the pod starts when it is back", outage::vault_at_start),
    check!("OpenBao away later: content stays, containers and the kubelet restart", outage::vault_later),
    check!("containerd restarts", outage::containerd),
    check!("the API server is away", outage::api_server),
    check!("100 pods at once", start::hundred),
    check!("a pod's start beside the same with a Secret volume", start::pairs),
];

/// How long a pod may take to be ready before a check gives up. No measure: nothing here takes long.
const READY: Duration = Duration::from_secs(60);

/// A namespace with the Secret `db`, whose password is a canary.
async fn namespace(cluster: &Cluster, name: &str) -> (String, String) {
    let password = cluster.canary();
    let namespace = cluster.namespace(name, "restricted").await;
    cluster.secret(&namespace, "db", &[("username", "app"), ("password", &password)]).await;
    (namespace, password)
}

/// The pod is there, and reads this.
async fn reads(cluster: &Cluster, namespace: &str, pod: &str, expected: &str) {
    let path = format!("{MOUNT}/password");
    assert_eq!(cluster.reads(namespace, pod, "app", &path).await.as_deref(), Ok(expected), "{pod}");
}

fn restarts(pod: &Value) -> u64 {
    let statuses = pod["status"]["containerStatuses"].as_array();
    statuses.into_iter().flatten().filter_map(|it| it["restartCount"].as_u64()).sum()
}

async fn first_start(cluster: &mut Cluster) -> String {
    let (namespace, password) = namespace(cluster, "first").await;
    let begun = Instant::now();
    cluster.kube.apply(&namespace, &simple("first").to_string()).await;
    cluster.kube.ready(&namespace, "first", READY).await;
    let seconds = begun.elapsed().as_secs_f32();
    reads(cluster, &namespace, "first", &password).await;
    let listing = cluster
        .kube
        .exec(&namespace, "first", "app", &["stat", "-L", "-c", "%a %u %n", &format!("{MOUNT}/password"), MOUNT])
        .await;
    let expected = format!("400 {APP_UID} {MOUNT}/password\n500 {APP_UID} {MOUNT}\n");
    assert_eq!(listing.out, expected, "{}", listing.err);
    format!("{seconds:.1} s from apply to ready")
}

async fn crash(cluster: &Cluster) -> String {
    let (namespace, password) = namespace(cluster, "crash").await;
    cluster.kube.apply(&namespace, &simple("crash").to_string()).await;
    let first = cluster.kube.ready(&namespace, "crash", READY).await;
    for expected in 1..=2 {
        // The first process of the container.
        cluster.kube.exec(&namespace, "crash", "app", &["kill", "-TERM", "1"]).await;
        until("the container runs again", Duration::from_secs(60), async || {
            let pod = cluster.kube.pod(&namespace, "crash").await.unwrap_or_default();
            restarts(&pod) == expected && crate::cluster::is_ready(&pod)
        })
        .await;
        reads(cluster, &namespace, "crash", &password).await;
    }
    let pod = cluster.kube.pod(&namespace, "crash").await.expect("the pod");
    assert_eq!(pod["metadata"]["uid"], first["metadata"]["uid"]);
    "twice".to_owned()
}

async fn init_container(cluster: &Cluster) -> String {
    let (namespace, password) = namespace(cluster, "init").await;
    let mut both = pod("both", &[app(&["password"])], &[from_secret("db", "db")]);
    // The comparison's text stands in the API server, so it is hashed.
    let hash = sha256(&password);
    let check = format!("test \"$(sha256sum < {MOUNT}/password | cut -c1-64)\" = {hash}");
    both["spec"]["initContainers"] = json!([container("migrate", APP_UID, &["sh", "-c", &check])]);
    both["spec"]["volumes"][0]["csi"]["volumeAttributes"] = json!({"for": "app, migrate"});
    cluster.kube.apply(&namespace, &both.to_string()).await;
    cluster.kube.ready(&namespace, "both", READY).await;
    reads(cluster, &namespace, "both", &password).await;
    // The same pod without `for`: two containers mount the volume.
    both["metadata"]["name"] = json!("unnamed");
    both["spec"]["volumes"][0]["csi"]["volumeAttributes"] = json!({});
    cluster.kube.apply(&namespace, &both.to_string()).await;
    let event = cluster.kube.event(&namespace, "unnamed", "SM", READY).await;
    "named: both read; not named: ".to_owned() + code(&event.message)
}

/// The first code in a message.
fn code(message: &str) -> &str {
    let start = message.match_indices("SM").find(|(at, _)| message[at + 2..].starts_with(|c: char| c.is_ascii_digit()));
    start.map_or(message, |(at, _)| &message[at..(at + 5).min(message.len())])
}

fn sha256(text: &str) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn eight_volumes(cluster: &mut Cluster) -> String {
    let (namespace, password) = namespace(cluster, "eight").await;
    let mut container = app(&[]);
    let names: Vec<String> = (0..8).map(|number| format!("v{number}")).collect();
    let mounts = names.iter().map(|name| json!({"name": name, "mountPath": format!("/run/{name}"), "readOnly": true}));
    container["volumeMounts"] = mounts.collect();
    let volumes: Vec<Value> = names.iter().map(|name| from_secret(name, "db")).collect();
    let begun = Instant::now();
    cluster.kube.apply(&namespace, &pod("eight", &[container], &volumes).to_string()).await;
    cluster.kube.ready(&namespace, "eight", READY).await;
    let seconds = begun.elapsed().as_secs_f32();
    for name in &names {
        let path = format!("/run/{name}/password");
        assert_eq!(cluster.reads(&namespace, "eight", "app", &path).await.as_deref(), Ok(password.as_str()));
    }
    format!("{seconds:.1} s from apply to ready")
}

async fn user_namespace(cluster: &Cluster) -> String {
    let (namespace, password) = namespace(cluster, "userns").await;
    let mut apart = simple("apart");
    apart["spec"]["hostUsers"] = json!(false);
    cluster.kube.apply(&namespace, &apart.to_string()).await;
    cluster.kube.ready(&namespace, "apart", READY).await;
    reads(cluster, &namespace, "apart", &password).await;
    let map = cluster.reads(&namespace, "apart", "app", "/proc/self/uid_map").await.expect("the map");
    assert!(!map.trim_start().starts_with("0          0"), "the pod has no namespace of its own: {map}");
    "reads".to_owned()
}

async fn mistyped(cluster: &Cluster) -> String {
    let (namespace, _) = namespace(cluster, "typo").await;
    let mut wrong = simple("typo");
    wrong["spec"]["volumes"][0]["csi"]["volumeAttributes"] = json!({"fro": "app"});
    let begun = Instant::now();
    cluster.kube.apply(&namespace, &wrong.to_string()).await;
    let event = cluster.kube.event(&namespace, "typo", "fro", Duration::from_secs(30)).await;
    let seconds = begun.elapsed().as_secs_f32();
    assert!(event.message.contains("`for`") || event.message.contains("\"for\""), "{}", event.message);
    format!("{}: after {seconds:.1} s", code(&event.message))
}

async fn other_uid(cluster: &Cluster) -> String {
    let (namespace, _) = namespace(cluster, "uid").await;
    let mut other = pod("uid", &[container("app", APP_UID, &["/bin/app", "pause"])], &[from_secret("db", "db")]);
    other["spec"]["volumes"][0]["csi"]["volumeAttributes"] = json!({"uid": "999"});
    cluster.kube.apply(&namespace, &other.to_string()).await;
    let told = cluster.kube.event(&namespace, "uid", "SM126 ", Duration::from_secs(30)).await;
    assert!(told.message.contains("app runs with UID 1000, and the files are UID 999's"), "{}", told.message);
    assert_eq!(told.reason, "SealmountWarning");
    "the real UID, from the pod's status".to_owned()
}

async fn not_utf8(cluster: &Cluster) -> String {
    let (namespace, _) = namespace(cluster, "binary").await;
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "db"}, "data": {"key": "//79"}});
    cluster.kube.apply(&namespace, &secret.to_string()).await;
    cluster.kube.apply(&namespace, &pod("binary", &[app(&[])], &[from_secret("db", "db")]).to_string()).await;
    let message = "string field contains invalid UTF-8";
    cluster.kube.event(&namespace, "binary", message, Duration::from_secs(30)).await;
    assert!(include_str!("../../README.md").contains(&format!("| `{message}` |")), "the README's table has it");
    "the kubelet says it".to_owned()
}

async fn jobs(cluster: &Cluster) -> String {
    let (namespace, password) = namespace(cluster, "jobs").await;
    let check = format!("test \"$(sha256sum < {MOUNT}/password | cut -c1-64)\" = {}", sha256(&password));
    let mut spec = spec(&[container("app", APP_UID, &["sh", "-c", &check])], &[from_secret("db", "db")]);
    spec["restartPolicy"] = json!("Never");
    let job = json!({"backoffLimit": 0, "template": {"spec": spec}});
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once"}, "spec": job},
        {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "often"},
         "spec": {"schedule": "0 0 1 1 *", "jobTemplate": {"spec": job}}},
    ]});
    cluster.kube.apply(&namespace, &list.to_string()).await;
    // The schedule's minute is not waited for: a run of it is asked for, as people do.
    cluster.kube.run(&format!("create job -n {namespace} now --from=cronjob/often")).await;
    for job in ["once", "now"] {
        cluster.kube.run(&format!("wait -n {namespace} job/{job} --for=condition=Complete --timeout=60s")).await;
    }
    "both complete".to_owned()
}

async fn stateful_set(cluster: &Cluster) -> String {
    let (namespace, password) = namespace(cluster, "stateful").await;
    let mut set = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "set"},
        "spec": {
            "serviceName": "set", "selector": {"matchLabels": {"app": "set"}},
            "template": {"metadata": {"labels": {"app": "set"}}},
        },
    });
    set["spec"]["template"]["spec"] = spec(&[app(&["password"])], &[from_secret("db", "db")]);
    cluster.kube.apply(&namespace, &set.to_string()).await;
    let exists = async || cluster.kube.pod(&namespace, "set-0").await.is_some();
    until("the set has a pod", READY, exists).await;
    let mut uid = cluster.kube.ready(&namespace, "set-0", READY).await["metadata"]["uid"].clone();
    for _ in 0..3 {
        cluster.kube.delete_pod(&namespace, "set-0").await;
        until("the set has a new pod", READY, async || {
            let pod = cluster.kube.pod(&namespace, "set-0").await.unwrap_or_default();
            pod["metadata"]["uid"].is_string() && pod["metadata"]["uid"] != uid
        })
        .await;
        uid = cluster.kube.ready(&namespace, "set-0", READY).await["metadata"]["uid"].clone();
        reads(cluster, &namespace, "set-0", &password).await;
    }
    "three times".to_owned()
}

/// Writes a new value into the Secret `db`.
async fn rotate(cluster: &Cluster, namespace: &str) -> String {
    let password = cluster.canary();
    cluster.secret(namespace, "db", &[("username", "app"), ("password", &password)]).await;
    password
}

/// How often the application saw `..data` move, by its log.
async fn moves(cluster: &Cluster, namespace: &str, pod: &str) -> usize {
    let log = cluster.kube.run(&format!("logs -n {namespace} {pod} -c app")).await;
    log.lines().filter(|line| *line == "moved").count()
}

async fn rotation(cluster: &Cluster) -> String {
    payments(cluster).await;
    let first = cluster.canary();
    cluster.secret("payments", "db", &[("password", &first)]).await;
    cluster.bao.write_kv2("secret", "payments/db", &json!({"password": first})).await;
    let mut vault =
        pod("vault", &[app(&["password"])], &[from_vault("db", "password: secret/data/payments/db#password")]);
    vault["spec"]["serviceAccountName"] = json!("api");
    for manifest in [simple("secret"), vault] {
        cluster.kube.apply("payments", &manifest.to_string()).await;
    }
    let mut facts = Vec::new();
    for name in ["secret", "vault"] {
        cluster.kube.ready("payments", name, READY).await;
        reads(cluster, "payments", name, &first).await;
        assert_eq!(moves(cluster, "payments", name).await, 0);
    }
    let begun = Instant::now();
    let second = rotate(cluster, "payments").await;
    cluster.bao.write_kv2("secret", "payments/db", &json!({"password": second})).await;
    for name in ["secret", "vault"] {
        until("the app sees the new content", cluster.times.republished(), async || {
            moves(cluster, "payments", name).await == 1
        })
        .await;
        facts.push(format!("{name} within {:.0} s", begun.elapsed().as_secs_f32()));
        reads(cluster, "payments", name, &second).await;
    }
    facts.join(", ")
}

async fn sub_path(cluster: &Cluster) -> String {
    let (namespace, first) = namespace(cluster, "subpath").await;
    let mut container = app(&[]);
    container["volumeMounts"] = json!([
        {"name": "db", "mountPath": "/etc/password", "subPath": "password", "readOnly": true},
        {"name": "db", "mountPath": MOUNT, "readOnly": true},
    ]);
    cluster.kube.apply(&namespace, &pod("sub", &[container], &[from_secret("db", "db")]).to_string()).await;
    cluster.kube.ready(&namespace, "sub", READY).await;
    for _ in 0..2 {
        let newest = rotate(cluster, &namespace).await;
        until("the directory has the new content", cluster.times.republished(), async || {
            cluster.reads(&namespace, "sub", "app", &format!("{MOUNT}/password")).await == Ok(newest.clone())
        })
        .await;
        let bound = cluster.reads(&namespace, "sub", "app", "/etc/password").await;
        assert_eq!(bound.as_deref(), Ok(first.as_str()), "never zeros, never half");
    }
    "two rotations".to_owned()
}

async fn secret_deleted(cluster: &Cluster) -> String {
    let (namespace, password) = namespace(cluster, "deleted").await;
    cluster.kube.apply(&namespace, &simple("keeps").to_string()).await;
    cluster.kube.ready(&namespace, "keeps", READY).await;
    cluster.kube.run(&format!("delete secret -n {namespace} db")).await;
    let begun = Instant::now();
    let limit = cluster.times.stale_after + cluster.times.republished();
    cluster.kube.event(&namespace, "keeps", "SealmountStale", limit).await;
    let seconds = begun.elapsed().as_secs();
    reads(cluster, &namespace, "keeps", &password).await;
    let status = cluster.kube.run(&format!("exec -n {SYSTEM} daemonset/sealmount -- /sealmount status")).await;
    let own = status.lines().find(|line| line.starts_with("deleted/keeps ")).unwrap_or_default();
    assert!(own.ends_with("STALE"), "{status}");
    format!("event after {seconds} s, stale_after {} s", cluster.times.stale_after.as_secs())
}

/// The sum of a series of the driver's metrics page.
pub(crate) async fn metric(cluster: &Cluster, name: &str) -> f64 {
    let driver = cluster.driver().await;
    let address = driver["status"]["podIP"].as_str().expect("an address");
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let page = http.get(format!("http://{address}:9810/metrics")).send().await.expect("the metrics page");
    let page = page.text().await.expect("a page");
    let lines: Vec<&str> =
        page.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']))).collect();
    assert!(!lines.is_empty(), "the page has no series {name}:\n{page}");
    lines.iter().filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Takes the driver off the node, or brings it back, by the DaemonSet's node selector.
async fn set_driver(cluster: &Cluster, runs: bool) {
    let value = if runs { "null" } else { r#""none""# };
    let patch = format!(r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{{"e2e":{value}}}}}}}}}}}"#);
    let args = ["patch", "daemonset", "sealmount", "-n", SYSTEM, "--type=merge", "-p", &patch];
    cluster.kube.try_with(&args, "").await.expect("patch the DaemonSet");
    if runs {
        cluster.driver().await;
    } else {
        until("the driver's pod is gone", READY, async || {
            // Not the pod of a question that `helm uninstall` asked before.
            let list = cluster.kube.json(&format!("get pods -n {SYSTEM} -l app.kubernetes.io/name=sealmount")).await;
            list["items"].as_array().is_some_and(Vec::is_empty)
        })
        .await;
    }
}
