//! The rule table: what makes a pod unfit to be given a secret, and the platform's settings for it.
//!
//! A rule must be true: it names the way by which the bytes get out. Codes are stable and never reused.

use std::time::SystemTime;

use super::facts::{Container, PodFacts};
use super::{Case, doors, neighbours, readers};
use crate::request::Code;

/// The pod does not hold the volume that the kubelet asks for.
pub const OTHER_VOLUME: Code = Code("SM101");
/// `csi.readOnly` is not true.
pub const NOT_READ_ONLY: Code = Code("SM102");
/// `csi.fsType` is set.
pub const FS_TYPE: Code = Code("SM103");
/// It is not known whose files they would be.
pub const OWNER_UNKNOWN: Code = Code("SM120");
/// A neighbour runs with the owner's UID.
pub const SAME_UID: Code = Code("SM150");
/// A neighbour may run with the owner's UID.
pub const IMAGE_UID: Code = Code("SM151");

/// Whether a finding refuses or warns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The volume is refused.
    Refuse,
    /// The pod's owner is told.
    Warn,
}

/// One rule.
#[derive(Debug)]
pub struct Rule {
    /// Stable code.
    pub code: Code,
    /// Severity.
    pub severity: Severity,
    /// The field it is about, as a path into the pod; a finding names the exact one.
    pub field: &'static str,
    /// What is wrong when it fires.
    pub text: &'static str,
    /// What to write instead.
    pub change: &'static str,
    /// The fact behind it: by which way the bytes would get out, and where that is documented.
    pub source: &'static str,
    /// Whether the platform team may waive it.
    pub waivable: bool,
    /// Adds a finding for each place where it fires.
    pub(super) check: fn(&Case<'_>, &mut Vec<Finding>),
}

impl Rule {
    /// Whether the platform team may waive it: `waivable`, and any in the lab's own build.
    pub fn may_be_waived(&self) -> bool {
        self.waivable || cfg!(feature = "waive-anything")
    }
}

/// One place where a rule fires.
#[derive(Debug)]
pub(super) struct Finding {
    /// The exact field.
    pub(super) field: String,
    /// What is wrong there.
    pub(super) text: String,
    /// The container it is about, for waivers.
    pub(super) container: Option<String>,
}

/// All rules, in the order they are reported.
pub static RULES: &[Rule] = &[
    Rule {
        code: OTHER_VOLUME,
        severity: Severity::Refuse,
        field: "spec.volumes[]",
        text: "the pod does not hold the volume that was asked for",
        change: "delete this pod and create it again; if that does not help, look at what speaks to the driver's socket",
        source: "a call can carry attributes that the pod's author never wrote (kubernetes, csi_mounter.go mergeMap)",
        waivable: false,
        check: readers::other_volume,
    },
    Rule {
        code: NOT_READ_ONLY,
        severity: Severity::Refuse,
        field: "spec.volumes[].csi.readOnly",
        text: "the volume is not read-only",
        change: "write readOnly: true",
        source: "only then does the kubelet leave owner, group and SELinux label alone (KEP-596)",
        waivable: false,
        check: readers::not_read_only,
    },
    Rule {
        code: FS_TYPE,
        severity: Severity::Refuse,
        field: "spec.volumes[].csi.fsType",
        text: "a file system type is set",
        change: "leave fsType out",
        source: "with it the kubelet may give the files to fsGroup, a group of every container (kubernetes, fsGroupPolicy)",
        waivable: false,
        check: readers::fs_type,
    },
    Rule {
        code: Code("SM110"),
        severity: Severity::Refuse,
        field: "spec.containers[].volumeMounts",
        text: "no container mounts the volume",
        change: "mount it in the container that should read it",
        source: "the reader decides the owner of the files",
        waivable: false,
        check: readers::nobody_mounts,
    },
    Rule {
        code: Code("SM111"),
        severity: Severity::Refuse,
        field: "spec.volumes[].csi.volumeAttributes.for",
        text: "several containers mount the volume and none is named as its reader",
        change: "name the reader in for:, and take the mount out of the others",
        source: "the reader decides the owner of the files",
        waivable: false,
        check: readers::several_mount,
    },
    Rule {
        code: Code("SM112"),
        severity: Severity::Refuse,
        field: "spec.volumes[].csi.volumeAttributes.for",
        text: "for: names a container that the pod does not have",
        change: "name a container or init container of this pod",
        source: "the reader decides the owner of the files",
        waivable: false,
        check: readers::unknown_reader,
    },
    Rule {
        code: Code("SM113"),
        severity: Severity::Refuse,
        field: "spec.ephemeralContainers[]",
        text: "an ephemeral container would be the reader",
        change: "name a container of the pod's own in for:",
        source: "whoever may debug a pod may add one at any time (kubernetes, pods/ephemeralcontainers)",
        waivable: false,
        check: readers::ephemeral_reader,
    },
    Rule {
        code: Code("SM114"),
        severity: Severity::Refuse,
        field: "spec.containers[].volumeMounts",
        text: "for: names a container that does not mount the volume",
        change: "mount it there, or take the name out of for:",
        source: "a reader without the mount reads nothing: one of the two is a mistake",
        waivable: false,
        check: readers::reader_without_mount,
    },
    Rule {
        code: OWNER_UNKNOWN,
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the pod does not say with which UID the reader runs",
        change: "write runAsUser there, or uid: in the volumeAttributes if the image drops to another UID",
        source: "the files are mode 0400, so they must be the reader's; an image's USER is not in the pod",
        waivable: false,
        check: readers::owner_unknown,
    },
    Rule {
        code: Code("SM121"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the reader runs as root",
        change: "run it with a UID of its own; or, if root it must be, write uid: \"0\" in the volumeAttributes",
        source: "every container that runs as root is the same user to the kernel (user_namespaces(7))",
        waivable: false,
        check: readers::root_not_written_out,
    },
    Rule {
        code: Code("SM122"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the readers run with different UIDs",
        change: "give them one UID, or each a volume of its own",
        source: "a file has one owner, and no group bit is ever set",
        waivable: false,
        check: readers::owners_differ,
    },
    Rule {
        code: Code("SM123"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the files would belong to the UID of a mesh proxy",
        change: "run the reader with a UID of its own",
        source: "a proxy's UID is exempt from the mesh's redirection and shared by every proxy (istio, 1337)",
        waivable: true,
        check: readers::mesh_uid,
    },
    Rule {
        code: Code("SM124"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the files would belong to the driver's own UID",
        change: "run the reader with a UID of its own",
        source: "the driver's worker must not be able to open what was published",
        waivable: false,
        check: readers::worker_uid,
    },
    Rule {
        code: Code("SM125"),
        severity: Severity::Warn,
        field: "spec.volumes[].csi.volumeAttributes.uid",
        text: "uid is not the one the reader starts with",
        change: "leave uid: out, unless the image drops to that UID",
        source: "the files are mode 0400: only the UID that owns them opens them (open(2), path_resolution(7))",
        waivable: true,
        check: readers::uid_differs,
    },
    Rule {
        code: Code("SM126"),
        severity: Severity::Warn,
        field: "spec.volumes[].csi.volumeAttributes.uid",
        text: "the reader runs with another UID than the files have",
        change: "write that UID in uid: and create the pod again",
        source: "a process that is not root cannot change its UID to the owner's (setuid(2)); status.containerStatuses[].user",
        waivable: true,
        check: readers::runs_with_another,
    },
    Rule {
        code: Code("SM130"),
        severity: Severity::Refuse,
        field: "spec.containers[].volumeMounts[]",
        text: "another container mounts the volume",
        change: "take this mount out; if it reads the files too and has the same UID, name it in for:",
        source: "what is mounted can be opened by root, and by any process with the owner's UID (path_resolution(7))",
        waivable: false,
        check: neighbours::another_mounts,
    },
    Rule {
        code: Code("SM131"),
        severity: Severity::Refuse,
        field: "spec.shareProcessNamespace",
        text: "the containers of the pod see each other's processes",
        change: "leave shareProcessNamespace out",
        source: "/proc/PID/root of the reader leads to its mounts (proc(5), ptrace(2) access mode checks)",
        waivable: false,
        check: neighbours::shared_processes,
    },
    Rule {
        code: Code("SM132"),
        severity: Severity::Refuse,
        field: "spec.hostPID",
        text: "the pod sees the node's processes",
        change: "leave hostPID out",
        source: "/proc/PID/root of the reader leads to its mounts (proc(5), ptrace(2) access mode checks)",
        waivable: false,
        check: neighbours::host_processes,
    },
    Rule {
        code: Code("SM133"),
        severity: Severity::Refuse,
        field: "spec.ephemeralContainers[].targetContainerName",
        text: "an ephemeral container shares the processes of a reader",
        change: "debug another container, or a copy of the pod (kubectl debug --copy-to=NAME --share-processes=false --profile=restricted)",
        source: "/proc/PID/root of the reader leads to its mounts for the same UID (ptrace(2)); kubectl debug --target",
        waivable: false,
        check: neighbours::targets_reader,
    },
    Rule {
        code: Code("SM140"),
        severity: Severity::Refuse,
        field: "metadata.namespace",
        text: "the platform team does not serve this namespace",
        change: "ask them to change policy.namespaces in the platform file",
        source: "the platform file",
        waivable: false,
        check: readers::namespace_not_served,
    },
    Rule {
        code: Code("SM141"),
        severity: Severity::Refuse,
        field: "spec.runtimeClassName",
        text: "the platform team has not listed the pod's runtime class",
        change: "use a listed one, or ask them to add it to policy.runtime_classes in the platform file",
        source: "whether owner and mode of a file keep containers apart is the runtime's to say (kubernetes, RuntimeClass)",
        waivable: false,
        check: readers::runtime_class,
    },
    Rule {
        code: SAME_UID,
        severity: Severity::Warn,
        field: "spec.containers[].securityContext.runAsUser",
        text: "another container runs with the owner's UID",
        change: "give it a UID of its own",
        source: "only the missing mount keeps it out: a way to the reader's mounts would open the files to it",
        waivable: true,
        check: neighbours::same_uid,
    },
    Rule {
        code: IMAGE_UID,
        severity: Severity::Warn,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the image decides with which UID another container runs",
        change: "write a runAsUser of its own there",
        source: "it may be the owner's; an image's USER is not in the pod",
        waivable: true,
        check: neighbours::image_uid,
    },
    Rule {
        code: Code("SM152"),
        severity: Severity::Warn,
        field: "spec.hostIPC",
        text: "the pod shares the node's System V and POSIX IPC",
        change: "leave hostIPC out",
        source: "shared memory of the application can be opened by its UID in any such pod (ipc_namespaces(7))",
        waivable: true,
        check: neighbours::host_ipc,
    },
    Rule {
        code: Code("SM153"),
        severity: Severity::Warn,
        field: "spec.hostNetwork",
        text: "the pod shares the node's network namespace",
        change: "leave hostNetwork out if the application can do without",
        source: "abstract unix sockets and listeners of the application are reachable from every such pod (network_namespaces(7))",
        waivable: true,
        check: neighbours::host_network,
    },
    Rule {
        code: Code("SM160"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.privileged",
        text: "another container is privileged",
        change: "leave privileged out",
        source: "it has every capability and device of the node, and through them the reader's memory and mounts (capabilities(7))",
        waivable: false,
        check: neighbours::privileged,
    },
    Rule {
        code: Code("SM161"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.capabilities.add[]",
        text: "another container adds SYS_ADMIN",
        change: "take it out",
        source: "it enters the namespaces of other processes and mounts what it likes (setns(2), mount(2))",
        waivable: false,
        check: neighbours::sys_admin,
    },
    Rule {
        code: Code("SM162"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.capabilities.add[]",
        text: "another container adds SYS_PTRACE",
        change: "take it out",
        source: "a process found by its unix socket is read with pidfd_getfd, no shared processes needed (pidfd_getfd(2), SO_PEERPIDFD)",
        waivable: false,
        check: neighbours::sys_ptrace,
    },
    Rule {
        code: Code("SM163"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.capabilities.add[]",
        text: "another container may load code into the kernel or read its memory",
        change: "take it out",
        source: "SYS_MODULE loads kernel modules, SYS_RAWIO opens /dev/mem and I/O ports (capabilities(7))",
        waivable: true,
        check: neighbours::kernel,
    },
    Rule {
        code: Code("SM164"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.capabilities.add[]",
        text: "another container adds DAC_READ_SEARCH",
        change: "take it out",
        source: "it opens files by handle, past every directory (open_by_handle_at(2))",
        waivable: true,
        check: neighbours::dac_read_search,
    },
    Rule {
        code: Code("SM165"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.capabilities.add[]",
        text: "another container adds PERFMON",
        change: "take it out",
        source: "it samples the stacks of any process of the node (perf_event_open(2), PERF_SAMPLE_STACK_USER)",
        waivable: true,
        check: neighbours::perfmon,
    },
    Rule {
        code: Code("SM166"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.capabilities.add[]",
        text: "another container adds CHECKPOINT_RESTORE",
        change: "take it out",
        source: "it follows /proc/PID/map_files of other processes (capabilities(7))",
        waivable: true,
        check: neighbours::checkpoint_restore,
    },
    Rule {
        code: Code("SM167"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.capabilities.add[]",
        text: "another container adds SYS_CHROOT and mounts a hostPath",
        change: "take one of the two out",
        source: "paths and setuid programs of the node's directory see a root of its choice (chroot(2))",
        waivable: true,
        check: neighbours::sys_chroot,
    },
    Rule {
        code: Code("SM168"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.procMount",
        text: "another container has an unmasked /proc",
        change: "leave procMount out",
        source: "/proc/kcore and its like are no longer masked (kubernetes, KEP-4265)",
        waivable: true,
        check: neighbours::unmasked_proc,
    },
    Rule {
        code: Code("SM169"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.seLinuxOptions.type",
        text: "another container has an SELinux type that does not confine it",
        change: "leave the type out",
        source: "to such a type SELinux denies next to nothing (container-selinux; Bottlerocket, SECURITY_GUIDANCE)",
        waivable: true,
        check: neighbours::super_privileged,
    },
    Rule {
        code: Code("SM170"),
        severity: Severity::Refuse,
        field: "spec.volumes[].hostPath.path",
        text: "another container mounts a directory of the node that leads to the files or to the runtime",
        change: "take the mount out, or mount a narrower path",
        source: "the kubelet's directory holds every volume, the runtime's socket every container (hostPath, kubernetes)",
        waivable: true,
        check: neighbours::host_path,
    },
    Rule {
        code: Code("SM171"),
        severity: Severity::Warn,
        field: "spec.containers[].volumeDevices[]",
        text: "another container opens a block device",
        change: "give it a file system volume",
        source: "a raw device may be one that the node uses too",
        waivable: true,
        check: neighbours::block_device,
    },
    Rule {
        code: Code("SM172"),
        severity: Severity::Warn,
        field: "spec.containers[].resources.limits",
        text: "another container is given a device",
        change: "run it in a pod of its own if it can be",
        source: "what a plugin or a claim hands in may read the node's memory by DMA (kubernetes, device plugins)",
        waivable: true,
        check: neighbours::device_plugin,
    },
    Rule {
        code: Code("SM173"),
        severity: Severity::Warn,
        field: "spec.containers[].securityContext.seccompProfile.type",
        text: "another container has no seccomp profile",
        change: "write seccompProfile: {type: RuntimeDefault}",
        source: "every system call of the kernel is open to it (seccomp(2))",
        waivable: true,
        check: neighbours::seccomp,
    },
    Rule {
        code: Code("SM174"),
        severity: Severity::Warn,
        field: "spec.containers[].securityContext.appArmorProfile.type",
        text: "another container has no AppArmor profile",
        change: "write appArmorProfile: {type: RuntimeDefault}",
        source: "the runtime's profile denies mounts and /proc writes (kubernetes, AppArmor)",
        waivable: true,
        check: neighbours::apparmor,
    },
    Rule {
        code: Code("SM175"),
        severity: Severity::Warn,
        field: "spec.containers[].securityContext.allowPrivilegeEscalation",
        text: "another container may gain rights by a setuid file",
        change: "write allowPrivilegeEscalation: false",
        source: "a UID that is not root may become root by execve (no_new_privs, prctl(2))",
        waivable: true,
        check: neighbours::escalation,
    },
    Rule {
        code: Code("SM176"),
        severity: Severity::Warn,
        field: "spec.containers[].securityContext",
        text: "another container has capabilities",
        change: "run it with a UID of its own and capabilities: {drop: [ALL]}",
        source: "none of them opens a path by itself; each widens what a fault elsewhere gives (capabilities(7))",
        waivable: true,
        check: neighbours::capabilities,
    },
    Rule {
        code: Code("SM177"),
        severity: Severity::Warn,
        field: "spec.containers[].securityContext",
        text: "the reader has more rights than reading needs",
        change: "leave privileged and root out",
        source: "it is its own secret; who takes the reader over has the node as well",
        waivable: true,
        check: readers::rights,
    },
    Rule {
        code: Code("SM178"),
        severity: Severity::Refuse,
        field: "spec.volumes[].hostPath.path",
        text: "another container may write what root on the node runs or follows",
        change: "write readOnly: true at its mount, or mount a narrower path",
        source: "a program put there runs as root, and the kubelet follows a link in the logs (kubernetes, ReadLogs)",
        waivable: true,
        check: neighbours::writable_host_path,
    },
    Rule {
        code: Code("SM180"),
        severity: Severity::Refuse,
        field: "spec.containers[]",
        text: "another container gets the same secret by another way",
        change: "take it out there, or give that container a volume of its own",
        source: "the kubelet delivers it, or an injector its vault: value, and neither asks who may read",
        waivable: true,
        check: doors::same_secret,
    },
    Rule {
        code: Code("SM181"),
        severity: Severity::Warn,
        field: "spec.containers[]",
        text: "the reader gets the same secret by another way too",
        change: "take it out; the application reads the file",
        source: "an environment is inherited by every child and shown by /proc/PID/environ (proc(5))",
        waivable: true,
        check: doors::same_secret_reader,
    },
    Rule {
        code: Code("SM182"),
        severity: Severity::Refuse,
        field: "spec.volumes[].projected.sources[].serviceAccountToken.audience",
        text: "another container mounts a token that Vault takes for the reader's",
        change: "take the mount out",
        source: "Vault's role asks for service account and audience, and both are the reader's (Vault, kubernetes auth)",
        waivable: true,
        check: doors::token,
    },
    Rule {
        code: Code("SM183"),
        severity: Severity::Warn,
        field: "spec.automountServiceAccountToken",
        text: "another container holds the pod's token for the API server",
        change: "write automountServiceAccountToken: false, mount no token by hand, or let no role of Vault's take it",
        source: "a role without an audience takes it (Vault, kubernetes auth)",
        waivable: true,
        check: doors::automount,
    },
    Rule {
        code: Code("SM184"),
        severity: Severity::Refuse,
        field: "metadata.annotations",
        text: "the Vault agent writes the same secret into a volume that it shares with others",
        change: "take the annotation out",
        source: "the injector mounts one emptyDir into its agent and the containers (vault-k8s, agent-inject)",
        waivable: true,
        check: doors::vault_agent,
    },
    Rule {
        code: Code("SM190"),
        severity: Severity::Refuse,
        field: "metadata.annotations",
        text: "Istio is told to mount the volume into its proxy",
        change: "take the volume out of the annotation",
        source: "the injector copies the annotation's mounts into the proxy (istio, sidecar.istio.io/userVolumeMount)",
        waivable: false,
        check: doors::user_volume_mount,
    },
    Rule {
        code: Code("SM191"),
        severity: Severity::Warn,
        field: "metadata.annotations",
        text: "a ConfigMap decides the proxy's bootstrap",
        change: "take the annotation out",
        source: "who may write it makes the proxy run any filter (istio, sidecar.istio.io/bootstrapOverride)",
        waivable: true,
        check: doors::bootstrap,
    },
    Rule {
        code: Code("SM192"),
        severity: Severity::Warn,
        field: "metadata.annotations",
        text: "Istio adds a privileged init container for core dumps",
        change: "take the annotation out",
        source: "it is refused as a privileged neighbour once it is injected (istio, sidecar.istio.io/enableCoreDump)",
        waivable: true,
        check: doors::core_dump,
    },
    Rule {
        code: Code("SM193"),
        severity: Severity::Warn,
        field: "metadata.annotations",
        text: "Istio runs its proxy as root",
        change: "leave the interception mode at REDIRECT, and capNetBindService out",
        source: "TPROXY needs root and NET_ADMIN, a low port root (istio, interceptionMode and capNetBindService)",
        waivable: true,
        check: doors::root_proxy,
    },
];

pub(super) fn found(findings: &mut Vec<Finding>, field: String, text: impl Into<String>) {
    findings.push(Finding { field, text: text.into(), container: None });
}

pub(super) fn found_at(findings: &mut Vec<Finding>, container: &Container, field: String, text: impl Into<String>) {
    findings.push(Finding { field, text: text.into(), container: Some(container.name.clone()) });
}

/// The platform's settings for the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// `mesh_uids`: UIDs of mesh proxies besides those recognised in the pod.
    pub mesh_uids: Vec<u32>,
    /// `distinct_uids`: a neighbour with the owner's UID is refused, not only warned of.
    pub distinct_uids: bool,
    /// `refuse`: codes of warnings made refusals.
    pub refuse: Vec<Code>,
    /// `runtime_classes`: those that pods may name.
    pub runtime_classes: Vec<String>,
    /// `namespaces`.
    pub namespaces: Namespaces,
    /// `waivers`.
    pub waivers: Vec<Waiver>,
    /// The audiences of all connections: a token for one of them is the reader's to Vault.
    pub audiences: Vec<String>,
    /// The kubelet's directory on the node (`--kubelet-dir`).
    pub kubelet_dir: String,
    /// `node_paths`: more directories of the nodes that lead to the kubelet's or the runtime's.
    pub node_paths: Vec<String>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            mesh_uids: vec![1337],
            distinct_uids: false,
            refuse: Vec::new(),
            runtime_classes: Vec::new(),
            namespaces: Namespaces::default(),
            waivers: Vec::new(),
            audiences: Vec::new(),
            kubelet_dir: "/var/lib/kubelet".into(),
            node_paths: Vec::new(),
        }
    }
}

impl Rules {
    /// Whether a rule's finding refuses: by its own severity, by the platform's, or since the container it is about
    /// sees the reader's processes, where the same UID is a way to the files.
    pub(super) fn refuses(&self, rule: &Rule, case: &Case<'_>, finding: &Finding) -> bool {
        let facts = case.facts;
        let sees = || {
            let mut about = facts.containers.iter().filter(|it| finding.container.as_ref() == Some(&it.name));
            facts.share_process_namespace || facts.host_pid || about.any(|it| case.targets(it).is_some())
        };
        let about_uids = rule.code == SAME_UID || rule.code == IMAGE_UID;
        rule.severity == Severity::Refuse
            || self.refuse.contains(&rule.code)
            || (about_uids && (self.distinct_uids || sees()))
    }

    /// The waiver that covers a finding, if one does and the rule may be waived.
    pub(super) fn waiver(&self, rule: &Rule, facts: &PodFacts, finding: &Finding, now: SystemTime) -> Option<&Waiver> {
        self.waivers.iter().filter(|_| rule.may_be_waived()).find(|waiver| {
            waiver.code == rule.code
                && waiver.namespace == facts.pod.namespace
                && waiver.service_account.as_ref().is_none_or(|only| *only == facts.pod.service_account)
                && waiver.container.as_ref().is_none_or(|only| finding.container.as_ref() == Some(only))
                && now < waiver.until
        })
    }
}

/// `policy.namespaces`: names, or `*` for all. `deny` wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespaces {
    /// Who may have volumes.
    pub allow: Vec<String>,
    /// Who may not.
    pub deny: Vec<String>,
}

impl Default for Namespaces {
    fn default() -> Self {
        Self { allow: vec!["*".into()], deny: Vec::new() }
    }
}

/// A refusal that the platform team accepts for some pods, for a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiver {
    /// The refusal's code; its rule is waivable.
    pub code: Code,
    /// The namespace.
    pub namespace: String,
    /// Only pods of this service account.
    pub service_account: Option<String>,
    /// Only findings about this container.
    pub container: Option<String>,
    /// Until then, exclusive.
    pub until: SystemTime,
    /// Why.
    pub reason: String,
}
