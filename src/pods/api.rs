//! Pod facts from the API server: a watch of this node's pods, and a GET of one that the watch has not brought.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use k8s_openapi::api::core::v1::{
    Container as ApiContainer, ContainerStatus, EnvFromSource, EnvVar, EphemeralContainer, Pod, PodSecurityContext,
    PodSpec, ResourceRequirements, SecurityContext, Volume as ApiVolume, VolumeDevice, VolumeMount,
};
pub use kube::Client;
use kube::Config;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::{
    Backoff, Cache, Described, PodsError, State, Task, annotations, capability, described, env_field, env_from_field,
    env_vault, init_kind, is_extended_resource, uid, unconfined, with_causes, written,
};
use crate::policy::facts::{Container, Csi, EnvSecret, Kind, Mount, PodFacts, Profiles, Projection, Source, Volume};
use crate::request::{PodRef, attributes_digest};

/// Why there is no client for the API server.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The file of `--kubeconfig` cannot be used.
    #[error("--kubeconfig: {0}")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// The settings give no client.
    #[error("a client for the API server: {0}")]
    Build(#[source] kube::Error),
}

/// A client for the API server: of the kubeconfig file if one is named, else of the in-cluster ServiceAccount;
/// `None` outside a cluster.
pub async fn client(kubeconfig: Option<&Path>) -> Result<Option<Client>, ClientError> {
    let config = match kubeconfig {
        Some(path) => config_of(path).await?,
        None => match Config::incluster() {
            Ok(config) => config,
            Err(error) => {
                info!(%error, "no in-cluster ServiceAccount");
                return Ok(None);
            }
        },
    };
    client_of(config).map(Some)
}

async fn config_of(kubeconfig: &Path) -> Result<Config, ClientError> {
    let file = Kubeconfig::read_from(kubeconfig)?;
    Ok(Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?)
}

/// A client for the API server of `config`, without its proxy, and only if the server proves itself.
pub fn client_of(mut config: Config) -> Result<Client, ClientError> {
    // The library takes it from HTTPS_PROXY: no environment variable may move the driver's traffic.
    config.proxy_url = None;
    // What it says of a pod decides who reads.
    config.accept_invalid_certs = false;
    config.connect_timeout = Some(CONNECT_TIME);
    Client::try_from(config).map_err(ClientError::Build)
}

const CONNECT_TIME: Duration = Duration::from_secs(5);
/// The longest a GET or a list may take, in whole.
const CALL_TIME: Duration = Duration::from_secs(10);
/// The server ends a watch after this many seconds.
const WATCH_SECONDS: u32 = 290;
/// A watch without a word is dead: bookmarks come about once a minute.
const SILENCE: Duration = Duration::from_secs(150);
/// The pods of one page of a list: a node has some 110.
const PAGE: u32 = 50;

