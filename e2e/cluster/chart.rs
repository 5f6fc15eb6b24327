//! The image and the chart: what they hold, what rights they ask for, and that an installation can be changed, ended and
//! taken away.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open, openat};
use rustix::process::{Gid, Pid, Signal, Uid, kill_process};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use sealmount::request::WORKER_UID;
use serde_json::{Value, json};

use crate::cluster::{Cluster, SYSTEM, is_ready, until};
use crate::install::{shell, try_shell};
use crate::kube::run;
use crate::readme::Section;
use crate::runner::{Check, check};

pub(crate) static CHECKS: &[Check] = &[
    check!("the image: one static program, labels, at most 16 MB, the same whenever it is built", image),
    check!("the API server takes the chart with default values and with all on", dry_run),
    check!("a value that the chart does not know is refused, and one that would do nothing or harm", typo),
    check!("the ServiceAccount may write events and nothing else", rights),
    check!("the worker can read its token, and the API server takes it", token),
    check!("root keeps nine capabilities, the worker none", capabilities),
    check!("SIGTERM ends the container by itself", terminate),
    check!("metrics are served on the pod's address when they are on, and only then", metrics),
    check!("a driver that starts with a bad platform file is not ready, says why, serves nothing new", bad_file),
    check!("helm uninstall is refused while a pod has a volume", uninstall),
    check!("deploy/sealmount.yaml is the chart's, and serves without Helm", manifest),
];

const LIMIT: Duration = Duration::from_secs(60);

/// What a program printed; it must succeed.
async fn ran(program: &str, args: &[&str], input: &str) -> String {
    let output = run(program, args, input).await;
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn chart(cluster: &Cluster) -> String {
    cluster.project.join("deploy/chart").display().to_string()
}

/// `helm upgrade` with more arguments, without waiting.
pub(crate) async fn upgrade(cluster: &Cluster, args: &[&str]) {
    let chart = chart(cluster);
    ran("helm", &[&["upgrade", "sealmount", &chart, "-n", SYSTEM, "--reuse-values"], args].concat(), "").await;
}

/// The revision that is installed.
pub(crate) async fn revision() -> String {
    let status = ran("helm", &["status", "sealmount", "-n", SYSTEM, "-o", "json"], "").await;
    let status: Value = serde_json::from_str(&status).expect("helm prints JSON");
    status["version"].to_string()
}

pub(crate) async fn back(cluster: &Cluster, revision: &str) {
    ran("helm", &["rollback", "sealmount", revision, "-n", SYSTEM], "").await;
    rolled_out(cluster).await;
}

pub(crate) async fn rolled_out(cluster: &Cluster) {
    cluster.kube.run(&format!("rollout status -n {SYSTEM} daemonset/sealmount --timeout=60s")).await;
}

/// The driver's processes: process id and what `/proc/PID/status` says of each.
pub(crate) fn processes(driver: &Value) -> BTreeMap<u32, String> {
    let uid = driver["metadata"]["uid"].as_str().expect("a UID");
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("sealmount")))
        .filter(|pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|it| it.contains(uid)))
        .filter_map(|pid| Some((pid, fs::read_to_string(format!("/proc/{pid}/status")).ok()?)))
        .collect()
}

/// The first word of a line of `/proc/PID/status`.
fn status_word<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}"));
    line.trim_start_matches(':').split_whitespace().next().unwrap_or_default()
}

