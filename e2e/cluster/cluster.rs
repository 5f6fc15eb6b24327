//! One node of Kubernetes, as processes of this machine, with the driver and OpenBao on it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::kube::{Kube, run};
use crate::lab::{Authority, OpenBao};
use crate::machine::{self, NODE_ADDRESS, SERVICE_ADDRESS};
use crate::programs::Programs;

/// The node's name.
pub(crate) const NODE: &str = "node1";
/// Vault's name in the platform file; no DNS has it, the chart's `hostAliases` do.
pub(crate) const VAULT: &str = "vault.example";
/// The namespace of the driver.
pub(crate) const SYSTEM: &str = "sealmount-system";

/// What the API server writes of requests about pods, without their bodies.
pub(crate) const AUDIT_LOG: &str = "/var/log/audit.log";

/// How long things last: the full values with `LONG=1`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// The kubelet's `syncFrequency`, from which the pace of its republishes follows.
    pub(crate) sync: Duration,
    /// `stale_after` of the platform file.
    pub(crate) stale_after: Duration,
    /// How long a part is away.
    pub(crate) outage: Duration,
}

impl Times {
    fn get() -> Self {
        let seconds = Duration::from_secs;
        if std::env::var_os("LONG").is_some_and(|it| !it.is_empty() && it != "0") {
            Self { sync: seconds(60), stale_after: seconds(300), outage: seconds(120) }
        } else {
            Self { sync: seconds(10), stale_after: seconds(20), outage: seconds(30) }
        }
    }

    /// When the kubelet has surely published again: its syncs, and time for a busy machine.
    pub(crate) fn republished(self) -> Duration {
        2 * self.sync + Duration::from_secs(60)
    }
}

/// A program of the node that tests stop and start.
pub(crate) struct Process {
    name: &'static str,
    command: Vec<String>,
    log: PathBuf,
    child: Option<Child>,
}

impl Process {
    fn start_new(name: &'static str, log: &Path, command: Vec<String>) -> Self {
        let mut process = Self { name, command, log: log.join(format!("{name}.log")), child: None };
        process.start();
        process
    }

    /// Starts it, if it does not run.
    pub(crate) fn start(&mut self) {
        if self.child.is_some() {
            return;
        }
        let out = File::options().create(true).append(true).open(&self.log).expect("open a log");
        let child = Command::new(&self.command[0])
            .args(&self.command[1..])
            .stdin(Stdio::null())
            .stderr(out.try_clone().expect("share the log"))
            .stdout(out)
            .spawn()
            .unwrap_or_else(|error| panic!("start {}: {error}", self.name));
        self.child = Some(child);
    }

