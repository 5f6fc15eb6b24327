//! The official suite for CSI drivers, csi-sanity, against the driver as it ships.
//!
//! The suite plays a kubelet that knows nothing of pods. What stands between it and the driver makes its requests those
//! of a kubelet, and nothing else: see [`REWRITES`].

mod controller;
mod proxy;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::lab::kubelet::PodSpec;
use crate::lab::node::{Node, Options};
use controller::Stub;
use proxy::Proxy;
use sealmount::csi::proto::csi::identity_server::IdentityServer;
use sealmount::csi::proto::csi::node_server::NodeServer;

/// What the proxy changes in a request, for the reader of the summary.
pub(crate) const REWRITES: &[&str] = &[
    "target_path and volume_path: the suite's DIR/target becomes the path that a kubelet gives this pod's volume",
    "readonly: true in every publish; the suite never sets it, and the driver refuses a volume without",
    "volume_context: the pod's name, namespace, UID and service account, as a kubelet adds them (podInfoOnMount)",
    "GetPluginCapabilities: CONTROLLER_SERVICE added, the stub's, or the suite leaves its whole cycle of a volume out",
    "before a publish: the volume's directory and vol_data.json, which a kubelet makes",
];

/// What of the suite does not run, and why it cannot.
const SKIPPED: &[(&str, &str)] = &[(
    r"\[Controller Server\]",
    "a node-only driver has no Controller service; the suite calls it without asking for the capability",
)];

/// What the suite itself leaves out, by its own words, since the driver does not offer it: volumes of one node, with
/// statistics, and no more.
const NOT_OFFERED: &[&str] = &[
    "GroupControllerService not supported",
    "NodeExpandVolume not supported",
    "NodeGetStorageHealth not supported",
    "NodeGetVolumeHealth not supported",
    "NodeStageVolume not supported",
    "NodeUnstageVolume not supported",
    "Service does not have single node multi writer capability",
];

/// How the suite ended.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    /// Tests that ran and passed.
    pub(crate) passed: usize,
    /// Tests that failed, with what they said.
    pub(crate) failed: Vec<String>,
    /// Tests that did not run, by reason.
    pub(crate) skipped: Vec<(String, String)>,
}

/// Runs the suite `csi_sanity` against a driver of its own.
pub(crate) async fn run(csi_sanity: &Path) -> Summary {
    let (node, kubelet) = Node::start(Options::new("version: 1\n")).await;
    let dir = node.dir().join("sanity");
    fs::create_dir(&dir).expect("a directory");
    let pod = PodSpec::new("sanity", kubelet.node()).secret("db", &[]);
    kubelet.admit(&pod);
    let target = kubelet.target(&pod, "creds");
    let mounts = dir.join("mounts");
    let path = |name: &str| dir.join(name);
    let proxy = Proxy::new(kubelet, pod, mounts.join("target"));
    let stub = Stub::new(proxy.volume_id());
    let socket = UnixListener::bind(path("csi.sock")).expect("bind a socket");
    let server = Server::builder()
        .add_service(IdentityServer::new(proxy.clone()))
        .add_service(NodeServer::new(proxy))
        .add_service(stub.service())
        .serve_with_incoming(UnixListenerStream::new(socket));
    let server = tokio::spawn(server);
    fs::write(path("secrets.yaml"), "NodePublishVolumeSecret:\n  password: of-the-suite\n").expect("write");
    // The suite looks whether the target is there before and after; it is where the kubelet wants it.
    let look = format!(
        "#!/bin/sh\ncase \"$1\" in '{}') p='{}';; *) p=$1;; esac\n\
         if [ -d \"$p\" ]; then echo directory; elif [ -f \"$p\" ]; then echo file; \
         elif [ -e \"$p\" ]; then echo other; else echo not_found; fi\n",
        mounts.join("target").display(),
        target.display(),
    );
    fs::write(path("look"), look).expect("write");
    fs::set_permissions(path("look"), fs::Permissions::from_mode(0o755)).expect("a mode");
    let report = path("report.json");
    let skip = SKIPPED.iter().map(|(pattern, _)| *pattern).collect::<Vec<_>>().join("|");
    let flag = |name: &str, value: &Path| format!("--{name}={}", value.display());
    let output = tokio::process::Command::new(csi_sanity)
        .args([
            format!("--csi.endpoint=unix://{}", path("csi.sock").display()),
            flag("csi.mountdir", &mounts),
            flag("csi.stagingdir", &path("staging")),
            flag("csi.secrets", &path("secrets.yaml")),
            flag("csi.checkpathcmd", &path("look")),
            flag("ginkgo.json-report", &report),
            format!("--ginkgo.skip={skip}"),
            "--ginkgo.no-color".to_owned(),
        ])
        .current_dir(&dir)
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(300), output).await.expect("the suite ends");
    let output = output.expect("start the suite");
    server.abort();
    let text = String::from_utf8_lossy(&output.stdout);
    let report = fs::read(&report).unwrap_or_else(|error| panic!("no report ({error}):\n{text}"));
    let mut summary = summary(&serde_json::from_slice(&report).expect("a report"));
    if !output.status.success() && summary.failed.is_empty() {
        summary.failed.push(format!("the suite: {}\n{text}\n{}", output.status, node.log()));
    }
    summary
}

/// From Ginkgo's JSON report.
fn summary(report: &Value) -> Summary {
    let mut summary = Summary::default();
    let specs = report.as_array().into_iter().flatten().flat_map(|suite| suite["SpecReports"].as_array());
    for spec in specs.flatten().filter(|spec| spec["LeafNodeType"] == "It") {
        let above = spec["ContainerHierarchyTexts"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let leaf = spec["LeafNodeText"].as_str().unwrap_or_default();
        let name = above.chain([leaf]).collect::<Vec<_>>().join(" ");
        let said = spec["Failure"]["Message"].as_str().unwrap_or_default();
        match spec["State"].as_str() {
            Some("passed") => summary.passed += 1,
            Some("skipped" | "pending") => {
                let own = SKIPPED.iter().find(|(pattern, _)| name.contains(&pattern.replace('\\', "")));
                let reason = match own {
                    Some((_, why)) => (*why).to_owned(),
                    None if NOT_OFFERED.contains(&said) => format!("the suite: {said}"),
                    None => {
                        summary.failed.push(format!("{name}: did not run: {said}"));
                        continue;
                    }
                };
                summary.skipped.push((name, reason));
            }
            state => summary.failed.push(format!("{name}: {}: {said}", state.unwrap_or_default())),
        }
    }
    summary
}
