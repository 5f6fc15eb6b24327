//! Admission: the policy of the chart on the real API server, held to the driver's own code by pods that a generator
//! breaks, one to three things at a time.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::{Api, Client};
use sealmount::policy::RULES;
use serde_json::{Value, json};

use crate::chart::{back, revision, upgrade};
use crate::cluster::{AUDIT_LOG, Cluster, SYSTEM, until};
use crate::images;
use crate::kube::run;
use crate::runner::{Check, check};

pub(crate) static CHECKS: &[Check] = &[
    check!("kubectl apply refuses a mistaken pod in the words of check and of the driver", same_words),
    check!("admission only warns, or leaves a namespace out, where it is told to", warns),
    check!("older mistaken pods lose their finalizers, and a Job of one ends", older),
    check!("admission takes a large pod", large),
    check!("admission and check agree on generated pods", differential),
    check!("admission and check agree where the platform file has a policy of its own", strict),
    check!("admission and check agree on debug containers", debugging),
];

const READY: Duration = Duration::from_secs(60);
/// How many pods the generator makes: with the driver's own policy, and with a stricter one.
const PODS: usize = 400;
const STRICT_PODS: usize = 120;

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

/// One of the others mounts the volume of the application.
fn mount_db(pod: &mut Value, number: usize) {
    let mounts = &mut other(pod, number)["volumeMounts"];
    let path = format!("/db{}", mounts.as_array().map_or(0, Vec::len));
    push(mounts, json!({"name": "db", "mountPath": path}));
}

/// One more volume, mounted by a container that is not the reader.
fn extra(pod: &mut Value, number: usize, source: Value) {
    let name = format!("extra-{}", pod["spec"]["volumes"].as_array().map_or(0, Vec::len));
    let mut volume = source;
    volume["name"] = json!(name);
    push(&mut pod["spec"]["volumes"], volume);
    push(&mut other(pod, number)["volumeMounts"], json!({"name": name, "mountPath": format!("/{name}")}));
}

fn last_mount(pod: &mut Value, number: usize) -> &mut Value {
    other(pod, number)["volumeMounts"].as_array_mut().expect("mounts").last_mut().expect("a mount")
}

fn ours(pod: &mut Value) -> &mut Value {
    &mut pod["spec"]["volumes"][1]["csi"]
}

/// Takes an attribute out of a volume of ours.
fn without(csi: &mut Value, attribute: &str) {
    csi["volumeAttributes"].as_object_mut().expect("attributes").remove(attribute);
}

/// One more volume of ours, which another container reads; gives the reader.
fn second(pod: &mut Value, number: usize, source: Value) -> &mut Value {
    let reader = other(pod, number)["name"].clone();
    let mut csi = source;
    csi["driver"] = json!("csi.sealmount.io");
    csi["readOnly"] = json!(true);
    csi["volumeAttributes"]["for"] = reader;
    extra(pod, number, json!({"csi": csi}));
    other(pod, number)
}

/// A projected volume with a token for the connection's audience.
fn token() -> Value {
    let source = json!({"serviceAccountToken": {"path": "t", "audience": "vault-prod", "expirationSeconds": 600}});
    json!({"projected": {"sources": [source]}})
}

/// An attribute that there is not: the driver says so before it judges the volume; admission does not look at it.
const TYPO: &str = "fro";
/// Where the nodes of the stricter platform keep the kubelet's files.
const KUBELET_DIR: &str = "/data/kubelet";

type Change = fn(&mut Value, usize);

