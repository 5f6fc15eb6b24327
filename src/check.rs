//! `sealmount check`: pods judged before they run, by the code that judges them on the node.
//!
//! Reads manifests, keeps where everything stands, and says for each pod what each container can read and what the
//! driver would refuse.

mod access;
mod hint;
mod istio;
mod manifest;
pub mod report;

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use serde_json::Value as Json;

use crate::config::{Config, Connection};
use crate::pods::manifest as pods;
use crate::policy::facts::PodFacts;
use crate::policy::{self, RULES, Rule, Severity};
use crate::request::attributes::{self, Field};
use crate::request::files::VaultPath;
use crate::request::yaml::Place;
use crate::request::{Claim, DRIVER, Fault, PodRef, RESERVED, VolumeId, VolumeName};
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
    /// What uses the driver and was not judged.
    pub unjudged: Vec<Unjudged>,
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

/// An object with a volume of this driver, of a kind that is not built in: where its pods are described is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unjudged {
    /// The file as it was named; `-` for the standard input.
    pub file: String,
    /// Where the object begins.
    pub place: Place,
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
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
    /// Whether it would refuse but for a waiver of the platform team's.
    pub waived: bool,
    /// Where the field stands, or the nearest part above it that does.
    pub place: Option<Place>,
    /// What to write, as a strategic merge patch of the object, where that is certain.
    pub hint: Option<Json>,
}

impl Finding {
    /// The rule it is of; `None` for what the attributes or the connections say.
    pub fn rule(&self) -> Option<&'static Rule> {
        RULES.iter().find(|rule| rule.code == self.fault.code)
    }
}

impl Report {
    /// Checks the pods of a text. What cannot be read is in the report too. `searched` says that nobody named the file:
    /// then a document that is not of Kubernetes (a chart's values, a kustomization) is passed over.
    pub fn manifest(&mut self, file: &str, text: &str, searched: bool, options: &Options) {
        let read = manifest::read(text);
        for found in read.found {
            self.one(file, found, options);
        }
        let kindless = read.kindless.into_iter().filter(|_| !searched);
        let kindless = kindless.map(|place| (place, "no Kubernetes object: it has no kind".to_owned()));
        let mut unreadable: Vec<(Place, String)> = read.unreadable.into_iter().chain(kindless).collect();
        unreadable.sort();
        let file = || file.to_owned();
        self.unreadable.extend(unreadable.into_iter().map(|(place, text)| Unreadable {
            file: file(),
            place: Some(place),
            text,
        }));
        let unjudged = read.unjudged.into_iter();
        self.unjudged.extend(unjudged.map(|(place, kind, name)| Unjudged { file: file(), place, kind, name }));
    }

    /// Checks a pod of a cluster, unless it has ended: nothing of it can read any more.
    pub fn pod(&mut self, pod: Json, options: &Options) {
        if has_ended(&pod) {
            return;
        }
        let text = |name: &str| text(&pod, &["metadata", name]).unwrap_or_default().to_owned();
        let found = manifest::Found {
            kind: "Pod".into(),
            name: text("name"),
            namespace: Some(text("namespace")),
            pod,
            node: None,
            place: Place { line: 1, column: 1 },
            path: &[],
        };
        self.one("", found, options);
    }