async fn image(cluster: &mut Cluster) -> String {
    let archive = crate::lab::programs::cache().join("images/sealmount.tar");
    let path = archive.display().to_string();
    let manifest = ran("tar", &["-xOf", &path, "manifest.json"], "").await;
    let manifest: Value = serde_json::from_str(&manifest).expect("a manifest");
    let config = ran("tar", &["-xOf", &path, manifest[0]["Config"].as_str().expect("a name")], "").await;
    let config: Value = serde_json::from_str(&config).expect("a config");
    let labels = &config["config"]["Labels"];
    assert_eq!(labels["org.opencontainers.image.version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(labels["org.opencontainers.image.licenses"], "Apache-2.0");
    let revision = labels["org.opencontainers.image.revision"].as_str().unwrap_or_default();
    assert!(revision.len() >= 40 || revision == "unknown", "revision {revision:?}");
    assert_eq!(config["created"], "1970-01-01T00:00:00Z", "a time would make each build another image");
    let layers = manifest[0]["Layers"].as_array().expect("layers");
    assert_eq!(layers.len(), 1);
    let layer = layers[0].as_str().expect("a name");
    let list = ran("sh", &["-c", &format!("tar -xOf '{path}' '{layer}' | tar -tf -")], "").await;
    assert_eq!(list.trim(), "sealmount", "the only file");
    let bytes = fs::metadata(&archive).expect("the image").len();
    assert!(bytes <= 16_000_000, "{bytes} bytes");
    // Twice more from the same program, which is not built again. The identity is the hash of the config.
    let program = std::env::var("SEALMOUNT_BIN").expect("SEALMOUNT_BIN names the driver");
    let release = Path::new(&program).parent().expect("a directory").display().to_string();
    let images = cluster.dir.join("tmp/images").display().to_string();
    let project = cluster.project.display().to_string();
    let set = [format!("RELEASE={release}"), format!("IMAGES={images}"), format!("REVISION={revision}")];
    let make = [&["-s", "-C", &project, "-o", "release", "image"][..], &set.each_ref().map(String::as_str)].concat();
    for _ in 0..2 {
        ran("make", &make, "").await;
        let id = fs::read_to_string(Path::new(&images).join("id")).expect("the image's id");
        assert_eq!(manifest[0]["Config"], format!("{}.json", id.trim()), "the same program gave another image");
    }
    format!("{:.1} MB, revision {}, three times the same", bytes as f64 / 1e6, &revision[..revision.len().min(12)])
}

/// A text that a block of YAML would not keep: its first line is indented, and blank lines end it.
const AWKWARD: &str = "  first\nlast \n\n\n";

/// Every value that turns something on.
fn all_on() -> Value {
    let connection = |audience: &str, address: &str| {
        json!({
            "address": address, "redirect_to": ["https://standby.example"], "ca_file": "ca.pem",
            "auth": {"method": "kubernetes", "audience": audience},
            "allow": [{"namespaces": ["a"], "service_accounts": ["*"], "roles": ["r"], "paths": ["secret/data/*"]}],
        })
    };
    json!({
        "image": {"repository": "registry.example/sealmount", "digest": format!("sha256:{}", "0".repeat(64)),
                  "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "pull"}],
        "config": {
            "connections": {
                "b": connection("vault-b", "https://vault.example:8200"),
                "a": connection("vault-a", "https://bao.example"),
                "c": connection("vault-b", "https://vault.example:8201"),
            },
            "limits": {"volume_bytes": "2MiB"},
            "policy": {
                "mesh_uids": [1337, 1_000_700_000], "distinct_uids": true, "refuse": ["SM152"],
                "node_paths": ["/data/kubelet"],
                "runtime_classes": {"gvisor": {}}, "namespaces": {"allow": ["a"], "deny": ["b"]},
                "waivers": [{"code": "SM170", "namespace": "a", "until": "2099-12-31", "reason": "moves"}],
            },
        },
        "configFiles": {"ca.pem": "-----BEGIN CERTIFICATE-----\n", "1e3": AWKWARD},
        "kubeletDir": "/data/{kubelet}, x",
        "podsFrom": "api",
        "admission": {"excludeNamespaces": ["a", "b"]},
        "allowSwap": true,
        "metrics": {"enabled": true},
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["vault.example"]}],
        "nodeSelector": {"pool": "a", "kubernetes.io/os": "linux"},
        "tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}],
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
    })
}

/// What `helm template` prints for the cluster's version, in a namespace where nothing is installed.
async fn template(cluster: &Cluster, values: &Value) -> String {
    let chart = chart(cluster);
    let args = ["template", "dry", &chart, "-n", "dry", "--kube-version", &cluster.version, "-f", "-"];
    ran("helm", &args, &values.to_string()).await
}

async fn dry_run(cluster: &mut Cluster) -> String {
    cluster.namespace("dry", "privileged").await;
    let chart = chart(cluster);
    for (name, values) in [("default values", json!({})), ("all on", all_on())] {
        ran("helm", &["lint", "--strict", &chart, "-f", "-"], &values.to_string()).await;
        let text = template(cluster, &values).await;
        // Unknown fields are errors; the CSIDriver's case is an update, since it stands.
        let args = ["apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-"];
        let took = cluster.kube.try_with(&args, &text).await;
        let took = took.unwrap_or_else(|error| panic!("{name}: {error}\n{text}"));
        let objects = text.lines().filter(|line| line.starts_with("kind: ")).count();
        assert_eq!(took.lines().filter(|line| line.contains("server dry run")).count(), objects, "{took}");
    }
    let text = template(cluster, &all_on()).await;
    let audiences: Vec<&str> = text.lines().filter(|line| line.contains("- audience: ")).map(str::trim).collect();
    assert_eq!(audiences, ["- audience: \"vault-a\"", "- audience: \"vault-b\""]);
    assert_eq!(text.contains("serviceAccountTokenInSecrets: true"), cluster.at_least(35));
    let driver = text.split("\n---\n").find(|part| part.contains("\nkind: DaemonSet\n")).expect("a DaemonSet");
    for absent in ["runAsUser:", "runAsGroup:", "fsGroup:", "hostNetwork: true", "hostPID: true"] {
        assert!(!driver.contains(absent), "{absent} in\n{driver}");
    }
    let driver: Value = serde_saphyr::from_str(driver).expect("YAML");
    let driver = &driver["spec"]["template"]["spec"];
    let container = &driver["containers"][0];
    let directory = "/data/{kubelet}, x";
    let socket = format!("--csi-socket={directory}/plugins/csi.sealmount.io/csi.sock");
    let args = container["args"].as_array().expect("args");
    for arg in
        [&format!("--kubelet-dir={directory}"), &socket, &format!("--registration-dir={directory}/plugins_registry")]
    {
        assert!(args.contains(&json!(arg)), "{arg} in {args:?}");
    }
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        assert_eq!(container[probe]["exec"]["command"][3], json!(socket), "{probe}");
    }
    assert_eq!(container["volumeMounts"][0]["mountPath"], directory);
    assert_eq!(driver["volumes"][0]["hostPath"]["path"], directory);
    assert_eq!(driver["nodeSelector"], json!({"pool": "a", "kubernetes.io/os": "linux"}));
    let files = text.split("\n---\n").find(|part| part.contains("\nkind: ConfigMap\n")).expect("a ConfigMap");
    let files: Value = serde_saphyr::from_str(files).expect("YAML");
    assert_eq!(files["data"]["1e3"], AWKWARD);
    // Nobody is not everybody.
    let nobody = template(cluster, &json!({"config": {"policy": {"namespaces": {"allow": []}}}})).await;
    assert!(nobody.contains("- name: allowed\n    expression: \"[]\"\n"), "{nobody}");
    "default and all on; the audiences of three connections, each once".to_owned()
}

