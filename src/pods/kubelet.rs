//! Pod facts from the kubelet's own pods API (KEP-4188, on by default from Kubernetes 1.37): no right in the API
//! server is needed, static pods are in it, and it works while the API server is away.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tower::service_fn;
use tracing::{debug, info, warn};

use super::{
    Backoff, Cache, Described, PodsError, State, Task, annotations, capability, described, env_field, env_from_field,
    env_vault, init_kind, is_extended_resource, uid, unconfined, with_causes, written,
};
use crate::policy::facts::{Container, Csi, EnvSecret, Kind, Mount, PodFacts, Profiles, Projection, Source, Volume};
use crate::request::{PodRef, attributes_digest};
use proto::pods_client::PodsClient;

pub mod proto {
    //! Messages and services generated from `proto/pods.proto`.
    #![allow(missing_docs, clippy::all, clippy::pedantic, missing_debug_implementations, unreachable_pub)]
    #![allow(unused_qualifications)]
    tonic::include_proto!("v1alpha1");
}

/// Gives a connected socket to the kubelet's pods API: the socket is root's, so the broker opens it.
#[derive(Clone)]
pub struct Connect(Arc<dyn Fn() -> Connecting + Send + Sync>);

type Connecting = Pin<Box<dyn Future<Output = io::Result<UnixStream>> + Send>>;

impl Connect {
    /// Calls `connect` for each connection.
    pub fn new<F>(connect: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<UnixStream>> + Send + 'static,
    {
        Self(Arc::new(move || Box::pin(connect())))
    }

    fn client(&self) -> PodsClient<Channel> {
        let connect = Arc::clone(&self.0);
        let connector = service_fn(move |_| {
            let connecting = connect();
            async move { connecting.await.map(TokioIo::new) }
        });
        // Only the authority is taken from this address.
        PodsClient::new(Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector))
    }
}

impl fmt::Debug for Connect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connect")
    }
}

/// The longest a GetPod, or the first answer of a watch, may take.
const CALL_TIME: Duration = Duration::from_secs(5);

/// Whether the kubelet answers on its pods API, and if not, why.
pub(super) async fn probe(connect: &Connect) -> Result<(), String> {
    let request = proto::GetPodRequest { pod_uid: String::new() };
    match timeout(CALL_TIME, connect.client().get_pod(request)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => match status.code() {
            // No pod has that UID; the kubelet is still starting; it has been asked too often.
            Code::NotFound | Code::FailedPrecondition | Code::ResourceExhausted => Ok(()),
            _ => Err(said(&status)),
        },
        Err(_) => Err(format!("no answer in {CALL_TIME:?}")),
    }
}

/// The pods of the kubelet's node.
#[derive(Debug)]
pub struct Kubelet {
    client: PodsClient<Channel>,
    pub(super) cache: Arc<Cache>,
    _watch: Task,
}

impl Kubelet {
    pub(super) fn start(connect: Connect) -> Self {
        let client = connect.client();
        let cache = Cache::new();
        let watch = Task(tokio::spawn(watch(client.clone(), Arc::clone(&cache))));
        Self { client, cache, _watch: watch }
    }

    pub(super) async fn find(&self, pod: &PodRef) -> Result<Arc<PodFacts>, PodsError> {
        let cached = self.cache.find(pod).await;
        if let Some(found) = &cached
            && found.uid == pod.uid.as_str()
        {
            return found.clone().facts(pod);
        }
        let request = proto::GetPodRequest { pod_uid: pod.uid.to_string() };
        match timeout(CALL_TIME, self.client.clone().get_pod(request)).await {
            Ok(Ok(answer)) => match decode(&answer.into_inner().pod) {
                Ok(found) => found.facts(pod),
                Err(fault) => Err(PodsError::Unreadable { pod: pod.clone(), fault }),
            },
            // The kubelet looks pods up by UID: only the watch knows who has the name now.
            Ok(Err(status)) if status.code() == Code::NotFound => match cached {
                Some(namesake) => namesake.facts(pod),
                None => Err(PodsError::Unknown(pod.clone())),
            },
            Ok(Err(status)) => Err(PodsError::Away(said(&status))),
            Err(_) => Err(PodsError::Away(format!("the kubelet did not answer in {CALL_TIME:?}"))),
        }
    }
}

async fn watch(mut client: PodsClient<Channel>, cache: Arc<Cache>) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    let mut told = false;
    loop {
        let ended = follow(&mut client, &cache, || {
            backoff.reset();
            if told {
                info!("the kubelet's pods are watched again");
                told = false;
            }
        });
        let status = ended.await;
        cache.set(State::Lost);
        // A kubelet that starts, or one that found us slow, is no fault. Others are said once an outage.
        let expected = matches!(status.code(), Code::FailedPrecondition | Code::ResourceExhausted);
        if !told && !expected {
            warn!(why = said(&status), "the watch of the kubelet's pods broke; trying again");
            told = true;
        } else {
            debug!(why = said(&status), "the watch of the kubelet's pods begins anew");
        }
        backoff.pause().await;
    }
}

