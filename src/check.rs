//! `sealmount check`: pods judged before they run, by the code that judges them on the node.
//!
//! Reads manifests, keeps where everything stands, and says for each pod what each container can read and what the
//! driver would refuse.

mod access;
mod istio;
mod manifest;
pub mod report;
mod tree;

use std::collections::HashMap;
use std::time::SystemTime;

use serde_json::Value as Json;

use crate::config::Config;
use crate::pods::manifest as pods;
use crate::policy::facts::PodFacts;
use crate::policy::{self, RULES, Rule, Severity};
use crate::request::attributes::{self, Field};
use crate::request::files::{Files, Location};
use crate::request::yaml::Place;
use crate::request::{DRIVER, Fault, VolumeId, VolumeName};
pub use access::Access;
pub use istio::Proxy;

/// What a check goes by.
#[derive(Debug)]
pub struct Options {
    /// The platform team's file, or the driver's defaults.
    pub config: Config,
    /// Whether `config` was given: then connections are known, and whether a volume names one of them.
    pub platform: bool,
    /// The namespace of objects that name none.
    pub namespace: String,
    /// The proxy to add where none is.
    pub istio: Option<Proxy>,
    /// When it is, for waivers.
    pub now: SystemTime,
}

/// All that was checked.
#[derive(Debug, Default)]
pub struct Report {
    /// Each pod, in the order they were found.
    pub pods: Vec<Checked>,
    /// What could not be read.
    pub unreadable: Vec<Unreadable>,
}

/// A text, or a part of one, that could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The file as it was named; `-` for the standard input.
    pub file: String,
    /// Where in it.
    pub place: Option<Place>,
    /// What was expected.
    pub text: String,
}

/// One pod, or the template of one.
#[derive(Debug)]
pub struct Checked {
    /// The file as it was named; `-` for the standard input; empty for a pod of a cluster.
    pub file: String,
    /// Where its object begins; `None` for a pod of a cluster.
    pub place: Option<Place>,
    /// The object's kind.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Who can read what.
    pub access: Vec<Access>,
    /// What refuses and what warns.
    pub findings: Vec<Finding>,
}

/// One finding.
#[derive(Debug)]
pub struct Finding {
    /// Code, field and text, as the driver says them.
    pub fault: Fault,
    /// Whether the volume is refused.
    pub refuses: bool,
    /// Where the field stands, or the nearest part above it that does.
    pub place: Option<Place>,
    /// What to write, as a strategic merge patch of the pod, where that is certain.
    pub hint: Option<Json>,
}

impl Finding {
    /// The rule it is of; `None` for what the attributes or the connections say.
    pub fn rule(&self) -> Option<&'static Rule> {
        RULES.iter().find(|rule| rule.code == self.fault.code)
    }
}

impl Report {
    /// Checks the pods of a text. What cannot be read is in the report too.
    pub fn manifest(&mut self, file: &str, text: &str, options: &Options) {
        match manifest::read(text) {
            Ok(found) => found.into_iter().for_each(|found| self.one(file, found, options)),
            Err(fault) => {
                self.unreadable.push(Unreadable { file: file.into(), place: Some(fault.place), text: fault.text });
            }
        }
    }

    /// Checks a pod of a cluster.
    pub fn pod(&mut self, pod: Json, options: &Options) {
        let text = |name: &str| text(&pod, &["metadata", name]).unwrap_or_default().to_owned();
        let found = manifest::Found {
            kind: "Pod".into(),
            name: text("name"),
            namespace: Some(text("namespace")),
            pod,
            node: None,
            place: Place { line: 1, column: 1 },
        };
        self.one("", found, options);
    }

