//! Where pod facts come from: the kubelet's own pods API, the API server, or manifest files.
//!
//! The two live sources watch the pods of this node and ask for one pod when the watch has not brought it. Facts are
//! given out only from a watch that is up to date or from an answer of this moment: a stale pod could lack the
//! ephemeral container that was added to it since.

pub mod api;
pub mod kubelet;
pub mod manifest;
pub(crate) mod tree;

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tracing::info;

use crate::policy::facts::{Kind, PodFacts};
use crate::request::{DRIVER, Malformed, PodRef, PodUid};

/// Why there are no facts of a pod.
#[derive(Debug, thiserror::Error)]
pub enum PodsError {
    /// The place facts come from is away: try again.
    #[error("pod facts are not to be had now: {0}")]
    Away(String),
    /// No such pod (yet).
    #[error("pod {0} is not known on this node")]
    Unknown(PodRef),
    /// Another pod has the name now.
    #[error("pod {pod} is another pod now (UID {found})")]
    Replaced {
        /// Who was asked for.
        pod: PodRef,
        /// Who is there.
        found: PodUid,
    },
    /// It is bound to another node.
    #[error("pod {pod} is bound to node {node}")]
    Elsewhere {
        /// Who was asked for.
        pod: PodRef,
        /// Its node.
        node: String,
    },
    /// A pod's description could not be read, or does not fit the call.
    #[error("pod {pod}: {fault}")]
    Unreadable {
        /// Who was asked for.
        pod: PodRef,
        /// What is wrong with it.
        fault: String,
    },
}

/// Why no source of pod facts could be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `--pods-from api` without a way to the API server.
    #[error("--pods-from api needs the in-cluster ServiceAccount or --kubeconfig")]
    NoApiServer,
    /// `--pods-from auto` found neither.
    #[error(
        "the kubelet's pods API does not answer ({0}) and there is no ServiceAccount for the API server: \
             set --pods-from or --kubeconfig"
    )]
    NoSource(String),
}

/// `--pods-from`: `auto`, `kubelet`, `api` or `manifest:DIR`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodsFrom {
    /// The kubelet's pods API if it answers, else the API server.
    Auto,
    /// The kubelet's pods API (Kubernetes 1.37).
    Kubelet,
    /// The API server.
    Api,
    /// Manifest files of a directory.
    Manifest(PathBuf),
}

impl FromStr for PodsFrom {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        match (text, text.strip_prefix("manifest:")) {
            ("auto", _) => Ok(Self::Auto),
            ("kubelet", _) => Ok(Self::Kubelet),
            ("api", _) => Ok(Self::Api),
            (_, Some(directory)) if !directory.is_empty() => Ok(Self::Manifest(directory.into())),
            _ => Err(Malformed("write auto, kubelet, api or manifest:DIR".into())),
        }
    }
}

/// A source of pod facts, with its cache. Its watch ends when it is dropped.
#[derive(Debug)]
pub struct Pods {
    node: String,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Api(api::Api),
    Kubelet(kubelet::Kubelet),
    Manifest(manifest::Directory),
}

impl Pods {
    /// Starts the source that `--pods-from` names, for the pods of `node`, on the current tokio runtime.
    /// `client` is [`api::client`]'s; `connect` gives a connected socket to the kubelet's pods API each time.
    pub async fn start(
        from: &PodsFrom,
        node: &str,
        client: Option<api::Client>,
        connect: kubelet::Connect,
    ) -> Result<Self, StartError> {
        let source = match from {
            PodsFrom::Manifest(directory) => {
                info!(directory = %directory.display(), "pod facts come from manifest files");
                Source::Manifest(manifest::Directory::new(directory.clone()))
            }
            PodsFrom::Kubelet => {
                info!("pod facts come from the kubelet's pods API");
                Source::Kubelet(kubelet::Kubelet::start(connect))
            }
            PodsFrom::Api => {
                info!("pod facts come from the API server");
                Source::Api(api::Api::start(client.ok_or(StartError::NoApiServer)?, node))
            }
            PodsFrom::Auto => match (kubelet::probe(&connect).await, client) {
                (Ok(()), _) => {
                    info!("pod facts come from the kubelet's pods API, which answers");
                    Source::Kubelet(kubelet::Kubelet::start(connect))
                }
                (Err(why), Some(client)) => {
                    info!(why, "pod facts come from the API server: the kubelet's pods API does not answer");
                    Source::Api(api::Api::start(client, node))
                }
                (Err(why), None) => return Err(StartError::NoSource(why)),
            },
        };
        Ok(Self { node: node.to_owned(), source })
    }