/// Follows one stream to its end; `synced` is called when the first list is complete.
async fn follow(client: &mut PodsClient<Channel>, cache: &Cache, synced: impl FnOnce()) -> Status {
    let mut stream = match timeout(CALL_TIME, client.watch_pods(proto::WatchPodsRequest {})).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return status,
        Err(_) => return Status::deadline_exceeded("no answer"),
    };
    // Until the first list is complete the pods are gathered apart: the cache must not lack one it had.
    let mut first = Some(Vec::new());
    let mut synced = Some(synced);
    loop {
        let event = match stream.message().await {
            Ok(Some(event)) => event,
            Ok(None) => return Status::unavailable("the stream ended"),
            Err(status) => return status,
        };
        let kind = event.r#type();
        if kind == proto::EventType::InitialSyncComplete {
            if let (Some(pods), Some(synced)) = (first.take(), synced.take()) {
                cache.replace(pods);
                synced();
            }
            continue;
        }
        let pod = match decode(&event.pod) {
            Ok(pod) => pod,
            // GetPod says the same to whoever asks for this pod.
            Err(fault) if first.is_some() => {
                warn!(fault, "the kubelet described a pod that cannot be read");
                continue;
            }
            // It may be a change of a pod that is known: what is kept of it would be old.
            Err(fault) => return Status::internal(format!("a pod cannot be read: {fault}")),
        };
        match (kind, &mut first) {
            (proto::EventType::Added | proto::EventType::Modified, Some(first)) => {
                first.push(pod);
            }
            (proto::EventType::Added | proto::EventType::Modified, None) => cache.put(pod),
            (proto::EventType::Deleted, Some(first)) => first.retain(|known: &Described| known.uid != pod.uid),
            (proto::EventType::Deleted, None) => cache.remove(&pod),
            _ => debug!("the kubelet sent an event of an unknown kind"),
        }
    }
}

/// The kubelet's words, or the connection's error.
fn said(status: &Status) -> String {
    let text = format!("the kubelet's pods API: {}: {}", status.code(), status.message());
    with_causes(text, status)
}

pub(super) fn decode(bytes: &[u8]) -> Result<Described, String> {
    let pod =
        proto::Pod::decode(bytes).map_err(|error| format!("the kubelet's description cannot be read: {error}"))?;
    Ok(describe(&pod))
}

/// Facts of a pod as the kubelet describes it.
fn describe(pod: &proto::Pod) -> Described {
    let nothing = proto::ObjectMeta::default();
    let metadata = pod.metadata.as_ref().unwrap_or(&nothing);
    described(&metadata.namespace, &metadata.name, &metadata.uid, |uid| {
        let nothing = proto::PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&nothing);
        let nothing = proto::PodSecurityContext::default();
        let context = spec.security_context.as_ref().unwrap_or(&nothing);
        Ok(PodFacts {
            pod: PodRef {
                namespace: metadata.namespace.clone(),
                name: metadata.name.clone(),
                uid,
                service_account: spec.service_account_name.clone(),
            },
            node: spec.node_name.clone(),
            annotations: annotations(&metadata.annotations),
            host_pid: spec.host_pid,
            host_ipc: spec.host_ipc,
            host_network: spec.host_network,
            share_process_namespace: spec.share_process_namespace.unwrap_or(false),
            automount_token: spec.automount_service_account_token,
            run_as_user: super::uid(context.run_as_user, "spec.securityContext.runAsUser")?,
            profiles: profiles(&context.seccomp_profile, &context.app_armor_profile, &context.se_linux_options),
            runtime_class: written(spec.runtime_class_name.as_deref()),
            containers: containers(pod, spec)?,
            volumes: spec.volumes.iter().map(volume).collect(),
        })
    })
}

