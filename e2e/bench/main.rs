//! Measures the driver in one run against the least work that does the same: the kernel's own mounts, and a bare
//! keep-alive client of the same OpenBao. What is compared is measured in turns, so that a busy machine slows both.
// A lab may stop at the first thing that is wrong; the driver may not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)]
#![allow(clippy::string_slice, clippy::disallowed_methods)]
#![allow(unreachable_pub, missing_debug_implementations)] // nobody else uses this

mod bare;
mod floor;
#[path = "../lab/mod.rs"]
mod lab;
mod memory;
mod report;

use std::collections::VecDeque;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use sealmount::csi::proto::csi::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use bare::Bare;
use lab::kubelet::{CSI_TIMEOUT, Kubelet, PodSpec, handle};
use lab::node::{Node, Options};
use lab::{Identity, Issuer, OpenBao};
use report::{Goal, Report};

const SAMPLES: usize = 200;
const WARM_UP: usize = 20;
/// Calls under way at once in the rows that say so.
const AT_ONCE: usize = 10;
/// The volumes of a full node.
const BURST: usize = 110;
/// The pods of one `sealmount check`.
const CHECKED: usize = 1000;
/// The volume of every pod here.
const VOLUME: &str = "creds";
const APP: u32 = 1000;
const AUDIENCE: &str = "sealmount-bench";
const NAMES: [&str; 5] = ["username", "password", "ca.crt", "tls.crt", "tls.key"];

/// Five files of a usual size, 4 KiB in all.
fn contents() -> Vec<(String, String)> {
    let sizes = [8, 32, 1200, 1152, 1704];
    NAMES.iter().zip(sizes).map(|(name, size)| ((*name).to_owned(), "s".repeat(size))).collect()
}

/// The programs that are measured, and who pods and tokens come from.
struct Bench {
    bao: OpenBao,
    bare: Arc<Bare>,
    issuer: Arc<Issuer>,
    report: Report,
}

/// A pod with its request made up, so that only the call is timed.
struct Job {
    pod: PodSpec,
    request: NodePublishVolumeRequest,
    /// The pod's token, for the bare client.
    jwt: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut bench = Bench::start().await;
    eprintln!("sealmount check of {CHECKED} pods");
    bench.check();
    eprintln!("memory: idle, and after {BURST} volumes");
    bench.memory().await;
    let (node, kubelet) = bench.node().await;
    let kubelet = Arc::new(kubelet);
    eprintln!("Kubernetes data against the kernel's floor");
    bench.kubernetes_data(&node, &kubelet).await;
    eprintln!("OpenBao against a bare client, one after the other");
    bench.serial(&kubelet).await;
    eprintln!("OpenBao against a bare client, {AT_ONCE} at a time");
    bench.concurrent(&kubelet).await;
    eprintln!("shared logins");
    bench.shared_logins(&kubelet).await;
    bench.report.print();
    println!("\n{}", bench.report.json());
}

impl Bench {
    async fn start() -> Self {
        let mut bao = OpenBao::start().await;
        let issuer = Arc::new(Issuer::new());
        bao.mount_kv().await;
        let data: serde_json::Map<String, Value> = contents().into_iter().map(|(k, v)| (k, json!(v))).collect();
        bao.write_kv2("secret", "bench/db", &Value::Object(data)).await;
        bao.policy("bench", &["secret/data/bench/*"]).await;
        bao.jwt_auth("jwt", &issuer).await;
        bao.kubernetes_auth("kubernetes", &issuer).await;
        // One role for all service accounts: what is measured is one login a pod, not one role a pod.
        let any = identity("bench", "unused", "any");
        bao.jwt_role("jwt", "bench", &any, AUDIENCE, &["bench"], &json!({"bound_subject": ""})).await;
        let accounts = json!({"bound_service_account_names": ["*"]});
        bao.kubernetes_role("kubernetes", "bench", &any, AUDIENCE, &["bench"], &accounts).await;
        let bare = Arc::new(Bare::new(bao.address(), bao.ca_pem()));
        Self { bao, bare, issuer, report: Report::default() }
    }