    /// Waits until some pod of this node is another than it was at `seen`, and sets `seen`. Manifests do not change.
    pub async fn changed(&self, seen: &mut u64) {
        let Some(cache) = self.cache() else { return std::future::pending().await };
        let mut changes = cache.changes.subscribe();
        let now = changes.wait_for(|now| now != seen).await.map(|now| *now);
        match now {
            Ok(now) => *seen = now,
            // The source ended, and the worker with it.
            Err(_) => std::future::pending().await,
        }
    }

    /// The facts of `pod` as the watch has them; `None` if it has none that are current. Asks nobody.
    pub fn known(&self, pod: &PodRef) -> Option<Arc<PodFacts>> {
        self.cache()?.known(pod)?.facts.ok().filter(|facts| facts.pod.uid == pod.uid)
    }

    /// What a watch keeps up to date; manifests are read when they are asked for.
    fn cache(&self) -> Option<&Cache> {
        match &self.source {
            Source::Api(api) => Some(&api.cache),
            Source::Kubelet(kubelet) => Some(&kubelet.cache),
            Source::Manifest(_) => None,
        }
    }

    /// The facts of `pod`, from the cache if a watch holds it. They are of this UID, of this node, and of the service
    /// account the call names.
    pub async fn get(&self, pod: &PodRef) -> Result<Arc<PodFacts>, PodsError> {
        let (facts, bound) = match &self.source {
            Source::Api(api) => (api.find(pod).await?, true),
            Source::Kubelet(kubelet) => (kubelet.find(pod).await?, true),
            // A manifest is written before a pod is bound.
            Source::Manifest(directory) => (directory.find(pod)?, false),
        };
        if facts.pod.uid != pod.uid {
            return Err(PodsError::Replaced { pod: pod.clone(), found: facts.pod.uid.clone() });
        }
        if facts.node != self.node && (bound || !facts.node.is_empty()) {
            return Err(PodsError::Elsewhere { pod: pod.clone(), node: facts.node.clone() });
        }
        let fault = if (&facts.pod.namespace, &facts.pod.name) != (&pod.namespace, &pod.name) {
            format!("the call's pod UID is that of pod {}", facts.pod)
        } else if facts.pod.service_account != pod.service_account {
            // What the kubelet says of it can be planted by the pod's author where podInfoOnMount is off.
            let (found, said) = (&facts.pod.service_account, &pod.service_account);
            format!("its service account is {found:?}, the call says {said:?}")
        } else {
            return Ok(facts);
        };
        Err(PodsError::Unreadable { pod: pod.clone(), fault })
    }
}

/// An error's text with those of its causes that say something new.
fn with_causes(mut text: String, error: &dyn Error) -> String {
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}

/// A pod as a source describes it: who it is, and its facts or why they cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Described {
    namespace: String,
    name: String,
    uid: String,
    facts: Result<Arc<PodFacts>, String>,
}

impl Described {
    fn facts(self, pod: &PodRef) -> Result<Arc<PodFacts>, PodsError> {
        self.facts.map_err(|fault| PodsError::Unreadable { pod: pod.clone(), fault })
    }
}

