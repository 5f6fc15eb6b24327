//! Admission: the policy of the chart on the real API server, held to the driver's own code by pods that a generator
//! breaks, one to three things at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::chart::{back, revision, upgrade};
use crate::cluster::{Cluster, SYSTEM, until};
use crate::images;
use crate::kube::run;
use crate::runner::{Check, check};

pub(crate) static CHECKS: &[Check] = &[
    check!("kubectl apply refuses a mistaken pod in the words of check and of the driver", same_words),
    check!("admission only warns, or leaves a namespace out, where it is told to", warns),
    check!("older mistaken pods lose their finalizers, and a Job of one ends", older),
    check!("admission and check agree on generated pods", differential),
];

const READY: Duration = Duration::from_secs(60);
/// How many pods the generator makes.
const PODS: usize = 400;

/// A valid pod: an application with a sidecar, an init container and a neighbour.
fn valid(name: &str) -> Value {
    let container = |name: &str, uid: u32| {
        json!({
            "name": name, "image": images::APP, "imagePullPolicy": "Never", "command": ["/bin/app", "pause"],
            "securityContext": {"runAsUser": uid, "capabilities": {"drop": ["ALL"]}}, "env": [], "envFrom": [],
            "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
        })
    };
    let mut app = container("app", 1000);
    app["volumeMounts"].as_array_mut().expect("mounts").push(json!({"name": "db", "mountPath": "/db"}));
    let mut proxy = container("istio-proxy", 1337);
    proxy["restartPolicy"] = json!("Always");
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "annotations": {}},
        "spec": {
            "terminationGracePeriodSeconds": 1, "dnsPolicy": "Default", "securityContext": {},
            "initContainers": [container("prepare", 1001), proxy],
            "containers": [container("exporter", 1002), app],
            "volumes": [
                {"name": "scratch", "emptyDir": {}},
                {"name": "db", "csi": {
                    "driver": "csi.sealmount.io", "readOnly": true, "nodePublishSecretRef": {"name": "db"},
                    "volumeAttributes": {"for": "app"},
                }},
            ],
        },
    })
}

/// One of the three that are not the reader, by number.
fn other(pod: &mut Value, number: usize) -> &mut Value {
    match number % 3 {
        0 => &mut pod["spec"]["containers"][0],
        1 => &mut pod["spec"]["initContainers"][0],
        _ => &mut pod["spec"]["initContainers"][1],
    }
}

fn push(list: &mut Value, item: Value) {
    list.as_array_mut().expect("a list").push(item);
}

fn add(pod: &mut Value, number: usize, capabilities: &[&str]) {
    other(pod, number)["securityContext"]["capabilities"]["add"] = json!(capabilities);
}

/// One more volume, mounted by a container that is not the reader.
fn extra(pod: &mut Value, number: usize, source: Value) {
    let name = format!("extra-{}", pod["spec"]["volumes"].as_array().map_or(0, Vec::len));
    let mut volume = source;
    volume["name"] = json!(name);
    push(&mut pod["spec"]["volumes"], volume);
    push(&mut other(pod, number)["volumeMounts"], json!({"name": name, "mountPath": format!("/{name}")}));
}

fn ours(pod: &mut Value) -> &mut Value {
    &mut pod["spec"]["volumes"][1]["csi"]
}

type Change = fn(&mut Value, usize);