    /// A driver of its own, registered.
    async fn node(&self) -> (Node, Kubelet) {
        let connection = |name: &str, default: bool| {
            format!(
                r#"
  {name}:
    default: {default}
    address: {address}
    ca_file: ca.pem
    auth: {{method: {name}, mount: {name}, audience: {AUDIENCE}, role: bench}}
    allow:
    - {{namespaces: [payments], service_accounts: ["*"], roles: [bench], paths: ["secret/data/bench/*"], methods: [read]}}
    # The limits are not what is measured.
    requests: {{at_once: 64, per_second: 10000}}"#,
                address = self.bao.address(),
            )
        };
        let config =
            format!("version: 1\nconnections:{}{}\n", connection("jwt", true), connection("kubernetes", false));
        // 200 volumes stand at once, each charged with the most it may ever hold.
        let options = Options::new(&config).file("ca.pem", self.bao.ca_pem()).arg("--max-node-bytes").arg("2GiB");
        Node::start(options).await
    }

    /// Pods that read five files from OpenBao through `connection`, ready to be published. With no `account`, each
    /// has a service account of its own.
    fn jobs(&self, kubelet: &Kubelet, prefix: &str, count: usize, connection: &str, account: Option<&str>) -> Vec<Job> {
        let files: String = NAMES.iter().map(|name| format!("{name}: secret/data/bench/db#{name}\n")).collect();
        let job = |i| {
            let name = format!("{prefix}-{i}");
            let account = account.unwrap_or(&name);
            let pod = PodSpec::new(&name, kubelet.node())
                .set("/spec/serviceAccountName", json!(account))
                .attribute("vault", connection)
                .attribute("files", &files);
            let jwt = self.issuer.token(&identity(account, &name, pod.uid()), AUDIENCE);
            let pod = pod.token(AUDIENCE, &jwt, SystemTime::now() + Duration::from_secs(3600));
            prepared(kubelet, pod, jwt)
        };
        (0..count).map(job).collect()
    }

    /// The logins, reads and revocations OpenBao saw so far.
    fn requests(&self) -> [usize; 3] {
        [("update", "auth/jwt/login"), ("read", "secret/data/bench/db"), ("update", "auth/token/revoke-self")]
            .map(|(operation, path)| self.bao.audited(operation, path))
    }

    /// Waits until OpenBao holds no more tokens than `count`: the driver revokes in the seconds after its answer.
    async fn settle(&self, count: usize) {
        for _ in 0..600 {
            if self.bao.tokens().await <= count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{} tokens were not revoked within 30 s", self.bao.tokens().await - count);
    }

    /// Manifests from a file to the report, in a process of its own.
    fn check(&mut self) {
        const POD: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: payments}
spec:
  containers:
  - name: app
    image: registry.example/app:1
    securityContext: {runAsUser: 1000}
    volumeMounts: [{name: db, mountPath: /run/db}]
  - name: exporter
    image: registry.example/exporter:1
    securityContext: {runAsUser: 1001, allowPrivilegeEscalation: false}
  volumes:
  - {name: db, csi: {driver: csi.sealmount.io, readOnly: true, nodePublishSecretRef: {name: db}}}
";
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pods.yaml");
        fs::write(&file, vec![POD; CHECKED].join("---\n")).unwrap();
        let times: Vec<Duration> = (0..10)
            .map(|_| {
                let begun = Instant::now();
                let output = Command::new(lab::node::binary()).arg("check").arg(&file).output().unwrap();
                assert!(output.status.success(), "{output:?}");
                begun.elapsed()
            })
            .collect();
        let whole = self.report.times(&format!("sealmount check of {CHECKED} pods"), &times);
        self.report.goal(&format!("sealmount check of {CHECKED} pods, p50 in ms"), whole, Goal::AtMost(2000.0));
    }

