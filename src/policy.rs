//! Who may read: a pure function over the facts of a pod. No Kubernetes client, no async, no I/O.

mod doors;
pub mod facts;
mod neighbours;
mod readers;
pub mod rules;
mod sidecars;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::time::SystemTime;

use crate::request::{Claim, Fault, Owner, PodRef, VolumeId};
pub use doors::AUTOMOUNT;
use facts::{Container, Csi, Kind, PodFacts, Source};
pub use rules::{Namespaces, RULES, Rule, Rules, Severity, Waiver};
pub use sidecars::product;

/// Proof that [`judge`] allowed this volume, now or ([`Grant::standing`]) when it was first published. Nothing else makes
/// one, and `source` and `broker` calls demand it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    volume: VolumeId,
    pod: PodRef,
    readers: Vec<String>,
    owner: Owner,
}

impl Grant {
    /// The grant of a volume that stands already: it was given before, and is kept whatever the rules say since
    /// (design, P3). The broker refuses any other owner than the one it stands with.
    pub fn standing(volume: &VolumeId, pod: &PodRef, owner: Owner) -> Self {
        Self { volume: volume.clone(), pod: pod.clone(), readers: Vec::new(), owner }
    }

    /// The volume.
    pub fn volume(&self) -> &VolumeId {
        &self.volume
    }
    /// The pod.
    pub fn pod(&self) -> &PodRef {
        &self.pod
    }
    /// The containers that may read, in the pod's order; empty only for [`Grant::standing`].
    pub fn readers(&self) -> &[String] {
        &self.readers
    }
    /// Who owns the files.
    pub fn owner(&self) -> Owner {
        self.owner
    }
}

/// A rule's finding that does not refuse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// What was found. The text of a waived refusal begins with "waived".
    pub fault: Fault,
    /// Whether it refuses but for a waiver of the platform team's.
    pub waived: bool,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fault.fmt(f)
    }
}

/// A rule's finding that refuses.
pub type Refusal = Fault;

/// Decides who may read `volume` of the pod described by `facts`. `now` decides which waivers still hold. A waived
/// refusal comes back among the warnings. On `Err` the list is never empty.
pub fn judge(
    volume: &VolumeId,
    claim: &Claim,
    facts: &PodFacts,
    rules: &Rules,
    now: SystemTime,
) -> Result<(Grant, Vec<Warning>), Vec<Refusal>> {
    let case = Case::new(volume, claim, facts, rules);
    let (mut warnings, mut refusals) = (Vec::new(), Vec::new());
    for rule in RULES {
        let mut findings = Vec::new();
        (rule.check)(&case, &mut findings);
        for finding in findings {
            let text = format!("{}; {}", finding.text, rule.change);
            let fault = Fault { code: rule.code, field: finding.field.clone(), text };
            if !rules.refuses(rule, &case, &finding) {
                warnings.push(Warning { fault, waived: false });
            } else if let Some(waiver) = rules.waiver(rule, facts, &finding, now) {
                let text = format!("waived ({}): {}", waiver.reason, fault.text);
                warnings.push(Warning { fault: Fault { text, ..fault }, waived: true });
            } else {
                refusals.push(fault);
            }
        }
    }
    match (&case.readers, case.owner()) {
        (Some(readers), Some(uid)) if refusals.is_empty() => {
            let readers = readers.iter().map(|container| container.name.clone()).collect();
            let owner = Owner { uid, gid: 0 };
            Ok((Grant { volume: volume.clone(), pod: facts.pod.clone(), readers, owner }, warnings))
        }
        _ => {
            if refusals.is_empty() {
                // The rules about readers and owners cover this; a gap in them must not become a grant.
                refusals.push(Fault {
                    code: rules::OWNER_UNKNOWN,
                    field: case.volume_field(""),
                    text: "it is not known who may read; write for: and uid:".into(),
                });
            }
            Err(refusals)
        }
    }
}

/// What the rules look at: the pod, and who reads as far as that is known.
#[derive(Debug)]
struct Case<'a> {
    volume: &'a VolumeId,
    claim: &'a Claim,
    facts: &'a PodFacts,
    rules: &'a Rules,
    /// The containers that may read, in the pod's order; `None` while a rule about readers fires, so that one
    /// mistake is reported once.
    readers: Option<Vec<&'a Container>>,
    /// The other containers, if the readers are known; else none.
    neighbours: Vec<&'a Container>,
    /// The pod's volumes by name, each with its index.
    volumes: HashMap<&'a str, (usize, &'a Source)>,
    /// What Istio's injector says it added: JSON with lists of names, so that each stands in quotes.
    added_by_istio: HashSet<&'a str>,
}