/// What breaks a pod, and what is harmless: each may meet each other.
const CHANGES: &[Change] = &[
    |pod, _| ours(pod)["readOnly"] = json!(false),
    |pod, _| drop(ours(pod).as_object_mut().expect("a map").remove("readOnly")),
    |pod, _| ours(pod)["fsType"] = json!("ext4"),
    |pod, _| {
        ours(pod)["volumeAttributes"] = json!({});
        pod["spec"]["containers"][1]["volumeMounts"] = json!([]);
    },
    |pod, number| {
        ours(pod)["volumeAttributes"] = json!({});
        push(&mut other(pod, number)["volumeMounts"], json!({"name": "db", "mountPath": "/db"}));
    },
    |pod, _| ours(pod)["volumeAttributes"]["for"] = json!("somebody"),
    |pod, _| ours(pod)["volumeAttributes"]["for"] = json!("ap"),
    |pod, _| ours(pod)["volumeAttributes"]["for"] = json!("app, exporter"),
    |pod, _| ours(pod)["volumeAttributes"]["fro"] = json!("app"),
    |pod, _| drop(pod["spec"]["containers"][1].as_object_mut().expect("a map").remove("securityContext")),
    |pod, _| pod["spec"]["containers"][1]["securityContext"]["runAsUser"] = json!(0),
    |pod, _| {
        drop(pod["spec"]["containers"][1].as_object_mut().expect("a map").remove("securityContext"));
        pod["spec"]["securityContext"]["runAsUser"] = json!(0);
    },
    |pod, number| {
        push(&mut other(pod, number)["volumeMounts"], json!({"name": "db", "mountPath": "/db"}));
        let name = other(pod, number)["name"].as_str().expect("a name").to_owned();
        ours(pod)["volumeAttributes"]["for"] = json!(format!("app,{name}"));
    },
    |pod, _| pod["spec"]["containers"][1]["securityContext"]["runAsUser"] = json!(1337),
    |pod, _| ours(pod)["volumeAttributes"]["uid"] = json!("1337"),
    |pod, _| ours(pod)["volumeAttributes"]["uid"] = json!("999"),
    |pod, _| pod["spec"]["initContainers"][1]["securityContext"]["runAsUser"] = json!(1000),
    |pod, _| {
        let proxy = &mut pod["spec"]["containers"][0];
        proxy["image"] = json!("registry.example:5000/mirror/envoy:v1.36@sha256:00");
        proxy["securityContext"]["runAsUser"] = json!(1000);
    },
    |pod, number| push(&mut other(pod, number)["volumeMounts"], json!({"name": "db", "mountPath": "/db"})),
    |pod, number| {
        let mount = json!({"name": "db", "mountPath": "/password", "subPath": "password"});
        push(&mut other(pod, number)["volumeMounts"], mount);
    },
    |pod, _| {
        if pod["spec"]["hostPID"] != true {
            pod["spec"]["shareProcessNamespace"] = json!(true);
        }
    },
    |pod, _| {
        if pod["spec"]["shareProcessNamespace"] != true && pod["spec"]["hostUsers"] != false {
            pod["spec"]["hostPID"] = json!(true);
        }
    },
    |pod, _| pod["spec"]["runtimeClassName"] = json!("unlisted"),
    |pod, number| other(pod, number)["securityContext"]["privileged"] = json!(true),
    |pod, number| add(pod, number, &["SYS_ADMIN"]),
    |pod, number| add(pod, number, &["NET_RAW", "cap_sys_admin"]),
    |pod, number| add(pod, number, &["ALL"]),
    |pod, number| add(pod, number, &["CAP_SYS_PTRACE"]),
    |pod, number| add(pod, number, &["SYS_MODULE"]),
    |pod, number| add(pod, number, &["Sys_RawIO"]),
    |pod, number| add(pod, number, &["DAC_READ_SEARCH"]),
    |pod, number| add(pod, number, &["BPF", "PERFMON"]),
    |pod, number| add(pod, number, &["CHECKPOINT_RESTORE"]),
    |pod, number| {
        add(pod, number, &["SYS_CHROOT"]);
        extra(pod, number, json!({"hostPath": {"path": "/srv"}}));
    },
    |pod, number| {
        if pod["spec"]["hostPID"] != true && pod["spec"]["hostNetwork"] != true {
            pod["spec"]["hostUsers"] = json!(false);
            other(pod, number)["securityContext"]["procMount"] = json!("Unmasked");
        }
    },
    |pod, number| other(pod, number)["securityContext"]["seLinuxOptions"] = json!({"type": "spc_t"}),
    |pod, _| pod["spec"]["securityContext"]["seLinuxOptions"] = json!({"type": "spc_t"}),
    |pod, number| extra(pod, number, json!({"hostPath": {"path": "/var/lib/kubelet/pods"}})),
    |pod, number| extra(pod, number, json!({"hostPath": {"path": "/var//run/./containerd"}})),
    |pod, number| extra(pod, number, json!({"hostPath": {"path": "/"}})),
    |pod, number| {
        let variable = json!({"name": "P", "valueFrom": {"secretKeyRef": {"name": "db", "key": "password"}}});
        push(&mut other(pod, number)["env"], variable);
    },
    |pod, number| push(&mut other(pod, number)["envFrom"], json!({"secretRef": {"name": "db"}})),
    |pod, number| extra(pod, number, json!({"secret": {"secretName": "db"}})),
    |pod, number| extra(pod, number, json!({"projected": {"sources": [{"secret": {"name": "db"}}]}})),
    |pod, number| {
        let source = json!({"serviceAccountToken": {"path": "t", "audience": "vault-prod", "expirationSeconds": 600}});
        from_vault(pod);
        extra(pod, number, json!({"projected": {"sources": [source]}}));
    },
    |pod, _| {
        from_vault(pod);
        pod["metadata"]["annotations"]["vault.hashicorp.com/agent-inject-secret-db"] = json!("secret/data/a/db");
    },
    |pod, _| {
        let mounts = "[{\"name\": \"db\", \"mountPath\": \"/db\"}]";
        pod["metadata"]["annotations"]["sidecar.istio.io/userVolumeMount"] = json!(mounts);
    },
    // From here on nothing that refuses.
    |pod, number| extra(pod, number, json!({"hostPath": {"path": "/var/log"}})),
    |pod, number| extra(pod, number, json!({"secret": {"secretName": "other", "optional": true}})),
    |pod, number| add(pod, number, &["NET_ADMIN"]),
    |pod, number| drop(other(pod, number).as_object_mut().expect("a map").remove("securityContext")),
    |pod, _| pod["spec"]["securityContext"]["fsGroup"] = json!(2000),
    |pod, _| pod["spec"]["securityContext"]["runAsUser"] = json!(1005),
    |pod, _| {
        if pod["spec"]["hostUsers"] != false {
            pod["spec"]["hostNetwork"] = json!(true);
        }
    },
    |pod, _| {
        pod["spec"]["runtimeClassName"] = json!("listed");
    },
    |pod, _| pod["spec"]["automountServiceAccountToken"] = json!(false),
    |pod, _| pod["metadata"]["labels"] = json!({"app": "x"}),
    |pod, number| other(pod, number)["name"] = json!(["daprd", "linkerd-proxy", "shipper"][number % 3]),
];

