//! What policy knows of a pod: its own types, filled from a manifest, the API server or the kubelet (`pods`).

use crate::request::PodRef;

/// A pod as admitted. Every container counts: init, native sidecar, ephemeral and injected ones too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// Who it is.
    pub pod: PodRef,
    /// `spec.nodeName`; empty while not bound (a manifest).
    pub node: String,
    /// `metadata.labels`, sorted by key.
    pub labels: Vec<(String, String)>,
    /// `metadata.annotations`, sorted by key.
    pub annotations: Vec<(String, String)>,
    /// `spec.hostPID`.
    pub host_pid: bool,
    /// `spec.shareProcessNamespace`.
    pub share_process_namespace: bool,
    /// `spec.securityContext.runAsUser`. A negative value never parses into facts.
    pub run_as_user: Option<u32>,
    /// `spec.runtimeClassName`.
    pub runtime_class: Option<String>,
    /// Regular, init and ephemeral containers.
    pub containers: Vec<Container>,
    /// The CSI volumes; others only by name.
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
    /// `volumeMounts`.
    pub mounts: Vec<Mount>,
    /// `status.*Statuses[].containerID` without its scheme, once it runs.
    pub id: Option<String>,
    /// `status.*Statuses[].user.linux.uid`, once it runs (Kubernetes 1.31).
    pub running_uid: Option<u32>,
}

/// One `volumeMounts` entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The volume's name.
    pub volume: String,
    /// `mountPath`.
    pub path: String,
    /// `subPath` or `subPathExpr`, if one is written.
    pub sub_path: Option<String>,
}

/// One volume of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Name.
    pub name: String,
    /// Its `csi` source, if it is one.
    pub csi: Option<Csi>,
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