impl<'a> Case<'a> {
    fn new(volume: &'a VolumeId, claim: &'a Claim, facts: &'a PodFacts, rules: &'a Rules) -> Self {
        let volumes = facts.volumes.iter().enumerate();
        let volumes = volumes.map(|(index, volume)| (volume.name.as_str(), (index, &volume.source))).collect();
        let (readers, neighbours, added_by_istio) = (None, Vec::new(), HashSet::new());
        let mut case = Self { volume, claim, facts, rules, readers, neighbours, volumes, added_by_istio };
        case.added_by_istio.extend(case.annotation("sidecar.istio.io/status").unwrap_or_default().split('"').skip(1));
        let readers: Vec<_> = match &claim.readers {
            Some(names) => facts.containers.iter().filter(|c| names.contains(&c.name)).collect(),
            None => case.mounting().collect(),
        };
        let wanted = claim.readers.as_ref().map_or(1, Vec::len);
        let fit = |c: &&Container| c.kind != Kind::Ephemeral && case.mounts(c).next().is_some();
        if readers.len() == wanted && wanted > 0 && readers.iter().all(fit) {
            let names: HashSet<&str> = readers.iter().map(|reader| reader.name.as_str()).collect();
            case.neighbours.extend(facts.containers.iter().filter(|other| !names.contains(other.name.as_str())));
            case.readers = Some(readers);
        }
        case
    }

    /// The indices of a container's mounts of this volume.
    fn mounts(&self, container: &'a Container) -> impl Iterator<Item = usize> {
        let name = self.volume.name.as_str();
        container.mounts.iter().enumerate().filter(move |(_, mount)| mount.volume == name).map(|(index, _)| index)
    }

    /// The pod's own containers that mount this volume, readers or not. A debug container decides nothing about who
    /// reads: it is another container.
    fn mounting(&self) -> impl Iterator<Item = &'a Container> {
        self.facts.containers.iter().filter(|c| c.kind != Kind::Ephemeral && self.mounts(c).next().is_some())
    }

    /// The readers, if known; else none.
    fn readers(&self) -> impl Iterator<Item = &'a Container> {
        self.readers.iter().flatten().copied()
    }

    /// The others, if the readers are known; else none.
    fn neighbours(&self) -> impl Iterator<Item = &'a Container> {
        self.neighbours.iter().copied()
    }

    /// The reader whose processes a debug container shares.
    fn targets(&self, container: &Container) -> Option<&'a Container> {
        self.readers().find(|reader| container.target.as_ref() == Some(&reader.name))
    }

    /// The UID a container starts with, if the pod says so; else its image decides.
    fn uid(&self, container: &Container) -> Option<u32> {
        container.run_as_user.or(self.facts.run_as_user)
    }

    /// The UID a neighbour runs with, as far as that is known: what the pod says, else what its status does.
    fn neighbour_uid(&self, container: &Container) -> Option<u32> {
        self.uid(container).or(container.running_uid)
    }

    /// The owner: the `uid` written, else the one UID that all readers start with.
    fn owner(&self) -> Option<u32> {
        let readers = self.readers.as_ref()?;
        if self.claim.uid.is_some() {
            return self.claim.uid;
        }
        let first = self.uid(readers.first()?)?;
        readers.iter().all(|reader| self.uid(reader) == Some(first)).then_some(first)
    }

    /// The field that decides the owner: where to write another.
    fn owner_field(&self) -> String {
        match self.readers().next().filter(|_| self.claim.uid.is_none()) {
            Some(reader) => uid_field(reader),
            None => self.volume_field(".csi.volumeAttributes.uid"),
        }
    }

    /// The volume's source in the pod, if it is one of this kind.
    fn csi(&self) -> Option<&'a Csi> {
        self.source(self.volume.name.as_str())?.1.csi()
    }

    /// A volume of the pod, with its index.
    fn source(&self, name: &str) -> Option<(usize, &'a Source)> {
        self.volumes.get(name).copied()
    }

    /// The value of an annotation that rules look at.
    fn annotation(&self, key: &str) -> Option<&'a str> {
        self.facts.annotations.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    /// A field of the volume, as a path into the pod.
    fn volume_field(&self, rest: &str) -> String {
        let name = self.volume.name.as_str();
        match self.source(name) {
            Some((index, _)) => format!("spec.volumes[{index}]{rest}"),
            None => format!("spec.volumes[{name}]{rest}"),
        }
    }
}

/// The field that says a container's UID: its own, else the pod's.
fn uid_field(container: &Container) -> String {
    match container.run_as_user {
        Some(_) => field(container, ".securityContext.runAsUser"),
        None => "spec.securityContext.runAsUser".into(),
    }
}

/// A field of a container, as a path into the pod.
fn field(container: &Container, rest: &str) -> String {
    let list = match container.kind {
        Kind::Regular => "containers",
        Kind::Init | Kind::Sidecar => "initContainers",
        Kind::Ephemeral => "ephemeralContainers",
    };
    format!("spec.{list}[{}]{rest}", container.index)
}

#[cfg(test)]
mod tests;