async fn typo(cluster: &mut Cluster) -> String {
    let chart = chart(cluster);
    let wrong = ["metrics.enabel=true", "kubletDir=/a", "config.connections.prod.adress=https://a", "image.tga=1"];
    for set in wrong {
        let args = ["template", "dry", &chart, "--kube-version", &cluster.version, "--set", set];
        let output = run("helm", &args, "").await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let name = set.split('=').next().and_then(|path| path.rsplit('.').next()).expect("a name");
        assert!(!output.status.success() && said.contains(name), "{set}: {said}");
    }
    // Each with what the refusal must say.
    let useless = [
        ("configFiles", json!({"ca.pem": "x"}), "write config too"),
        ("podLabels", json!({"helm.sh/chart": "x"}), "the chart writes helm.sh/chart itself"),
        ("podAnnotations", json!({"checksum/config": "x"}), "the chart writes checksum/config itself"),
        ("nodeSelector", json!({"kubernetes.io/os": "windows"}), "must be 'linux'"),
        ("kubeletDir", json!("/var/run/kubelet"), "/run instead of /var/run"),
        ("kubeletDir", json!("/var//kubelet"), "kubeletDir"),
        ("maxUnavailable", json!(0), "maxUnavailable"),
        ("maxUnavailable", json!("0%"), "maxUnavailable"),
        ("config", json!({"log": {"level": "verbose"}}), "'error', 'warn', 'info', 'debug', 'trace'"),
        ("config", json!({"audit": {"output": "file"}}), "'stdout'"),
        ("config", json!({"policy": {"runtime_classes": {"a": {"gate": "enforce"}}}}), "'off'"),
        ("config", json!({"connections": {"a": {"share_login": "node"}}}), "'service_account', 'pod'"),
        ("config", json!({"connections": {"a": {"auth": {"method": "approle"}}}}), "'kubernetes', 'jwt'"),
    ];
    for (name, value, expected) in &useless {
        let set = format!("{name}={value}");
        let args = ["template", "dry", &chart, "--kube-version", &cluster.version, "--set-json", &set];
        let output = run("helm", &args, "").await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(expected), "{set}: {said}");
    }
    format!("{} and {} that it knows", wrong.join(", "), useless.len())
}

