//! What each container of a pod can read today, whoever delivers it: this driver, the kubelet, or an agent.

use crate::policy::facts::{Container, Kind, PodFacts, Projection, Source, Volume};
use crate::policy::{AUTOMOUNT, product};
use crate::request::DRIVER;

/// One thing that a container gets, or does not get although it is in its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// The container.
    pub container: String,
    /// Whose it is, where an injector's name says so: `Istio`.
    pub product: Option<&'static str>,
    /// What: `Secret db`, `token for vault-prod`, `volume data`.
    pub what: String,
    /// By which way: `env`, `Secret volume`, `sealmount`.
    pub how: &'static str,
    /// Whether it can read it.
    pub reads: bool,
    /// Why, or why not.
    pub why: String,
}

/// Every container with every secret of its pod. `readers` gives the names of the containers that may read a volume of
/// this driver's; `None` if it is refused.
pub(super) fn of<'a>(facts: &PodFacts, readers: impl Fn(&str) -> Option<&'a [String]>) -> Vec<Access> {
    let mut all = Vec::new();
    for container in &facts.containers {
        let mut add = |what: String, how, reads, why: &str| {
            all.push(Access {
                container: container.name.clone(),
                product: product(&container.name),
                what,
                how,
                reads,
                why: why.to_owned(),
            });
        };
        for volume in &facts.volumes {
            let mounted = container.mounts.iter().find(|mount| mount.volume == volume.name);
            if let Some(csi) = volume.source.csi().filter(|csi| csi.driver == DRIVER) {
                let what =
                    csi.secret.as_ref().map_or_else(|| format!("volume {}", volume.name), |it| format!("Secret {it}"));
                match (readers(&volume.name), mounted) {
                    (Some(names), Some(_)) if names.contains(&container.name) => {
                        add(what, "sealmount", true, "the reader: 0400, its own UID");
                    }
                    (_, Some(_)) => add(what, "sealmount", false, "the volume is refused"),
                    (_, None) => add(what, "sealmount", false, "not mounted"),
                }
                continue;
            }
            let Some(mount) = mounted else { continue };
            let path = mount.path.as_str();
            match &volume.source {
                Source::Secret(name) => add(format!("Secret {name}"), "Secret volume", true, path),
                Source::Projected(sources) => {
                    for (_, source) in sources {
                        match source {
                            Projection::Secret(name) => add(format!("Secret {name}"), "projected volume", true, path),
                            Projection::Token(audience) if audience.is_empty() => {
                                add(account_token(facts), "projected volume", true, path);
                            }
                            Projection::Token(audience) => {
                                add(format!("token for {audience}"), "projected volume", true, path);
                            }
                        }
                    }
                }
                Source::Csi(csi) => {
                    let what = format!("volume {} of {}", volume.name, csi.driver);
                    add(what, "CSI volume", true, path);
                }
                Source::EmptyDir if others_mount(facts, container, volume) => {
                    let how = if written_by_agent(facts, volume) { "emptyDir of an agent" } else { "shared emptyDir" };
                    add(format!("volume {}", volume.name), how, true, path);
                }
                Source::Claim(claim) if others_mount(facts, container, volume) => {
                    add(format!("claim {claim}"), "shared claim", true, path);
                }
                Source::HostPath(host) => add(format!("{host} of the node"), "hostPath", true, path),
                Source::EmptyDir | Source::Claim(_) | Source::Other => {}
            }
        }
        for variable in &container.env {
            add(format!("Secret {}", variable.secret), "env", true, "and every child process");
        }
        // What a manifest does not show: admission adds the mount. A debug container gets none.
        let mounted = container.mounts.iter().any(|mount| mount.path.trim_end_matches('/') == AUTOMOUNT);
        let will = facts.node.is_empty() && facts.automount_token != Some(false) && container.kind != Kind::Ephemeral;
        if will && !mounted {
            add(account_token(facts), "automount", true, AUTOMOUNT);
        }
    }
    all
}

fn account_token(facts: &PodFacts) -> String {
    format!("token of {}", facts.pod.service_account)
}

fn others_mount(facts: &PodFacts, container: &Container, volume: &Volume) -> bool {
    let mounts = |it: &Container| it.mounts.iter().any(|mount| mount.volume == volume.name);
    facts.containers.iter().any(|other| other.name != container.name && mounts(other))
}

/// Whether one of the volume's users is a container that fetches secrets for the others.
fn written_by_agent(facts: &PodFacts, volume: &Volume) -> bool {
    let agents = facts.containers.iter().filter(|container| product(&container.name) == Some("Vault"));
    agents.into_iter().any(|agent| agent.mounts.iter().any(|mount| mount.volume == volume.name))
}