    async fn memory(&mut self) {
        let (node, kubelet) = self.node().await;
        let kubelet = Arc::new(kubelet);
        tokio::time::sleep(Duration::from_secs(2)).await;
        let idle = memory::of_tree(node.broker());
        let jobs = self.jobs(&kubelet, "burst", BURST, "jwt", None);
        let targets: Vec<_> = jobs.iter().map(|job| kubelet.target(&job.pod, VOLUME)).collect();
        publish_all(&kubelet, AT_ONCE, jobs).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let full = memory::of_tree(node.broker());
        for (name, memory) in [("idle", idle), ("after 110 volumes", full)] {
            let of = format!("{name}, {} processes", memory.processes);
            self.report.figure(&format!("memory {of}: Pss"), memory.pss as f64 / 1e3, "MB");
            self.report.figure(&format!("memory {of}: Rss"), memory.rss as f64 / 1e3, "MB");
        }
        let tmpfs: u64 = targets.iter().map(|target| used_bytes(target)).sum();
        self.report.figure("tmpfs of the 110 volumes, not in the above", tmpfs as f64 / 1e6, "MB");
        self.report.goal("memory idle, Pss in MB", idle.pss as f64 / 1e3, Goal::AtMost(14.0));
        self.report.goal("memory after 110 volumes, Pss in MB", full.pss as f64 / 1e3, Goal::AtMost(20.0));
        drop(node);
    }

    async fn kubernetes_data(&mut self, node: &Node, kubelet: &Kubelet) {
        let files = contents();
        let data: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        let [mut floor, mut floor_end, mut publish, mut again, mut unpublish] = [const { Vec::new() }; 5];
        let target = node.dir().join("floor");
        for i in 0..WARM_UP + SAMPLES {
            let pod = PodSpec::new(&format!("data-{i}"), kubelet.node()).secret("db", &data);
            let job = prepared(kubelet, pod, String::new());
            let bare = timed(async { floor::publish(&target, &files, APP).unwrap() }).await;
            let bare_end = timed(async { floor::unpublish(&target).unwrap() }).await;
            let first = timed(call(kubelet, job.request.clone())).await;
            let second = timed(call(kubelet, job.request)).await;
            let ended = timed(end(kubelet, &job.pod)).await;
            forget(kubelet, &job.pod).await;
            if i >= WARM_UP {
                floor.push(bare);
                floor_end.push(bare_end);
                publish.push(first);
                again.push(second);
                unpublish.push(ended);
            }
        }
        let bare = self.report.times("kernel floor: the same mount with 5 files, bare", &floor);
        self.report.times("kernel floor: unmount, bare", &floor_end);
        let ours = self.report.times("publish from Kubernetes data", &publish);
        self.report.times("republish of the same Kubernetes data", &again);
        let ended = self.report.times("unpublish of a volume from Kubernetes data", &unpublish);
        self.report.goal("publish from Kubernetes data, p50 above the floor in ms", ours - bare, Goal::AtMost(2.0));
        self.report.goal("unpublish, p50 in ms", ended, Goal::AtMost(1.5));
    }

    /// What one publish asks of OpenBao, by its audit log; warms it up too.
    async fn requests_of_a_publish(&mut self, kubelet: &Arc<Kubelet>) {
        let idle = self.bao.tokens().await;
        let before = self.requests();
        let pods = publish_all(kubelet, AT_ONCE, self.jobs(kubelet, "warm", WARM_UP, "jwt", None)).await.pods;
        self.settle(idle).await;
        let after = self.requests();
        for pod in &pods {
            forget(kubelet, pod).await;
        }
        for (name, (before, after)) in ["login", "read", "revoke-self"].iter().zip(before.iter().zip(after)) {
            let each = (after - before) as f64 / WARM_UP as f64;
            self.report.figure(&format!("requests of one publish to OpenBao: {name}"), each, "");
        }
    }