    fn one(&mut self, file: &str, mut found: manifest::Found, options: &Options) {
        if let Some(how) = options.istio {
            istio::inject(&mut found.pod, how);
        }
        let namespace = found.namespace.clone().unwrap_or_else(|| options.namespace.clone());
        let place = |path: &str| found.node.as_ref().map(|node| node.place_of(path));
        let facts = match pods::facts(found.pod.clone(), &namespace, &found.name) {
            Ok(facts) => facts,
            Err(misread) => {
                let what = format!("{} {}: {}: {}", found.kind, found.name, misread.path, misread.text);
                self.unreadable.push(Unreadable { file: file.into(), place: place(&misread.path), text: what });
                return;
            }
        };
        let mut findings = Vec::new();
        let mut readers: HashMap<String, Vec<String>> = HashMap::new();
        for (name, source) in ours(&found.pod) {
            let judged = judge(name, source, &facts, options);
            if let Some(names) = judged.readers {
                readers.insert(name.to_owned(), names);
            }
            let new = judged.faults.into_iter().map(|(fault, refuses)| Finding {
                place: place(&fault.field),
                hint: hint(&fault, &found.pod),
                fault,
                refuses,
            });
            findings.extend(new);
        }
        let access = access::of(&facts, |volume| readers.get(volume).cloned());
        self.pods.push(Checked {
            file: file.to_owned(),
            place: found.node.as_ref().map(|_| found.place),
            kind: found.kind,
            namespace,
            name: found.name,
            access,
            findings,
        });
    }

    /// How many pods are refused, and how many only warned of.
    pub fn counts(&self) -> (usize, usize) {
        let refused = self.pods.iter().filter(|pod| pod.is_refused()).count();
        let warned = self.pods.iter().filter(|pod| !pod.is_refused() && !pod.findings.is_empty()).count();
        (refused, warned)
    }
}

impl Checked {
    /// Whether the driver would refuse a volume of it.
    pub fn is_refused(&self) -> bool {
        self.findings.iter().any(|finding| finding.refuses)
    }
}

/// A part of a document, by the names that lead to it.
fn at<'a>(document: &'a Json, path: &[&str]) -> Option<&'a Json> {
    path.iter().try_fold(document, |part, name| part.get(name))
}

fn text<'a>(document: &'a Json, path: &[&str]) -> Option<&'a str> {
    at(document, path)?.as_str()
}

/// The volumes of this driver: name and source.
fn ours(pod: &Json) -> impl Iterator<Item = (&str, &Json)> {
    let volumes = at(pod, &["spec", "volumes"]).and_then(Json::as_array);
    volumes.into_iter().flatten().filter_map(|volume| {
        let csi = volume.get("csi").filter(|csi| text(csi, &["driver"]) == Some(DRIVER))?;
        Some((text(volume, &["name"])?, csi))
    })
}

/// Whether a pod of a cluster has a volume of this driver and has not ended.
pub fn uses(pod: &Json) -> bool {
    let ended = matches!(text(pod, &["status", "phase"]), Some("Succeeded" | "Failed"));
    !ended && ours(pod).next().is_some()
}

/// Namespace and name of a pod of a cluster.
pub fn called(pod: &Json) -> String {
    let text = |name: &str| text(pod, &["metadata", name]).unwrap_or_default();
    format!("{}/{}", text("namespace"), text("name"))
}

struct Judged {
    /// Each with whether it refuses.
    faults: Vec<(Fault, bool)>,
    /// Who reads, if the volume is granted.
    readers: Option<Vec<String>>,
}

/// What the driver would say of one volume.
fn judge(name: &str, source: &Json, facts: &PodFacts, options: &Options) -> Judged {
    let refused = |faults: Vec<Fault>| faults.into_iter().map(|fault| (fault, true)).collect();
    let context: HashMap<String, String> = source
        .get("volumeAttributes")
        .and_then(Json::as_object)
        .into_iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned()))
        .collect();
    let has_secret = text(source, &["nodePublishSecretRef", "name"]).is_some_and(|name| !name.is_empty());
    let mut faults = Vec::new();
    let claim = attributes::parse(&context, has_secret, &Field::of(name), &mut faults);
    let (Some(claim), Ok(volume)) = (claim, VolumeName::parse(name)) else {
        return Judged { faults: refused(faults), readers: None };
    };
    if options.platform && (claim.vault.is_some() || claim.files.as_ref().is_some_and(reads_vault)) {
        let connection = options.config.connection(&claim).and_then(|connection| connection.refresh(&claim));
        faults.extend(connection.err());
    }
    let id = VolumeId { pod: facts.pod.uid.clone(), name: volume };
    let mut judged = Judged { faults: refused(faults), readers: None };
    match policy::judge(&id, &claim, facts, &options.config.policy, options.now) {
        Ok((grant, warnings)) => {
            judged.faults.extend(warnings.into_iter().map(|warning| (warning.fault, false)));
            judged.readers = Some(grant.readers().to_vec());
        }
        Err(refusals) => judged.faults.extend(refusals.into_iter().map(|refusal| (refusal, true))),
    }
    judged
}

