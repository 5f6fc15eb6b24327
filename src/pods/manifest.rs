//! Pod facts from manifest files: for tests, for the demo, and where a pod is judged before there is a cluster.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use super::tree::{self, Node};
use super::{Described, PodsError, api};
use crate::policy::facts::PodFacts;
use crate::request::PodRef;

/// The longest manifest file that is read, in bytes: what a pod may have in the API server, four times over.
const MAX_FILE: u64 = 6 * 1024 * 1024;
/// How the name of a manifest ends.
const ENDS: [&str; 3] = ["yaml", "yml", "json"];

/// Whether a file's name is that of a manifest.
pub fn is_named_so(path: &Path) -> bool {
    path.extension().and_then(|end| end.to_str()).is_some_and(|end| ENDS.contains(&end))
}

/// A directory of `*.yaml`, `*.yml` and `*.json` files. A file is read again when it changed; documents of another kind
/// than `Pod` are passed over.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    parsed: Mutex<HashMap<PathBuf, Parsed>>,
}

#[derive(Debug)]
struct Parsed {
    stamp: Stamp,
    pods: Result<Vec<Described>, String>,
}

/// What a file that was replaced or written to does not keep.
type Stamp = (u64, i64, i64, u64);

impl Directory {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, parsed: Mutex::default() }
    }

    /// The pod with this UID; without one, another pod of that name, which the caller then finds replaced.
    pub(super) fn find(&self, pod: &PodRef) -> Result<Arc<PodFacts>, PodsError> {
        // A file named by the pod's UID answers without a look at the others.
        for end in ENDS {
            let path = self.path.join(format!("{}.{end}", pod.uid));
            if let Ok(Some(found)) = self.pods(&path, |found| found.uid == pod.uid.as_str()) {
                return found.facts(pod);
            }
        }
        let away = |error| PodsError::Away(format!("{}: {error}", self.path.display()));
        let mut names: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(away)? {
            let path = entry.map_err(away)?.path();
            if is_named_so(&path) {
                names.push(path);
            }
        }
        names.sort();
        let mut namesake = None;
        let mut fault = None;
        for path in names {
            let same_name = |found: &Described| found.namespace == pod.namespace && found.name == pod.name;
            let exact = self.pods(&path, |found| same_name(found) && found.uid == pod.uid.as_str());
            match exact {
                Ok(Some(found)) => return found.facts(pod),
                Ok(None) => namesake = self.pods(&path, same_name).ok().flatten().or(namesake),
                // A broken file must not hide the pods of the others.
                Err(error) => fault = fault.or_else(|| Some(format!("{}: {error}", path.display()))),
            }
        }
        match (namesake, fault) {
            (Some(found), _) => found.facts(pod),
            (None, Some(fault)) => Err(PodsError::Unreadable { pod: pod.clone(), fault }),
            (None, None) => Err(PodsError::Unknown(pod.clone())),
        }
    }

    /// The first pod of a file that is wanted.
    fn pods(&self, path: &Path, wanted: impl Fn(&Described) -> bool) -> Result<Option<Described>, String> {
        // A panic elsewhere cannot leave the map half changed.
        let mut parsed = self.parsed.lock().unwrap_or_else(PoisonError::into_inner);
        let stat = match fs::metadata(path) {
            Ok(stat) => stat,
            Err(error) => {
                parsed.remove(path);
                return Err(error.to_string());
            }
        };
        let stamp = (stat.ino(), stat.mtime(), stat.mtime_nsec(), stat.len());
        let known = match parsed.entry(path.to_owned()) {
            Entry::Occupied(known) if known.get().stamp == stamp => known.into_mut(),
            Entry::Occupied(mut old) => {
                old.insert(Parsed { stamp, pods: read(path) });
                old.into_mut()
            }
            Entry::Vacant(new) => new.insert(Parsed { stamp, pods: read(path) }),
        };
        let pods = known.pods.as_ref().map_err(Clone::clone)?;
        Ok(pods.iter().find(|found| wanted(found)).cloned())
    }
}

/// A pod of a manifest that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misread {
    /// The field: `spec.containers[0].image`.
    pub path: String,
    /// What was expected.
    pub text: String,
}

/// The UID of a pod that has none yet.
const NO_UID: &str = "00000000-0000-0000-0000-000000000000";