/// What breaks a pod, and what is harmless: each may meet each other.
const CHANGES: &[Change] = &[
    |pod, _| ours(pod)["readOnly"] = json!(false),
    |pod, _| drop(ours(pod).as_object_mut().expect("a map").remove("readOnly")),
    |pod, _| ours(pod)["fsType"] = json!("ext4"),
    |pod, _| {
        without(ours(pod), "for");
        pod["spec"]["containers"][1]["volumeMounts"] = json!([]);
    },
    |pod, number| {
        without(ours(pod), "for");
        mount_db(pod, number);
    },
    |pod, _| ours(pod)["volumeAttributes"]["for"] = json!("somebody"),
    |pod, _| ours(pod)["volumeAttributes"]["for"] = json!("ap"),
    |pod, _| ours(pod)["volumeAttributes"]["for"] = json!("app, exporter"),
    |pod, _| ours(pod)["volumeAttributes"][TYPO] = json!("app"),
    |pod, _| drop(pod["spec"]["containers"][1].as_object_mut().expect("a map").remove("securityContext")),
    |pod, _| pod["spec"]["containers"][1]["securityContext"]["runAsUser"] = json!(0),
    |pod, _| {
        drop(pod["spec"]["containers"][1].as_object_mut().expect("a map").remove("securityContext"));
        pod["spec"]["securityContext"]["runAsUser"] = json!(0);
    },
    |pod, number| {
        mount_db(pod, number);
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
    |pod, _| {
        pod["spec"]["containers"][0]["securityContext"]["runAsUser"] = json!(1000);
        pod["metadata"]["annotations"]["sidecar.istio.io/status"] = json!("{\"containers\":[\"exporter\"]}");
    },
    |pod, number| mount_db(pod, number),
    |pod, number| {
        mount_db(pod, number);
        let mounts = other(pod, number)["volumeMounts"].as_array_mut().expect("mounts");
        mounts.last_mut().expect("a mount")["subPath"] = json!("password");
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
    |pod, number| add(pod, number, &["ſYS_ADMIN"]),
    |pod, number| add(pod, number, &["NET_RAW", "cap_ſyſ_rawıo"]),
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
    |pod, _| pod["spec"]["securityContext"]["seLinuxOptions"] = json!({"type": "super_t"}),
    |pod, number| extra(pod, number, json!({"hostPath": {"path": "/var/lib/kubelet/pods"}})),
    |pod, number| extra(pod, number, json!({"hostPath": {"path": "/var//run/./containerd"}})),
    |pod, number| extra(pod, number, json!({"hostPath": {"path": "/"}})),
    |pod, number| extra(pod, number, json!({"hostPath": {"path": "/var/log"}})),
    |pod, number| {
        extra(pod, number, json!({"hostPath": {"path": "/var/"}}));
        last_mount(pod, number)["subPath"] = json!("run/docker.sock");
    },
    |pod, number| {
        let variable = json!({"name": "P", "valueFrom": {"secretKeyRef": {"name": "db", "key": "password"}}});
        push(&mut other(pod, number)["env"], variable);
    },
    |pod, number| push(&mut other(pod, number)["envFrom"], json!({"secretRef": {"name": "db"}})),
    |pod, number| extra(pod, number, json!({"secret": {"secretName": "db"}})),
    |pod, number| extra(pod, number, json!({"projected": {"sources": [{"secret": {"name": "db"}}]}})),
    |pod, number| {
        from_vault(pod);
        extra(pod, number, token());
    },
    // Of two volumes the second one's reader is the first one's neighbour, and the other way round.
    |pod, number| {
        second(pod, number, json!({"nodePublishSecretRef": {"name": "other"}}))["securityContext"]["privileged"] =
            json!(true);
    },
    |pod, number| {
        second(pod, number, json!({"volumeAttributes": {"files": FILES}}));
        extra(pod, number + 1, token());
    },
    |pod, number| {
        second(pod, number, json!({"nodePublishSecretRef": {"name": "other"}}));
        push(&mut pod["spec"]["containers"][1]["envFrom"], json!({"secretRef": {"name": "other"}}));
    },
    |pod, number| {
        second(pod, number, json!({"nodePublishSecretRef": {"name": "other"}, "fsType": "ext4"}));
    },
    |pod, number| other(pod, number % 2)["securityContext"]["runAsUser"] = json!(1000),
    |pod, number| extra(pod, number, json!({"hostPath": {"path": format!("{KUBELET_DIR}/pods")}})),
    |pod, _| {
        from_vault(pod);
        pod["metadata"]["annotations"]["vault.hashicorp.com/agent-inject"] = json!("true");
        pod["metadata"]["annotations"]["vault.hashicorp.com/agent-inject-secret-db"] = json!("secret/data/a/db");
    },
    |pod, _| {
        let mounts = "[{\"name\": \"db\", \"mountPath\": \"/db\"}]";
        pod["metadata"]["annotations"]["sidecar.istio.io/userVolumeMount"] = json!(mounts);
    },
    // From here on nothing that refuses by itself.
    |pod, number| {
        second(pod, number, json!({"nodePublishSecretRef": {"name": "other"}}));
    },
    // The token is the reader's own; the volume that it does not read needs no login.
    |pod, number| {
        second(pod, number, json!({"volumeAttributes": {"files": FILES}}));
        extra(pod, number, token());
    },
    // It reaches admission as `sources: null`.
    |pod, number| extra(pod, number, json!({"projected": {"defaultMode": 420}})),
    |pod, number| {
        extra(pod, number, json!({"hostPath": {"path": "/var/log"}}));
        last_mount(pod, number)["readOnly"] = json!(true);
    },
    |pod, number| {
        extra(pod, number, json!({"hostPath": {"path": "/var"}}));
        last_mount(pod, number)["subPath"] = json!("data");
    },
    |pod, _| {
        let mounts = "[{\"name\": \"scratch\", \"mountPath\": \"/x\", \"subPath\": \"db\"}]";
        pod["metadata"]["annotations"]["sidecar.istio.io/userVolumeMount"] = json!(mounts);
    },
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
    csi["volumeAttributes"]["files"] = json!(FILES);
}

/// One file from Vault.
const FILES: &str = "password: secret/data/a/db#password";

/// A small generator, so that a failure comes again (Knuth's MMIX constants).
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap_or(0) % end
    }
}

