//! The proxy that Istio will inject, so that a manifest is judged as the pod that it becomes.

use std::str::FromStr;

use serde_json::{Value as Json, json};

use super::at;

/// How Istio adds its proxy. The annotation of a pod decides for that pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proxy {
    /// An init container that goes on.
    Native,
    /// A container.
    Plain,
}

impl FromStr for Proxy {
    type Err = String;

    /// `native`, `plain` or a version of Istio: native sidecars are its default from 1.27 on, where the nodes have them
    /// (Kubernetes 1.33).
    fn from_str(text: &str) -> Result<Self, String> {
        let version = || {
            let mut numbers = text.split('.').map(str::parse::<u32>);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
        };
        match text {
            "native" => Ok(Self::Native),
            "plain" => Ok(Self::Plain),
            _ => match version() {
                Some(version) if version >= (1, 27) => Ok(Self::Native),
                Some(_) => Ok(Self::Plain),
                None => Err("write native, plain or a version of Istio, such as 1.27".into()),
            },
        }
    }
}

/// Adds `istio-init` and `istio-proxy` to a pod, unless they are there or the pod declines them. The proxy has the UID
/// and the rights of Istio's own templates, and what the pod's annotations add to it.
pub(super) fn inject(pod: &mut Json, how: Proxy) {
    let said = |map: &str, key: &str| at(pod, &["metadata", map, key])?.as_str().map(str::to_owned);
    let annotation = |key: &str| said("annotations", &format!("sidecar.istio.io/{key}"));
    // The label wins; nothing written is a yes where the namespace is in the mesh; what is no yes is a no (inject.go).
    let wish = said("labels", "sidecar.istio.io/inject").or_else(|| annotation("inject")).unwrap_or_default();
    let declined = !["", "true", "yes", "y", "on"].contains(&wish.to_lowercase().as_str());
    // In ambient mode no proxy stands in the pod.
    let ambient = said("labels", "istio.io/dataplane-mode").is_some_and(|mode| mode == "ambient");
    if ambient || declined {
        return;
    }
    let lists = ["initContainers", "containers"].into_iter().filter_map(|list| at(pod, &["spec", list])?.as_array());
    let there = lists.flatten().any(|it| at(it, &["name"]).is_some_and(|name| name == "istio-proxy"));
    if there || at(pod, &["spec", "hostNetwork"]) == Some(&Json::Bool(true)) {
        return;
    }
    let how = match annotation("nativeSidecar").as_deref() {
        Some("true") => Proxy::Native,
        Some("false") => Proxy::Plain,
        _ => how,
    };
    // TPROXY needs root; otherwise the proxy has the UID that the mesh exempts from its own redirection.
    let root = annotation("interceptionMode").is_some_and(|mode| mode == "TPROXY");
    let proxy = json!({
        "name": "istio-proxy",
        "image": "docker.io/istio/proxyv2",
        "restartPolicy": if how == Proxy::Native { json!("Always") } else { Json::Null },
        "securityContext": {
            "allowPrivilegeEscalation": root, "privileged": false, "readOnlyRootFilesystem": true,
            "runAsUser": if root { 0 } else { 1337 }, "runAsGroup": 1337, "runAsNonRoot": !root,
            "capabilities": {"drop": ["ALL"], "add": if root { json!(["NET_ADMIN"]) } else { json!([]) }},
        },
        "volumeMounts": user_mounts(annotation("userVolumeMount").as_deref()),
    });
    let init = json!({
        "name": "istio-init",
        "image": "docker.io/istio/proxyv2",
        "securityContext": {
            "allowPrivilegeEscalation": false, "privileged": false, "runAsUser": 0, "runAsGroup": 0,
            "capabilities": {"add": ["NET_ADMIN", "NET_RAW"], "drop": ["ALL"]},
        },
    });
    let mut first = vec![init];
    if annotation("enableCoreDump").as_deref() == Some("true") {
        first.push(json!({
            "name": "enable-core-dump",
            "image": "docker.io/istio/proxyv2",
            "securityContext": {
                "allowPrivilegeEscalation": true, "privileged": true, "runAsUser": 0, "runAsGroup": 0,
                "capabilities": {"add": ["SYS_ADMIN"], "drop": ["ALL"]},
            },
        }));
    }
    let mut then = Vec::new();
    match how {
        Proxy::Native => first.push(proxy),
        Proxy::Plain => then.push(proxy),
    }
    // What is no map cannot be read as a pod either, and that is reported.
    let Some(spec) = pod.get_mut("spec").and_then(Json::as_object_mut) else { return };
    // Behind the author's own, so that the fields of those keep their index.
    for (list, more) in [("initContainers", first), ("containers", then)] {
        let known = spec.entry(list).or_insert_with(|| json!([]));
        if known.is_null() {
            *known = json!([]);
        }
        if let Some(known) = known.as_array_mut() {
            known.extend(more);
        }
    }
}

