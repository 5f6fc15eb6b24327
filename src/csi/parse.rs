//! From the kubelet's messages to [`crate::request`]: parsed once, and nothing in them taken on trust that a pod's
//! author can write.
//!
//! The kubelet merges its own facts into the author's attributes and strips nothing (kubernetes,
//! pkg/volume/csi/csi_mounter.go, `mergeMap`). So each fact is held against one that no author can choose: volume id
//! and target path follow from the pod's UID and the volume's name, and a token names the pod it was made for.
//! Every fault is reported at once; none quotes a value of `secrets`, or one of an attribute but names in `files`.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

use super::proto::csi::volume_capability::AccessType;
use super::proto::csi::{
    NodeGetVolumeStatsRequest, NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
};
use crate::policy::rules::{FS_TYPE, NOT_READ_ONLY};
use crate::request::attributes::{self, Field, is_dns, reserved};
use crate::request::{Code, Fault, PodRef, PodUid, Publish, RESERVED, Token, VolumeId, VolumeName, shown};
use crate::secret::{SecretBytes, SecretText};

/// The volume id is not the one that this pod and volume have.
pub const VOLUME_ID: Code = Code("SM001");
/// The target path is not the one that this pod and volume have.
pub const TARGET_PATH: Code = Code("SM002");
/// The volume is asked for in a way that this driver does not serve.
pub const CAPABILITY: Code = Code("SM003");
/// The kubelet's facts of the pod are missing or cannot be.
pub const POD_INFO: Code = Code("SM004");
/// A token is not one of this pod.
pub const TOKEN: Code = Code("SM006");
/// The key of the pod's tokens (kubernetes, KEP-1855 and KEP-5538).
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";
/// What a call is checked against: this node's side of it.
#[derive(Debug, Clone)]
pub struct Node {
    /// The kubelet's directory, with one `/` at its end.
    root: String,
}

impl Node {
    /// The node whose kubelet keeps its pods below `kubelet_dir`.
    pub fn new(kubelet_dir: PathBuf) -> Self {
        Self { root: format!("{}/", kubelet_dir.to_string_lossy().trim_end_matches('/')) }
    }

    /// The one path a volume can have (kubernetes, pkg/volume/csi/csi_mounter.go, `GetPath`).
    fn target_path(&self, volume: &VolumeId) -> String {
        format!("{}pods/{}/volumes/kubernetes.io~csi/{}/mount", self.root, volume.pod, volume.name)
    }

    /// The volume whose path this is, letter by letter.
    fn volume_at(&self, target_path: &str) -> Option<VolumeId> {
        let mut parts = target_path.strip_prefix(&self.root)?.strip_prefix("pods/")?.split('/');
        let pod = PodUid::parse(parts.next()?).ok()?;
        let name = VolumeName::parse(parts.nth(2)?).ok()?;
        let volume = VolumeId { pod, name };
        (self.target_path(&volume) == target_path).then_some(volume)
    }
}

/// A NodePublishVolume. The message's strings are moved, not copied; what is left of them is wiped when freed.
pub fn publish(request: NodePublishVolumeRequest, node: &Node) -> Result<Publish, Vec<Fault>> {
    let mut faults = Vec::new();
    let NodePublishVolumeRequest {
        volume_id,
        target_path,
        volume_capability,
        readonly,
        mut secrets,
        mut volume_context,
        ..
    } = request;

    let volume = volume(&volume_id, &target_path, node, &mut faults);
    let field = Field::of(volume.as_ref().map_or("", |volume| volume.name.as_str()));
    capability(volume_capability.as_ref(), &field, &mut faults);
    if !readonly {
        faults.push(Fault {
            code: NOT_READ_ONLY,
            field: field.csi("readOnly"),
            text: "the volume is not read-only; write readOnly: true".into(),
        });
    }

    let from_context = volume_context.remove(TOKENS);
    let tokens_json = match (secrets.remove(TOKENS), from_context) {
        (Some(_), Some(_)) => {
            faults.push(reserved(TOKENS, &field));
            None
        }
        (one, other) => one.or(other),
    };
    let pod = pod(&mut volume_context, volume.as_ref(), &field, &mut faults);
    let tokens = match (&tokens_json, &pod) {
        (Some(json), Some(pod)) => tokens(json, pod, &mut faults),
        _ => BTreeMap::new(),
    };
    let secret = secret(secrets);
    let claim = attributes::parse(&volume_context, secret.is_some(), &field, &mut faults);

    match (volume, pod, claim) {
        (Some(volume), Some(pod), Some(claim)) if faults.is_empty() => {
            Ok(Publish { volume, pod, claim, secret, tokens })
        }
        _ => Err(faults),
    }
}