fn reads_vault(files: &Files) -> bool {
    files.locations().any(|location| matches!(location, Location::Vault { .. }))
}

/// The change of the pod that a finding asks for, where there is just one.
fn hint(fault: &Fault, pod: &Json) -> Option<Json> {
    use serde_json::json;
    let field = fault.field.as_str();
    let spec = |value: Json| Some(json!({"spec": value}));
    let container = || {
        let (list, rest) = field.strip_prefix("spec.")?.split_once('[')?;
        let index: usize = rest.split_once(']')?.0.parse().ok()?;
        let container = at(pod, &["spec", list])?.get(index)?;
        Some((list, text(container, &["name"])?, container))
    };
    let of_container = |change: Json| {
        let (list, name, _) = container()?;
        let mut entry = change.as_object()?.clone();
        entry.insert("name".to_owned(), json!(name));
        spec(json!({list: [entry]}))
    };
    match fault.code.0 {
        "SM102" | "SM103" => {
            let index: usize = field.strip_prefix("spec.volumes[")?.split_once(']')?.0.parse().ok()?;
            let name = text(at(pod, &["spec", "volumes"])?.get(index)?, &["name"])?;
            let change = if fault.code.0 == "SM102" { json!({"readOnly": true}) } else { json!({"fsType": null}) };
            spec(json!({"volumes": [{"name": name, "csi": change}]}))
        }
        "SM130" => {
            let (_, _, found) = container()?;
            let index: usize = field.rsplit_once('[')?.1.trim_end_matches(']').parse().ok()?;
            let path = text(found.get("volumeMounts")?.get(index)?, &["mountPath"])?;
            of_container(json!({"volumeMounts": [{"$patch": "delete", "mountPath": path}]}))
        }
        "SM131" => spec(json!({"shareProcessNamespace": null})),
        "SM132" => spec(json!({"hostPID": null})),
        "SM160" => of_container(json!({"securityContext": {"privileged": null}})),
        "SM161" | "SM162" | "SM163" | "SM164" | "SM166" => {
            let (_, _, found) = container()?;
            let index: usize = field.rsplit_once('[')?.1.trim_end_matches(']').parse().ok()?;
            let mut added = at(found, &["securityContext", "capabilities", "add"])?.as_array()?.clone();
            if index >= added.len() {
                return None;
            }
            added.remove(index);
            of_container(json!({"securityContext": {"capabilities": {"add": added}}}))
        }
        "SM168" => of_container(json!({"securityContext": {"procMount": null}})),
        "SM175" => of_container(json!({"securityContext": {"allowPrivilegeEscalation": false}})),
        "SM183" => spec(json!({"automountServiceAccountToken": false})),
        "SM190" | "SM191" | "SM192" | "SM193" => {
            let key = field.strip_prefix("metadata.annotations[")?.strip_suffix(']')?;
            Some(json!({"metadata": {"annotations": {key: null}}}))
        }
        _ => None,
    }
}

/// What a code means, for people: the rule with its reason, or the row of the documents.
pub fn explain(code: &str) -> Option<String> {
    if let Some(rule) = RULES.iter().find(|rule| rule.code.0 == code) {
        let Rule { code, severity, field, text, change, source, waivable, .. } = rule;
        let severity = if *severity == Severity::Refuse { "refuses" } else { "warns" };
        let waivable = match waivable {
            true => "the platform team may waive it for some pods (policy.waivers)",
            false => "never waived",
        };
        return Some(format!(
            "{code} {severity}: {text}\n\n  field   {field}\n  change  {change}\n  why     {source}\n  waiver  {waivable}\n"
        ));
    }
    let row = include_str!("../docs/codes.md").lines().find(|line| line.starts_with(&format!("| `{code}` |")))?;
    let mut cells = row.trim_matches('|').split(" | ").map(str::trim).skip(1);
    let (what, change) = (cells.next()?, cells.next().unwrap_or_default());
    Some(format!("{code}: {what}\n\n  change  {change}\n"))
}