/// The pods of this node as a watch has brought them.
#[derive(Debug)]
struct Cache {
    known: Mutex<HashMap<(String, String), Described>>,
    state: watch::Sender<State>,
    /// Counts the changes of what is kept.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The first list has not come yet.
    Starting,
    /// What is not in the cache was not on the node a moment ago, and what is in it is current.
    Live,
    /// The watch is broken: nothing in the cache may be given out.
    Lost,
}

/// How long a call waits for the first list: a kubelet restart publishes every volume of the node again at once, and
/// each would ask for its pod.
const FIRST_LIST: Duration = Duration::from_secs(5);

impl Cache {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            known: Mutex::default(),
            state: watch::Sender::new(State::Starting),
            changes: watch::Sender::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), Described>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        let before = self.state.send_replace(state);
        // Who looked while nothing could be given out has to look again.
        if state == State::Live && before != State::Live {
            self.count();
        }
    }

    /// What a whole list brought; the cache is live with it.
    fn replace(&self, pods: impl IntoIterator<Item = Described>) {
        let mut known = self.lock();
        let mut before = std::mem::take(&mut *known);
        for pod in pods.into_iter().filter(wanted) {
            let key = (pod.namespace.clone(), pod.name.clone());
            let same = before.remove(&key).filter(|before| *before == pod);
            known.insert(key, same.unwrap_or(pod));
        }
        drop(known);
        self.state.send_replace(State::Live);
        self.count();
    }

    fn count(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn put(&self, pod: Described) {
        let key = (pod.namespace.clone(), pod.name.clone());
        let mut known = self.lock();
        if !wanted(&pod) {
            known.remove(&key);
        } else if known.get(&key) != Some(&pod) {
            // Most changes of a pod are of its status, which no rule looks at: they wake nobody.
            known.insert(key, pod);
            drop(known);
            self.count();
        }
    }

    fn remove(&self, pod: &Described) {
        let key = (pod.namespace.clone(), pod.name.clone());
        let mut known = self.lock();
        // The deletion of the old pod may come after the new one of the same name.
        if known.get(&key).is_some_and(|known| known.uid == pod.uid) {
            known.remove(&key);
        }
    }

    /// The pod of that name, if the cache is live; waits for the first list.
    async fn find(&self, pod: &PodRef) -> Option<Described> {
        let mut state = self.state.subscribe();
        let _ = tokio::time::timeout(FIRST_LIST, state.wait_for(|state| *state != State::Starting)).await;
        drop(state);
        self.known(pod)
    }

    /// The pod of that name, if the cache is live.
    fn known(&self, pod: &PodRef) -> Option<Described> {
        if *self.state.borrow() != State::Live {
            return None;
        }
        self.lock().get(&(pod.namespace.clone(), pod.name.clone())).cloned()
    }
}

/// Only pods with a volume of this driver are kept: no call comes for the others.
fn wanted(pod: &Described) -> bool {
    match &pod.facts {
        Ok(facts) => facts.volumes.iter().any(|volume| volume.source.csi().is_some_and(|csi| csi.driver == DRIVER)),
        Err(_) => true,
    }
}