    /// The driver and the bare client in turns, `lanes` calls at a time: each round publishes, republishes and
    /// unpublishes, and ends with no token left. Only what the answer waits for is timed; both revoke afterwards.
    async fn compare(&mut self, kubelet: &Arc<Kubelet>, lanes: usize, rounds: usize) -> Compared {
        let idle = self.bao.tokens().await;
        let mut all = Compared::default();
        // The first round warms up both.
        for round in 0..=rounds {
            let jobs = self.jobs(kubelet, &format!("by-{lanes}-{round}"), SAMPLES / rounds, "jwt", None);
            let jwts: Vec<String> = jobs.iter().map(|job| job.jwt.clone()).collect();
            let client = Arc::clone(&self.bare);
            let run = move |jwt: String| {
                let client = Arc::clone(&client);
                async move { fetch(&client, &jwt).await }
            };
            let requests: Vec<_> = jobs.iter().map(|job| job.request.clone()).collect();
            let (bare, published);
            // Neither is always the first.
            if round % 2 == 0 {
                bare = at_once(lanes, jwts, run).await;
                self.settle(idle).await;
                published = publish_all(kubelet, lanes, jobs).await;
            } else {
                published = publish_all(kubelet, lanes, jobs).await;
                self.settle(idle).await;
                bare = at_once(lanes, jwts, run).await;
            }
            self.settle(idle).await;
            let mut one = Compared { bare, publish: published.round, ..Compared::default() };
            for request in requests {
                one.republish.push(timed(call(kubelet, request)).await);
            }
            for pod in &published.pods {
                one.unpublish.push(timed(end(kubelet, pod)).await);
                forget(kubelet, pod).await;
            }
            if round > 0 {
                all.add(one);
            }
        }
        all
    }

    async fn serial(&mut self, kubelet: &Arc<Kubelet>) {
        self.requests_of_a_publish(kubelet).await;
        let all = self.compare(kubelet, 1, 10).await;
        let bare = self.report.times("bare client: login and read", &all.bare.each);
        let publish = self.report.times("publish through OpenBao", &all.publish.each);
        let republish = self.report.times("republish that is not due", &all.republish);
        self.report.times("unpublish of a volume from OpenBao", &all.unpublish);
        self.report.goal("publish through OpenBao / bare client, p50", publish / bare, Goal::AtMost(1.5));
        self.report.goal("republish that is not due, p50 in ms", republish, Goal::AtMost(0.6));
    }

    async fn concurrent(&mut self, kubelet: &Arc<Kubelet>) {
        let Compared { bare, publish, .. } = self.compare(kubelet, AT_ONCE, 4).await;
        self.report.times("bare client: login and read, 10 at a time", &bare.each);
        self.report.times("publish through OpenBao, 10 at a time", &publish.each);
        self.report.figure("bare client, 10 at a time", bare.rate(), "a second");
        self.report.figure("publish through OpenBao, 10 at a time", publish.rate(), "a second");
        self.report.goal("rate of 10 at a time / bare client", publish.rate() / bare.rate(), Goal::AtLeast(0.75));
    }

    /// Pods of one service account: `kubernetes` logins do not depend on the pod and are shared.
    async fn shared_logins(&mut self, kubelet: &Arc<Kubelet>) {
        let jobs = self.jobs(kubelet, "shared", WARM_UP + SAMPLES, "kubernetes", Some("payments"));
        let [mut bare, mut ours] = [const { Vec::new() }; 2];
        let token = self.bare.login("kubernetes", "bench", &jobs[0].jwt).await;
        for (i, job) in jobs.iter().enumerate() {
            let read = timed(async {
                self.bare.read(&token, "secret/data/bench/db").await;
            });
            let read = read.await;
            let publish = timed(call(kubelet, job.request.clone())).await;
            if i >= WARM_UP {
                bare.push(read);
                ours.push(publish);
            }
        }
        for job in &jobs {
            forget(kubelet, &job.pod).await;
        }
        self.report.times("bare client: read with a token it has", &bare);
        self.report.times("publish through OpenBao, one login for all pods", &ours);
    }
}

/// Who a pod's token names.
fn identity(account: &str, pod: &str, uid: &str) -> Identity {
    Identity {
        namespace: "payments".into(),
        pod: pod.into(),
        pod_uid: uid.into(),
        service_account: account.into(),
        service_account_uid: format!("uid-of-{account}"),
    }
}

/// Admits a pod and does what the kubelet does before the call.
fn prepared(kubelet: &Kubelet, pod: PodSpec, jwt: String) -> Job {
    kubelet.admit(&pod);
    kubelet.prepare(&pod, VOLUME);
    let request = kubelet.request(&pod, VOLUME);
    Job { pod, request, jwt }
}