async fn rights(cluster: &mut Cluster) -> String {
    let may = async |what: &str| {
        let ask = format!("auth can-i {what} -A --as=system:serviceaccount:{SYSTEM}:sealmount");
        // "no" is also the exit code 1.
        cluster.kube.try_run(&ask).await.is_ok_and(|said| said.trim() == "yes")
    };
    for what in ["create events", "patch events"] {
        assert!(may(what).await, "{what}");
    }
    let pods = !cluster.at_least(37);
    for what in ["get pods", "list pods", "watch pods"] {
        assert_eq!(may(what).await, pods, "{what}");
    }
    let mut refused = 0;
    for resource in [
        "secrets",
        "serviceaccounts",
        "serviceaccounts/token",
        "tokenreviews.authentication.k8s.io",
        "nodes",
        "nodes/proxy",
        "csidrivers.storage.k8s.io",
        "configmaps",
        "pods/exec",
        "pods/ephemeralcontainers",
    ] {
        for verb in ["get", "list", "watch", "create", "update", "patch", "delete", "impersonate"] {
            // For kubectl what stands behind a slash is a name.
            let (resource, part) = resource.split_once('/').unwrap_or((resource, ""));
            let what = format!("{verb} {resource} --subresource={part}");
            assert!(!may(&what).await, "{what}");
            refused += 1;
        }
    }
    for what in ["get events", "delete events", "create pods", "delete pods", "patch pods", "* *"] {
        assert!(!may(what).await, "{what}");
        refused += 1;
    }
    // Nothing but these two, and what every account has (questions about itself, and CAs).
    let list = cluster.kube.run(&format!("auth can-i --list --as=system:serviceaccount:{SYSTEM}:sealmount")).await;
    let own: Vec<&str> = list
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next().filter(|_| !line.starts_with(' ')))
        .filter(|name| !name.starts_with("self") && !name.starts_with("clustertrustbundles"))
        .collect();
    assert_eq!(own, if pods { vec!["events", "pods"] } else { vec!["events"] }, "{list}");
    format!("{}; {refused} other questions: no", if pods { "events, and reading pods" } else { "events" })
}