/// Ends a task with its owner.
#[derive(Debug)]
struct Task(tokio::task::JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Pauses between attempts, doubling, until an attempt went well.
#[derive(Debug)]
struct Backoff {
    next: Duration,
    first: Duration,
    most: Duration,
}

impl Backoff {
    fn new(first: Duration, most: Duration) -> Self {
        Self { next: first, first, most }
    }

    fn reset(&mut self) {
        self.next = self.first;
    }

    async fn pause(&mut self) {
        // Half fixed, half by chance: the nodes of a cluster lose their API server in the same moment.
        let half = self.next / 2;
        tokio::time::sleep(half + half.mul_f64(chance())).await;
        self.next = self.next.saturating_mul(2).min(self.most);
    }
}

/// A number from 0 to 1, good enough to spread load.
fn chance() -> f64 {
    use std::hash::{BuildHasher, RandomState};
    let low = u32::try_from(RandomState::new().hash_one(0_u8) & 0xffff).unwrap_or(0);
    f64::from(low) / f64::from(0xffff_u32)
}

// What the two conversions into facts share.

/// How the annotations begin that rules look at. A pod may have 256 KiB of others, and one of them repeats the whole
/// pod as its author applied it, environment included.
const ANNOTATIONS: [&str; 2] = ["sidecar.istio.io/", "vault.hashicorp.com/agent-inject"];

/// A `runAsUser` as a UID.
fn uid(value: Option<i64>, field: &str) -> Result<Option<u32>, String> {
    let Some(value) = value else { return Ok(None) };
    u32::try_from(value).map(Some).map_err(|_| format!("{field}: {value} is no UID"))
}

/// Absent and empty are the same to the kubelet.
fn written(text: Option<&str>) -> Option<String> {
    text.filter(|text| !text.is_empty()).map(str::to_owned)
}

/// Which kind of init container.
fn init_kind(restart_policy: Option<&str>) -> Kind {
    if restart_policy == Some("Always") { Kind::Sidecar } else { Kind::Init }
}

/// A capability as the runtime takes it: upper case, without `CAP_` (containerd, pkg/cri/opts; cri-o, specs). Upper
/// case is Unicode's: to the runtime `ſYS_ADMIN` is one too, and the API server checks no name.
pub(crate) fn capability(name: &str) -> String {
    let name = name.to_uppercase();
    name.strip_prefix("CAP_").unwrap_or(&name).to_owned()
}

/// Whether a seccomp or AppArmor profile's type is `Unconfined`; `None` if there is no profile.
fn unconfined(kind: Option<&str>) -> Option<bool> {
    written(kind).map(|kind| kind == "Unconfined")
}

/// Where a variable's Secret stands in a container.
fn env_field(index: usize) -> String {
    format!(".env[{index}].valueFrom.secretKeyRef")
}

/// Where a Secret stands in a container whose keys all become variables.
fn env_from_field(index: usize) -> String {
    format!(".envFrom[{index}].secretRef")
}

/// The paths of Vault in a container's `env` values, as bank-vaults' webhook takes them: `vault:PATH#KEY`, or with `>>`
/// before it to read anew. No other value is kept.
fn env_vault<'a>(values: impl Iterator<Item = &'a str>) -> Vec<(usize, String)> {
    let path = |value: &str| {
        let (path, _) = value.strip_prefix(">>").unwrap_or(value).strip_prefix("vault:")?.split_once('#')?;
        Some(path.to_owned())
    };
    values.enumerate().filter_map(|(index, value)| Some((index, path(value)?))).collect()
}

/// Whether a resource is served by a device plugin or the like: its name has a domain that is not Kubernetes' own
/// (kubernetes, core/v1 helper `IsExtendedResourceName`).
fn is_extended_resource(name: &str) -> bool {
    name.split_once('/').is_some_and(|(domain, _)| domain != "kubernetes.io" && !domain.ends_with(".kubernetes.io"))
        && !name.starts_with("requests.")
}

