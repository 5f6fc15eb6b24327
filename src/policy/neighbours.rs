//! Rules about the other containers: what lets one of them reach the reader's mounts, memory or files.

use super::facts::{Container, Source};
use super::rules::{Finding, found, found_at};
use super::sidecars::{called, is_mesh_proxy};
use super::{Case, field};

/// What leads to the files, to a process's memory or to the runtime, besides the kubelet's directory: everything at, in
/// or above these. What the kubelet, the runtimes and etcd keep, the keys to them, and the sockets by which root on the
/// node is asked for anything.
const NODE_PATHS: [&str; 26] = [
    "/proc",
    "/sys",
    "/dev",
    "/var/lib/kubelet",
    "/etc/kubernetes",
    "/etc/cni",
    "/run/nri",
    "/run/containerd",
    "/var/lib/containerd",
    "/run/crio",
    "/var/lib/containers",
    "/run/docker.sock",
    "/run/docker",
    "/var/lib/docker",
    "/run/cri-dockerd.sock",
    "/run/dockershim.sock",
    "/run/runc",
    "/run/k3s",
    "/etc/rancher",
    "/var/lib/rancher",
    "/run/k0s",
    "/var/lib/k0s",
    "/var/snap/microk8s",
    "/var/lib/etcd",
    "/run/systemd",
    "/run/dbus",
];

/// What root on the node runs or follows: harmless to read, and a way for who may write it. Programs, plugins, units,
/// the runtimes' settings, and the logs, where the kubelet and log shippers follow a link as root.
const RUN_AS_ROOT: [&str; 26] = [
    "/bin",
    "/sbin",
    "/lib/systemd",
    "/lib64",
    "/usr/bin",
    "/usr/sbin",
    "/usr/lib/systemd",
    "/usr/lib64",
    "/usr/local/bin",
    "/usr/local/sbin",
    "/usr/libexec/kubernetes",
    "/opt/cni",
    "/opt/nri",
    "/etc/nri",
    "/etc/cdi",
    "/run/cdi",
    "/etc/containerd",
    "/etc/crio",
    "/etc/containers",
    "/etc/docker",
    "/etc/systemd",
    "/etc/cron.d",
    "/var/spool/cron",
    "/root",
    "/var/log/pods",
    "/var/log/containers",
];

pub(super) fn another_mounts(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours() {
        for index in case.mounts(container) {
            let text = format!("{} mounts the volume too", called(container));
            found_at(findings, container, field(container, &format!(".volumeMounts[{index}]")), text);
        }
    }
}

pub(super) fn shared_processes(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.facts.share_process_namespace {
        let text = "the containers of the pod see each other's processes, and through them the files";
        found(findings, "spec.shareProcessNamespace".into(), text);
    }
}

pub(super) fn host_processes(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.facts.host_pid {
        found(findings, "spec.hostPID".into(), "the pod sees the node's processes, and through them the files");
    }
}

pub(super) fn same_uid(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let Some(owner) = case.owner() else { return };
    for container in case.neighbours().filter(|c| case.neighbour_uid(c) == Some(owner)) {
        // A mesh proxy with the owner's UID is a rule of its own.
        if !is_mesh_proxy(case, container) {
            let text = format!("{} runs with UID {owner}, as the reader does", called(container));
            found_at(findings, container, field(container, ".securityContext.runAsUser"), text);
        }
    }
}

pub(super) fn targets_reader(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours() {
        if let Some(reader) = case.targets(container) {
            let text = format!("{} shares the processes of {}", called(container), reader.name);
            found_at(findings, container, field(container, ".targetContainerName"), text);
        }
    }
}

pub(super) fn image_uid(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours().filter(|container| case.neighbour_uid(container).is_none()) {
        let text = format!("the image decides with which UID {} runs", called(container));
        found_at(findings, container, field(container, ".securityContext.runAsUser"), text);
    }
}

pub(super) fn host_ipc(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.facts.host_ipc {
        found(findings, "spec.hostIPC".into(), "the pod shares the node's System V and POSIX IPC");
    }
}

pub(super) fn host_network(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.facts.host_network {
        found(findings, "spec.hostNetwork".into(), "the pod shares the node's network namespace");
    }
}

pub(super) fn privileged(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours().filter(|container| container.privileged) {
        let text = format!("{} is privileged", called(container));
        found_at(findings, container, field(container, ".securityContext.privileged"), text);
    }
}

