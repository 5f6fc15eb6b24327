//! The rule table: what makes a pod unfit to be given a secret, and the platform's settings for it.
//!
//! A rule must be true: it names the way by which the bytes get out. Codes are stable and never reused.

use std::time::SystemTime;

use super::facts::{Container, Kind, PodFacts};
use super::{Case, field};
use crate::request::{Code, DRIVER, WORKER_UID, nearest, shown};

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
        check: other_volume,
    },
    Rule {
        code: NOT_READ_ONLY,
        severity: Severity::Refuse,
        field: "spec.volumes[].csi.readOnly",
        text: "the volume is not read-only",
        change: "write readOnly: true",
        source: "only then does the kubelet leave owner, group and SELinux label alone (KEP-596)",
        waivable: false,
        check: not_read_only,
    },
    Rule {
        code: FS_TYPE,
        severity: Severity::Refuse,
        field: "spec.volumes[].csi.fsType",
        text: "a file system type is set",
        change: "leave fsType out",
        source: "with it the kubelet may give the files to fsGroup, a group of every container (kubernetes, fsGroupPolicy)",
        waivable: false,
        check: fs_type,
    },
    Rule {
        code: Code("SM110"),
        severity: Severity::Refuse,
        field: "spec.containers[].volumeMounts",
        text: "no container mounts the volume",
        change: "mount it in the container that should read it",
        source: "the reader decides the owner of the files",
        waivable: false,
        check: nobody_mounts,
    },
    Rule {
        code: Code("SM111"),
        severity: Severity::Refuse,
        field: "spec.volumes[].csi.volumeAttributes.for",
        text: "several containers mount the volume and none is named as its reader",
        change: "name the reader in for:, and take the mount out of the others",
        source: "the reader decides the owner of the files",
        waivable: false,
        check: several_mount,
    },
    Rule {
        code: Code("SM112"),
        severity: Severity::Refuse,
        field: "spec.volumes[].csi.volumeAttributes.for",
        text: "for: names a container that the pod does not have",
        change: "name a container or init container of this pod",
        source: "the reader decides the owner of the files",
        waivable: false,
        check: unknown_reader,
    },
    Rule {
        code: Code("SM113"),
        severity: Severity::Refuse,
        field: "spec.ephemeralContainers[]",
        text: "an ephemeral container would be the reader",
        change: "name a container of the pod's own in for:",
        source: "whoever may debug a pod may add one at any time (kubernetes, pods/ephemeralcontainers)",
        waivable: false,
        check: ephemeral_reader,
    },
    Rule {
        code: Code("SM114"),
        severity: Severity::Refuse,
        field: "spec.containers[].volumeMounts",
        text: "for: names a container that does not mount the volume",
        change: "mount it there, or take the name out of for:",
        source: "a reader without the mount reads nothing: one of the two is a mistake",
        waivable: false,
        check: reader_without_mount,
    },
    Rule {
        code: OWNER_UNKNOWN,
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the pod does not say with which UID the reader runs",
        change: "write runAsUser there, or uid: in the volumeAttributes if the image drops to another UID",
        source: "the files are mode 0400, so they must be the reader's; an image's USER is not in the pod",
        waivable: false,
        check: owner_unknown,
    },
    Rule {
        code: Code("SM121"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the reader runs as root",
        change: "run it with a UID of its own; or, if root it must be, write uid: \"0\" in the volumeAttributes",
        source: "every container that runs as root is the same user to the kernel (user_namespaces(7))",
        waivable: false,
        check: root_not_written_out,
    },
    Rule {
        code: Code("SM122"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the readers run with different UIDs",
        change: "give them one UID, or each a volume of its own",
        source: "a file has one owner, and no group bit is ever set",
        waivable: false,
        check: owners_differ,
    },
    Rule {
        code: Code("SM123"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the files would belong to the UID of a mesh proxy",
        change: "run the reader with a UID of its own",
        source: "a proxy's UID is exempt from the mesh's redirection and shared by every proxy (istio, 1337)",
        waivable: true,
        check: mesh_uid,
    },
    Rule {
        code: Code("SM124"),
        severity: Severity::Refuse,
        field: "spec.containers[].securityContext.runAsUser",
        text: "the files would belong to the driver's own UID",
        change: "run the reader with a UID of its own",
        source: "the driver's worker must not be able to open what was published",
        waivable: false,
        check: worker_uid,
    },
    Rule {
        code: Code("SM130"),
        severity: Severity::Refuse,
        field: "spec.containers[].volumeMounts[]",
        text: "another container mounts the volume",
        change: "take this mount out; if it reads the files too and has the same UID, name it in for:",
        source: "what is mounted can be opened by root, and by any process with the owner's UID (path_resolution(7))",
        waivable: false,
        check: another_mounts,
    },
    Rule {
        code: Code("SM131"),
        severity: Severity::Refuse,
        field: "spec.shareProcessNamespace",
        text: "the containers of the pod see each other's processes",
        change: "leave shareProcessNamespace out",
        source: "/proc/PID/root of the reader leads to its mounts (proc(5), ptrace(2) access mode checks)",
        waivable: false,
        check: shared_processes,
    },
    Rule {
        code: Code("SM132"),
        severity: Severity::Refuse,
        field: "spec.hostPID",
        text: "the pod sees the node's processes",
        change: "leave hostPID out",
        source: "/proc/PID/root of the reader leads to its mounts (proc(5), ptrace(2) access mode checks)",
        waivable: false,
        check: host_processes,
    },
    Rule {
        code: Code("SM140"),
        severity: Severity::Refuse,
        field: "metadata.namespace",
        text: "the platform team does not serve this namespace",
        change: "ask them to change policy.namespaces in the platform file",
        source: "the platform file",
        waivable: false,
        check: namespace_not_served,
    },
    Rule {
        code: SAME_UID,
        severity: Severity::Warn,
        field: "spec.containers[].securityContext.runAsUser",
        text: "another container runs with the owner's UID",
        change: "give it a UID of its own",
        source: "only the missing mount keeps it out: a way to the reader's mounts would open the files to it",
        waivable: true,
        check: same_uid,
    },
];

fn found(findings: &mut Vec<Finding>, field: String, text: impl Into<String>) {
    findings.push(Finding { field, text: text.into(), container: None });
}

fn found_at(findings: &mut Vec<Finding>, container: &Container, field: String, text: String) {
    findings.push(Finding { field, text, container: Some(container.name.clone()) });
}

fn other_volume(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let pod = &case.facts.pod;
    if pod.uid != case.volume.pod {
        return found(findings, "metadata.uid".into(), format!("pod {pod} is another one now"));
    }
    let text = match case.csi() {
        None => "the pod has no such CSI volume",
        Some(csi) if csi.driver != DRIVER => "the pod's volume is another driver's",
        Some(csi) if csi.attributes != case.claim.digest => "the pod's volumeAttributes are not those of the call",
        Some(_) => return,
    };
    found(findings, case.volume_field(""), text);
}

fn not_read_only(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.csi().is_some_and(|csi| !csi.read_only) {
        found(findings, case.volume_field(".csi.readOnly"), "the volume is not read-only");
    }
}

fn fs_type(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.csi().is_some_and(|csi| csi.fs_type.as_deref().is_some_and(|fs_type| !fs_type.is_empty())) {
        found(findings, case.volume_field(".csi.fsType"), "a file system type is set");
    }
}

fn nobody_mounts(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.claim.readers.is_none() && case.mounting().next().is_none() {
        found(findings, "spec.containers".into(), "no container mounts the volume");
    }
}

fn several_mount(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.claim.readers.is_some() {
        return;
    }
    let names: Vec<_> = case.mounting().map(|container| container.name.as_str()).collect();
    if names.len() > 1 {
        let text = format!("{} mount the volume", shown(&names.join(", ")));
        found(findings, case.volume_field(".csi.volumeAttributes.for"), text);
    }
}

fn unknown_reader(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let containers = &case.facts.containers;
    for name in case.claim.readers.iter().flatten() {
        if !containers.iter().any(|container| container.name == *name) {
            let own = containers.iter().filter(|c| c.kind != Kind::Ephemeral).map(|c| c.name.as_str());
            let text = format!("the pod has no container \"{}\"{}", shown(name), nearest(name, own));
            found(findings, case.volume_field(".csi.volumeAttributes.for"), text);
        }
    }
}

fn ephemeral_reader(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let named = |container: &&Container| match &case.claim.readers {
        Some(names) => names.contains(&container.name),
        None => case.mounting().count() == 1 && case.mounts(container).next().is_some(),
    };
    for container in case.facts.containers.iter().filter(|c| c.kind == Kind::Ephemeral).filter(named) {
        let text = format!("ephemeral container {} cannot be a reader", container.name);
        found_at(findings, container, field(container, ""), text);
    }
}

fn reader_without_mount(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let Some(names) = &case.claim.readers else { return };
    for container in case.facts.containers.iter().filter(|c| c.kind != Kind::Ephemeral) {
        if names.contains(&container.name) && case.mounts(container).next().is_none() {
            let text = format!("{} is named in for: and does not mount the volume", container.name);
            found_at(findings, container, field(container, ".volumeMounts"), text);
        }
    }
}

fn owner_unknown(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for reader in case.readers().filter(|reader| case.claim.uid.is_none() && case.uid(reader).is_none()) {
        let text = format!("the pod does not say with which UID {} runs", reader.name);
        found_at(findings, reader, field(reader, ".securityContext.runAsUser"), text);
    }
}

fn root_not_written_out(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for reader in case.readers().filter(|reader| case.claim.uid.is_none() && case.uid(reader) == Some(0)) {
        found_at(findings, reader, case.owner_field(), format!("{} runs as root", reader.name));
    }
}

fn owners_differ(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.claim.uid.is_some() {
        return;
    }
    let mut known = case.readers().filter_map(|reader| Some((reader, case.uid(reader)?)));
    let Some((first, uid)) = known.next() else { return };
    for (reader, other) in known.filter(|(_, other)| *other != uid) {
        let text = format!("{} runs with UID {other}, {} with {uid}", reader.name, first.name);
        found_at(findings, reader, field(reader, ".securityContext.runAsUser"), text);
    }
}

fn mesh_uid(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let Some(owner) = case.owner() else { return };
    let proxy = case.neighbours().find(|c| is_mesh_proxy(c) && case.uid(c) == Some(owner));
    if let Some(proxy) = proxy {
        let text = format!("{owner} is the UID of the mesh proxy {}", proxy.name);
        found_at(findings, proxy, case.owner_field(), text);
    } else if case.rules.mesh_uids.contains(&owner) {
        found(findings, case.owner_field(), format!("{owner} is the UID of mesh proxies"));
    }
}

fn worker_uid(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.owner() == Some(WORKER_UID) {
        found(findings, case.owner_field(), format!("{WORKER_UID} is the driver's own UID"));
    }
}

fn another_mounts(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours() {
        for index in case.mounts(container) {
            let text = format!("{} mounts the volume too", container.name);
            found_at(findings, container, field(container, &format!(".volumeMounts[{index}]")), text);
        }
    }
}

fn shared_processes(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.facts.share_process_namespace {
        let text = "the containers of the pod see each other's processes, and through them the files";
        found(findings, "spec.shareProcessNamespace".into(), text);
    }
}

fn host_processes(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.facts.host_pid {
        found(findings, "spec.hostPID".into(), "the pod sees the node's processes, and through them the files");
    }
}

fn namespace_not_served(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let namespace = &case.facts.pod.namespace;
    let lists = |names: &[String]| names.iter().any(|name| name == "*" || name == namespace);
    let Namespaces { allow, deny } = &case.rules.namespaces;
    if lists(deny) || !lists(allow) {
        found(findings, "metadata.namespace".into(), format!("namespace {namespace} is not served"));
    }
}

fn same_uid(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let Some(owner) = case.owner() else { return };
    for container in case.neighbours().filter(|c| case.uid(c) == Some(owner)) {
        // A mesh proxy with the owner's UID is a rule of its own.
        if !is_mesh_proxy(container) {
            let text = format!("{} runs with UID {owner}, as the reader does", container.name);
            found_at(findings, container, field(container, ".securityContext.runAsUser"), text);
        }
    }
}

/// Whether a container is a service mesh's proxy, by the names that the injectors give it or by its image: istio,
/// linkerd, consul, kuma, and plain Envoy.
fn is_mesh_proxy(container: &Container) -> bool {
    const NAMES: [&str; 6] =
        ["istio-proxy", "linkerd-proxy", "consul-dataplane", "envoy", "envoy-sidecar", "kuma-sidecar"];
    const IMAGES: [&str; 5] = ["proxyv2", "envoy", "consul-dataplane", "kuma-dp", "envoy-distroless"];
    // "registry:5000/istio/proxyv2:1.29@sha256:…" names the repository "registry:5000/istio/proxyv2".
    let image = container.image.split('@').next().unwrap_or_default();
    let (path, name) = image.rsplit_once('/').unwrap_or(("", image));
    let name = name.split(':').next().unwrap_or_default();
    NAMES.contains(&container.name.as_str())
        || IMAGES.contains(&name)
        || (name == "proxy" && path.rsplit('/').next() == Some("linkerd"))
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
    /// `namespaces`.
    pub namespaces: Namespaces,
    /// `waivers`.
    pub waivers: Vec<Waiver>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            mesh_uids: vec![1337],
            distinct_uids: false,
            refuse: Vec::new(),
            namespaces: Namespaces::default(),
            waivers: Vec::new(),
        }
    }
}

impl Rules {
    /// Whether a rule's finding refuses, by its own severity or by the platform's.
    pub(super) fn refuses(&self, rule: &Rule) -> bool {
        rule.severity == Severity::Refuse
            || self.refuse.contains(&rule.code)
            || (rule.code == SAME_UID && self.distinct_uids)
    }

    /// The waiver that covers a finding, if one does and the rule may be waived.
    pub(super) fn waiver(&self, rule: &Rule, facts: &PodFacts, finding: &Finding, now: SystemTime) -> Option<&Waiver> {
        self.waivers.iter().filter(|_| rule.waivable).find(|waiver| {
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