/// A NodeUnpublishVolume: the volume, whose id must be the one of the path.
pub fn unpublish(request: &NodeUnpublishVolumeRequest, node: &Node) -> Result<VolumeId, Vec<Fault>> {
    let mut faults = Vec::new();
    match volume(&request.volume_id, &request.target_path, node, &mut faults) {
        Some(volume) if faults.is_empty() => Ok(volume),
        _ => Err(faults),
    }
}

/// A NodeGetVolumeStats: the volume, or `None` for a path that no volume of this driver can have.
pub fn stats(request: &NodeGetVolumeStatsRequest, node: &Node) -> Option<VolumeId> {
    node.volume_at(&request.volume_path).filter(|volume| volume.handle() == request.volume_id)
}

fn volume(volume_id: &str, target_path: &str, node: &Node, faults: &mut Vec<Fault>) -> Option<VolumeId> {
    let mut fault = |code, field: &str, text: &str| {
        faults.push(Fault { code, field: field.into(), text: text.into() });
    };
    if volume_id.is_empty() {
        fault(VOLUME_ID, "volume_id", "is missing");
    }
    if target_path.is_empty() {
        fault(TARGET_PATH, "target_path", "is missing");
        return None;
    }
    let volume = node.volume_at(target_path);
    match &volume {
        None => {
            let text = "is not DIR/pods/UID/volumes/kubernetes.io~csi/NAME/mount; is --kubelet-dir the kubelet's own?";
            fault(TARGET_PATH, "target_path", text);
        }
        Some(volume) if !volume_id.is_empty() && volume.handle() != volume_id => {
            fault(VOLUME_ID, "volume_id", "is not the one of this pod and volume; only inline volumes are served");
        }
        Some(_) => {}
    }
    volume
}

fn capability(capability: Option<&VolumeCapability>, field: &Field, faults: &mut Vec<Fault>) {
    let mut fault = |code, field: String, text: &str| faults.push(Fault { code, field, text: text.into() });
    let wrong = || "volume_capability".to_owned();
    let mount = match capability.and_then(|capability| capability.access_type.as_ref()) {
        None => return fault(CAPABILITY, wrong(), "is missing"),
        Some(AccessType::Block(_)) => return fault(CAPABILITY, wrong(), "a block volume is not served; mount it"),
        Some(AccessType::Mount(mount)) => mount,
    };
    if !mount.fs_type.is_empty() {
        fault(FS_TYPE, field.csi("fsType"), "a file system type is set; leave fsType out");
    }
    if !mount.mount_flags.is_empty() {
        fault(CAPABILITY, wrong(), "mount flags are not served; leave them out");
    }
    if !mount.volume_mount_group.is_empty() {
        let text = "a mount group is not served: no group bit is ever set, and fsGroup is not needed";
        fault(CAPABILITY, wrong(), text);
    }
}

/// Takes the kubelet's facts of the pod out of the map; what is left below [`RESERVED`] was planted.
fn pod(
    context: &mut HashMap<String, String>,
    volume: Option<&VolumeId>,
    field: &Field,
    faults: &mut Vec<Fault>,
) -> Option<PodRef> {
    let mut take = |name: &str, fits: fn(&str) -> bool| {
        let text = match context.remove(&format!("{RESERVED}{name}")) {
            Some(value) if fits(&value) => return Some(value),
            Some(_) => "is not what a kubelet sends",
            None => "is missing: the CSIDriver object must say podInfoOnMount: true",
        };
        faults.push(Fault { code: POD_INFO, field: format!("{RESERVED}{name}"), text: text.into() });
        None
    };
    let namespace = take("pod.namespace", |text| is_dns(text, 63) && !text.contains('.'));
    let name = take("pod.name", |text| is_dns(text, 253));
    let uid = take("pod.uid", |text| PodUid::parse(text).is_ok());
    let service_account = take("serviceAccount.name", |text| is_dns(text, 253));
    take("ephemeral", |text| text == "true");

    let mut planted: Vec<&String> = context.keys().filter(|key| key.starts_with(RESERVED)).collect();
    planted.sort();
    faults.extend(planted.into_iter().map(|key| reserved(key, field)));

    let uid = PodUid::parse(&uid?).ok()?;
    if volume.is_some_and(|volume| volume.pod != uid) {
        let text = "is not the pod of the target path".into();
        faults.push(Fault { code: POD_INFO, field: format!("{RESERVED}pod.uid"), text });
        return None;
    }
    Some(PodRef { namespace: namespace?, name: name?, uid, service_account: service_account? })
}

