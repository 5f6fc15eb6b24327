//! The pods of the checks, as JSON manifests. Each satisfies the restricted level of the Pod Security Standards unless
//! a check changes it.

use serde_json::{Value, json};

use crate::images;

/// Where containers mount the volume `db`.
pub(crate) const MOUNT: &str = "/run/db";
/// The UID of the application.
pub(crate) const APP_UID: u32 = 1000;

/// What the restricted level asks of every container.
pub(crate) fn restricted(uid: u32) -> Value {
    json!({
        "runAsUser": uid,
        "runAsNonRoot": true,
        "readOnlyRootFilesystem": true,
        "allowPrivilegeEscalation": false,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    })
}

/// A container that runs the lab's program with `args` and mounts the volume `db`.
pub(crate) fn container(name: &str, uid: u32, command: &[&str]) -> Value {
    json!({
        "name": name, "image": images::APP, "imagePullPolicy": "Never", "command": command,
        "securityContext": restricted(uid),
        "volumeMounts": [{"name": "db", "mountPath": MOUNT, "readOnly": true}],
    })
}

/// The application: holds these files of the volume open and says when new content comes.
pub(crate) fn app(files: &[&str]) -> Value {
    let paths: Vec<String> = files.iter().map(|it| format!("{MOUNT}/{it}")).collect();
    let mut command = vec!["/bin/app", "hold"];
    command.extend(paths.iter().map(String::as_str));
    container("app", APP_UID, &command)
}

/// A volume of ours from the Secret of this name.
pub(crate) fn from_secret(volume: &str, secret: &str) -> Value {
    json!({"name": volume, "csi": {
        "driver": "csi.sealmount.io", "readOnly": true, "nodePublishSecretRef": {"name": secret},
    }})
}

/// A volume of ours from Vault, with this `files` attribute.
pub(crate) fn from_vault(volume: &str, files: &str) -> Value {
    json!({"name": volume, "csi": {
        "driver": "csi.sealmount.io", "readOnly": true, "volumeAttributes": {"vault": "prod", "files": files},
    }})
}

/// A pod with these containers and volumes.
pub(crate) fn pod(name: &str, containers: &[Value], volumes: &[Value]) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec(containers, volumes)})
}

/// The part of it that workloads have too.
pub(crate) fn spec(containers: &[Value], volumes: &[Value]) -> Value {
    json!({
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": false,
        // No DNS runs here; otherwise each sync writes an event about that.
        "dnsPolicy": "Default",
        "containers": containers,
        "volumes": volumes,
    })
}

/// A pod with the application and one volume from the Secret `db`.
pub(crate) fn simple(name: &str) -> Value {
    pod(name, &[app(&["password"])], &[from_secret("db", "db")])
}