/// The pods of one node.
pub struct Api {
    client: Client,
    pub(super) cache: Arc<Cache>,
    _watch: Task,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl Api {
    pub(super) fn start(client: Client, node: &str) -> Self {
        let cache = Cache::new();
        let selector = format!("spec.nodeName={node}");
        let watch = Task(tokio::spawn(watch(client.clone(), selector, Arc::clone(&cache))));
        Self { client, cache, _watch: watch }
    }

    pub(super) async fn find(&self, pod: &PodRef) -> Result<Arc<PodFacts>, PodsError> {
        if let Some(found) = self.cache.find(pod).await
            && found.uid == pod.uid.as_str()
        {
            return found.facts(pod);
        }
        let pods: kube::Api<Pod> = kube::Api::namespaced(self.client.clone(), &pod.namespace);
        match timeout(CALL_TIME, pods.get_opt(&pod.name)).await {
            Ok(Ok(Some(found))) => describe(&found).facts(pod),
            Ok(Ok(None)) => Err(PodsError::Unknown(pod.clone())),
            Ok(Err(error)) => Err(PodsError::Away(said(&error))),
            Err(_) => Err(PodsError::Away(format!("the API server did not answer in {CALL_TIME:?}"))),
        }
    }
}

/// Why the pods of a cluster could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// There is no client.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// No kubeconfig, and no pod of the cluster's own.
    #[error("no cluster: name one by --kubeconfig or $KUBECONFIG")]
    NoCluster(#[source] kube::config::InferConfigError),
    /// The API server does not give the list.
    #[error("{0}")]
    Refused(String),
}

/// Whose pods are listed.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    /// The namespace of the kubeconfig's context, or of the pod that asks.
    Own,
    /// A namespace.
    Namespace(&'a str),
    /// All namespaces.
    All,
}

/// Gives `take` each pod in scope, as the API server has it: a page at a time, so that no cluster is too large. For
/// people's own rights: the cluster is that of the kubeconfig that is named, of `$KUBECONFIG` or `~/.kube/config`, or
/// the pod's own.
pub async fn each(
    kubeconfig: Option<&Path>,
    scope: Scope<'_>,
    mut take: impl FnMut(serde_json::Value),
) -> Result<(), ListError> {
    let config = match kubeconfig {
        Some(path) => config_of(path).await?,
        None => Config::infer().await.map_err(ListError::NoCluster)?,
    };
    let client = client_of(config)?;
    let pods: kube::Api<Pod> = match scope {
        Scope::Own => kube::Api::default_namespaced(client),
        Scope::Namespace(namespace) => kube::Api::namespaced(client, namespace),
        Scope::All => kube::Api::all(client),
    };
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = timeout(CALL_TIME, pods.list(&params)).await;
        let page = page.map_err(|_| ListError::Refused(format!("the API server did not answer in {CALL_TIME:?}")))?;
        let page = page.map_err(|error| ListError::Refused(said(&error)))?;
        for pod in &page.items {
            take(serde_json::to_value(pod).map_err(|error| ListError::Refused(error.to_string()))?);
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// Why a watch has to begin anew.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{}", said(.0))]
    Client(#[from] kube::Error),
    #[error("the API server's history does not reach back far enough")]
    Gone,
    #[error("the API server did not answer in {0:?}")]
    Silent(Duration),
}

async fn watch(client: Client, selector: String, cache: Arc<Cache>) {
    let pods: kube::Api<Pod> = kube::Api::all(client);
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    let mut told = false;
    loop {
        let listed = list(&pods, &selector).await;
        let broken = match listed {
            Ok((known, version)) => {
                let watched = || {
                    if told {
                        info!("the API server's pods are watched again");
                        told = false;
                    }
                    backoff.reset();
                };
                follow(&pods, &selector, (known, version), &cache, watched).await
            }
            Err(broken) => broken,
        };
        cache.set(State::Lost);
        // Said once an outage, not once an attempt.
        if !told && !matches!(broken, Broken::Gone) {
            warn!(%broken, "the watch of this node's pods broke; trying again");
            told = true;
        } else {
            debug!(%broken, "the watch of this node's pods begins anew");
        }
        backoff.pause().await;
    }
}

async fn list(pods: &kube::Api<Pod>, selector: &str) -> Result<(Vec<Described>, String), Broken> {
    let mut params = ListParams::default().fields(selector).limit(PAGE);
    let mut known = Vec::new();
    loop {
        let page = timeout(CALL_TIME, pods.list(&params)).await.map_err(|_| Broken::Silent(CALL_TIME))?;
        let page = page.map_err(gone)?;
        known.extend(page.items.iter().map(describe));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok((known, page.metadata.resource_version.unwrap_or_default())),
        }
    }
}

/// Takes a list and follows the changes after its version until the watch has to begin anew; `watched` is called when
/// it stands.
async fn follow(
    pods: &kube::Api<Pod>,
    selector: &str,
    (known, mut version): (Vec<Described>, String),
    cache: &Cache,
    watched: impl FnOnce(),
) -> Broken {
    let params = WatchParams::default().fields(selector).timeout(WATCH_SECONDS);
    let mut watched = Some(watched);
    cache.replace(known);
    loop {
        let begun = Instant::now();
        let stream = match timeout(CALL_TIME, pods.watch(&params, &version)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return gone(error),
            Err(_) => return Broken::Silent(CALL_TIME),
        };
        cache.set(State::Live);
        if let Some(watched) = watched.take() {
            watched();
        }
        let mut stream = pin!(stream);
        loop {
            match timeout(SILENCE, stream.try_next()).await {
                Ok(Ok(Some(WatchEvent::Added(pod) | WatchEvent::Modified(pod)))) => {
                    version = pod.metadata.resource_version.clone().unwrap_or(version);
                    cache.put(describe(&pod));
                }
                Ok(Ok(Some(WatchEvent::Deleted(pod)))) => {
                    version = pod.metadata.resource_version.clone().unwrap_or(version);
                    cache.remove(&describe(&pod));
                }
                Ok(Ok(Some(WatchEvent::Bookmark(mark)))) => version = mark.metadata.resource_version,
                Ok(Ok(Some(WatchEvent::Error(status)))) => return gone(kube::Error::Api(status)),
                Ok(Err(error)) => return gone(error),
                // The server ended the watch in its time, or the connection broke: go on from where it was.
                Ok(Ok(None)) => break,
                Err(_) => return Broken::Silent(SILENCE),
            }
        }
        // Until the next watch stands a change may be missed.
        cache.set(State::Lost);
        if begun.elapsed() < Duration::from_secs(1) {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

fn gone(error: kube::Error) -> Broken {
    match error {
        // 410 Gone, "too old resource version" or an expired page.
        kube::Error::Api(status) if status.code == 410 => Broken::Gone,
        error => Broken::Client(error),
    }
}

/// A client's error in one line. An answer that cannot be read is not repeated: it may hold anything.
fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => {
            format!("the API server says {} {}: {}", status.code, status.reason, status.message)
        }
        kube::Error::SerdeError(_) => "the API server's answer cannot be read".to_owned(),
        error => with_causes(error.to_string(), error),
    }
}

/// Facts of a pod as the API server's JSON or a manifest describes it.
pub(super) fn describe(pod: &Pod) -> Described {
    let metadata = &pod.metadata;
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (namespace, name, uid) = (text(&metadata.namespace), text(&metadata.name), text(&metadata.uid));
    described(&namespace, &name, &uid, |uid| {
        let nothing = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&nothing);
        let nothing = PodSecurityContext::default();
        let context = spec.security_context.as_ref().unwrap_or(&nothing);
        Ok(PodFacts {
            pod: PodRef {
                namespace: namespace.clone(),
                name: name.clone(),
                uid,
                service_account: text(&spec.service_account_name),
            },
            node: text(&spec.node_name),
            annotations: annotations(metadata.annotations.iter().flatten()),
            host_pid: spec.host_pid.unwrap_or(false),
            host_ipc: spec.host_ipc.unwrap_or(false),
            host_network: spec.host_network.unwrap_or(false),
            share_process_namespace: spec.share_process_namespace.unwrap_or(false),
            automount_token: spec.automount_service_account_token,
            run_as_user: super::uid(context.run_as_user, "spec.securityContext.runAsUser")?,
            profiles: Profiles {
                seccomp_unconfined: unconfined(context.seccomp_profile.as_ref().map(|profile| profile.type_.as_str())),
                apparmor_unconfined: unconfined(
                    context.app_armor_profile.as_ref().map(|profile| profile.type_.as_str()),
                ),
                selinux_type: context.se_linux_options.as_ref().and_then(|options| written(options.type_.as_deref())),
            },
            runtime_class: written(spec.runtime_class_name.as_deref()),
            containers: containers(pod, spec)?,
            volumes: spec.volumes.iter().flatten().map(volume).collect(),
        })
    })
}

fn containers(pod: &Pod, spec: &PodSpec) -> Result<Vec<Container>, String> {
    let mut running: BTreeMap<&str, &ContainerStatus> = BTreeMap::new();
    if let Some(status) = &pod.status {
        for list in [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses]
        {
            running.extend(list.iter().flatten().map(|status| (status.name.as_str(), status)));
        }
    }
    let mut all = Vec::new();
    let mut add = |list: &str, index: usize, kind: Kind, container: Spec<'_>| -> Result<(), String> {
        let status = running.get(container.name);
        let user = status.and_then(|status| status.user.as_ref()).and_then(|user| user.linux.as_ref());
        let nothing = SecurityContext::default();
        let context = container.context.unwrap_or(&nothing);
        let capabilities = context.capabilities.as_ref();
        let added = capabilities.and_then(|capabilities| capabilities.add.as_deref()).unwrap_or_default();
        let dropped = capabilities.and_then(|capabilities| capabilities.drop.as_deref()).unwrap_or_default();
        let limits = container.resources.and_then(|resources| resources.limits.as_ref());
        all.push(Container {
            name: container.name.to_owned(),
            kind,
            index,
            image: container.image.unwrap_or_default().to_owned(),
            run_as_user: uid(context.run_as_user, &format!("spec.{list}[{index}].securityContext.runAsUser"))?,
            privileged: context.privileged.unwrap_or(false),
            added: added.iter().map(|name| capability(name)).collect(),
            drops_all: dropped.iter().any(|name| capability(name) == "ALL"),
            escalation: context.allow_privilege_escalation,
            unmasked_proc: context.proc_mount.as_deref() == Some("Unmasked"),
            profiles: Profiles {
                seccomp_unconfined: unconfined(context.seccomp_profile.as_ref().map(|profile| profile.type_.as_str())),
                apparmor_unconfined: unconfined(
                    context.app_armor_profile.as_ref().map(|profile| profile.type_.as_str()),
                ),
                selinux_type: context.se_linux_options.as_ref().and_then(|options| written(options.type_.as_deref())),
            },
            target: container.target.and_then(|target| written(Some(target))),
            env: env(container.env, container.env_from),
            env_vault: env_vault(container.env.iter().map(|variable| variable.value.as_deref().unwrap_or_default())),
            mounts: container.mounts.iter().map(mount).collect(),
            devices: container.devices.iter().map(|device| device.name.clone()).collect(),
            extended_resources: limits
                .into_iter()
                .flatten()
                .map(|(name, _)| name.clone())
                .filter(|name| is_extended_resource(name))
                .collect(),
            claims: container
                .resources
                .and_then(|resources| resources.claims.as_ref())
                .into_iter()
                .flatten()
                .map(|claim| claim.name.clone())
                .collect(),
            running_uid: uid(user.map(|user| user.uid), &format!("status of container {}: user", container.name))?,
        });
        Ok(())
    };
    for (index, container) in spec.containers.iter().enumerate() {
        add("containers", index, Kind::Regular, container.into())?;
    }
    for (index, container) in spec.init_containers.iter().flatten().enumerate() {
        add("initContainers", index, init_kind(container.restart_policy.as_deref()), container.into())?;
    }
    for (index, container) in spec.ephemeral_containers.iter().flatten().enumerate() {
        add("ephemeralContainers", index, Kind::Ephemeral, container.into())?;
    }
    Ok(all)
}

/// What is read of a container: the three lists hold two types.
struct Spec<'a> {
    name: &'a str,
    image: Option<&'a str>,
    context: Option<&'a SecurityContext>,
    resources: Option<&'a ResourceRequirements>,
    env: &'a [EnvVar],
    env_from: &'a [EnvFromSource],
    mounts: &'a [VolumeMount],
    devices: &'a [VolumeDevice],
    target: Option<&'a str>,
}