/// What the kubelet sends for one audience (kubernetes, pkg/volume/csi/csi_plugin.go, `podServiceAccountTokenAttrs`).
#[derive(Deserialize)]
struct Sent {
    token: String,
    #[serde(rename = "expirationTimestamp")]
    expires: String,
}

/// The claims of a bound token that name its pod (kubernetes, pkg/serviceaccount/claims.go).
#[derive(Deserialize)]
struct Claims {
    aud: Audiences,
    #[serde(rename = "kubernetes.io")]
    bound: Bound,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Many(Vec<String>),
}

impl Audiences {
    fn contain(&self, audience: &str) -> bool {
        match self {
            Self::One(only) => only == audience,
            Self::Many(all) => all.iter().any(|one| one == audience),
        }
    }
}

#[derive(Deserialize)]
struct Bound {
    namespace: String,
    pod: Object,
    serviceaccount: Object,
}

#[derive(Deserialize)]
struct Object {
    name: String,
    uid: String,
}

/// The tokens by audience. Their signatures are Vault's to check; here it is made sure that no author handed in
/// another pod's token, or kept a replaced pod's.
fn tokens(json: &str, pod: &PodRef, faults: &mut Vec<Fault>) -> BTreeMap<String, Token> {
    let mut fault = |text: String| faults.push(Fault { code: TOKEN, field: TOKENS.into(), text });
    let Ok(sent) = serde_json::from_str::<BTreeMap<String, Sent>>(json) else {
        fault("is not what a kubelet sends".into());
        return BTreeMap::new();
    };
    let mut tokens = BTreeMap::new();
    for (audience, sent) in sent {
        // The API server's own audience: no connection may use it, so it is not even kept.
        if audience.is_empty() {
            continue;
        }
        match token(&audience, sent, pod) {
            Ok(token) => drop(tokens.insert(audience, token)),
            Err(text) => fault(format!("the token for audience \"{}\" {text}", shown(&audience))),
        }
    }
    tokens
}

fn token(audience: &str, sent: Sent, pod: &PodRef) -> Result<Token, &'static str> {
    let claims = claims(&sent.token).ok_or("is no token bound to a pod")?;
    let Bound { namespace, pod: bound, serviceaccount } = claims.bound;
    if !claims.aud.contain(audience) {
        return Err("is for another audience");
    }
    if namespace != pod.namespace || bound.name != pod.name || bound.uid != pod.uid.as_str() {
        return Err("is another pod's");
    }
    if serviceaccount.name != pod.service_account {
        return Err("is another service account's");
    }
    let expires: jiff::Timestamp = sent.expires.parse().map_err(|_| "has no time of expiry")?;
    Ok(Token {
        jwt: SecretText::new(sent.token),
        expires: SystemTime::from(expires),
        service_account_uid: serviceaccount.uid,
    })
}

/// The payload of a JWT in compact form (RFC 7519); its signature is not looked at.
fn claims(jwt: &str) -> Option<Claims> {
    let mut parts = jwt.split('.');
    let (_, payload, _, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else { return None };
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
}

/// The data of the pod's Secret. The kubelet adds keys of its own, which hold `/`; no key of a Secret can.
fn secret(secrets: HashMap<String, String>) -> Option<BTreeMap<String, SecretBytes>> {
    let data: BTreeMap<_, _> = secrets
        .into_iter()
        .filter(|(key, _)| !key.contains('/'))
        .map(|(key, value)| (key, SecretBytes::new(value.into_bytes())))
        .collect();
    (!data.is_empty()).then_some(data)
}

#[cfg(test)]
mod tests;