/// The mounts that the annotation asks for: a list of mounts, or in the older form a map of them by volume.
fn user_mounts(annotation: Option<&str>) -> Json {
    let mounts: Option<Json> = annotation.and_then(|text| serde_json::from_str(text).ok());
    match mounts {
        Some(Json::Array(mounts)) => Json::Array(mounts),
        Some(Json::Object(by_name)) => by_name
            .into_iter()
            .map(|(name, mut mount)| {
                if let Some(mount) = mount.as_object_mut() {
                    mount.insert("name".to_owned(), json!(name));
                }
                mount
            })
            .collect(),
        _ => json!([]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pod: &Json, list: &str) -> Vec<String> {
        let containers = pod["spec"][list].as_array();
        containers.into_iter().flatten().map(|it| it["name"].as_str().unwrap().to_owned()).collect()
    }

    fn pod(annotations: &Json) -> Json {
        json!({"metadata": {"annotations": annotations}, "spec": {"containers": [{"name": "app"}]}})
    }

    #[test]
    fn both_forms() {
        let mut native = pod(&json!({}));
        inject(&mut native, Proxy::Native);
        assert_eq!(names(&native, "initContainers"), ["istio-init", "istio-proxy"]);
        assert_eq!(names(&native, "containers"), ["app"]);
        let mut plain = pod(&json!({}));
        inject(&mut plain, Proxy::Plain);
        assert_eq!(names(&plain, "initContainers"), ["istio-init"]);
        assert_eq!(names(&plain, "containers"), ["app", "istio-proxy"]);
        let twice = plain.clone();
        inject(&mut plain, Proxy::Plain);
        assert_eq!(plain, twice);
    }

    #[test]
    fn a_version_says_how() {
        for (text, how) in [
            ("native", Some(Proxy::Native)),
            ("plain", Some(Proxy::Plain)),
            ("1.27", Some(Proxy::Native)),
            ("1.26.4", Some(Proxy::Plain)),
            ("1.100.0", Some(Proxy::Native)),
            ("27", None),
            ("ambient", None),
        ] {
            assert_eq!(text.parse().ok(), how, "{text}");
        }
    }

    #[test]
    fn who_declines() {
        for (annotation, label, injected) in [
            (None, None, true),
            (Some("true"), None, true),
            (Some("false"), None, false),
            (Some("no"), None, false),
            (Some("disabled"), None, false),
            (Some("Yes"), None, true),
            (Some("false"), Some("true"), true),
            (Some("true"), Some("false"), false),
        ] {
            let mut told = pod(&json!({"sidecar.istio.io/inject": annotation}));
            told["metadata"]["labels"] = json!({"sidecar.istio.io/inject": label});
            inject(&mut told, Proxy::Plain);
            let seen = names(&told, "containers").len() == 2;
            assert_eq!(seen, injected, "annotation {annotation:?}, label {label:?}");
        }
    }

    #[test]
    fn annotations_are_followed() {
        let mut ambient = pod(&json!({}));
        ambient["metadata"]["labels"] = json!({"istio.io/dataplane-mode": "ambient"});
        let before = ambient.clone();
        inject(&mut ambient, Proxy::Native);
        assert_eq!(ambient, before);
        for mounts in ["[{\"name\": \"db\", \"mountPath\": \"/db\"}]", "{\"db\": {\"mountPath\": \"/db\"}}"] {
            let mut told = pod(&json!({
                "sidecar.istio.io/userVolumeMount": mounts, "sidecar.istio.io/interceptionMode": "TPROXY",
            }));
            inject(&mut told, Proxy::Plain);
            let proxy = &told["spec"]["containers"][1];
            assert_eq!(proxy["volumeMounts"], json!([{"name": "db", "mountPath": "/db"}]));
            assert_eq!(proxy["securityContext"]["runAsUser"], 0);
        }
        let mut dumping = pod(&json!({
            "sidecar.istio.io/enableCoreDump": "true", "sidecar.istio.io/nativeSidecar": "true",
        }));
        inject(&mut dumping, Proxy::Plain);
        assert_eq!(names(&dumping, "initContainers"), ["istio-init", "enable-core-dump", "istio-proxy"]);
        assert_eq!(dumping["spec"]["initContainers"][1]["securityContext"]["privileged"], true);
    }
}
