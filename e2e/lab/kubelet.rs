//! Plays the kubelet over the driver's real sockets: registration, NodePublishVolume, NodeUnpublishVolume, stats, in
//! the order and with the files that kubernetes, pkg/volume/csi and pkg/kubelet/pluginmanager show.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use hyper_util::rt::TokioIo;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use sealmount::csi::proto::csi::node_client::NodeClient;
use sealmount::csi::proto::csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
use sealmount::csi::proto::csi::{
    NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
};
use sealmount::csi::proto::registration::registration_client::RegistrationClient;
use sealmount::csi::proto::registration::{InfoRequest, PluginInfo, RegistrationStatus};
use sealmount::request::DRIVER;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

/// The kubelet's deadline of one CSI call (csi_plugin.go, `csiTimeout`).
pub const CSI_TIMEOUT: Duration = Duration::from_secs(120);
/// The kubelet's deadline of GetInfo on the registration socket.
pub const INFO_TIMEOUT: Duration = Duration::from_secs(1);

/// One pod: its manifest as the API server would show it, and what the kubelet sends along with its volumes.
#[derive(Clone)]
pub struct PodSpec {
    /// The manifest. Tests break exactly one thing of it with [`PodSpec::set`] and [`PodSpec::remove`].
    pub manifest: Value,
    /// The Secrets of the pod's namespace, by name.
    pub secrets: BTreeMap<String, BTreeMap<String, String>>,
    /// The pod's tokens by audience: the JWT and when it expires.
    pub tokens: BTreeMap<String, (String, SystemTime)>,
}

impl PodSpec {
    /// A valid pod of namespace `payments` on `node`: container `app` (UID 1000) mounts the volume `creds` of this
    /// driver, container `envoy` (UID 1337) does not. The volume asks for nothing yet.
    pub fn new(name: &str, node: &str) -> Self {
        let uid = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
        let manifest = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "payments", "uid": uid.trim()},
            "spec": {
                "nodeName": node,
                "serviceAccountName": "payments",
                "containers": [
                    {
                        "name": "app", "image": "registry.example/payments:1",
                        "securityContext": {"runAsUser": 1000},
                        "volumeMounts": [{"name": "creds", "mountPath": "/etc/creds", "readOnly": true}]
                    },
                    {
                        "name": "envoy", "image": "registry.example/envoy:1.40",
                        "securityContext": {"runAsUser": 1337}
                    }
                ],
                "volumes": [{"name": "creds", "csi": {"driver": DRIVER, "readOnly": true}}]
            }
        });
        Self { manifest, secrets: BTreeMap::new(), tokens: BTreeMap::new() }
    }

    /// Writes `value` at a JSON pointer of the manifest, making the objects on the way.
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        let mut at = &mut self.manifest;
        for key in pointer.split('/').skip(1) {
            let key = key.replace("~1", "/");
            at = match at {
                Value::Array(list) => {
                    let index: usize = key.parse().unwrap();
                    if index == list.len() {
                        list.push(Value::Null);
                    }
                    &mut list[index]
                }
                _ => &mut at[&key],
            };
        }
        *at = value;
        self
    }

    /// Removes what stands at a JSON pointer of the manifest.
    pub fn remove(mut self, pointer: &str) -> Self {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        match self.manifest.pointer_mut(parent).unwrap() {
            Value::Array(list) => drop(list.remove(key.parse().unwrap())),
            Value::Object(map) => drop(map.remove(&key.replace("~1", "/")).unwrap()),
            _ => panic!("{parent} of the manifest has no members"),
        }
        self
    }

    /// Sets one of the first volume's attributes.
    pub fn attribute(self, key: &str, value: &str) -> Self {
        self.set(&format!("/spec/volumes/0/csi/volumeAttributes/{}", key.replace('/', "~1")), json!(value))
    }

    /// Makes a Secret of this name with these keys, and names it in the first volume's `nodePublishSecretRef`.
    pub fn secret(mut self, name: &str, data: &[(&str, &str)]) -> Self {
        let data = data.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        self.secrets.insert(name.to_owned(), data);
        self.set("/spec/volumes/0/csi/nodePublishSecretRef", json!({"name": name}))
    }

    /// The token the kubelet asks for on the pod's behalf for `audience` (CSIDriver.spec.tokenRequests).
    pub fn token(mut self, audience: &str, jwt: &str, expires: SystemTime) -> Self {
        self.tokens.insert(audience.to_owned(), (jwt.to_owned(), expires));
        self
    }

    /// `metadata.name`.
    pub fn name(&self) -> &str {
        self.manifest["metadata"]["name"].as_str().unwrap()
    }

    /// `metadata.namespace`.
    pub fn namespace(&self) -> &str {
        self.manifest["metadata"]["namespace"].as_str().unwrap()
    }

    /// `metadata.uid`.
    pub fn uid(&self) -> &str {
        self.manifest["metadata"]["uid"].as_str().unwrap()
    }

    /// `spec.serviceAccountName`, which admission sets to `default` if the author leaves it out.
    pub fn service_account(&self) -> &str {
        self.manifest["spec"]["serviceAccountName"].as_str().unwrap_or("default")
    }

    /// The `csi` source of a volume.
    fn source(&self, volume: &str) -> &Value {
        let volumes = self.manifest["spec"]["volumes"].as_array().unwrap();
        &volumes.iter().find(|it| it["name"] == volume).unwrap_or_else(|| panic!("no volume {volume}"))["csi"]
    }

    /// The manifest as YAML.
    pub fn yaml(&self) -> String {
        let mut text = String::new();
        write_yaml(&mut text, &self.manifest, 0);
        text
    }
}

