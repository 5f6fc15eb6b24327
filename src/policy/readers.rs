//! Rules about the volume itself, who reads it, and whose the files are.

use super::facts::{Container, Kind};
use super::rules::{Finding, Namespaces, found, found_at};
use super::sidecars::is_mesh_proxy;
use super::{Case, field, uid_field};
use crate::request::{DRIVER, WORKER_UID, nearest, shown};

pub(super) fn other_volume(case: &Case<'_>, findings: &mut Vec<Finding>) {
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

pub(super) fn not_read_only(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.csi().is_some_and(|csi| !csi.read_only) {
        found(findings, case.volume_field(".csi.readOnly"), "the volume is not read-only");
    }
}

pub(super) fn fs_type(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.csi().is_some_and(|csi| csi.fs_type.as_deref().is_some_and(|fs_type| !fs_type.is_empty())) {
        found(findings, case.volume_field(".csi.fsType"), "a file system type is set");
    }
}

pub(super) fn nobody_mounts(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let any = case.facts.containers.iter().any(|container| case.mounts(container).next().is_some());
    if case.claim.readers.is_none() && !any {
        found(findings, "spec.containers".into(), "no container mounts the volume");
    }
}

pub(super) fn several_mount(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.claim.readers.is_some() {
        return;
    }
    let names: Vec<_> = case.mounting().map(|container| container.name.as_str()).collect();
    if names.len() > 1 {
        let text = format!("{} mount the volume", shown(&names.join(", ")));
        found(findings, case.volume_field(".csi.volumeAttributes.for"), text);
    }
}

pub(super) fn unknown_reader(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let containers = &case.facts.containers;
    for name in case.claim.readers.iter().flatten() {
        if !containers.iter().any(|container| container.name == *name) {
            let own = containers.iter().filter(|c| c.kind != Kind::Ephemeral).map(|c| c.name.as_str());
            let text = format!("the pod has no container \"{}\"{}", shown(name), nearest(name, own));
            found(findings, case.volume_field(".csi.volumeAttributes.for"), text);
        }
    }
}

pub(super) fn ephemeral_reader(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let named = |container: &&Container| match &case.claim.readers {
        Some(names) => names.contains(&container.name),
        None => case.mounting().next().is_none() && case.mounts(container).next().is_some(),
    };
    for container in case.facts.containers.iter().filter(|c| c.kind == Kind::Ephemeral).filter(named) {
        let text = format!("ephemeral container {} cannot be a reader", container.name);
        found_at(findings, container, field(container, ""), text);
    }
}

pub(super) fn reader_without_mount(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let Some(names) = &case.claim.readers else { return };
    for container in case.facts.containers.iter().filter(|c| c.kind != Kind::Ephemeral) {
        if names.contains(&container.name) && case.mounts(container).next().is_none() {
            let text = format!("{} is named in for: and does not mount the volume", container.name);
            found_at(findings, container, field(container, ".volumeMounts"), text);
        }
    }
}

pub(super) fn owner_unknown(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for reader in case.readers().filter(|reader| case.claim.uid.is_none() && case.uid(reader).is_none()) {
        let text = format!("the pod does not say with which UID {} runs", reader.name);
        found_at(findings, reader, field(reader, ".securityContext.runAsUser"), text);
    }
}

pub(super) fn root_not_written_out(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for reader in case.readers().filter(|reader| case.claim.uid.is_none() && case.uid(reader) == Some(0)) {
        found_at(findings, reader, uid_field(reader), format!("{} runs as root", reader.name));
    }
}

pub(super) fn owners_differ(case: &Case<'_>, findings: &mut Vec<Finding>) {
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

pub(super) fn mesh_uid(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let Some(owner) = case.owner() else { return };
    let proxy = case.neighbours().find(|c| is_mesh_proxy(case, c) && case.neighbour_uid(c) == Some(owner));
    if let Some(proxy) = proxy {
        let text = format!("{owner} is the UID of the mesh proxy {}", proxy.name);
        found_at(findings, proxy, case.owner_field(), text);
    } else if case.rules.mesh_uids.contains(&owner) && !case.readers().all(|reader| is_mesh_proxy(case, reader)) {
        // A gateway may have a certificate of its own.
        found(findings, case.owner_field(), format!("{owner} is the UID of mesh proxies"));
    }
}

pub(super) fn worker_uid(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.owner() == Some(WORKER_UID) {
        found(findings, case.owner_field(), format!("{WORKER_UID} is the driver's own UID"));
    }
}

pub(super) fn namespace_not_served(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let namespace = &case.facts.pod.namespace;
    let lists = |names: &[String]| names.iter().any(|name| name == "*" || name == namespace);
    let Namespaces { allow, deny } = &case.rules.namespaces;
    if lists(deny) || !lists(allow) {
        found(findings, "metadata.namespace".into(), format!("namespace {namespace} is not served"));
    }
}

pub(super) fn uid_differs(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let Some(uid) = case.claim.uid else { return };
    for reader in case.readers() {
        if let Some(starts) = case.uid(reader).filter(|starts| *starts != uid) {
            let text = format!("uid is {uid}, and {} starts with UID {starts}", reader.name);
            found_at(findings, reader, case.volume_field(".csi.volumeAttributes.uid"), text);
        }
    }
}

pub(super) fn runs_with_another(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let Some(owner) = case.owner() else { return };
    for reader in case.readers() {
        // Root may still drop to the owner, and need not: it is what reads.
        if let Some(runs) = reader.running_uid.filter(|runs| *runs != owner && *runs != 0) {
            let text = format!("{} runs with UID {runs}, and the files are UID {owner}'s", reader.name);
            found_at(findings, reader, case.volume_field(".csi.volumeAttributes.uid"), text);
        }
    }
}

pub(super) fn runtime_class(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if let Some(class) = case.facts.runtime_class.as_ref().filter(|class| !case.rules.runtime_classes.contains(class)) {
        found(findings, "spec.runtimeClassName".into(), format!("runtime class {class} is not listed"));
    }
}

pub(super) fn rights(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for reader in case.readers() {
        let text = if reader.privileged {
            format!("{} reads the files and is privileged", reader.name)
        } else if case.uid(reader) == Some(0) && !(reader.drops_all && reader.added.is_empty()) {
            format!("{} reads the files and is root with capabilities", reader.name)
        } else {
            continue;
        };
        found_at(findings, reader, field(reader, ".securityContext"), text);
    }
}