/// Each added capability that is one of `names`.
fn adds(case: &Case<'_>, findings: &mut Vec<Finding>, names: &[&str], only: impl Fn(&Container) -> bool, rest: &str) {
    for container in case.neighbours().filter(|container| only(container)) {
        for (index, name) in container.added.iter().enumerate().filter(|(_, name)| names.contains(&name.as_str())) {
            let text = format!("{} adds {name}{rest}", called(container));
            found_at(
                findings,
                container,
                field(container, &format!(".securityContext.capabilities.add[{index}]")),
                text,
            );
        }
    }
}

pub(super) fn sys_admin(case: &Case<'_>, findings: &mut Vec<Finding>) {
    adds(case, findings, &["SYS_ADMIN", "ALL"], |_| true, "");
}

pub(super) fn sys_ptrace(case: &Case<'_>, findings: &mut Vec<Finding>) {
    adds(case, findings, &["SYS_PTRACE"], |_| true, "");
}

pub(super) fn kernel(case: &Case<'_>, findings: &mut Vec<Finding>) {
    adds(case, findings, &["SYS_MODULE", "SYS_RAWIO"], |_| true, "");
}

pub(super) fn dac_read_search(case: &Case<'_>, findings: &mut Vec<Finding>) {
    adds(case, findings, &["DAC_READ_SEARCH"], |_| true, "");
}

pub(super) fn perfmon(case: &Case<'_>, findings: &mut Vec<Finding>) {
    adds(case, findings, &["PERFMON"], |_| true, "");
}

pub(super) fn checkpoint_restore(case: &Case<'_>, findings: &mut Vec<Finding>) {
    adds(case, findings, &["CHECKPOINT_RESTORE"], |_| true, "");
}

pub(super) fn sys_chroot(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let of_node = |container: &Container| {
        container.mounts.iter().any(|mount| matches!(case.source(&mount.volume), Some((_, Source::HostPath(_)))))
    };
    adds(case, findings, &["SYS_CHROOT"], of_node, " and mounts a hostPath");
}

pub(super) fn unmasked_proc(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours().filter(|container| container.unmasked_proc) {
        let text = format!("{} has an unmasked /proc", called(container));
        found_at(findings, container, field(container, ".securityContext.procMount"), text);
    }
}

/// Where the profile that holds for a container stands: in its own context, else in the pod's.
fn profile_field(container: &Container, own: bool, rest: &str) -> String {
    match own {
        true => field(container, &format!(".securityContext.{rest}")),
        false => format!("spec.securityContext.{rest}"),
    }
}

pub(super) fn super_privileged(case: &Case<'_>, findings: &mut Vec<Finding>) {
    /// container-selinux has the first three, Bottlerocket (SECURITY_GUIDANCE) the others.
    const UNCONFINED: [&str; 5] = ["spc_t", "unconfined_t", "container_runtime_t", "super_t", "control_t"];
    for container in case.neighbours() {
        let own = &container.profiles.selinux_type;
        let kind = own.as_ref().or(case.facts.profiles.selinux_type.as_ref());
        if let Some(kind) = kind.filter(|kind| UNCONFINED.contains(&kind.as_str())) {
            let text = format!("{} has the SELinux type {kind}", called(container));
            found_at(findings, container, profile_field(container, own.is_some(), "seLinuxOptions.type"), text);
        }
    }
}

pub(super) fn host_path(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for (container, index, path, _) in host_paths(case) {
        if let Some(leads) = leads_to_files(case, &path) {
            let text = format!("{} mounts {path} of the node, which leads to {leads}", called(container));
            found_at(findings, container, format!("spec.volumes[{index}].hostPath.path"), text);
        }
    }
}

pub(super) fn writable_host_path(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for (container, index, path, read_only) in host_paths(case) {
        // What leads to the files is a rule of its own.
        if let Some(leads) = leads_to(&path, RUN_AS_ROOT.into_iter())
            && !read_only
            && leads_to_files(case, &path).is_none()
        {
            let text = format!("{} may write {path} of the node, which leads to {leads}", called(container));
            found_at(findings, container, format!("spec.volumes[{index}].hostPath.path"), text);
        }
    }
}

