//! Rules about other doors of the same pod: the same secret by another way, or what an injector is told to do.

use super::facts::{Container, Projection, Source};
use super::rules::{Finding, found, found_at};
use super::sidecars::called;
use super::{Case, field};
use crate::request::files::VaultPath;
use crate::request::shown;

/// Where the kubelet mounts the automounted token (kubernetes, ServiceAccount admission).
pub const AUTOMOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

pub(super) fn same_secret(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.neighbours() {
        other_ways(case, container, findings, "");
    }
}

pub(super) fn same_secret_reader(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for container in case.readers() {
        other_ways(case, container, findings, " by another way");
    }
}

/// Each way by which a container gets the volume's Kubernetes Secret, or a path of Vault that it reads, without this
/// driver.
fn other_ways(case: &Case<'_>, container: &Container, findings: &mut Vec<Finding>, rest: &str) {
    for (index, path) in &container.env_vault {
        if case.claim.vault_paths().any(|read| read.as_str() == path) {
            let text = format!("{} gets {}{rest} too", called(container), shown(path));
            found_at(findings, container, field(container, &format!(".env[{index}].value")), text);
        }
    }
    let Some(secret) = case.csi().and_then(|csi| csi.secret.as_deref()) else { return };
    let text = format!("{} gets Secret {secret}{rest} too", called(container));
    for variable in container.env.iter().filter(|variable| variable.secret == secret) {
        found_at(findings, container, field(container, &variable.field), text.as_str());
    }
    for (index, mount) in container.mounts.iter().enumerate() {
        let same = match case.source(&mount.volume) {
            Some((_, Source::Secret(name))) => name == secret,
            Some((_, Source::Projected(sources))) => {
                sources.iter().any(|(_, source)| matches!(source, Projection::Secret(name) if name == secret))
            }
            _ => false,
        };
        if same {
            found_at(findings, container, field(container, &format!(".volumeMounts[{index}]")), text.as_str());
        }
    }
}

pub(super) fn token(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if !case.claim.reads_vault() {
        return;
    }
    for container in case.neighbours() {
        for mount in &container.mounts {
            let Some((volume, Source::Projected(sources))) = case.source(&mount.volume) else { continue };
            for (index, source) in sources {
                let Projection::Token(audience) = source else { continue };
                if case.rules.audiences.contains(audience) {
                    let field =
                        format!("spec.volumes[{volume}].projected.sources[{index}].serviceAccountToken.audience");
                    let text = format!("{} mounts a token for audience {}", called(container), shown(audience));
                    found_at(findings, container, field, text);
                }
            }
        }
    }
}

pub(super) fn automount(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if !case.claim.reads_vault() {
        return;
    }
    // The token for the API server, at the usual path or mounted by hand at another.
    let holds = |container: &&Container| {
        container.mounts.iter().any(|mount| {
            mount.path.trim_end_matches('/') == AUTOMOUNT
                || matches!(case.source(&mount.volume), Some((_, Source::Projected(sources)))
                    if sources.iter().any(|(_, source)| *source == Projection::Token(String::new())))
        })
    };
    // Admission has mounted it in the pod of a node; a manifest says only whether it will.
    let admitted = !case.facts.node.is_empty();
    let field = || "spec.automountServiceAccountToken".to_owned();
    if let Some(container) = case.neighbours().find(holds) {
        let text = format!("{} holds the pod's token for the API server", called(container));
        found_at(findings, container, field(), text);
    } else if let Some(container) = case.neighbours().next()
        && !admitted
        && case.facts.automount_token != Some(false)
    {
        let text = format!("{} will hold the pod's token for the API server", called(container));
        found_at(findings, container, field(), text);
    }
}

pub(super) fn vault_agent(case: &Case<'_>, findings: &mut Vec<Finding>) {
    // What Go's ParseBool takes for true; without it the injector does nothing.
    let injected = ["1", "t", "T", "TRUE", "true", "True"];
    if !case.annotation("vault.hashicorp.com/agent-inject").is_some_and(|value| injected.contains(&value)) {
        return;
    }
    const SECRET: &str = "vault.hashicorp.com/agent-inject-secret-";
    const TEMPLATE: &str = "vault.hashicorp.com/agent-inject-template-";
    for (key, value) in &case.facts.annotations {
        let same = |path: &&VaultPath| {
            let path = path.as_str();
            // The injector takes a path with or without a leading slash.
            (key.starts_with(SECRET) && value.trim_start_matches('/') == path)
                || (key.starts_with(TEMPLATE) && value.contains(&format!("\"{path}\"")))
        };
        if let Some(path) = case.claim.vault_paths().find(same) {
            let text = format!("the Vault agent writes {} for every container", shown(path.as_str()));
            found(findings, annotation(key), text);
        }
    }
}

fn annotation(key: &str) -> String {
    format!("metadata.annotations[{key}]")
}

/// An annotation's value, and where it stands.
fn annotated<'a>(case: &Case<'a>, key: &str) -> Option<(&'a str, String)> {
    Some((case.annotation(key)?, annotation(key)))
}

pub(super) fn user_volume_mount(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let name = case.volume.name.as_str();
    let Some((value, field)) = annotated(case, "sidecar.istio.io/userVolumeMount") else { return };
    // JSON: a list of mounts or, in the older form, a map of them by name.
    let plain: String = value.split_ascii_whitespace().collect();
    if plain.contains(&format!("\"name\":\"{name}\"")) || plain.contains(&format!("\"{name}\":{{")) {
        found(findings, field, format!("Istio is told to mount {name} into its proxy"));
    }
}

pub(super) fn bootstrap(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if let Some((_, field)) = annotated(case, "sidecar.istio.io/bootstrapOverride") {
        // Not its name: who may annotate the pod would make an event of each new one.
        found(findings, field, "a ConfigMap decides the proxy's bootstrap");
    }
}

pub(super) fn core_dump(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if let Some(("true", field)) = annotated(case, "sidecar.istio.io/enableCoreDump") {
        found(findings, field, "Istio adds a privileged init container for core dumps");
    }
}

pub(super) fn root_proxy(case: &Case<'_>, findings: &mut Vec<Finding>) {
    for (key, value) in
        [("sidecar.istio.io/interceptionMode", "TPROXY"), ("sidecar.istio.io/capNetBindService", "true")]
    {
        if let Some((_, field)) = annotated(case, key).filter(|(written, _)| *written == value) {
            found(findings, field, "Istio runs its proxy as root");
        }
    }
}