impl<'a> From<&'a ApiContainer> for Spec<'a> {
    fn from(container: &'a ApiContainer) -> Self {
        Self {
            name: &container.name,
            image: container.image.as_deref(),
            context: container.security_context.as_ref(),
            resources: container.resources.as_ref(),
            env: container.env.as_deref().unwrap_or_default(),
            env_from: container.env_from.as_deref().unwrap_or_default(),
            mounts: container.volume_mounts.as_deref().unwrap_or_default(),
            devices: container.volume_devices.as_deref().unwrap_or_default(),
            target: None,
        }
    }
}

impl<'a> From<&'a EphemeralContainer> for Spec<'a> {
    fn from(container: &'a EphemeralContainer) -> Self {
        Self {
            name: &container.name,
            image: container.image.as_deref(),
            context: container.security_context.as_ref(),
            resources: container.resources.as_ref(),
            env: container.env.as_deref().unwrap_or_default(),
            env_from: container.env_from.as_deref().unwrap_or_default(),
            mounts: container.volume_mounts.as_deref().unwrap_or_default(),
            devices: container.volume_devices.as_deref().unwrap_or_default(),
            target: container.target_container_name.as_deref(),
        }
    }
}

fn env(env: &[EnvVar], from: &[EnvFromSource]) -> Vec<EnvSecret> {
    let single = env.iter().enumerate().filter_map(|(index, variable)| {
        let key = variable.value_from.as_ref()?.secret_key_ref.as_ref()?;
        Some(EnvSecret { field: env_field(index), secret: key.name.clone() })
    });
    let whole = from.iter().enumerate().filter_map(|(index, source)| {
        Some(EnvSecret { field: env_from_field(index), secret: source.secret_ref.as_ref()?.name.clone() })
    });
    single.chain(whole).collect()
}