fn from_vault(pod: &mut Value) {
    let csi = ours(pod);
    csi.as_object_mut().expect("a map").remove("nodePublishSecretRef");
    csi["volumeAttributes"]["files"] = json!("password: secret/data/a/db#password");
}

/// A small generator, so that a failure comes again (Knuth's MMIX constants).
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap_or(0) % end
    }
}

/// The first ones have one change each, so that none is left out; the others up to three.
fn generated() -> Vec<Value> {
    let mut chance = Chance(11);
    (0..PODS)
        .map(|number| {
            let mut pod = valid(&format!("pod{number}"));
            match CHANGES.get(number) {
                Some(change) => change(&mut pod, chance.below(3)),
                None => {
                    for _ in 0..chance.below(4) {
                        CHANGES[chance.below(CHANGES.len())](&mut pod, chance.below(3));
                    }
                }
            }
            pod
        })
        .collect()
}

/// A namespace of a check's own: that of the check before may still be going.
async fn place(cluster: &Cluster, name: &str) -> String {
    let namespace = cluster.namespace(&format!("admission-{name}"), "privileged").await;
    cluster.secret(&namespace, "db", &[("password", "x")]).await;
    for name in ["listed", "unlisted"] {
        let class = json!({
            "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": name}, "handler": "runc",
        });
        cluster.kube.apply("default", &class.to_string()).await;
    }
    namespace
}

/// What the API server says of a pod, without making it: nothing, or the sentence.
async fn admitted(api: &Api<Pod>, pod: &Value) -> Result<(), String> {
    let typed: Pod = serde_json::from_value(pod.clone()).expect("a pod");
    match api.create(&PostParams { dry_run: true, ..PostParams::default() }, &typed).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) => {
            let (_, said) = status
                .message
                .split_once("denied request: ")
                .unwrap_or_else(|| panic!("not admission's: {}\n{pod:#}", status.message));
            Err(said.to_owned())
        }
        Err(error) => panic!("{error}"),
    }
}

/// What `sealmount check` says of pods: of each the refusals, in the driver's order.
async fn checked(pods: &[Value], namespace: &str, platform: &str) -> BTreeMap<String, Vec<(String, String)>> {
    let program = std::env::var("SEALMOUNT_BIN").expect("SEALMOUNT_BIN names the driver");
    let list = json!({"kind": "List", "items": pods}).to_string();
    let output = run(&program, &["check", "-o", "json", "-n", namespace, "--config", platform, "-"], &list).await;
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(report["unreadable"], json!([]));
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let pods = report["pods"].as_array().expect("pods");
    pods.iter()
        .map(|pod| {
            let findings = pod["findings"].as_array().expect("findings").iter();
            let refusals = findings.filter(|it| it["severity"] == "refuse");
            (text(&pod["name"]), refusals.map(|it| (text(&it["code"]), text(&it["message"]))).collect())
        })
        .collect()
}