/// One NodePublishVolume on a connection of its own, as the kubelet makes it.
async fn call(kubelet: &Kubelet, request: NodePublishVolumeRequest) {
    let mut request = tonic::Request::new(request);
    request.set_timeout(CSI_TIMEOUT);
    let mut client = kubelet.csi().await.unwrap();
    client.node_publish_volume(request).await.unwrap();
}

/// One NodeUnpublishVolume on a connection of its own.
async fn end(kubelet: &Kubelet, pod: &PodSpec) {
    let target_path = kubelet.target(pod, VOLUME).to_str().unwrap().to_owned();
    let mut request = tonic::Request::new(NodeUnpublishVolumeRequest { volume_id: handle(pod, VOLUME), target_path });
    request.set_timeout(CSI_TIMEOUT);
    let mut client = kubelet.csi().await.unwrap();
    client.node_unpublish_volume(request).await.unwrap();
}

/// What is left for the kubelet to remove after that.
async fn forget(kubelet: &Kubelet, pod: &PodSpec) {
    kubelet.unpublish(pod, VOLUME).await.unwrap();
    kubelet.forget(pod);
}

/// What the driver asks of OpenBao for one volume; the token is revoked afterwards, as the driver does it.
async fn fetch(client: &Arc<Bare>, jwt: &str) {
    let token = client.login("jwt", "bench", jwt).await;
    client.read(&token, "secret/data/bench/db").await;
    client.revoke_later(token);
}

async fn timed(work: impl Future<Output = ()>) -> Duration {
    let start = Instant::now();
    work.await;
    start.elapsed()
}

/// The times of each of many jobs, and of all together.
#[derive(Default)]
struct Round {
    each: Vec<Duration>,
    all: Duration,
}

impl Round {
    fn add(&mut self, other: Round) {
        self.each.extend(other.each);
        self.all += other.all;
    }

    fn rate(&self) -> f64 {
        self.each.len() as f64 / self.all.as_secs_f64()
    }
}

/// What [`Bench::compare`] measured.
#[derive(Default)]
struct Compared {
    bare: Round,
    publish: Round,
    republish: Vec<Duration>,
    unpublish: Vec<Duration>,
}

impl Compared {
    fn add(&mut self, other: Compared) {
        self.bare.add(other.bare);
        self.publish.add(other.publish);
        self.republish.extend(other.republish);
        self.unpublish.extend(other.unpublish);
    }
}

/// Runs the jobs, so many at a time.
async fn at_once<J, F>(lanes: usize, jobs: Vec<J>, run: impl Fn(J) -> F + Clone + Send + 'static) -> Round
where
    J: Send + 'static,
    F: Future<Output = ()> + Send,
{
    let queue = Arc::new(Mutex::new(VecDeque::from(jobs)));
    let start = Instant::now();
    let mut running = JoinSet::new();
    for _ in 0..lanes {
        let (queue, run) = (Arc::clone(&queue), run.clone());
        running.spawn(async move {
            let mut each = Vec::new();
            loop {
                let job = queue.lock().unwrap().pop_front();
                let Some(job) = job else { return each };
                each.push(timed(run(job)).await);
            }
        });
    }
    let each = running.join_all().await.concat();
    Round { each, all: start.elapsed() }
}

struct Published {
    round: Round,
    pods: Vec<PodSpec>,
}

/// Publishes all, so many at a time.
async fn publish_all(kubelet: &Arc<Kubelet>, lanes: usize, jobs: Vec<Job>) -> Published {
    let (requests, pods) = jobs.into_iter().map(|job| (job.request, job.pod)).unzip();
    let kubelet = Arc::clone(kubelet);
    let run = move |request| {
        let kubelet = Arc::clone(&kubelet);
        async move { call(&kubelet, request).await }
    };
    Published { round: at_once(lanes, requests, run).await, pods }
}

/// What a volume takes of memory: its blocks in use.
fn used_bytes(target: &Path) -> u64 {
    let stat = rustix::fs::statvfs(target).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}