async fn token(cluster: &mut Cluster) -> String {
    let driver = cluster.driver().await;
    let uid = driver["metadata"]["uid"].as_str().expect("a UID");
    let projected = PathBuf::from(format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected"));
    let volume = fs::read_dir(&projected).expect("the token's volume").flatten().next().expect("one volume").path();
    // The directory is opened by root, as the runtime does that mounts it; the file by the worker's UID.
    let directory = open(&volume, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("the volume");
    let read = std::thread::spawn(move || {
        let (uid, gid) = (Uid::from_raw(WORKER_UID), Gid::from_raw(WORKER_UID));
        set_thread_groups(&[]).expect("no groups");
        set_thread_res_gid(gid, gid, gid).expect("the worker's group");
        set_thread_res_uid(uid, uid, uid).expect("the worker's user");
        openat(directory.as_fd(), "token", OFlags::RDONLY, Mode::empty()).map(drop)
    });
    assert_eq!(read.join().expect("the thread"), Ok(()), "the worker's UID cannot open the token");

    // An event of the driver's own, not the kubelet's, is written with that token.
    let namespace = cluster.namespace("token", "restricted").await;
    cluster.secret(&namespace, "db", &[("k", "v")]).await;
    let mut pod = plain_pod("neighbours", "db");
    let mut neighbour = pod["spec"]["containers"][0].clone();
    neighbour["name"] = json!("neighbour");
    neighbour["volumeMounts"] = json!([]);
    pod["spec"]["containers"].as_array_mut().expect("containers").push(neighbour);
    cluster.kube.apply(&namespace, &pod.to_string()).await;
    let mut own = Value::Null;
    until("an event of the driver's", LIMIT, async || {
        let events = cluster.kube.json(&format!("get events -n {namespace}")).await;
        let items = events["items"].as_array().cloned().unwrap_or_default();
        own = items.into_iter().find(|it| it["source"]["component"] == "csi.sealmount.io").unwrap_or_default();
        !own.is_null()
    })
    .await;
    assert_eq!(own["involvedObject"]["name"], "neighbours", "{own}");
    let text = |name: &str| own[name].as_str().unwrap_or_default().to_owned();
    format!("{}: {}", text("reason"), text("message").chars().take(60).collect::<String>())
}

/// A restricted pod with one container that mounts the Secret.
fn plain_pod(name: &str, secret: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "app", "image": crate::images::APP, "imagePullPolicy": "Never",
                "securityContext": {
                    "runAsUser": 1000, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "db", "mountPath": "/s", "readOnly": true}],
            }],
            "volumes": [{"name": "db", "csi": {
                "driver": "csi.sealmount.io", "readOnly": true, "nodePublishSecretRef": {"name": secret},
            }}],
        },
    })
}

async fn capabilities(cluster: &mut Cluster) -> String {
    let processes = processes(&cluster.driver().await);
    let word = |name: &'static str| processes.values().map(move |it| status_word(it, name)).collect::<Vec<_>>();
    let worker = WORKER_UID.to_string();
    assert_eq!(word("Uid"), ["0", &worker]);
    // SYS_ADMIN CHOWN DAC_OVERRIDE FOWNER SYS_PTRACE KILL SETUID SETGID SETPCAP, and no way to more.
    let (root, none) = ("00000000002801eb", "0000000000000000");
    for set in ["CapEff", "CapPrm"] {
        assert_eq!(word(set), [root, none], "{set}");
    }
    assert_eq!(word("CapBnd")[0], root);
    assert_eq!(word("NoNewPrivs")[1], "1");
    assert_eq!(word("Seccomp")[1], "2", "the worker has a list of system calls");
    format!("broker uid 0 {root}; worker uid {worker} none")
}