/// The rules that stay with the driver, and why.
fn stays(code: &str) -> Option<&'static str> {
    match code {
        "SM184" => Some("the paths of `files` are YAML in a text"),
        code if code.starts_with("SM0") => Some("the attributes' own grammar"),
        _ => None,
    }
}

/// The platform file of the generated pods, in the chart and for `check`.
const POLICY: [&str; 1] = ["config.policy.runtime_classes.listed.gate=off"];

async fn differential(cluster: &mut Cluster) -> String {
    let namespace = place(cluster, "generated").await;
    let before = revision().await;
    upgrade(cluster, &["--set", POLICY[0]]).await;
    let platform = cluster.dir.join("tmp/platform.yaml");
    std::fs::write(cluster.dir.join("tmp/ca.pem"), cluster.bao.ca_pem()).expect("write the CA");
    let file = cluster.kube.json(&format!("get configmap sealmount -n {SYSTEM}")).await;
    std::fs::write(&platform, file["data"]["config.yaml"].as_str().expect("a file")).expect("write the file");
    let api: Api<Pod> = Api::namespaced(Client::try_default().await.expect("a client"), &namespace);
    // A policy is in force a moment after it was written.
    let mut listed = valid("probe");
    listed["spec"]["runtimeClassName"] = json!("listed");
    until("the policy knows the class", READY, async || admitted(&api, &listed).await.is_ok()).await;

    let pods = generated();
    let verdicts = checked(&pods, &namespace, &platform.display().to_string()).await;
    let (mut agree, mut refused, mut exceptions, mut wrong) = (0, 0, BTreeMap::new(), Vec::new());
    for pod in &pods {
        let name = pod["metadata"]["name"].as_str().expect("a name");
        let refusals = &verdicts[name];
        let said = admitted(&api, pod).await;
        let first = refusals.iter().find(|(code, _)| stays(code).is_none());
        match (&said, first) {
            // The driver reads the attributes before it judges; admission goes on without them.
            (_, None) if !refusals.is_empty() => {
                *exceptions.entry(stays(&refusals[0].0).expect("it stays")).or_insert(0) += 1;
            }
            (Ok(()), None) => agree += 1,
            (Err(said), Some((code, message))) if same(said, code, message) => {
                refused += 1;
                match refusals.first().and_then(|(code, _)| stays(code)) {
                    Some(why) => *exceptions.entry(why).or_insert(0) += 1,
                    None if said != message && code == "SM112" => {
                        *exceptions.entry("the nearest name in SM112's sentence").or_insert(0) += 1;
                    }
                    None => agree += 1,
                }
            }
            _ => wrong.push(format!("{name}: admission {said:?}, check {refusals:?}")),
        }
    }
    back(cluster, &before).await;
    assert!(wrong.is_empty(), "{} of {PODS} differ:\n{}", wrong.len(), wrong.join("\n"));
    let exceptions: Vec<String> = exceptions.into_iter().map(|(why, count)| format!("{count}: {why}")).collect();
    assert!(refused > 100 && agree > 200, "{refused} refused, {agree} agree: too few to prove much");
    format!("{PODS} pods, {refused} refused, {agree} agree to the word; excepted {}", exceptions.join("; "))
}

/// The same sentence; the driver cuts long ones, and knows the name that was meant.
fn same(said: &str, code: &str, message: &str) -> bool {
    if code == "SM112" {
        return said.starts_with("SM112 ");
    }
    match message.strip_suffix('…') {
        Some(cut) => said.starts_with(cut),
        None => said == message,
    }
}

