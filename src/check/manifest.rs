//! From manifests to pods: every built-in kind that is or holds a pod.

use serde_json::Value as Json;

use super::tree::{Node, parse};
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
}

/// Why a text cannot be read: where, and what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unreadable {
    pub(super) place: Place,
    pub(super) text: String,
}

/// Where each kind keeps its pod.
const KINDS: [(&str, &[&str]); 9] = [
    ("Pod", &[]),
    ("Deployment", &["spec", "template"]),
    ("StatefulSet", &["spec", "template"]),
    ("DaemonSet", &["spec", "template"]),
    ("ReplicaSet", &["spec", "template"]),
    ("ReplicationController", &["spec", "template"]),
    ("Job", &["spec", "template"]),
    ("CronJob", &["spec", "jobTemplate", "spec", "template"]),
    ("PodTemplate", &["template"]),
];

/// The pods of a text. Documents of other kinds are passed over, and so are empty ones.
pub(super) fn read(source: &str) -> Result<Vec<Found>, Unreadable> {
    let documents = parse(source).map_err(|fault| Unreadable { place: fault.place, text: fault.text })?;
    let mut found = Vec::new();
    for document in &documents {
        collect(document, &mut found)?;
    }
    Ok(found)
}

fn collect(document: &Node, found: &mut Vec<Found>) -> Result<(), Unreadable> {
    if document.json().is_null() {
        return Ok(());
    }
    let Some(kind) = document.text("kind") else {
        let text = "no Kubernetes object: it has no kind".to_owned();
        return Err(Unreadable { place: document.place, text });
    };
    // List, PodList, DeploymentList: each item is an object, whose kind a typed list may leave out.
    if let Some(items) = document.get("items").filter(|_| kind.ends_with("List")) {
        for item in items.items() {
            match (item.text("kind"), kind.strip_suffix("List").filter(|kind| !kind.is_empty())) {
                (None, Some(kind)) => one(kind, item, found)?,
                _ => collect(item, found)?,
            }
        }
        return Ok(());
    }
    one(kind, document, found)
}

fn one(kind: &str, object: &Node, found: &mut Vec<Found>) -> Result<(), Unreadable> {
    let Some((_, path)) = KINDS.iter().find(|(known, _)| *known == kind) else { return Ok(()) };
    let mut pod = object;
    for step in *path {
        pod = pod.get(step).ok_or_else(|| Unreadable {
            place: pod.place,
            text: format!("a {kind} holds its pod in {}, and there is no {step} here", path.join(".")),
        })?;
    }
    if pod.get("spec").is_none() {
        return Err(Unreadable { place: pod.place, text: "a pod has a spec, and there is none here".into() });
    }
    let metadata = object.get("metadata");
    let text = |name: &str| metadata.and_then(|metadata| metadata.text(name)).map(str::to_owned);
    found.push(Found {
        kind: kind.to_owned(),
        name: text("name").or_else(|| text("generateName")).unwrap_or_default(),
        namespace: text("namespace"),
        pod: pod.json(),
        node: Some(pod.clone()),
        place: object.place,
    });
    Ok(())
}