async fn terminate(cluster: &mut Cluster) -> String {
    let driver = cluster.driver().await;
    let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or_default();
    let broker = *processes(&driver).keys().next().expect("a broker");
    let pid = Pid::from_raw(broker.cast_signed()).expect("a process");
    let start = Instant::now();
    kill_process(pid, Signal::TERM).expect("a signal");
    while Path::new(&format!("/proc/{broker}")).exists() {
        assert!(start.elapsed() < LIMIT, "the first process does not end");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let took = start.elapsed();
    let name = driver["metadata"]["name"].as_str().expect("a name");
    let mut now = Value::Null;
    until("the container runs again", LIMIT, async || {
        now = cluster.kube.pod(SYSTEM, name).await.unwrap_or_default();
        restarts(&now) > restarts(&driver) && is_ready(&now)
    })
    .await;
    let ended = &now["status"]["containerStatuses"][0]["lastState"]["terminated"];
    assert_eq!(ended["exitCode"], 0, "{ended}");
    format!("exit code 0 after {} ms", took.as_millis())
}

async fn metrics(cluster: &mut Cluster) -> String {
    let get = async |driver: &Value| {
        let address = driver["status"]["podIP"].as_str().expect("an address").to_owned();
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build().expect("a client");
        let reply = client.get(format!("http://{address}:9810/metrics")).send().await.ok()?;
        reply.text().await.ok()
    };
    let before = revision().await;
    let mut pages = Vec::new();
    for on in ["false", "true"] {
        upgrade(cluster, &["--set", &format!("metrics.enabled={on}")]).await;
        rolled_out(cluster).await;
        pages.push(get(&cluster.driver().await).await);
    }
    back(cluster, &before).await;
    assert_eq!(pages[0], None, "metrics are off");
    let page = pages[1].as_ref().expect("metrics are on");
    let series = page.lines().filter(|line| line.starts_with("# TYPE sealmount_")).count();
    assert!(series > 5, "{page}");
    format!("{series} metrics")
}

async fn bad_file(cluster: &mut Cluster) -> String {
    let namespace = cluster.namespace("bad-file", "restricted").await;
    let value = cluster.canary();
    cluster.secret(&namespace, "db", &[("k", &value)]).await;
    cluster.kube.apply(&namespace, &plain_pod("before", "db").to_string()).await;
    cluster.kube.ready(&namespace, "before", LIMIT).await;
    let installed = revision().await;
    let before = cluster.driver().await["metadata"]["uid"].clone();
    upgrade(cluster, &["--set", "config.connections.prod.ca_file=absent.pem"]).await;
    let select = format!("get pods -n {SYSTEM} -l app.kubernetes.io/name=sealmount");
    let mut driver = Value::Null;
    until("the new driver runs", LIMIT, async || {
        let list = cluster.kube.json(&select).await;
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        driver = pods.into_iter().find(|pod| pod["metadata"]["uid"] != before).unwrap_or_default();
        !driver.is_null()
    })
    .await;
    let name = driver["metadata"]["name"].as_str().expect("a name").to_owned();
    let event = cluster.kube.event(SYSTEM, &name, "the platform file was not taken", LIMIT).await;
    let now = cluster.kube.pod(SYSTEM, &name).await.expect("the driver's pod");
    // Nothing new is served; what stood stays, and what needs no file ends.
    cluster.kube.apply(&namespace, &plain_pod("after", "db").to_string()).await;
    cluster.kube.event(&namespace, "after", "the platform file is not valid", LIMIT).await;
    let after = cluster.kube.pod(&namespace, "after").await.expect("the pod");
    let kept = cluster.reads(&namespace, "before", "app", "/s/k").await;
    cluster.kube.delete_pod(&namespace, "before").await;
    cluster.kube.delete_pod(&namespace, "after").await;
    back(cluster, &installed).await;
    assert!(!is_ready(&now), "{}", now["status"]);
    assert_eq!(after["status"]["phase"], "Pending", "{}", after["status"]);
    assert_eq!(kept, Ok(value));
    assert!(event.message.contains("connections.prod.ca_file"), "{event:?}");
    event.message.lines().collect()
}

async fn manifest(cluster: &mut Cluster) -> String {
    let project = cluster.project.display().to_string();
    let install = Section::of("Install").all("sh").remove(1);
    let path = cluster.project.join("deploy/sealmount.yaml");
    let made = cluster.dir.join("tmp/sealmount.yaml");
    let set = format!("MANIFEST={}", made.display());
    ran("make", &["-s", "-C", &project, "manifest", "HELM=helm", &set], "").await;
    let text = fs::read_to_string(&path).expect("deploy/sealmount.yaml");
    let now = fs::read_to_string(&made).expect("what make printed");
    assert!(text == now, "deploy/sealmount.yaml is not what the chart gives: make manifest");
    if !cluster.at_least(37) {
        return "the same; it is for Kubernetes 1.37".to_owned();
    }

    let values = ran("helm", &["get", "values", "sealmount", "-n", SYSTEM, "-o", "json"], "").await;
    let removal = Section::of("Run").all("sh");
    shell(cluster, &removal[removal.len() - 2]).await;
    gone(cluster).await;
    shell(cluster, &install).await;
    rolled_out(cluster).await;
    let namespace = cluster.namespace("manifest", "restricted").await;
    let value = cluster.canary();
    cluster.secret(&namespace, "db", &[("k", &value)]).await;
    cluster.kube.apply(&namespace, &plain_pod("plain", "db").to_string()).await;
    cluster.kube.ready(&namespace, "plain", LIMIT).await;
    assert_eq!(cluster.reads(&namespace, "plain", "app", "/s/k").await, Ok(value));
    cluster.kube.delete_pod(&namespace, "plain").await;
    // All but the namespace, which also holds what the README made for Vault.
    let parts = text.split("\n---\n").filter(|part| !part.contains("\nkind: Namespace\n"));
    let parts = parts.collect::<Vec<_>>().join("\n---\n");
    ran("kubectl", &["delete", "--wait", "-f", "-"], &parts).await;
    gone(cluster).await;
    let chart = chart(cluster);
    ran("helm", &["install", "sealmount", &chart, "-n", SYSTEM, "-f", "-"], &values).await;
    rolled_out(cluster).await;
    "the same as make manifest; a pod ran; nothing of either installation stayed".to_owned()
}

async fn uninstall(cluster: &mut Cluster) -> String {
    let namespace = cluster.namespace("uninstall", "restricted").await;
    let value = cluster.canary();
    cluster.secret(&namespace, "db", &[("k", &value)]).await;
    cluster.kube.apply(&namespace, &plain_pod("user", "db").to_string()).await;
    cluster.kube.ready(&namespace, "user", LIMIT).await;
    // The same code, by a person with a kubeconfig.
    let program = std::env::var("SEALMOUNT_BIN").expect("SEALMOUNT_BIN names the driver");
    let report = ran(&program, &["check", "--cluster", "-n", &namespace, "-o", "json"], "").await;
    let report: Value = serde_json::from_str(&report).expect("check prints JSON");
    let access = report["pods"][0]["access"].as_array().expect("the pod");
    assert!(access.iter().any(|it| it["container"] == "app" && it["how"] == "sealmount" && it["reads"] == true));

    let installed = revision().await;
    let [.., remove, logs] = &Section::of("Run").all("sh")[..] else { panic!("the README's section has no commands") };
    try_shell(cluster, remove).await.expect_err("helm uninstalled a driver that is in use");
    let said = shell(cluster, logs).await;
    assert!(said.contains(&format!("  {namespace}/user\n")), "{said}");
    rolled_out(cluster).await;
    assert_eq!(cluster.reads(&namespace, "user", "app", "/s/k").await, Ok(value));
    cluster.kube.delete_pod(&namespace, "user").await;
    // The release is marked as on its way out and takes no upgrade; what the README says takes it back.
    let status = ran("helm", &["status", "sealmount", "-n", SYSTEM, "-o", "json"], "").await;
    let status: Value = serde_json::from_str(&status).expect("helm prints JSON");
    assert_eq!(status["info"]["status"], "uninstalling");
    back(cluster, &installed).await;
    upgrade(cluster, &[]).await;
    rolled_out(cluster).await;
    "its log names the pod; the driver stayed; a rollback takes the release back".to_owned()
}

/// Nothing of the driver is left on the node or in the API server.
async fn gone(cluster: &Cluster) {
    until("the driver is gone", LIMIT, async || {
        let pods = cluster.kube.json(&format!("get pods -n {SYSTEM} -l app.kubernetes.io/name=sealmount")).await;
        let node = cluster.kube.json(&format!("get csinode {}", crate::cluster::NODE)).await;
        pods["items"].as_array().is_some_and(Vec::is_empty) && !node.to_string().contains("sealmount")
    })
    .await;
    let left = cluster
        .kube
        .run(
            "get csidriver,clusterrole,clusterrolebinding,daemonset,configmap,networkpolicy,\
             validatingadmissionpolicy,validatingadmissionpolicybinding -A -o name",
        )
        .await;
    assert!(!left.lines().any(|name| name.contains("sealmount")), "{left}");
    for directory in ["/var/lib/kubelet/plugins_registry", "/var/lib/kubelet/plugins/csi.sealmount.io"] {
        let names: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().map(|it| it.file_name()).collect();
        assert!(names.is_empty(), "{directory}: {names:?}");
    }
}