/// The first ones have one change each, so that none is left out; the others up to three. Of ten pods, one stands in each
/// of the `rare` namespaces and the others in the usual one.
fn generated(seed: u64, count: usize, usual: &str, rare: &[String]) -> Vec<Value> {
    let mut chance = Chance(seed);
    (0..count)
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
            pod["metadata"]["namespace"] = json!(rare.get(number % 10).map_or(usual, String::as_str));
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
async fn admitted(client: &Client, pod: &Value) -> Result<(), String> {
    let typed: Pod = serde_json::from_value(pod.clone()).expect("a pod");
    let namespace = pod["metadata"]["namespace"].as_str().expect("a namespace");
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    said(api.create(&DRY, &typed).await)
}

const DRY: PostParams = PostParams { dry_run: true, field_manager: None };

/// The policy's sentence out of the API server's answer.
fn said<T>(answer: kube::Result<T>) -> Result<(), String> {
    match answer {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) => {
            let (_, said) = status
                .message
                .split_once("denied request: ")
                .unwrap_or_else(|| panic!("not admission's: {}", status.message));
            Err(said.to_owned())
        }
        Err(error) => panic!("{error}"),
    }
}

/// The refusals of a pod: code and sentence.
type Refusals = Vec<(String, String)>;

/// What `sealmount check` says of pods: of each the refusals, in the driver's order.
async fn checked(pods: &[Value], args: &[&str]) -> BTreeMap<String, Refusals> {
    let program = std::env::var("SEALMOUNT_BIN").expect("SEALMOUNT_BIN names the driver");
    let list = json!({"kind": "List", "items": pods}).to_string();
    let output = run(&program, &[&["check", "-o", "json"], args, &["-"]].concat(), &list).await;
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

/// What admission is to say where the driver says `refusals`: one of these sentences of one code, or nothing. Of one
/// volume it is the first; of several the first code is the same, whatever container or volume stands first.
fn expected(pod: &Value, refusals: &Refusals) -> Refusals {
    let volumes = pod["spec"]["volumes"].as_array().expect("volumes").iter();
    let several = volumes.filter(|it| it["csi"]["driver"] == "csi.sealmount.io").count() > 1;
    let place = |code: &str| RULES.iter().position(|rule| rule.code.0 == code);
    let refusals = refusals.iter().filter(|(code, _)| code != "SM184" && !code.starts_with("SM2"));
    let Some(first) = refusals.clone().min_by_key(|(code, _)| place(code).unwrap_or(0)) else { return Vec::new() };
    refusals.filter(|it| it.0 == first.0).take(if several { usize::MAX } else { 1 }).cloned().collect()
}

/// Pods through admission and through `check`.
#[derive(Debug, Default)]
struct Compared {
    pods: usize,
    refused: usize,
    agree: usize,
    codes: BTreeMap<String, usize>,
    exceptions: BTreeMap<&'static str, usize>,
    wrong: Vec<String>,
}

impl Compared {
    /// Takes in what admission said of a pod and what the driver says; `mended` is what it says without the typo.
    fn add(&mut self, pod: &Value, said: &Result<(), String>, refusals: &Refusals, mended: &Refusals) {
        self.pods += 1;
        let expected = expected(pod, mended);
        let same = match said {
            Ok(()) => expected.is_empty(),
            Err(said) => expected.iter().any(|(code, message)| same(said, code, message)),
        };
        if !same {
            let name = &pod["metadata"]["name"];
            return self.wrong.push(format!("{name}: admission {said:?}, check {refusals:?}, mended {mended:?}"));
        }
        if let Err(said) = said {
            self.refused += 1;
            *self.codes.entry(said.split(' ').next().unwrap_or_default().to_owned()).or_default() += 1;
        }
        let exception = if refusals.iter().any(|(code, _)| code.starts_with("SM0")) {
            "the attributes' own grammar"
        } else if refusals.iter().any(|(code, _)| code.starts_with("SM2")) {
            "the connection's own rules"
        } else if refusals.iter().any(|(code, _)| code == "SM184") {
            "the paths of `files` are YAML in a text"
        } else if expected.first().is_some_and(|(code, message)| code == "SM112" && message.contains(NEAREST)) {
            "the nearest name in SM112's sentence"
        } else {
            self.agree += 1;
            return;
        };
        *self.exceptions.entry(exception).or_default() += 1;
    }

    fn report(self) -> String {
        let Self { pods, refused, agree, codes, exceptions, wrong } = self;
        assert!(wrong.is_empty(), "{} of {pods} differ:\n{}", wrong.len(), wrong.join("\n"));
        let exceptions: Vec<String> = exceptions.into_iter().map(|(why, count)| format!("{count}: {why}")).collect();
        assert!(refused > pods / 4 && agree > pods / 2, "{refused} refused, {agree} agree: too few to prove much");
        let excepted = if exceptions.is_empty() { "none".to_owned() } else { exceptions.join("; ") };
        format!(
            "{pods} pods, {refused} refused by {} codes, {agree} agree to the word; excepted {excepted}",
            codes.len()
        )
    }
}

const NEAREST: &str = " (did you mean \"";

/// The same sentence; the driver cuts long ones, and knows the name that was meant.
fn same(said: &str, code: &str, message: &str) -> bool {
    if let Some((before, after)) = message.split_once(NEAREST).filter(|_| code == "SM112") {
        let after = after.split_once("?)").map_or("", |(_, after)| after);
        return said == format!("{before}{after}");
    }
    match message.strip_suffix('…') {
        Some(cut) => said.starts_with(cut),
        None => said == message,
    }
}

/// The platform file that is installed, for `check`, with the CA beside it.
async fn platform_file(cluster: &Cluster) -> PathBuf {
    let path = cluster.dir.join("tmp/platform.yaml");
    fs::write(cluster.dir.join("tmp/ca.pem"), cluster.bao.ca_pem()).expect("write the CA");
    let file = cluster.kube.json(&format!("get configmap sealmount -n {SYSTEM}")).await;
    fs::write(&path, file["data"]["config.yaml"].as_str().expect("a file")).expect("write the file");
    path
}

/// Pods through both.
async fn compare(client: &Client, pods: &[Value], platform: &Path, args: &[&str]) -> Compared {
    let platform = platform.display().to_string();
    let args = [&["--config", &platform], args].concat();
    let mended: Vec<Value> = pods
        .iter()
        .map(|pod| {
            let mut pod = pod.clone();
            without(ours(&mut pod), TYPO);
            pod
        })
        .collect();
    let (verdicts, mended) = (checked(pods, &args).await, checked(&mended, &args).await);
    let mut compared = Compared::default();
    for pod in pods {
        let name = pod["metadata"]["name"].as_str().expect("a name");
        compared.add(pod, &admitted(client, pod).await, &verdicts[name], &mended[name]);
    }
    compared
}

async fn differential(cluster: &mut Cluster) -> String {
    let namespace = place(cluster, "generated").await;
    let before = revision().await;
    upgrade(cluster, &["--set", "config.policy.runtime_classes.listed.gate=off"]).await;
    let platform = platform_file(cluster).await;
    let client = Client::try_default().await.expect("a client");
    // A policy is in force a moment after it was written.
    let mut listed = valid("probe");
    listed["metadata"]["namespace"] = json!(namespace);
    listed["spec"]["runtimeClassName"] = json!("listed");
    until("the policy knows the class", READY, async || admitted(&client, &listed).await.is_ok()).await;
    let compared = compare(&client, &generated(11, PODS, &namespace, &[]), &platform, &[]).await;
    back(cluster, &before).await;
    compared.report()
}

/// What the default policy leaves out: a waiver, namespaces, UIDs of meshes, distinct UIDs, another directory.
async fn strict(cluster: &mut Cluster) -> String {
    let namespace = place(cluster, "strict").await;
    let rare = [place(cluster, "denied").await, place(cluster, "elsewhere").await];
    let before = revision().await;
    let policy = json!({
        "mesh_uids": [999], "distinct_uids": true, "runtime_classes": {"listed": {"gate": "off"}},
        "namespaces": {"allow": [namespace, rare[0]], "deny": [rare[0]]},
        "waivers": [{"code": "SM164", "namespace": namespace, "until": "2099-12-31", "reason": "moves"}],
    });
    // The driver does not come up where no kubelet has that directory; nothing of it is asked here.
    let policy = format!("config.policy={policy}");
    upgrade(cluster, &["--set-json", &policy, "--set", &format!("kubeletDir={KUBELET_DIR}")]).await;
    let platform = platform_file(cluster).await;
    let client = Client::try_default().await.expect("a client");
    let mut elsewhere = valid("probe");
    elsewhere["metadata"]["namespace"] = json!(rare[1]);
    until("the policy knows the namespaces", READY, async || admitted(&client, &elsewhere).await.is_err()).await;
    let pods = generated(7, STRICT_PODS, &namespace, &rare);
    let compared = compare(&client, &pods, &platform, &["--kubelet-dir", KUBELET_DIR]).await;
    back(cluster, &before).await;
    for code in ["SM123", "SM140", "SM150", "SM151", "SM170"] {
        assert!(compared.codes.contains_key(code), "no pod was refused by {code}");
    }
    compared.report()
}

/// Pods to which debug containers are added, as admission sees them: with what their status says.
async fn debugging(cluster: &mut Cluster) -> String {
    let namespace = place(cluster, "debugging").await;
    let before = revision().await;
    // Some of them are mistaken: they come while it is off.
    upgrade(cluster, &["--set", "admission.enabled=false"]).await;
    let held = held();
    until("the policy is gone", READY, async || !denies(cluster, &namespace, &held[1]).await).await;
    for pod in &held {
        cluster.kube.apply(&namespace, &pod.to_string()).await;
    }
    let status = json!({"status": {"containerStatuses": [{
        "name": "exporter", "image": images::APP, "imageID": "", "ready": false, "restartCount": 0,
        "state": {"waiting": {}}, "user": {"linux": {"uid": 1000, "gid": 1000}},
    }]}});
    let patch = ["patch", "pod", "seen", "-n", &namespace, "--subresource=status", "--type=merge", "-p"];
    cluster.kube.try_with(&[&patch[..], &[&status.to_string()]].concat(), "").await.expect("a status");
    upgrade(cluster, &["--set", "admission.enabled=true,config.policy.distinct_uids=true"]).await;
    let mut same = valid("same");
    same["spec"]["containers"][0]["securityContext"]["runAsUser"] = json!(1000);
    until("the policy is in force", READY, async || denies(cluster, &namespace, &same).await).await;
    let client = Client::try_default().await.expect("a client");
    let compared = debug(&client, &namespace, &platform_file(cluster).await).await;
    back(cluster, &before).await;
    for code in ["SM113", "SM130", "SM133", "SM150", "SM151", "SM160"] {
        assert!(compared.codes.contains_key(code), "no pod was refused by {code}");
    }
    compared.report()
}

/// Pods that stay unbound, so that nobody serves or refuses them: a right one, two whose reader can only be a debug
/// container, and one whose sidecar's UID is known from its status alone.
fn held() -> [Value; 4] {
    let mut pods = ["right", "named", "unmounted", "seen"].map(valid);
    ours(&mut pods[1])["volumeAttributes"]["for"] = json!("debug");
    without(ours(&mut pods[2]), "for");
    pods[2]["spec"]["containers"][1]["volumeMounts"] = json!([]);
    pods[3]["spec"]["containers"][0].as_object_mut().expect("a map").remove("securityContext");
    for pod in &mut pods {
        pod["spec"]["schedulingGates"] = json!([{"name": "e2e.sealmount.io/held"}]);
    }
    pods
}

/// Each of those pods with each debug container, through both.
async fn debug(client: &Client, namespace: &str, platform: &Path) -> Compared {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let platform = platform.display().to_string();
    let mut compared = Compared::default();
    for pod in held() {
        let name = pod["metadata"]["name"].as_str().expect("a name");
        let pod = serde_json::to_value(api.get(name).await.expect("the pod")).expect("a pod");
        for more in [
            json!({}),
            json!({"volumeMounts": [{"name": "db", "mountPath": "/db"}]}),
            json!({"targetContainerName": "app"}),
            json!({"securityContext": {"privileged": true, "runAsUser": 2000}}),
            json!({"securityContext": {"runAsUser": 1000}}),
            json!({"securityContext": null}),
        ] {
            let mut debug = json!({"name": "debug", "image": images::APP, "securityContext": {"runAsUser": 2000}});
            debug.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
            let mut pod = pod.clone();
            pod["spec"]["ephemeralContainers"] = json!([debug]);
            let typed: Pod = serde_json::from_value(pod.clone()).expect("a pod");
            let said = said(api.replace_ephemeral_containers(name, &DRY, &typed).await);
            let refusals = &checked(std::slice::from_ref(&pod), &["--config", &platform]).await[name];
            compared.add(&pod, &said, refusals, refusals);
        }
    }
    compared
}

/// What an expression costs grows with containers, volumes and mounts: no pod that somebody writes comes near the limit.
async fn large(cluster: &mut Cluster) -> String {
    const CONTAINERS: usize = 60;
    const MOUNTS: usize = 60;
    const VOLUMES: usize = 120;
    let namespace = place(cluster, "large").await;
    let mut pod = valid("large");
    pod["metadata"]["namespace"] = json!(namespace);
    for number in 2..VOLUMES {
        let mut volume = match number % 5 {
            0 => json!({"emptyDir": {}}),
            1 => json!({"configMap": {"name": "settings", "optional": true}}),
            2 => json!({"secret": {"secretName": format!("s{number}"), "optional": true}}),
            3 => json!({"projected": {"sources": [{"secret": {"name": format!("s{number}"), "optional": true}}]}}),
            _ => json!({"hostPath": {"path": format!("/srv/{number}")}}),
        };
        volume["name"] = json!(format!("v{number}"));
        push(&mut pod["spec"]["volumes"], volume);
    }
    let app = pod["spec"]["containers"][1].clone();
    for number in 3..CONTAINERS {
        let mut container = app.clone();
        container["name"] = json!(format!("c{number}"));
        container["securityContext"]["runAsUser"] = json!(2000 + number);
        push(&mut pod["spec"]["containers"], container);
    }
    for container in pod["spec"]["containers"].as_array_mut().expect("containers") {
        let mounts = (0..=MOUNTS).filter(|number| *number != 1).map(|number| match number {
            0 => json!({"name": "scratch", "mountPath": "/scratch"}),
            _ => json!({"name": format!("v{number}"), "mountPath": format!("/v{number}")}),
        });
        container["volumeMounts"] = mounts.collect();
    }
    push(&mut pod["spec"]["containers"][1]["volumeMounts"], json!({"name": "db", "mountPath": "/db"}));
    let client = Client::try_default().await.expect("a client");
    assert_eq!(admitted(&client, &pod).await, Ok(()));
    // And it was looked at.
    pod["spec"]["shareProcessNamespace"] = json!(true);
    assert!(admitted(&client, &pod).await.is_err_and(|said| said.starts_with("SM131 ")));
    format!("{CONTAINERS} containers with {MOUNTS} mounts each, {VOLUMES} volumes")
}

async fn same_words(cluster: &mut Cluster) -> String {
    let namespace = place(cluster, "words").await;
    let mut pod = valid("mistaken");
    push(&mut pod["spec"]["containers"][0]["volumeMounts"], json!({"name": "db", "mountPath": "/db"}));
    let sentence = "SM130 spec.containers[0].volumeMounts[1]: exporter mounts the volume too; take this mount out; \
                    if it reads the files too and has the same UID, name it in for:";
    let error = cluster.kube.try_apply(&namespace, &pod.to_string()).await.expect_err("it is refused");
    assert!(error.contains(sentence), "{error}");
    until("the audit log has it", READY, async || audited(&namespace, "mistaken").iter().any(|it| it == sentence))
        .await;
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

/// What the policy wrote into the API server's audit log about a pod.
fn audited(namespace: &str, pod: &str) -> Vec<String> {
    let log = fs::read_to_string(AUDIT_LOG).expect("the audit log");
    let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events
        .filter(|event| event["objectRef"]["namespace"] == namespace && event["objectRef"]["name"] == pod)
        .filter_map(|event| event["annotations"]["sealmount/refused"].as_str().map(str::to_owned))
        .collect()
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