/// Facts of a pod that nobody has admitted: `namespace` and `name` are those of the object it stands in.
pub fn facts(pod: Value, namespace: &str, name: &str) -> Result<PodFacts, Misread> {
    let mut pod = typed(pod)?;
    let metadata = &mut pod.metadata;
    metadata.namespace = Some(namespace.to_owned());
    metadata.name.get_or_insert_with(|| name.to_owned());
    metadata.uid.get_or_insert_with(|| NO_UID.to_owned());
    complete(&mut pod);
    let facts = api::describe(&pod).facts.map_err(|text| Misread { path: "spec".into(), text })?;
    Ok(Arc::unwrap_or_clone(facts))
}

/// A pod as a type. The library's errors quote the value, which may be a password in `env`: what was expected is kept.
fn typed(pod: Value) -> Result<Pod, Misread> {
    serde_path_to_error::deserialize(pod).map_err(|error| {
        let said = error.inner().to_string();
        let text = match said.rsplit_once(", expected ") {
            Some((_, expected)) => format!("expected {expected}"),
            None if said.starts_with("missing field ") => said,
            None => "not what the API server takes here".into(),
        };
        Misread { path: error.path().to_string(), text }
    })
}

/// What admission fills in.
fn complete(pod: &mut Pod) {
    pod.metadata.namespace.get_or_insert_with(|| "default".to_owned());
    if let Some(spec) = &mut pod.spec {
        let account = spec.service_account_name.take().or_else(|| spec.service_account.take());
        spec.service_account_name = account.or_else(|| Some("default".to_owned()));
    }
}

/// A text of at most so many bytes: a longer one is refused, never cut.
pub fn read_text(input: impl Read, most: u64) -> io::Result<String> {
    let mut text = String::new();
    let read = input.take(most.saturating_add(1)).read_to_string(&mut text)?;
    match u64::try_from(read) {
        Ok(read) if read <= most => Ok(text),
        _ => Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {} MiB", most >> 20))),
    }
}

fn read(path: &Path) -> Result<Vec<Described>, String> {
    let text = fs::File::open(path).and_then(|file| read_text(file, MAX_FILE)).map_err(|error| error.to_string())?;
    parse(&text)
}

/// The pods of a text of one or several YAML documents. JSON is YAML.
pub(super) fn parse(text: &str) -> Result<Vec<Described>, String> {
    let (documents, faults) = tree::parse(text);
    if let Some(fault) = faults.first() {
        return Err(format!("{}: {}", fault.place, fault.text));
    }
    let pods = documents.iter().filter(|document| document.text("kind") == Some("Pod")).map(Node::json);
    pods.map(|document| {
        let mut pod = typed(document).map_err(|misread| format!("{}: {}", misread.path, misread.text))?;
        complete(&mut pod);
        Ok(api::describe(&pod))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_fault_holds_a_value() {
        const CANARY: &str = "12345678";
        for value in [CANARY, "[12345678]", "{a: 12345678}", "2012-34-56T12345678"] {
            let env = format!("kind: Pod\nspec: {{containers: [{{name: a, env: [{{name: P, value: {value}}}]}}]}}\n");
            if let Err(fault) = parse(&env) {
                assert_eq!(fault, "spec.containers[0].env[0].value: expected a string");
            }
        }
        for broken in [
            "kind: Pod\nmetadata: {creationTimestamp: '12345678, expected 12345678'}\n",
            "kind: Pod\nspec: '12345678, expected 12345678'\n",
            "kind: Pod\nspec: {containers: [{name: a, env: [{name: P, value: *12345678}]}]}\n",
            "kind: Pod\nspec: {containers: [{name: a, env: [{name: P, value: \"12345678}]}]}\n",
            "kind: Pod\nspec: {containers: [{name: a, env: [{name: P, value: 12345678 : b}]}]}\n",
        ] {
            let fault = parse(broken).unwrap_err();
            assert!(!fault.contains(CANARY), "{fault}");
        }
    }

    #[test]
    fn a_text_is_never_cut() {
        assert_eq!(read_text(&b"1234"[..], 4).unwrap(), "1234");
        assert!(read_text(&b"12345"[..], 4).is_err());
    }
}