/// Block YAML; scalars are JSON (a subset of YAML 1.2) but for plain multi-line text, which is easier to read as `|`.
pub fn write_yaml(text: &mut String, value: &Value, depth: usize) {
    let pad = "  ".repeat(depth);
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, member) in map {
                text.push_str(&format!("{pad}{}:", scalar(key)));
                write_member(text, member, depth);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            for item in list {
                if item.as_object().is_some_and(|map| !map.is_empty()) {
                    let mut inner = String::new();
                    write_yaml(&mut inner, item, depth + 1);
                    // The first member of a map stands on the dash's line.
                    text.push_str(&format!("{pad}- {}", &inner[pad.len() + 2..]));
                } else {
                    text.push_str(&format!("{pad}-"));
                    write_member(text, item, depth);
                }
            }
        }
        plain => text.push_str(&format!("{pad}{plain}\n")),
    }
}

fn write_member(text: &mut String, member: &Value, depth: usize) {
    match member {
        Value::Object(map) if !map.is_empty() => {
            text.push('\n');
            write_yaml(text, member, depth + 1);
        }
        Value::Array(list) if !list.is_empty() => {
            text.push('\n');
            write_yaml(text, member, depth);
        }
        Value::String(lines) if is_block(lines) => {
            text.push_str(" |\n");
            for line in lines.lines() {
                text.push_str(&format!("{}{line}\n", "  ".repeat(depth + 1)));
            }
        }
        Value::String(plain) => text.push_str(&format!(" {}\n", scalar(plain))),
        plain => text.push_str(&format!(" {plain}\n")),
    }
}

fn is_block(text: &str) -> bool {
    let clean = |line: &str| !line.is_empty() && !line.ends_with(' ') && !line.chars().any(char::is_control);
    let mut lines = text.strip_suffix('\n').unwrap_or("").split('\n');
    text.matches('\n').count() > 1 && !text.starts_with(' ') && lines.all(clean)
}

/// Bare where every YAML reader takes it for text, quoted otherwise.
fn scalar(text: &str) -> String {
    let letter = |c: char| c.is_ascii_alphabetic();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    let word = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"].contains(&text.to_lowercase().as_str());
    if text.starts_with(letter) && text.chars().all(plain) && !word {
        return text.to_owned();
    }
    Value::from(text).to_string()
}

/// The directories of one kubelet and the driver it registered.
pub struct Kubelet {
    root: PathBuf,
    registry: PathBuf,
    manifests: PathBuf,
    node: String,
    driver: Mutex<Option<PathBuf>>,
}

impl Kubelet {
    /// A kubelet whose root (`--kubelet-dir`), plugin registry and pod manifests are these directories.
    pub fn new(root: &Path, registry: &Path, manifests: &Path, node: &str) -> Self {
        Self {
            root: root.to_owned(),
            registry: registry.to_owned(),
            manifests: manifests.to_owned(),
            node: node.to_owned(),
            driver: Mutex::new(None),
        }
    }

    /// The name of the node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Waits for a registration socket and registers the driver behind it: GetInfo within one second, NodeGetInfo on
    /// the endpoint it names, then `Notify(true)`.
    pub async fn register(&self, within: Duration) -> io::Result<PluginInfo> {
        // A socket that a dead driver left answers nobody; the reconciler tries again while it is there.
        let end = Instant::now() + within;
        loop {
            match self.register_once(within).await {
                Err(_) if Instant::now() < end => tokio::time::sleep(Duration::from_millis(20)).await,
                done => return done,
            }
        }
    }

