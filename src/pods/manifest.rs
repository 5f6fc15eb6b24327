//! Pod facts from manifest files: for tests, for the demo, and where a pod is judged before there is a cluster.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use super::{Described, PodsError, api};
use crate::policy::facts::PodFacts;
use crate::request::PodRef;

/// The longest manifest file that is read, in bytes: what a pod may have in the API server, four times over.
const MAX_FILE: u64 = 6 * 1024 * 1024;

/// A directory of `*.yaml`, `*.yml` and `*.json` files, read anew at each question. Documents of another kind than
/// `Pod` are passed over.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The pod with this UID; without one, another pod of that name, which the caller then finds replaced.
    pub(super) fn find(&self, pod: &PodRef) -> Result<Arc<PodFacts>, PodsError> {
        let away = |error| PodsError::Away(format!("{}: {error}", self.path.display()));
        let mut names: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(away)? {
            let path = entry.map_err(away)?.path();
            if matches!(path.extension().and_then(|end| end.to_str()), Some("yaml" | "yml" | "json")) {
                names.push(path);
            }
        }
        names.sort();
        let mut namesake = None;
        let mut fault = None;
        for path in names {
            match read(&path) {
                Ok(pods) => {
                    for found in pods {
                        if (&found.namespace, &found.name) != (&pod.namespace, &pod.name) {
                            continue;
                        }
                        if found.uid == pod.uid.as_str() {
                            return found.facts(pod);
                        }
                        namesake = Some(found);
                    }
                }
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
}

fn read(path: &Path) -> Result<Vec<Described>, String> {
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text).map_err(|error| error.to_string())?;
    parse(&text)
}

/// The pods of a text of one or several YAML documents. JSON is YAML.
pub(super) fn parse(text: &str) -> Result<Vec<Described>, String> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| error.to_string())?;
    let pods = documents.into_iter().filter(|document| document.get("kind").and_then(Value::as_str) == Some("Pod"));
    pods.map(|document| {
        let mut pod: Pod = serde_json::from_value(document).map_err(|error| error.to_string())?;
        // What admission fills in.
        let namespace = &mut pod.metadata.namespace;
        namespace.get_or_insert_with(|| "default".to_owned());
        if let Some(spec) = &mut pod.spec {
            let account = spec.service_account_name.take().or_else(|| spec.service_account.take());
            spec.service_account_name = account.or_else(|| Some("default".to_owned()));
        }
        Ok(api::describe(&pod))
    })
    .collect()
}