fn annotations<'a>(all: impl IntoIterator<Item = (&'a String, &'a String)>) -> Vec<(String, String)> {
    let looked_at = all.into_iter().filter(|(key, _)| ANNOTATIONS.iter().any(|start| key.starts_with(start)));
    let sorted: BTreeMap<_, _> = looked_at.collect();
    sorted.into_iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn described(
    namespace: &str,
    name: &str,
    uid: &str,
    facts: impl FnOnce(PodUid) -> Result<PodFacts, String>,
) -> Described {
    let parsed = PodUid::parse(uid).map_err(|error| format!("metadata.uid: {error}"));
    Described {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: uid.to_owned(),
        facts: parsed.and_then(facts).map(Arc::new),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::facts::{Container, Csi, EnvSecret, Mount, Profiles, Projection, Source, Volume};
    use crate::request::attributes_digest;

    const YAML: &str = include_str!("../e2e/lab/recorded/pod.yaml");
    const JSON: &str = include_str!("../e2e/lab/recorded/pod.json");
    const PROTOBUF: &[u8] = include_bytes!("../e2e/lab/recorded/pod.pb");

    fn who() -> PodRef {
        PodRef {
            namespace: "payments".into(),
            name: "api-0".into(),
            uid: PodUid::parse("0b0c3c4e-1d6a-4a58-9b8e-4f8a6f1c2d3e").unwrap(),
            service_account: "payments".into(),
        }
    }

    fn expected() -> PodFacts {
        let text = |text: &str| text.to_owned();
        let mount = |volume: &str, path: &str, sub_path: Option<&str>| Mount {
            volume: text(volume),
            path: text(path),
            read_only: path == "/etc/db",
            sub_path: sub_path.map(text),
        };
        let volume = |name: &str, source| Volume { name: text(name), source };
        let container = |name: &str, kind, index, image: &str, uid| Container {
            name: text(name),
            kind,
            index,
            image: format!("registry.example/{image}"),
            run_as_user: uid,
            privileged: false,
            added: Vec::new(),
            drops_all: false,
            escalation: None,
            unmasked_proc: false,
            profiles: Profiles::default(),
            target: None,
            env: Vec::new(),
            env_vault: Vec::new(),
            mounts: Vec::new(),
            devices: Vec::new(),
            extended_resources: Vec::new(),
            claims: Vec::new(),
            running_uid: None,
        };
        PodFacts {
            pod: who(),
            node: text("node-1"),
            annotations: vec![(text("sidecar.istio.io/status"), text("{\"containers\":[\"istio-proxy\"]}"))],
            host_pid: true,
            host_ipc: true,
            host_network: true,
            share_process_namespace: true,
            automount_token: Some(false),
            run_as_user: Some(2000),
            profiles: Profiles {
                seccomp_unconfined: Some(false),
                apparmor_unconfined: Some(true),
                selinux_type: Some(text("container_t")),
            },
            runtime_class: Some(text("gvisor")),
            containers: vec![
                Container {
                    mounts: vec![
                        mount("db", "/etc/db", None),
                        mount("db", "/etc/password", Some("password")),
                        mount("db", "/etc/mine", None),
                        mount("scratch", "/work", None),
                    ],
                    drops_all: true,
                    devices: vec![text("disk")],
                    running_uid: Some(1000),
                    ..container("app", Kind::Regular, 0, "payments:1", Some(1000))
                },
                container("logs", Kind::Regular, 1, "logs:1", None),
                Container {
                    privileged: true,
                    added: vec![text("NET_ADMIN"), text("SYS_PTRACE")],
                    escalation: Some(true),
                    unmasked_proc: true,
                    profiles: Profiles {
                        seccomp_unconfined: Some(true),
                        apparmor_unconfined: Some(false),
                        selinux_type: Some(text("spc_t")),
                    },
                    env: vec![
                        EnvSecret { field: text(".env[1].valueFrom.secretKeyRef"), secret: text("db") },
                        EnvSecret { field: text(".envFrom[1].secretRef"), secret: text("db-all") },
                    ],
                    env_vault: vec![(2, text("secret/data/db"))],
                    extended_resources: vec![text("vendor.example/gpu")],
                    claims: vec![text("accelerator")],
                    running_uid: Some(1337),
                    ..container("istio-proxy", Kind::Sidecar, 0, "proxyv2:1.27", Some(1337))
                },
                Container {
                    mounts: vec![mount("scratch", "/work", None)],
                    ..container("prepare", Kind::Init, 1, "prepare:1", None)
                },
                Container {
                    mounts: vec![mount("db", "/mnt", None)],
                    target: Some(text("app")),
                    running_uid: Some(0),
                    ..container("debug", Kind::Ephemeral, 0, "busybox:1", Some(0))
                },
            ],
            volumes: vec![
                volume(
                    "db",
                    Source::Csi(Csi {
                        driver: text(DRIVER),
                        read_only: true,
                        fs_type: Some(text("ext4")),
                        secret: Some(text("db")),
                        attributes: attributes_digest([("vault", "prod"), ("files", "a: secret/data/db#a")]),
                    }),
                ),
                volume(
                    "other",
                    Source::Csi(Csi {
                        driver: text("csi.example.io"),
                        read_only: false,
                        fs_type: None,
                        secret: None,
                        attributes: attributes_digest([]),
                    }),
                ),
                volume("scratch", Source::EmptyDir),
                volume(
                    "token",
                    Source::Projected(vec![
                        (1, Projection::Token(text("vault"))),
                        (2, Projection::Secret(text("db"))),
                        (3, Projection::Token(String::new())),
                    ]),
                ),
                volume("host", Source::HostPath(text("/var/log"))),
                volume("native", Source::Secret(text("db"))),
                volume("disk", Source::Claim(text("data"))),
                volume("settings", Source::Other),
            ],
        }
    }

    #[test]
    fn three_formats_give_the_same_facts() {
        let expected = Ok(Arc::new(expected()));
        assert_eq!(manifest::parse(YAML).unwrap()[0].facts, expected, "YAML");
        assert_eq!(manifest::parse(JSON).unwrap()[0].facts, expected, "JSON as a manifest");
        assert_eq!(api::describe(&serde_json::from_str(JSON).unwrap()).facts, expected, "JSON of an API server");
        assert_eq!(kubelet::decode(PROTOBUF).unwrap().facts, expected, "protobuf of a kubelet");
    }

    #[test]
    fn capabilities_are_spelled_as_the_runtime_takes_them() {
        for (written, taken) in [
            ("SYS_ADMIN", "SYS_ADMIN"),
            ("CAP_SYS_ADMIN", "SYS_ADMIN"),
            ("cap_sys_admin", "SYS_ADMIN"),
            ("Sys_RawIO", "SYS_RAWIO"),
            ("ſYS_ADMIN", "SYS_ADMIN"),
            ("cap_ſys_ptrace", "SYS_PTRACE"),
            ("ſyſ_rawıo", "SYS_RAWIO"),
            ("all", "ALL"),
        ] {
            assert_eq!(capability(written), taken, "{written}");
        }
    }

    #[test]
    fn only_paths_of_vault_are_kept_of_a_variable() {
        let values = ["", "plain", "vault:secret/data/db#password", ">>vault:kv/db#a#b", "vault:no key", "xvault:a#b"];
        let kept = vec![(2, "secret/data/db".to_owned()), (3, "kv/db".to_owned())];
        assert_eq!(env_vault(values.into_iter()), kept);
    }

    #[test]
    fn what_no_rule_looks_at_is_no_fact() {
        let same = |from: &str, to: &str| {
            let changed = YAML.replacen(from, to, 1);
            assert_ne!(changed, YAML, "{to}");
            assert_eq!(manifest::parse(&changed).unwrap()[0].facts, Ok(Arc::new(expected())), "{to}");
        };
        // No group bit is ever set.
        same("fsGroup: 3000", "fsGroup: 1000");
        same("    fsGroup: 3000\n", "    fsGroup: 3000\n    runAsGroup: 1000\n    supplementalGroups: [1000, 2000]\n");
        same("runAsGroup: 1337", "runAsGroup: 1000");
        // A mount is one, wherever it propagates and whatever an expression of its path becomes.
        same("mountPropagation: None", "mountPropagation: Bidirectional");
        same(", subPathExpr: $(POD)", "");
        same("app: payments", "istio.io/dataplane-mode: ambient");
        same("    sidecar.istio.io/status", "    example.org/other: x\n    sidecar.istio.io/status");
    }

    #[test]
    fn a_user_that_is_no_uid_is_a_fault() {
        for (from, to, field) in [
            ("runAsUser: 2000", "runAsUser: -1", "spec.securityContext.runAsUser: -1"),
            ("runAsUser: 1000", "runAsUser: 4294967296", "spec.containers[0].securityContext.runAsUser: 4294967296"),
            ("runAsUser: 1337", "runAsUser: -5", "spec.initContainers[0].securityContext.runAsUser: -5"),
            ("runAsUser: 0}", "runAsUser: -9}", "spec.ephemeralContainers[0].securityContext.runAsUser: -9"),
        ] {
            let text = YAML.replacen(from, to, 1);
            assert_ne!(text, YAML);
            let fault = manifest::parse(&text).unwrap().remove(0).facts.unwrap_err();
            assert_eq!(fault, format!("{field} is no UID"));
        }
        let most = YAML.replacen("runAsUser: 1000", "runAsUser: 4294967295", 1);
        let facts = manifest::parse(&most).unwrap().remove(0).facts.unwrap();
        assert_eq!(facts.containers[0].run_as_user, Some(u32::MAX));
    }

    #[test]
    fn the_kubelet_says_a_bad_user_too() {
        use prost::Message;
        let mut pod = kubelet::proto::Pod::decode(PROTOBUF).unwrap();
        let spec = pod.spec.as_mut().unwrap();
        spec.containers[0].security_context.as_mut().unwrap().run_as_user = Some(-1);
        let fault = kubelet::decode(&pod.encode_to_vec()).unwrap().facts.unwrap_err();
        assert_eq!(fault, "spec.containers[0].securityContext.runAsUser: -1 is no UID");
        assert!(kubelet::decode(&PROTOBUF[..PROTOBUF.len() - 3]).is_err());
    }

    #[test]
    fn pods_from_is_one_of_four() {
        assert_eq!("auto".parse(), Ok(PodsFrom::Auto));
        assert_eq!("kubelet".parse(), Ok(PodsFrom::Kubelet));
        assert_eq!("api".parse(), Ok(PodsFrom::Api));
        assert_eq!("manifest:/etc/pods".parse(), Ok(PodsFrom::Manifest("/etc/pods".into())));
        for wrong in ["", "manifest", "manifest:", "API", "file:/x"] {
            assert!(wrong.parse::<PodsFrom>().is_err(), "{wrong}");
        }
    }

    async fn from_files(files: &[(&str, &str)], node: &str, pod: &PodRef) -> Result<Arc<PodFacts>, PodsError> {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::io::Write::write_all(
                &mut std::fs::File::create(directory.path().join(name)).unwrap(),
                text.as_bytes(),
            )
            .unwrap();
        }
        let from = PodsFrom::Manifest(directory.path().to_owned());
        let connect = kubelet::Connect::new(|| async { Err(std::io::ErrorKind::NotFound.into()) });
        Pods::start(&from, node, None, connect).await.unwrap().get(pod).await
    }

    #[tokio::test]
    async fn manifests_are_found_by_name_and_uid() {
        let other = YAML.replace("0b0c3c4e-1d6a-4a58-9b8e-4f8a6f1c2d3e", "11111111-1d6a-4a58-9b8e-4f8a6f1c2d3e");
        let list = format!("apiVersion: v1\nkind: Service\nmetadata: {{name: api-0}}\n---\n{other}\n---\n{YAML}");
        let broken = "kind: Pod\nspec: {containers: 5}\n";
        let files = [("0.yaml", broken), ("a.yml", &*list), ("b.txt", "{{{{")];
        assert_eq!(*from_files(&files, "node-1", &who()).await.unwrap(), expected());
        assert_eq!(*from_files(&[("pod.json", JSON)], "node-1", &who()).await.unwrap(), expected());
        let answer = from_files(&[("a.yaml", &other)], "node-1", &who()).await;
        assert!(
            matches!(&answer, Err(PodsError::Replaced { found, .. }) if found.as_str().starts_with("1111")),
            "{answer:?}"
        );
        let answer = from_files(&[], "node-1", &who()).await;
        assert!(matches!(answer, Err(PodsError::Unknown(_))), "{answer:?}");
        let answer = from_files(&[("0.yaml", broken)], "node-1", &who()).await;
        assert!(matches!(&answer, Err(PodsError::Unreadable { fault, .. }) if fault.contains("0.yaml")), "{answer:?}");
    }

    #[tokio::test]
    async fn a_pod_must_fit_the_call() {
        let answer = from_files(&[("a.yaml", YAML)], "node-2", &who()).await;
        assert!(matches!(&answer, Err(PodsError::Elsewhere { node, .. }) if node == "node-1"), "{answer:?}");
        let unbound = YAML.replace("  nodeName: node-1\n", "");
        assert_eq!(from_files(&[("a.yaml", &unbound)], "node-2", &who()).await.unwrap().node, "");
        let thief = PodRef { service_account: "admin".into(), ..who() };
        let answer = from_files(&[("a.yaml", YAML)], "node-1", &thief).await;
        assert!(matches!(&answer, Err(PodsError::Unreadable { fault, .. }) if fault.contains("admin")), "{answer:?}");
        let bare = "kind: Pod\nmetadata: {name: a, uid: x}\nspec: {containers: [{name: c}]}\n";
        let pod = |account: &str| PodRef {
            namespace: "default".into(),
            name: "a".into(),
            uid: PodUid::parse("x").unwrap(),
            service_account: account.into(),
        };
        let facts = from_files(&[("a.yaml", bare)], "node-1", &pod("default")).await.unwrap();
        assert_eq!(facts.pod, pod("default"));
        let answer = from_files(&[("a.yaml", &bare.replace(", uid: x", ""))], "node-1", &pod("default")).await;
        assert!(
            matches!(&answer, Err(PodsError::Unreadable { fault, .. }) if fault.contains("metadata.uid")),
            "{answer:?}"
        );
    }

    #[test]
    fn the_deletion_of_an_old_pod_keeps_its_successor() {
        let cache = Cache::new();
        let pod = manifest::parse(YAML).unwrap().remove(0);
        let old = Described { uid: "old".into(), ..pod.clone() };
        cache.replace([pod.clone()]);
        cache.remove(&old);
        assert_eq!(cache.lock().len(), 1);
        cache.remove(&pod);
        assert!(cache.lock().is_empty());
    }

    #[test]
    fn who_waits_for_a_change_is_woken_by_one_and_by_the_end_of_a_gap() {
        let cache = Cache::new();
        let pod = manifest::parse(YAML).unwrap().remove(0);
        let seen = cache.changes.subscribe();
        let count = || *seen.borrow();
        cache.replace([pod.clone()]);
        let listed = count();
        let facts = |cache: &Cache| cache.lock().values().next().unwrap().facts.clone().unwrap();
        let first = facts(&cache);

        // The same again, and the same in a new list: what is kept is the same thing.
        cache.put(manifest::parse(YAML).unwrap().remove(0));
        assert_eq!(count(), listed);
        cache.replace(manifest::parse(YAML).unwrap());
        assert!(Arc::ptr_eq(&first, &facts(&cache)));

        let listed = count();
        cache.put(manifest::parse(&YAML.replace("readOnly: true", "readOnly: false")).unwrap().remove(0));
        assert!(count() > listed);
        assert!(!Arc::ptr_eq(&first, &facts(&cache)));

        // A change that came before a watch was renewed was not given out: it has to be looked at now.
        let changed = count();
        cache.set(State::Live);
        assert_eq!(count(), changed);
        cache.set(State::Lost);
        cache.set(State::Live);
        assert!(count() > changed);
    }

    #[test]
    fn pods_without_a_volume_of_ours_are_not_kept() {
        let cache = Cache::new();
        let ours = manifest::parse(YAML).unwrap().remove(0);
        let other = manifest::parse(&YAML.replace(DRIVER, "csi.example.net")).unwrap().remove(0);
        cache.replace([other.clone()]);
        assert!(cache.lock().is_empty());
        cache.put(ours);
        assert_eq!(cache.lock().len(), 1);
        cache.put(other);
        assert!(cache.lock().is_empty());
    }
}