async fn same_words(cluster: &mut Cluster) -> String {
    let namespace = place(cluster, "words").await;
    let mut pod = valid("mistaken");
    push(&mut pod["spec"]["containers"][0]["volumeMounts"], json!({"name": "db", "mountPath": "/db"}));
    let sentence = "SM130 spec.containers[0].volumeMounts[1]: exporter mounts the volume too; take this mount out; \
                    if it reads the files too and has the same UID, name it in for:";
    let error = cluster.kube.try_apply(&namespace, &pod.to_string()).await.expect_err("it is refused");
    assert!(error.contains(sentence), "{error}");
    let program = std::env::var("SEALMOUNT_BIN").expect("SEALMOUNT_BIN names the driver");
    let output = run(&program, &["check", "-"], &pod.to_string()).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains(sentence), "{text}");
    // The driver's word, where admission says nothing: its event.
    let before = revision().await;
    upgrade(cluster, &["--set", "admission.enabled=false"]).await;
    until("the policy is gone", READY, async || cluster.kube.try_apply(&namespace, &pod.to_string()).await.is_ok())
        .await;
    let event = cluster.kube.event(&namespace, "mistaken", sentence, READY).await;
    cluster.kube.delete_pod(&namespace, "mistaken").await;
    back(cluster, &before).await;
    // Another pod is not looked at, and a valid one passes.
    let mut plain = valid("plain");
    plain["spec"]["volumes"][1] = json!({"name": "db", "emptyDir": {}});
    plain["spec"]["hostPID"] = json!(true);
    cluster.kube.apply(&namespace, &plain.to_string()).await;
    cluster.kube.apply(&namespace, &valid("right").to_string()).await;
    for name in ["plain", "right"] {
        cluster.kube.delete_pod(&namespace, name).await;
    }
    event.reason
}

/// Whether the API server refuses a pod, without making it.
async fn denies(cluster: &Cluster, namespace: &str, pod: &Value) -> bool {
    let dry = ["create", "--dry-run=server", "-n", namespace, "-f", "-"];
    cluster.kube.try_with(&dry, &pod.to_string()).await.is_err()
}

async fn warns(cluster: &mut Cluster) -> String {
    let namespace = place(cluster, "warns").await;
    let mut pod = valid("warned");
    pod["spec"]["shareProcessNamespace"] = json!(true);
    let before = revision().await;
    upgrade(cluster, &["--set", "admission.action=Warn"]).await;
    let mut said = String::new();
    until("admission only warns", READY, async || {
        let output = run("kubectl", &["apply", "-n", &namespace, "-f", "-"], &pod.to_string()).await;
        said = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success()
    })
    .await;
    assert!(said.contains("Warning: ") && said.contains("SM131 spec.shareProcessNamespace: "), "{said}");
    cluster.kube.delete_pod(&namespace, "warned").await;
    back(cluster, &before).await;
    until("admission denies again", READY, async || denies(cluster, &namespace, &pod).await).await;
    let excluded = format!("admission.excludeNamespaces={{{namespace}}}");
    upgrade(cluster, &["--set", &excluded]).await;
    until("the namespace is left out", READY, async || !denies(cluster, &namespace, &pod).await).await;
    back(cluster, &before).await;
    "Warn, and excludeNamespaces".to_owned()
}

async fn older(cluster: &mut Cluster) -> String {
    let namespace = place(cluster, "older").await;
    let before = revision().await;
    upgrade(cluster, &["--set", "admission.enabled=false"]).await;
    let mut pod = valid("older");
    pod["spec"]["shareProcessNamespace"] = json!(true);
    pod["metadata"]["finalizers"] = json!(["e2e.sealmount.io/held"]);
    let mut job_spec = pod["spec"].clone();
    job_spec["restartPolicy"] = json!("Never");
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "older"},
        "spec": {"template": {"metadata": {}, "spec": job_spec}, "backoffLimit": 0},
    });
    until("the policy is gone", READY, async || cluster.kube.try_apply(&namespace, &pod.to_string()).await.is_ok())
        .await;
    cluster.kube.apply(&namespace, &job.to_string()).await;
    until("the Job has a pod", READY, async || {
        let pods = cluster.kube.json(&format!("get pods -n {namespace} -l job-name=older")).await;
        pods["items"].as_array().is_some_and(|items| !items.is_empty())
    })
    .await;
    back(cluster, &before).await;
    let mut fresh = valid("fresh");
    fresh["spec"]["shareProcessNamespace"] = json!(true);
    until("admission denies again", READY, async || denies(cluster, &namespace, &fresh).await).await;
    cluster.kube.run(&format!("delete pod -n {namespace} older --wait=false --grace-period=0")).await;
    let patch =
        ["patch", "pod", "older", "-n", &namespace, "--type=merge", "-p", r#"{"metadata":{"finalizers":null}}"#];
    cluster.kube.try_with(&patch, "").await.expect("the finalizer goes");
    cluster.kube.run(&format!("delete job -n {namespace} older --cascade=foreground --wait --timeout=60s")).await;
    until("the pods are gone", READY, async || {
        let pods = cluster.kube.json(&format!("get pods -n {namespace}")).await;
        pods["items"].as_array().is_some_and(Vec::is_empty)
    })
    .await;
    "both gone with admission on".to_owned()
}
