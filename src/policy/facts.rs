//! What policy knows of a pod: its own types, filled from a manifest, the API server or the kubelet (`pods`).

use crate::request::PodRef;

/// A pod as admitted. Every container counts: init, native sidecar, ephemeral and injected ones too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// Who it is.
    pub pod: PodRef,
    /// `spec.nodeName`; empty while not bound (a manifest).
    pub node: String,
    /// Those of `metadata.annotations` that rules look at, sorted by key.
    pub annotations: Vec<(String, String)>,
    /// `spec.hostPID`.
    pub host_pid: bool,
    /// `spec.hostIPC`.
    pub host_ipc: bool,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `spec.shareProcessNamespace`.
    pub share_process_namespace: bool,
    /// `spec.automountServiceAccountToken`.
    pub automount_token: Option<bool>,
    /// `spec.securityContext.runAsUser`. A negative value never parses into facts.
    pub run_as_user: Option<u32>,
    /// The profiles of `spec.securityContext`.
    pub profiles: Profiles,
    /// `spec.runtimeClassName`.
    pub runtime_class: Option<String>,
    /// Regular, init and ephemeral containers.
    pub containers: Vec<Container>,
    /// `spec.volumes`.
    pub volumes: Vec<Volume>,
}

/// Which list of the spec a container stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `spec.containers`.
    Regular,
    /// `spec.initContainers` that ends before the others start.
    Init,
    /// `spec.initContainers` with `restartPolicy: Always`.
    Sidecar,
    /// `spec.ephemeralContainers`.
    Ephemeral,
}

/// What a security context says of the kernel's profiles; a container's wins over its pod's, field by field.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Profiles {
    /// Whether `seccompProfile.type` is `Unconfined`.
    pub seccomp_unconfined: Option<bool>,
    /// Whether `appArmorProfile.type` is `Unconfined`.
    pub apparmor_unconfined: Option<bool>,
    /// `seLinuxOptions.type`.
    pub selinux_type: Option<String>,
}

/// One container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Name.
    pub name: String,
    /// Which list.
    pub kind: Kind,
    /// Index in its list, for the field path.
    pub index: usize,
    /// Image reference as written.
    pub image: String,
    /// `securityContext.runAsUser`.
    pub run_as_user: Option<u32>,
    /// `securityContext.privileged`.
    pub privileged: bool,
    /// `securityContext.capabilities.add` in its order, as the runtime takes them: upper case, without `CAP_`.
    pub added: Vec<String>,
    /// Whether `securityContext.capabilities.drop` holds `ALL`.
    pub drops_all: bool,
    /// `securityContext.allowPrivilegeEscalation`.
    pub escalation: Option<bool>,
    /// Whether `securityContext.procMount` is `Unmasked`.
    pub unmasked_proc: bool,
    /// The profiles of its own security context.
    pub profiles: Profiles,
    /// `targetContainerName` of an ephemeral container: whose processes it shares.
    pub target: Option<String>,
    /// The Secrets in `env` and `envFrom`.
    pub env: Vec<EnvSecret>,
    /// The paths of Vault in `env` values that an injector replaces when the container starts
    /// (`vault:secret/data/db#password`), each with its index.
    pub env_vault: Vec<(usize, String)>,
    /// `volumeMounts`.
    pub mounts: Vec<Mount>,
    /// The volumes in `volumeDevices`.
    pub devices: Vec<String>,
    /// Extended resources in `resources.limits`, such as `vendor.example/gpu`: a device plugin hands in devices.
    pub extended_resources: Vec<String>,
    /// The names in `resources.claims`: devices by dynamic resource allocation.
    pub claims: Vec<String>,
    /// `status.*Statuses[].user.linux.uid`, once it runs (Kubernetes 1.31).
    pub running_uid: Option<u32>,
}

/// A Secret that a container gets in its environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvSecret {
    /// Where it stands in the container: `.env[2].valueFrom.secretKeyRef` or `.envFrom[0].secretRef`.
    pub field: String,
    /// The Secret's name.
    pub secret: String,
}

/// One `volumeMounts` entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The volume's name.
    pub volume: String,
    /// `mountPath`.
    pub path: String,
    /// `readOnly`.
    pub read_only: bool,
    /// `subPath`, if one is written. `subPathExpr` may become any path of the volume.
    pub sub_path: Option<String>,
}

/// One volume of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Name.
    pub name: String,
    /// What it is.
    pub source: Source,
}

/// A volume's source, as far as rules look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `csi`.
    Csi(Csi),
    /// `hostPath.path`.
    HostPath(String),
    /// `secret.secretName`.
    Secret(String),
    /// `projected.sources`, those that hold secrets, each with its index.
    Projected(Vec<(usize, Projection)>),
    /// `emptyDir`.
    EmptyDir,
    /// `persistentVolumeClaim.claimName`; the volume's name where the claim is made for it (`ephemeral`).
    Claim(String),
    /// Anything else.
    Other,
}

impl Source {
    /// The inline CSI volume it is, if it is one.
    pub fn csi(&self) -> Option<&Csi> {
        match self {
            Self::Csi(csi) => Some(csi),
            _ => None,
        }
    }
}

/// One source of a projected volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Projection {
    /// `secret.name`.
    Secret(String),
    /// `serviceAccountToken.audience`; empty for the API server's own.
    Token(String),
}

/// An inline CSI volume source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Csi {
    /// `driver`.
    pub driver: String,
    /// `readOnly`.
    pub read_only: bool,
    /// `fsType`.
    pub fs_type: Option<String>,
    /// `nodePublishSecretRef.name`.
    pub secret: Option<String>,
    /// `request::attributes_digest` of `volumeAttributes`.
    pub attributes: [u8; 32],
}