    /// Asks it to end, and waits; after ten seconds it is killed.
    pub(crate) fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _ = kill_process(Pid::from_child(&child), Signal::TERM);
        let limit = Instant::now() + Duration::from_secs(10);
        while child.try_wait().is_ok_and(|it| it.is_none()) {
            if Instant::now() > limit {
                let _ = child.kill();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The cluster.
pub(crate) struct Cluster {
    /// Kubernetes' version, `1.37.2`.
    pub(crate) version: String,
    /// All of its files that are not below `/var`.
    pub(crate) dir: PathBuf,
    /// Where its programs are.
    pub(crate) programs: Programs,
    /// kubectl.
    pub(crate) kube: Kube,
    /// The Vault of the platform file, on the node's address, port 8200.
    pub(crate) bao: OpenBao,
    /// containerd.
    pub(crate) containerd: Process,
    /// kube-apiserver.
    pub(crate) apiserver: Process,
    /// kubelet.
    pub(crate) kubelet: Process,
    /// How long things last.
    pub(crate) times: Times,
    /// The project's directory.
    pub(crate) project: PathBuf,
    canaries: Mutex<Vec<String>>,
}

impl Cluster {
    /// Starts everything but the driver, and waits until the node is ready.
    pub(crate) async fn start(version: &str, programs: Programs) -> Self {
        let dir = machine::directory();
        let project = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let times = Times::get();
        let own = dir.join("node");
        let log = Path::new("/var/log").to_owned();
        fs::create_dir_all(own.join("images")).expect("a directory");
        let authority = Arc::new(Authority::new());
        let pki = Pki::write(Path::new("/var/lib/pki"), &authority);
        write_admin(&dir, &pki);
        let text = |args: &[&str]| args.iter().map(|it| (*it).to_owned()).collect::<Vec<String>>();
        let start = |name: &'static str, args: &[&str]| Process::start_new(name, &log, text(args));
        fs::write(own.join("containerd.toml"), containerd(&programs, &own)).expect("write the config");
        // The platform that needs neither KVM nor ptrace.
        fs::write(own.join("runsc.toml"), "[runsc_config]\n  platform = \"systrap\"\n").expect("write the config");
        fs::write(own.join("10-net.conflist"), network().to_string()).expect("write the config");
        let config = own.join("containerd.toml").display().to_string();
        let containerd = start("containerd", &["containerd", "-c", &config]);
        // What no check stops ends with the namespace.
        start(
            "etcd",
            &[
                "etcd",
                "--data-dir=/var/lib/etcd",
                "--listen-client-urls=http://127.0.0.1:2379",
                "--advertise-client-urls=http://127.0.0.1:2379",
                "--listen-peer-urls=http://127.0.0.1:2380",
                "--unsafe-no-fsync",
            ],
        );
        let apiserver = start("kube-apiserver", &pki.apiserver());
        let bao = OpenBao::start_at(authority.clone(), NODE_ADDRESS, 8200).await;
        let mut images = crate::images::build(&own.join("images"), &crate::lab::program("envoy"));
        images.push(crate::lab::programs::cache().join("images/sealmount.tar"));
        let kube = Kube;
        until("the API server serves", Duration::from_secs(60), async || {
            kube.try_run("get --raw /readyz").await.is_ok_and(|it| it == "ok")
        })
        .await;
        start(
            "kube-controller-manager",
            &[
                "kube-controller-manager",
                "--kubeconfig=/var/lib/pki/controllers.kubeconfig",
                "--service-account-private-key-file=/var/lib/pki/tokens.key",
                "--root-ca-file=/var/lib/pki/ca.pem",
                "--use-service-account-credentials",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
            ],
        );
        start(
            "kube-scheduler",
            &[
                "kube-scheduler",
                "--kubeconfig=/var/lib/pki/scheduler.kubeconfig",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
            ],
        );
        for image in &images {
            import(image).await;
        }
        let yaml = own.join("kubelet.json");
        fs::write(&yaml, kubelet(&times, &machine::cgroup(&dir)).to_string()).expect("write the config");
        let config = format!("--config={}", yaml.display());
        let address = format!("--node-ip={NODE_ADDRESS}");
        let kubelet = start(
            "kubelet",
            &[
                "kubelet",
                &config,
                "--kubeconfig=/var/lib/pki/kubelet.kubeconfig",
                "--hostname-override=node1",
                &address,
                "--v=2",
            ],
        );
        until("the node is ready", Duration::from_secs(120), async || {
            kube.try_run("get node node1").await.is_ok_and(|it| it.contains(" Ready"))
                && kube.try_run("get serviceaccount -n default default").await.is_ok()
        })
        .await;
        Self {
            version: version.to_owned(),
            dir,
            programs,
            kube,
            bao,
            containerd,
            apiserver,
            kubelet,
            times,
            project,
            canaries: Mutex::default(),
        }
    }

    /// Whether this version of Kubernetes is at least `1.minor`.
    pub(crate) fn at_least(&self, minor: u32) -> bool {
        self.version.split('.').nth(1).and_then(|it| it.parse::<u32>().ok()).is_some_and(|it| it >= minor)
    }

    /// A new secret value that the sweep after each check looks for everywhere.
    pub(crate) fn canary(&self) -> String {
        let mut bytes = [0_u8; 12];
        ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes).expect("random bytes");
        let value = format!("canary{}", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        self.canaries.lock().expect("no panic in there").push(value.clone());
        value
    }

    /// All canaries so far.
    pub(crate) fn canaries(&self) -> Vec<String> {
        self.canaries.lock().expect("no panic in there").clone()
    }

    /// A namespace for one check, at a level of the Pod Security Standards.
    pub(crate) async fn namespace(&self, name: &str, level: &str) -> String {
        let yaml = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": level}},
        });
        self.kube.apply("default", &yaml.to_string()).await;
        // The controllers that lost their API server come back to it with pauses.
        until("the namespace has its ServiceAccount", Duration::from_secs(120), async || {
            self.kube.try_run(&format!("get serviceaccount -n {name} default")).await.is_ok()
        })
        .await;
        name.to_owned()
    }

    /// A Kubernetes Secret with these values.
    pub(crate) async fn secret(&self, namespace: &str, name: &str, values: &[(&str, &str)]) {
        let values: BTreeMap<_, _> = values.iter().copied().collect();
        let yaml = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": values});
        self.kube.apply(namespace, &yaml.to_string()).await;
    }

    /// After a check that broke off: what it may have stopped runs again.
    pub(crate) async fn restore(&mut self) {
        for process in [&mut self.containerd, &mut self.apiserver, &mut self.kubelet] {
            process.start();
        }
        if self.bao.call("", "GET", "sys/seal-status", &Value::Null).await.is_none() {
            self.bao.stop();
            self.bao.start_again().await;
        }
        until("the API server serves", Duration::from_secs(60), async || {
            self.kube.try_run("get --raw /readyz").await.is_ok_and(|it| it == "ok")
        })
        .await;
        let patch = r#"{"spec":{"template":{"spec":{"nodeSelector":{"e2e":null}}}}}"#;
        let args = ["patch", "daemonset", "sealmount", "-n", SYSTEM, "--type=merge", "-p", patch];
        // Without a DaemonSet nothing was installed: the check that says so has failed already.
        let _ = self.kube.try_with(&args, "").await;
    }

    /// The driver's pod on the node, once it is ready.
    pub(crate) async fn driver(&self) -> Value {
        let select = format!("get pods -n {SYSTEM} -l app.kubernetes.io/name=sealmount");
        let mut found = None;
        until("the driver's pod is ready", Duration::from_secs(60), async || {
            let list = self.kube.json(&select).await;
            let pods = list["items"].as_array().cloned().unwrap_or_default();
            found = pods.into_iter().find(|pod| pod["metadata"]["deletionTimestamp"].is_null() && is_ready(pod));
            found.is_some()
        })
        .await;
        found.expect("just found")
    }

    /// Waits until a value of a file changes, by what `kubectl exec cat` prints.
    pub(crate) async fn reads(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        path: &str,
    ) -> Result<String, String> {
        let ran = self.kube.exec(namespace, pod, container, &["cat", path]).await;
        if ran.code == 0 { Ok(ran.out) } else { Err(ran.err) }
    }
}

/// Whether a pod's status says it is ready.
pub(crate) fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|it| it["type"] == "Ready" && it["status"] == "True")
}