    async fn register_once(&self, within: Duration) -> io::Result<PluginInfo> {
        let socket = self.registration_socket(within).await?;
        let mut plugin = RegistrationClient::new(dial_plugin(&socket).await.map_err(io::Error::other)?);
        let info = tokio::time::timeout(INFO_TIMEOUT, plugin.get_info(InfoRequest {}))
            .await
            .map_err(|_| io::Error::other("GetInfo took more than a second"))?
            .map_err(io::Error::other)?
            .into_inner();
        if info.r#type != "CSIPlugin" || info.name != DRIVER || info.supported_versions.is_empty() {
            return Err(io::Error::other(format!("not this driver's registration: {info:?}")));
        }
        let endpoint = if info.endpoint.is_empty() { socket } else { PathBuf::from(&info.endpoint) };
        let mut csi = NodeClient::new(dial(&endpoint).await.map_err(io::Error::other)?);
        let id = csi.node_get_info(NodeGetInfoRequest {}).await.map_err(io::Error::other)?.into_inner().node_id;
        if id.is_empty() {
            return Err(io::Error::other("NodeGetInfo answered no node_id"));
        }
        *self.driver.lock().unwrap() = Some(endpoint);
        let status = RegistrationStatus { plugin_registered: true, error: String::new() };
        plugin.notify_registration_status(status).await.map_err(io::Error::other)?;
        Ok(info)
    }

    /// Tells the driver that its registration was refused, as the kubelet does for one it cannot use.
    pub async fn refuse_registration(&self, within: Duration, error: &str) -> io::Result<()> {
        let socket = self.registration_socket(within).await?;
        let mut plugin = RegistrationClient::new(dial_plugin(&socket).await.map_err(io::Error::other)?);
        let status = RegistrationStatus { plugin_registered: false, error: error.to_owned() };
        plugin.notify_registration_status(status).await.map_err(io::Error::other)?;
        Ok(())
    }

    /// The first socket in the registry whose name does not start with a dot.
    pub async fn registration_socket(&self, within: Duration) -> io::Result<PathBuf> {
        let end = Instant::now() + within;
        loop {
            for entry in fs::read_dir(&self.registry)? {
                let entry = entry?;
                let hidden = entry.file_name().to_string_lossy().starts_with('.');
                if !hidden && entry.file_type()?.is_socket() {
                    return Ok(entry.path());
                }
            }
            if Instant::now() > end {
                return Err(io::Error::other("no registration socket appeared"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The CSI socket that the registered driver named.
    pub fn endpoint(&self) -> Result<PathBuf, Status> {
        let path = self.driver.lock().unwrap().clone();
        path.ok_or_else(|| Status::unavailable("driver name csi.sealmount.io not found in the list"))
    }

    /// A new connection to the driver's CSI socket: the kubelet makes one for each call.
    pub async fn csi(&self) -> Result<NodeClient<Channel>, Status> {
        Ok(NodeClient::new(dial(&self.endpoint()?).await?))
    }

    /// Writes the pod's manifest to where the node reads pods from.
    pub fn admit(&self, pod: &PodSpec) {
        // Renamed into place, so that no reader sees half a manifest.
        let new = self.manifests.join(format!(".{}", pod.uid()));
        fs::write(&new, pod.yaml()).unwrap();
        fs::rename(new, self.manifest(pod)).unwrap();
    }

    /// Removes the pod's manifest.
    pub fn forget(&self, pod: &PodSpec) {
        fs::remove_file(self.manifest(pod)).unwrap();
    }

    fn manifest(&self, pod: &PodSpec) -> PathBuf {
        self.manifests.join(format!("{}.yaml", pod.uid()))
    }

    /// The volume's directory, which the kubelet makes; `vol_data.json` and the target lie in it.
    pub fn parent(&self, pod: &PodSpec, volume: &str) -> PathBuf {
        self.root.join(format!("pods/{}/volumes/kubernetes.io~csi/{volume}", pod.uid()))
    }

    /// The target path: where the driver attaches the volume.
    pub fn target(&self, pod: &PodSpec, volume: &str) -> PathBuf {
        self.parent(pod, volume).join("mount")
    }

    /// What the kubelet sends for this volume.
    pub fn request(&self, pod: &PodSpec, volume: &str) -> NodePublishVolumeRequest {
        let source = pod.source(volume);
        let mut context: HashMap<String, String> = source["volumeAttributes"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, value)| (key.clone(), value.as_str().unwrap().to_owned()))
            .collect();
        // The kubelet's keys win over the author's, but nothing strips other reserved ones (`mergeMap`).
        for (key, value) in [
            ("pod.name", pod.name()),
            ("pod.namespace", pod.namespace()),
            ("pod.uid", pod.uid()),
            ("serviceAccount.name", pod.service_account()),
            ("ephemeral", "true"),
        ] {
            context.insert(format!("csi.storage.k8s.io/{key}"), value.to_owned());
        }
        let mut secrets = HashMap::new();
        if let Some(name) = source["nodePublishSecretRef"]["name"].as_str() {
            secrets.extend(pod.secrets.get(name).unwrap_or_else(|| panic!("no Secret {name}")).clone());
        }
        if !pod.tokens.is_empty() {
            let tokens: serde_json::Map<String, Value> = pod
                .tokens
                .iter()
                .map(|(audience, (jwt, expires))| {
                    let expires = jiff::Timestamp::try_from(*expires).unwrap().strftime("%Y-%m-%dT%H:%M:%SZ");
                    (audience.clone(), json!({"token": jwt, "expirationTimestamp": expires.to_string()}))
                })
                .collect();
            secrets.insert("csi.storage.k8s.io/serviceAccount.tokens".into(), Value::from(tokens).to_string());
        }
        let fs_type = source["fsType"].as_str().unwrap_or("").to_owned();
        NodePublishVolumeRequest {
            volume_id: handle(pod, volume),
            target_path: self.target(pod, volume).to_str().unwrap().to_owned(),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume { fs_type, ..MountVolume::default() })),
                access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
            }),
            readonly: source["readOnly"].as_bool().unwrap_or(false),
            secrets,
            volume_context: context,
            ..NodePublishVolumeRequest::default()
        }
    }

    /// Makes the volume's directory and `vol_data.json`, as the kubelet does before every NodePublishVolume
    /// (csi_mounter.go, `SetUpAt`).
    pub fn prepare(&self, pod: &PodSpec, volume: &str) {
        let parent = self.parent(pod, volume);
        DirBuilder::new().recursive(true).mode(0o750).create(&parent).unwrap();
        fs::write(parent.join("vol_data.json"), self.vol_data(pod, volume)).unwrap();
    }

    /// `vol_data.json`: Go's encoder sorts the keys, writes no blanks and ends the line.
    fn vol_data(&self, pod: &PodSpec, volume: &str) -> String {
        let id = handle(pod, volume);
        let attachment = hex(&Sha256::digest(format!("{id}{DRIVER}{}", self.node)));
        let data = BTreeMap::from([
            ("attachmentID", format!("csi-{attachment}")),
            ("driverName", DRIVER.to_owned()),
            ("nodeName", self.node.clone()),
            ("specVolID", volume.to_owned()),
            ("volumeHandle", id),
            ("volumeLifecycleMode", "Ephemeral".to_owned()),
        ]);
        serde_json::to_string(&data).unwrap() + "\n"
    }

    /// Publishes a volume of the pod: its directory, its data file, then the call.
    pub async fn publish(&self, pod: &PodSpec, volume: &str) -> Result<(), Status> {
        self.publish_with(pod, volume, |_| {}).await
    }

    /// [`Kubelet::publish`] with a request that `change` may spoil first.
    pub async fn publish_with(
        &self,
        pod: &PodSpec,
        volume: &str,
        change: impl FnOnce(&mut NodePublishVolumeRequest),
    ) -> Result<(), Status> {
        let mut request = self.request(pod, volume);
        change(&mut request);
        self.prepare(pod, volume);
        let outcome = self.call_publish(request).await;
        if outcome.as_ref().is_err_and(|status| is_final(status.code())) {
            // The kubelet forgets the volume and will not unpublish it.
            self.remove_mount_dir(pod, volume);
        }
        outcome
    }

    /// The bare calls of one publish, each on a connection of its own.
    pub async fn call_publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        self.csi().await?.node_get_capabilities(NodeGetCapabilitiesRequest {}).await?;
        let mut request = Request::new(request);
        request.set_timeout(CSI_TIMEOUT);
        self.csi().await?.node_publish_volume(request).await?;
        Ok(())
    }

    /// Unpublishes a volume and removes its directory.
    pub async fn unpublish(&self, pod: &PodSpec, volume: &str) -> Result<(), Status> {
        let target_path = self.target(pod, volume).to_str().unwrap().to_owned();
        let mut request = Request::new(NodeUnpublishVolumeRequest { volume_id: handle(pod, volume), target_path });
        request.set_timeout(CSI_TIMEOUT);
        self.csi().await?.node_unpublish_volume(request).await?;
        self.remove_mount_dir(pod, volume);
        Ok(())
    }

    /// The volume's figures.
    pub async fn stats(&self, pod: &PodSpec, volume: &str) -> Result<NodeGetVolumeStatsResponse, Status> {
        let mut request = Request::new(NodeGetVolumeStatsRequest {
            volume_id: handle(pod, volume),
            volume_path: self.target(pod, volume).to_str().unwrap().to_owned(),
            ..NodeGetVolumeStatsRequest::default()
        });
        request.set_timeout(CSI_TIMEOUT);
        Ok(self.csi().await?.node_get_volume_stats(request).await?.into_inner())
    }

    /// `removeMountDir` of csi_mounter.go: nothing while the target is a mount; otherwise target, data file, parent.
    fn remove_mount_dir(&self, pod: &PodSpec, volume: &str) {
        let target = self.target(pod, volume);
        if is_mounted(&target) {
            return;
        }
        let parent = self.parent(pod, volume);
        let gone = |outcome: io::Result<()>| match outcome {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        gone(fs::remove_dir(&target)).unwrap();
        gone(fs::remove_file(parent.join("vol_data.json"))).unwrap();
        gone(fs::remove_dir(&parent)).unwrap();
    }

    /// Whether nothing of the volume is left: no mount and no directory.
    pub fn is_gone(&self, pod: &PodSpec, volume: &str) -> bool {
        !self.parent(pod, volume).exists()
    }
}

