//! From manifests to pods: every built-in kind that is or holds a pod.

use serde_json::{Value as Json, json};

use super::at;
use crate::pods::tree::{self, Node, Value};
use crate::request::DRIVER;
use crate::request::yaml::Place;

/// A pod, or the template of one, where it was found.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// `Deployment`, `Pod`.
    pub(super) kind: String,
    /// The object's name; its `generateName` or nothing if it has none.
    pub(super) name: String,
    /// The object's namespace, if it says one.
    pub(super) namespace: Option<String>,
    /// Metadata and spec of the pod.
    pub(super) pod: Json,
    /// The same with its places; `None` for a pod of a cluster.
    pub(super) node: Option<Node>,
    /// Where the object begins.
    pub(super) place: Place,
    /// The names that lead from the object to its pod.
    pub(super) path: &'static [&'static str],
}

/// What a text holds.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub(super) found: Vec<Found>,
    /// What cannot be read: where, and what was expected.
    pub(super) unreadable: Vec<(Place, String)>,
    /// Objects with a volume of this driver, of a kind whose pod this program does not know: where, kind and name.
    pub(super) unjudged: Vec<(Place, String, String)>,
    /// Where documents without a kind begin: not of Kubernetes.
    pub(super) kindless: Vec<Place>,
}

/// Where each kind keeps its pod, by its group.
const KINDS: [(&str, &str, &[&str]); 9] = [
    ("", "Pod", &[]),
    ("apps", "Deployment", &["spec", "template"]),
    ("apps", "StatefulSet", &["spec", "template"]),
    ("apps", "DaemonSet", &["spec", "template"]),
    ("apps", "ReplicaSet", &["spec", "template"]),
    ("", "ReplicationController", &["spec", "template"]),
    ("batch", "Job", &["spec", "template"]),
    ("batch", "CronJob", &["spec", "jobTemplate", "spec", "template"]),
    ("", "PodTemplate", &["template"]),
];

/// The pods of a text. Documents of other kinds are passed over, and so are empty ones.
pub(super) fn read(source: &str) -> Read {
    let (documents, faults) = tree::parse(source);
    let mut read = Read::default();
    read.unreadable.extend(faults.into_iter().map(|fault| (fault.place, fault.text)));
    for document in &documents {
        read.document(document);
    }
    read
}

impl Read {
    fn document(&mut self, document: &Node) {
        if matches!(document.value, Value::Scalar(Json::Null)) {
            return;
        }
        let Some(kind) = document.text("kind") else { return self.kindless.push(document.place) };
        let version = document.text("apiVersion");
        // List, PodList, DeploymentList: each item is an object, whose kind a typed list may leave out.
        let Some(items) = document.get("items").filter(|_| kind.ends_with("List")) else {
            return self.object(version, kind, document);
        };
        for item in items.items() {
            match (item.text("kind"), kind.strip_suffix("List").filter(|kind| !kind.is_empty())) {
                (None, Some(kind)) => self.object(version, kind, item),
                _ => self.document(item),
            }
        }
    }

    /// One object. One without an apiVersion is taken for the built-in kind of its name.
    fn object(&mut self, version: Option<&str>, kind: &str, object: &Node) {
        let group = version.map(|version| version.split_once('/').map_or("", |(group, _)| group));
        let known = KINDS.iter().find(|(of, known, _)| *known == kind && group.is_none_or(|group| group == *of));
        let metadata = object.get("metadata");
        let text = |name: &str| metadata.and_then(|metadata| metadata.text(name)).map(str::to_owned);
        let name = text("name").or_else(|| text("generateName")).unwrap_or_default();
        let Some((_, _, path)) = known else {
            if uses_driver(object) {
                self.unjudged.push((object.place, kind.to_owned(), name));
            }
            return;
        };
        let mut node = object;
        for step in *path {
            let Some(next) = node.get(step) else {
                let text = format!("a {kind} holds its pod in {}, and there is no {step} here", path.join("."));
                return self.unreadable.push((node.place, text));
            };
            node = next;
        }
        if node.get("spec").is_none() {
            return self.unreadable.push((node.place, "a pod has a spec, and there is none here".into()));
        }
        let mut pod = node.json();
        claims(object, &mut pod);
        self.found.push(Found {
            kind: kind.to_owned(),
            name,
            namespace: text("namespace"),
            pod,
            node: Some(node.clone()),
            place: object.place,
            path,
        });
    }
}

/// Whether a part of an object names the driver as a volume does.
fn uses_driver(node: &Node) -> bool {
    match &node.value {
        Value::Scalar(_) => false,
        Value::List(items) => items.iter().any(uses_driver),
        Value::Map(entries) => node.text("driver") == Some(DRIVER) || entries.iter().any(|(_, node)| uses_driver(node)),
    }
}

/// A StatefulSet's pods get a volume for each of its claim templates, in the place of one of that name.
fn claims(object: &Node, pod: &mut Json) {
    let Some(templates) = object.get("spec").and_then(|spec| spec.get("volumeClaimTemplates")) else { return };
    let templates = templates.items().iter();
    let names: Vec<&str> = templates.filter_map(|template| template.get("metadata")?.text("name")).collect();
    let mut volumes = match at(pod, &["spec", "volumes"]) {
        None | Some(Json::Null) => Vec::new(),
        Some(Json::Array(volumes)) => volumes.clone(),
        // What is no list cannot be read as a pod either, and that is reported.
        Some(_) => return,
    };
    for name in names {
        let volume = json!({"name": name, "persistentVolumeClaim": {"claimName": name}});
        match volumes.iter_mut().find(|known| known.get("name").is_some_and(|known| known == name)) {
            Some(known) => *known = volume,
            None => volumes.push(volume),
        }
    }
    if let Some(spec) = pod.get_mut("spec").and_then(Json::as_object_mut) {
        spec.insert("volumes".to_owned(), volumes.into());
    }
}