/// Waits until `holds`; panics with `what` after `limit`.
pub(crate) async fn until(what: &str, limit: Duration, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + limit;
    while !holds().await {
        assert!(Instant::now() < end, "not within {} s: {what}", limit.as_secs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The environment of everything the cluster runs, and a file with the same for a shell.
#[allow(unsafe_code)] // one thread runs so far
pub(crate) fn enter(dir: &Path, programs: &Programs) {
    let bao = crate::lab::program("bao");
    let path = format!("{}:{}", bao.parent().expect("a directory").display(), programs.search_path());
    let home = dir.join("home").display().to_string();
    let set = [("PATH", path), ("KUBECONFIG", dir.join("admin.kubeconfig").display().to_string()), ("HOME", home)];
    let mut text = String::new();
    for (name, value) in set {
        text.push_str(&format!("export {name}='{value}'\n"));
        // SAFETY: called before any other thread of this process exists.
        unsafe { std::env::set_var(name, value) };
    }
    fs::write(dir.join("env"), text).expect("write the environment");
}

/// Certificates and kubeconfigs, below one directory.
struct Pki {
    dir: PathBuf,
}

impl Pki {
    fn write(dir: &Path, authority: &Authority) -> Self {
        let put = |name: &str, text: &str| fs::write(dir.join(name), text).expect("write a certificate");
        put("ca.pem", authority.pem());
        let names = ["localhost", "127.0.0.1", NODE_ADDRESS, SERVICE_ADDRESS, "kubernetes", "kubernetes.default.svc"];
        let server = authority.server_for(&names);
        put("apiserver.crt", &server.certificate);
        put("apiserver.key", &server.key);
        // Who may do what stands in the name: the node authorizer is real.
        for (file, organization, name) in [
            ("admin", Some("system:masters"), "admin"),
            ("controllers", None, "system:kube-controller-manager"),
            ("scheduler", None, "system:kube-scheduler"),
            ("kubelet", Some("system:nodes"), "system:node:node1"),
        ] {
            let client = authority.client(organization, name);
            put(&format!("{file}.crt"), &client.certificate);
            put(&format!("{file}.key"), &client.key);
            let data = |text: &str| STANDARD.encode(text);
            let config = json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "lab",
                "clusters": [{"name": "lab", "cluster": {
                    "server": "https://127.0.0.1:443", "certificate-authority-data": data(authority.pem()),
                }}],
                "users": [{"name": "lab", "user": {
                    "client-certificate-data": data(&client.certificate), "client-key-data": data(&client.key),
                }}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
            });
            put(&format!("{file}.kubeconfig"), &config.to_string());
        }
        let tokens = rcgen::KeyPair::generate().expect("make a key");
        put("tokens.key", &tokens.serialize_pem());
        put("tokens.pub", &tokens.public_key_pem());
        let audit = json!({
            "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
            "rules": [
                {"level": "Metadata", "verbs": ["create", "update", "patch"],
                 "resources": [{"resources": ["pods", "pods/ephemeralcontainers"]}]},
                {"level": "None"},
            ],
        });
        put("audit.json", &audit.to_string());
        Self { dir: dir.to_owned() }
    }

    fn apiserver(&self) -> Vec<&str> {
        vec![
            "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:2379",
            "--bind-address=0.0.0.0",
            "--advertise-address=10.244.77.1",
            "--secure-port=443",
            "--tls-cert-file=/var/lib/pki/apiserver.crt",
            "--tls-private-key-file=/var/lib/pki/apiserver.key",
            "--client-ca-file=/var/lib/pki/ca.pem",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-key-file=/var/lib/pki/tokens.pub",
            "--service-account-signing-key-file=/var/lib/pki/tokens.key",
            "--service-cluster-ip-range=10.96.0.0/24",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            "--kubelet-client-certificate=/var/lib/pki/admin.crt",
            "--kubelet-client-key=/var/lib/pki/admin.key",
            "--kubelet-preferred-address-types=InternalIP",
            "--endpoint-reconciler-type=none",
            "--audit-policy-file=/var/lib/pki/audit.json",
            "--audit-log-path=/var/log/audit.log",
        ]
    }
}

fn write_admin(dir: &Path, pki: &Pki) {
    fs::copy(pki.dir.join("admin.kubeconfig"), dir.join("admin.kubeconfig")).expect("copy the kubeconfig");
}

async fn import(archive: &Path) {
    assert!(archive.exists(), "{} is missing: make image", archive.display());
    let path = archive.display().to_string();
    let output = run("ctr", &["-n", "k8s.io", "images", "import", &path], "").await;
    assert!(output.status.success(), "import {path}: {}", String::from_utf8_lossy(&output.stderr));
}

fn containerd(programs: &Programs, own: &Path) -> String {
    let (runc, bridge) = (programs.path("runc"), programs.path("bridge"));
    format!(
        r#"version = 3
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
  # A container of a machine without CAP_SYS_RESOURCE may not lower its score.
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{bins}"]
    conf_dir = "{own}"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = "{runc}"
      SystemdCgroup = false
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runsc]
    runtime_type = "io.containerd.runsc.v1"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runsc.options]
      TypeUrl = "io.containerd.runsc.v1.options"
      ConfigPath = "{own}/runsc.toml"
"#,
        pause = crate::images::PAUSE,
        bins = bridge.parent().expect("a directory").display(),
        own = own.display(),
        runc = runc.display(),
    )
}

fn network() -> Value {
    let mut subnet: Vec<&str> = NODE_ADDRESS.split('.').collect();
    subnet[3] = "0/24";
    json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{
        "type": "bridge", "bridge": "node", "isGateway": true, "ipMasq": false,
        "ipam": {
            "type": "host-local", "ranges": [[{"subnet": subnet.join(".")}]], "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": "/run/cni",
        },
    }]})
}

fn kubelet(times: &Times, cgroup: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "failCgroupV1": false, "cgroupDriver": "cgroupfs", "cgroupsPerQOS": true, "cgroupRoot": format!("/{cgroup}"),
        "authentication": {
            "anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": "/var/lib/pki/ca.pem"},
        },
        "authorization": {"mode": "Webhook"},
        "address": "0.0.0.0", "healthzBindAddress": "127.0.0.1",
        "clusterDNS": [], "resolvConf": "",
        "failSwapOn": false,
        "maxPods": 160,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "1Mi", "nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%",
        },
        "syncFrequency": format!("{}s", times.sync.as_secs()),
        "containerLogMaxSize": "100Mi",
        "registryPullQPS": 0,
    })
}