fn mount(mount: &VolumeMount) -> Mount {
    Mount {
        volume: mount.name.clone(),
        path: mount.mount_path.clone(),
        read_only: mount.read_only.unwrap_or(false),
        sub_path: written(mount.sub_path.as_deref()),
    }
}

fn volume(volume: &ApiVolume) -> Volume {
    let source = if let Some(csi) = &volume.csi {
        Source::Csi(Csi {
            driver: csi.driver.clone(),
            read_only: csi.read_only.unwrap_or(false),
            fs_type: written(csi.fs_type.as_deref()),
            secret: written(csi.node_publish_secret_ref.as_ref().map(|secret| secret.name.as_str())),
            attributes: attributes_digest(
                csi.volume_attributes.iter().flatten().map(|(key, value)| (key.as_str(), value.as_str())),
            ),
        })
    } else if let Some(host) = &volume.host_path {
        Source::HostPath(host.path.clone())
    } else if let Some(secret) = &volume.secret {
        Source::Secret(secret.secret_name.clone().unwrap_or_default())
    } else if let Some(projected) = &volume.projected {
        let sources = projected.sources.iter().flatten().enumerate();
        Source::Projected(
            sources
                .filter_map(|(index, source)| {
                    let token = || Some(source.service_account_token.as_ref()?.audience.clone().unwrap_or_default());
                    let secret = source.secret.as_ref().map(|secret| Projection::Secret(secret.name.clone()));
                    Some((index, secret.or_else(|| token().map(Projection::Token))?))
                })
                .collect(),
        )
    } else if volume.empty_dir.is_some() {
        Source::EmptyDir
    } else if let Some(claim) = &volume.persistent_volume_claim {
        Source::Claim(claim.claim_name.clone())
    } else if volume.ephemeral.is_some() {
        Source::Claim(volume.name.clone())
    } else {
        Source::Other
    };
    Volume { name: volume.name.clone(), source }
}