/// Whether something is mounted exactly here, asked as the kubelet does (mount-utils, `STATX_ATTR_MOUNT_ROOT`).
pub fn is_mounted(path: &Path) -> bool {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(CWD, path, flags, StatxFlags::BASIC_STATS)
        .is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Whether the kubelet takes a code as the end of the operation (csi_client.go, `isFinalError`): after such an error
/// on a first publish it never unpublishes; after any other it is sure to.
pub fn is_final(code: Code) -> bool {
    let uncertain =
        [Code::Cancelled, Code::DeadlineExceeded, Code::Unavailable, Code::ResourceExhausted, Code::Aborted];
    !uncertain.contains(&code)
}

/// A connection over a unix socket with the authority the kubelet sends since 1.26.
pub async fn dial(socket: &Path) -> Result<Channel, Status> {
    dial_as(socket, Uri::from_static("http://localhost")).await
}

async fn dial_as(socket: &Path, authority: Uri) -> Result<Channel, Status> {
    let path = socket.to_owned();
    let connect = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from(authority)
        .connect_with_connector(connect)
        .await
        .map_err(|error| Status::unavailable(format!("{}: {error}", socket.display())))
}

/// As the kubelet's plugin watcher does it, which is not as for CSI calls: grpc-go makes `:authority` of the escaped path
/// (pluginmanager/operationexecutor, `dial`; grpc-go, `encodeAuthority`).
async fn dial_plugin(socket: &Path) -> Result<Channel, Status> {
    let escaped: String = socket
        .to_str()
        .unwrap()
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'@' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect();
    let authority = format!("http://{escaped}/").parse();
    dial_as(socket, authority.map_err(|error| Status::internal(format!("{escaped}: {error}")))?).await
}

/// The id of an inline volume (csi_mounter.go, `makeVolumeHandle`); written out here, not taken from the driver.
pub fn handle(pod: &PodSpec, volume: &str) -> String {
    format!("csi-{}", hex(&Sha256::digest(format!("{}{volume}", pod.uid()))))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The inode of a socket: another one means that it was bound anew.
pub fn inode(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|it| it.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_is_read_back_as_it_was() {
        let pod = PodSpec::new("web-0", "8080")
            .attribute("files", "a: x/y#z\nb:\n  from: \"#k\"\n\n")
            .attribute("odd", " two\nlines, the first indented\n")
            .set("/metadata/labels/app~1name", json!("on"))
            .set("/metadata/annotations", json!({"empty": "", "number": "0123", "tab": "a\tb\nc\n", "list": [[], {}]}))
            .set("/spec/hostPID", json!(true));
        let read: Value = serde_saphyr::from_str(&pod.yaml()).unwrap();
        assert_eq!(read, pod.manifest, "{}", pod.yaml());
    }
}