/// What the others mount of the node: the container, the volume's index, the path, and whether it is read-only.
fn host_paths<'a>(case: &Case<'a>) -> impl Iterator<Item = (&'a Container, usize, String, bool)> {
    case.neighbours().flat_map(move |container| {
        container.mounts.iter().filter_map(move |mount| match case.source(&mount.volume)? {
            (index, Source::HostPath(path)) => {
                let path = match &mount.sub_path {
                    Some(below) => format!("{path}/{below}"),
                    None => path.clone(),
                };
                Some((container, index, path, mount.read_only))
            }
            _ => None,
        })
    })
}

fn leads_to_files<'a>(case: &Case<'a>, path: &str) -> Option<&'a str> {
    let own = std::iter::once(&case.rules.kubelet_dir).chain(&case.rules.node_paths).map(String::as_str);
    leads_to(path, own.chain(NODE_PATHS))
}

/// Which of the node's own directories a path lies in or above.
fn leads_to<'a>(path: &str, mut known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // The API server lets "." and doubled slashes through, and every node has /var/run as a name of /run.
    let plain = |path: &str| {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        match parts.as_slice() {
            ["var", "run", rest @ ..] => [&["run"], rest].concat().join("/"),
            parts => parts.join("/"),
        }
    };
    let within = |inner: &str, outer: &str| {
        outer.is_empty() || inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let path = plain(path);
    known.find(|known| {
        let known = plain(known);
        within(&path, &known) || within(&known, &path)
    })
}

pub(super) fn block_device(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours() {
        for index in 0..container.devices.len() {
            let text = format!("{} opens a block device", called(container));
            found_at(findings, container, field(container, &format!(".volumeDevices[{index}]")), text);
        }
    }
}

pub(super) fn device_plugin(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours() {
        for name in &container.extended_resources {
            let text = format!("{} is given {name}", called(container));
            found_at(findings, container, field(container, ".resources.limits"), text);
        }
        for (index, name) in container.claims.iter().enumerate() {
            let text = format!("{} is given the devices of claim {name}", called(container));
            found_at(findings, container, field(container, &format!(".resources.claims[{index}]")), text);
        }
    }
}

pub(super) fn seccomp(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours() {
        let own = container.profiles.seccomp_unconfined;
        if own.or(case.facts.profiles.seccomp_unconfined) == Some(true) {
            let text = format!("{} has no seccomp profile", called(container));
            found_at(findings, container, profile_field(container, own.is_some(), "seccompProfile.type"), text);
        }
    }
}

pub(super) fn apparmor(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours() {
        let own = container.profiles.apparmor_unconfined;
        if own.or(case.facts.profiles.apparmor_unconfined) == Some(true) {
            let text = format!("{} has no AppArmor profile", called(container));
            found_at(findings, container, profile_field(container, own.is_some(), "appArmorProfile.type"), text);
        }
    }
}

pub(super) fn escalation(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours() {
        // Root has nothing to gain, and a privileged container has all: each is a rule of its own.
        let plain = case.neighbour_uid(container).is_some_and(|uid| uid != 0) && !container.privileged;
        if plain && container.escalation != Some(false) {
            let text = format!("{} may gain rights by a setuid file", called(container));
            found_at(findings, container, field(container, ".securityContext.allowPrivilegeEscalation"), text);
        }
    }
}

pub(super) fn capabilities(case: &Case<'_>, findings: &mut Vec<Finding>) {
    /// Those that are rules of their own.
    const REFUSED: [&str; 8] = [
        "ALL",
        "SYS_ADMIN",
        "SYS_PTRACE",
        "SYS_MODULE",
        "SYS_RAWIO",
        "DAC_READ_SEARCH",
        "PERFMON",
        "CHECKPOINT_RESTORE",
    ];
    for container in case.neighbours().filter(|container| !container.privileged) {
        let added: Vec<(usize, &str)> = (container.added.iter().map(String::as_str).enumerate())
            .filter(|(_, name)| !REFUSED.contains(name))
            .collect();
        let (rest, text) = if let Some((first, _)) = added.first() {
            let names: Vec<&str> = added.iter().map(|(_, name)| *name).collect();
            (format!(".capabilities.add[{first}]"), format!("{} adds {}", called(container), names.join(", ")))
        } else if case.neighbour_uid(container) == Some(0) && !container.drops_all && container.added.is_empty() {
            (String::new(), format!("{} is root with the runtime's capabilities", called(container)))
        } else {
            continue;
        };
        found_at(findings, container, field(container, &format!(".securityContext{rest}")), text);
    }
}