fn containers(pod: &proto::Pod, spec: &proto::PodSpec) -> Result<Vec<Container>, String> {
    let mut running: BTreeMap<&str, &proto::ContainerStatus> = BTreeMap::new();
    if let Some(status) = &pod.status {
        for list in [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses]
        {
            running.extend(list.iter().map(|status| (status.name.as_str(), status)));
        }
    }
    let mut all = Vec::new();
    let mut add = |list: &str, index: usize, kind: Kind, container: &proto::Container, target: Option<&str>| {
        let status = running.get(container.name.as_str());
        let user = status.and_then(|status| status.user.as_ref()).and_then(|user| user.linux.as_ref());
        let nothing = proto::SecurityContext::default();
        let context = container.security_context.as_ref().unwrap_or(&nothing);
        let nothing = proto::Capabilities::default();
        let capabilities = context.capabilities.as_ref().unwrap_or(&nothing);
        let limits = container.resources.as_ref().map(|resources| &resources.limits);
        all.push(Container {
            name: container.name.clone(),
            kind,
            index,
            image: container.image.clone(),
            run_as_user: uid(context.run_as_user, &format!("spec.{list}[{index}].securityContext.runAsUser"))?,
            privileged: context.privileged.unwrap_or(false),
            added: capabilities.add.iter().map(|name| capability(name)).collect(),
            drops_all: capabilities.drop.iter().any(|name| capability(name) == "ALL"),
            escalation: context.allow_privilege_escalation,
            unmasked_proc: context.proc_mount.as_deref() == Some("Unmasked"),
            profiles: profiles(&context.seccomp_profile, &context.app_armor_profile, &context.se_linux_options),
            target: written(target),
            env: env(container),
            env_vault: env_vault(container.env.iter().map(|variable| variable.value.as_str())),
            mounts: container.volume_mounts.iter().map(mount).collect(),
            devices: container.volume_devices.iter().map(|device| device.name.clone()).collect(),
            extended_resources: {
                let mut names: Vec<_> = limits.into_iter().flatten().map(|(name, _)| name.clone()).collect();
                names.retain(|name| is_extended_resource(name));
                names.sort();
                names
            },
            claims: container
                .resources
                .iter()
                .flat_map(|resources| &resources.claims)
                .map(|claim| claim.name.clone())
                .collect(),
            running_uid: uid(user.map(|user| user.uid), &format!("status of container {}: user", container.name))?,
        });
        Ok::<_, String>(())
    };
    for (index, container) in spec.containers.iter().enumerate() {
        add("containers", index, Kind::Regular, container, None)?;
    }
    for (index, container) in spec.init_containers.iter().enumerate() {
        add("initContainers", index, init_kind(container.restart_policy.as_deref()), container, None)?;
    }
    for (index, container) in spec.ephemeral_containers.iter().enumerate() {
        let nothing = proto::Container::default();
        let common = container.common.as_ref().unwrap_or(&nothing);
        add("ephemeralContainers", index, Kind::Ephemeral, common, Some(&container.target_container_name))?;
    }
    Ok(all)
}

fn mount(mount: &proto::VolumeMount) -> Mount {
    Mount {
        volume: mount.name.clone(),
        path: mount.mount_path.clone(),
        read_only: mount.read_only,
        sub_path: written(Some(&mount.sub_path)),
    }
}

/// The profiles of a security context, a pod's or a container's.
fn profiles(
    seccomp: &Option<proto::Profile>,
    apparmor: &Option<proto::Profile>,
    selinux: &Option<proto::SeLinuxOptions>,
) -> Profiles {
    Profiles {
        seccomp_unconfined: unconfined(seccomp.as_ref().map(|profile| profile.r#type.as_str())),
        apparmor_unconfined: unconfined(apparmor.as_ref().map(|profile| profile.r#type.as_str())),
        selinux_type: selinux.as_ref().and_then(|options| written(Some(&options.r#type))),
    }
}

fn env(container: &proto::Container) -> Vec<EnvSecret> {
    let single = container.env.iter().enumerate().filter_map(|(index, variable)| {
        let key = variable.value_from.as_ref()?.secret_key_ref.as_ref()?;
        Some(EnvSecret { field: env_field(index), secret: name(&key.reference) })
    });
    let whole = container.env_from.iter().enumerate().filter_map(|(index, source)| {
        Some(EnvSecret { field: env_from_field(index), secret: name(&source.secret_ref.as_ref()?.reference) })
    });
    single.chain(whole).collect()
}

fn name(reference: &Option<proto::LocalObjectReference>) -> String {
    reference.as_ref().map(|reference| reference.name.clone()).unwrap_or_default()
}

fn volume(volume: &proto::Volume) -> Volume {
    let nothing = proto::VolumeSource::default();
    let source = volume.source.as_ref().unwrap_or(&nothing);
    let source = if let Some(csi) = &source.csi {
        Source::Csi(Csi {
            driver: csi.driver.clone(),
            read_only: csi.read_only.unwrap_or(false),
            fs_type: written(csi.fs_type.as_deref()),
            secret: written(csi.node_publish_secret_ref.as_ref().map(|secret| secret.name.as_str())),
            attributes: attributes_digest(
                csi.volume_attributes.iter().map(|(key, value)| (key.as_str(), value.as_str())),
            ),
        })
    } else if let Some(host) = &source.host_path {
        Source::HostPath(host.path.clone())
    } else if let Some(secret) = &source.secret {
        Source::Secret(secret.secret_name.clone())
    } else if let Some(projected) = &source.projected {
        let sources = projected.sources.iter().enumerate();
        Source::Projected(
            sources
                .filter_map(|(index, source)| {
                    let token = || Some(source.service_account_token.as_ref()?.audience.clone());
                    let secret = source.secret.as_ref().map(|secret| Projection::Secret(name(&secret.reference)));
                    Some((index, secret.or_else(|| token().map(Projection::Token))?))
                })
                .collect(),
        )
    } else if source.empty_dir.is_some() {
        Source::EmptyDir
    } else if let Some(claim) = &source.persistent_volume_claim {
        Source::Claim(claim.claim_name.clone())
    } else if source.ephemeral.is_some() {
        Source::Claim(volume.name.clone())
    } else {
        Source::Other
    };
    Volume { name: volume.name.clone(), source }
}