    fn one(&mut self, file: &str, found: manifest::Found, options: &Options) {
        let mut pod = found.pod.clone();
        if let Some(how) = options.istio {
            istio::inject(&mut pod, how);
        }
        let namespace = found.namespace.clone().unwrap_or_else(|| options.namespace.clone());
        let place = |path: &str| found.node.as_ref().map(|node| node.place_of(path));
        let facts = match pods::facts(pod, &namespace, &found.name) {
            Ok(facts) => facts,
            Err(misread) => {
                let name = format!("{} {}", found.kind, found.name);
                let what = format!("{}: {}: {}", name.trim_end(), misread.path, misread.text);
                self.unreadable.push(Unreadable { file: file.into(), place: place(&misread.path), text: what });
                return;
            }
        };
        // Only a pod's own manifest says its name.
        let named = found.kind == "Pod";
        let mut judged = Judged::default();
        for (name, source) in ours(&found.pod) {
            judged.volume(name, source, &facts, named, options);
        }
        let readers = std::mem::take(&mut judged.readers);
        let mut findings: Vec<Finding> = judged.in_order().into_iter().map(|said| said.finding(place)).collect();
        let hints: Vec<_> = findings.iter().map(|finding| hint::of(finding, &findings, &found)).collect();
        for (finding, hint) in findings.iter_mut().zip(hints) {
            finding.hint = hint;
        }
        self.pods.push(Checked {
            file: file.to_owned(),
            place: found.node.as_ref().map(|_| found.place),
            access: access::of(&facts, |volume| readers.get(volume).map(Vec::as_slice)),
            kind: found.kind,
            namespace,
            name: found.name,
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

fn has_ended(pod: &Json) -> bool {
    matches!(text(pod, &["status", "phase"]), Some("Succeeded" | "Failed"))
}

/// Whether a pod of a cluster has a volume of this driver and has not ended.
pub fn uses(pod: &Json) -> bool {
    !has_ended(pod) && ours(pod).next().is_some()
}

/// Namespace and name of a pod of a cluster.
pub fn full_name(pod: &Json) -> String {
    let text = |name: &str| text(pod, &["metadata", name]).unwrap_or_default();
    format!("{}/{}", text("namespace"), text("name"))
}

/// What the driver would say of the volumes of one pod.
#[derive(Default)]
struct Judged {
    /// What it says before it looks at the pod.
    attributes: Vec<Said>,
    /// What the rules say.
    rules: Vec<Said>,
    /// What the platform file says of Vault.
    connections: Vec<Said>,
    /// Who reads, of each volume that is granted.
    readers: BTreeMap<String, Vec<String>>,
}

/// One thing that the driver would say.
#[derive(PartialEq)]
struct Said {
    fault: Fault,
    refuses: bool,
    waived: bool,
    /// The field to look for in the manifest, where the fault's own is not in it.
    at: Option<String>,
}

impl Said {
    fn refusal(fault: Fault) -> Self {
        Self { fault, refuses: true, waived: false, at: None }
    }

    fn finding(self, place: impl Fn(&str) -> Option<Place>) -> Finding {
        let place = place(self.at.as_deref().unwrap_or(&self.fault.field));
        Finding { fault: self.fault, refuses: self.refuses, waived: self.waived, place, hint: None }
    }
}

impl Judged {
    /// Judges one volume, in the driver's order: what comes later is said only if nothing before refuses.
    fn volume(&mut self, name: &str, source: &Json, facts: &PodFacts, named: bool, options: &Options) {
        let field = Field::of(name);
        let context: HashMap<String, String> = source
            .get("volumeAttributes")
            .and_then(Json::as_object)
            .into_iter()
            .flatten()
            .map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned()))
            .collect();
        let has_secret = text(source, &["nodePublishSecretRef", "name"]).is_some_and(|name| !name.is_empty());
        let mut planted: Vec<&String> = context.keys().filter(|key| key.starts_with(RESERVED)).collect();
        planted.sort();
        let mut faults: Vec<Fault> = planted.into_iter().map(|key| attributes::reserved(key, &field)).collect();
        let claim = attributes::parse(&context, has_secret, &field, &mut faults);
        let refused = !faults.is_empty();
        self.attributes.extend(faults.into_iter().map(Said::refusal));
        let (Some(claim), Ok(volume), false) = (claim, VolumeName::parse(name), refused) else { return };
        let id = VolumeId { pod: facts.pod.uid.clone(), name: volume };
        let grant = match policy::judge(&id, &claim, facts, &options.config.policy, options.now) {
            Ok((grant, warnings)) => {
                self.rules.extend(warnings.into_iter().map(|warning| Said {
                    fault: warning.fault,
                    refuses: false,
                    waived: warning.waived,
                    at: None,
                }));
                grant
            }
            Err(refusals) => return self.rules.extend(refusals.into_iter().map(Said::refusal)),
        };
        if options.platform
            && let Err(fault) = permitted(&claim, grant.pod(), named, &options.config)
        {
            let said = match fault.field.starts_with("volumeAttributes.") {
                true => Said::refusal(Fault { field: field.csi(&fault.field), ..fault }),
                // It names the platform file.
                false => Said { at: Some(field.attribute("files")), ..Said::refusal(fault) },
            };
            return self.connections.push(said);
        }
        self.readers.insert(name.to_owned(), grant.readers().to_vec());
    }

    /// All of it: the rules in their order, which is that of the API server too, each thing once.
    fn in_order(mut self) -> Vec<Said> {
        self.rules.sort_by_key(|said| RULES.iter().position(|rule| rule.code == said.fault.code));
        let mut all: Vec<Said> = Vec::new();
        for said in [self.attributes, self.rules, self.connections].into_iter().flatten() {
            if !all.contains(&said) {
                all.push(said);
            }
        }
        all
    }
}

/// Whether the platform file gives a volume what it asks of Vault, as the driver asks it before it sends anything.
fn permitted(claim: &Claim, pod: &PodRef, named: bool, config: &Config) -> Result<(), Fault> {
    if !claim.reads_vault() {
        return Ok(());
    }
    let connection = config.connection(claim)?;
    connection.refresh(claim)?;
    let role = connection.role(claim)?;
    for path in claim.vault_paths() {
        match connection.permits(pod, role, path) {
            Err(_) if !named && may_be_permitted(connection, pod, role, path) => {}
            verdict => verdict?,
        }
    }
    connection.namespace.as_ref().map_or(Ok(()), |namespace| namespace.expand(pod).map(drop))
}

/// Whether some name of a pod would permit the path: pods of a template have names that no manifest tells.
fn may_be_permitted(connection: &Connection, pod: &PodRef, role: &str, path: &VaultPath) -> bool {
    let mut names = path.as_str().split('/');
    names.any(|name| connection.permits(&PodRef { name: name.to_owned(), ..pod.clone() }, role, path).is_ok())
}

/// The rows of the documents' tables: code, what is wrong, what to do.
fn documented() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    include_str!("../docs/codes.md").lines().filter_map(|line| {
        let (code, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
        let mut cells = rest.trim_end_matches('|').split(" | ").map(str::trim);
        Some((code, cells.next()?, cells.next().unwrap_or_default()))
    })
}

/// What a code means, for people: the rule with its reason, or the row of the documents. Its case does not matter.
pub fn explain(code: &str) -> Option<String> {
    let code = code.to_ascii_uppercase();
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
    let (code, what, change) = documented().find(|(known, ..)| *known == code)?;
    Some(format!("{code}: {what}\n\n  change  {change}\n"))
}
