//! Runs the checks one after the other, sweeps after each, and prints the table.
//!
//! A check is added to the `CHECKS` of its group's file; a new group's file is added to `GROUPS` below.

use std::fs;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use serde_json::Value;

use crate::cluster::{Cluster, until};
use crate::lab::canary;
use crate::programs::Programs;

/// One check. It panics if something is not as promised; what it gives is the figure or the fact that the table shows.
pub(crate) struct Check {
    /// What holds, in the table's words.
    pub(crate) name: &'static str,
    /// The check.
    pub(crate) run: Run,
}

/// How a check wants the cluster.
pub(crate) enum Run {
    /// For itself: it measures, or stops a part.
    Alone(for<'a> fn(&'a mut Cluster) -> LocalBoxFuture<'a, String>),
    /// Beside its neighbours in the list that are like it: it mostly waits, in a namespace of its own.
    Beside(for<'a> fn(&'a Cluster) -> LocalBoxFuture<'a, String>),
}

/// `check!("a pod starts", a_pod_starts)`, where `async fn a_pod_starts(cluster: &mut Cluster) -> String`.
macro_rules! check {
    ($name:literal, $function:path) => {
        $crate::runner::Check { name: $name, run: $crate::runner::Run::Alone(|cluster| Box::pin($function(cluster))) }
    };
}
pub(crate) use check;

/// The same for an `async fn(&Cluster) -> String` that runs beside others.
macro_rules! beside {
    ($name:literal, $function:path) => {
        $crate::runner::Check { name: $name, run: $crate::runner::Run::Beside(|cluster| Box::pin($function(cluster))) }
    };
}
pub(crate) use beside;

/// The groups, in the order they run. `install` comes first and always: the others need the driver.
static GROUPS: &[(&str, &[Check])] = &[
    ("install", crate::install::CHECKS),
    ("chart", crate::chart::CHECKS),
    ("sanity", crate::suite::CHECKS),
    ("admission", crate::admission::CHECKS),
    ("attacks", crate::attacks::CHECKS),
    ("gvisor", crate::gvisor::CHECKS),
    ("life", crate::life::CHECKS),
    ("disk", &[check!("no canary of any check on the disk", on_disk)]),
];

/// Namespaces that are not a check's.
const STANDING: [&str; 5] = ["default", "kube-system", "kube-public", "kube-node-lease", crate::cluster::SYSTEM];

/// Starts the cluster and runs the checks whose group or name contains one of `wanted`, or all. Says whether all held.
pub(crate) fn run(version: &str, programs: Programs, wanted: &[String]) -> bool {
    // Before any thread: it sets the environment.
    crate::cluster::enter(&crate::machine::directory(), &programs);
    rustls::crypto::ring::default_provider().install_default().expect("set once");
    let temporary = crate::machine::directory().join("tmp");
    fs::create_dir_all(&temporary).expect("a directory");
    tempfile::env::override_temp_dir(&temporary).expect("set once");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let start = Instant::now();
        let mut cluster = Cluster::start(version, programs).await;
        println!("Kubernetes {version} is up after {:.0} s", start.elapsed().as_secs_f32());
        let mut unknown = wanted.to_vec();
        let (mut passed, mut failed) = (0, Vec::new());
        for (group, checks) in GROUPS {
            let is_wanted = |check: &&Check| {
                *group == "install"
                    || wanted.is_empty()
                    || wanted.iter().any(|it| group.contains(it.as_str()) || check.name.contains(it.as_str()))
            };
            let chosen: Vec<&Check> = checks.iter().filter(is_wanted).collect();
            unknown.retain(|it| !group.contains(it.as_str()) && !checks.iter().any(|check| check.name.contains(it)));
            if !chosen.is_empty() {
                println!("\n== {group}");
            }
            for batch in chosen.chunk_by(|a, b| matches!((&a.run, &b.run), (Run::Beside(_), Run::Beside(_)))) {
                for (check, outcome) in batch.iter().zip(run_batch(&mut cluster, batch).await) {
                    let Outcome { fact, seconds } = outcome;
                    match fact {
                        Some(fact) => {
                            passed += 1;
                            println!("  ok   {:<70} {fact}  [{seconds:.0} s]", check.name);
                        }
                        None => {
                            // The panic's own message was printed where it happened.
                            failed.push(format!("{group}: {}", check.name));
                            println!("  FAIL {}  [{seconds:.0} s]", check.name);
                        }
                    }
                }
            }
        }
        failed.extend(unknown.iter().map(|it| format!("no check has {it:?} in its name or group")));
        println!("\n{:.1} minutes on Kubernetes {version}", start.elapsed().as_secs_f32() / 60.0);
        for name in &failed {
            println!("FAIL {name}");
        }
        println!("{passed} passed, {} failed", failed.len());
        failed.is_empty() && passed > 0
    })
}

/// What came of a check; no fact if it failed.
struct Outcome {
    fact: Option<String>,
    seconds: f32,
}

/// Runs checks that may run beside each other, or one; then removes what they made and sweeps.
async fn run_batch(cluster: &mut Cluster, batch: &[&Check]) -> Vec<Outcome> {
    async fn timed(run: impl Future<Output = String>) -> Outcome {
        let begun = Instant::now();
        let fact = AssertUnwindSafe(run).catch_unwind().await.ok();
        Outcome { fact, seconds: begun.elapsed().as_secs_f32() }
    }
    let before = release().await;
    let mut outcomes = match &batch[0].run {
        Run::Alone(run) => vec![timed(run(cluster)).await],
        Run::Beside(_) => {
            let cluster = &*cluster;
            let runs = batch.iter().filter_map(|check| match &check.run {
                Run::Beside(run) => Some(timed(run(cluster))),
                Run::Alone(_) => None,
            });
            futures_util::future::join_all(runs).await
        }
    };
    if outcomes.iter().any(|it| it.fact.is_none()) {
        cluster.restore().await;
        if let Some(before) = before
            && release().await.as_ref() != Some(&before)
        {
            let _ = AssertUnwindSafe(crate::chart::back(cluster, &before.to_string())).catch_unwind().await;
        }
    }
    remove_namespaces(cluster).await;
    let names: Vec<&str> = batch.iter().map(|it| it.name).collect();
    let swept = AssertUnwindSafe(sweep(cluster, &names.join("; "))).catch_unwind().await;
    if swept.is_err() {
        outcomes.iter_mut().for_each(|it| it.fact = None);
    }
    outcomes
}

/// The revision of the driver's release, if it is installed: a check that breaks off may leave another than it found.
async fn release() -> Option<Value> {
    let output =
        crate::kube::run("helm", &["status", "sealmount", "-n", crate::cluster::SYSTEM, "-o", "json"], "").await;
    serde_json::from_slice::<Value>(&output.stdout).ok().map(|status| status["version"].clone())
}

/// Removes the pods of the check, waits for their end, and leaves the rest of its namespaces to the controllers.
async fn remove_namespaces(cluster: &Cluster) {
    let list = cluster.kube.json("get namespaces").await;
    let names = list["items"].as_array().into_iter().flatten();
    for name in names.filter_map(|it| it["metadata"]["name"].as_str()).filter(|it| !STANDING.contains(it)) {
        // Controllers first, or they make new pods.
        let kinds = "cronjobs,jobs,deployments,statefulsets,daemonsets,pods";
        let delete =
            format!("delete {kinds} --all -n {name} --wait --timeout=60s --cascade=foreground --grace-period=1");
        let _ = cluster.kube.try_run(&delete).await;
        let _ = cluster.kube.try_run(&format!("delete namespace {name} --wait=false")).await;
    }
}

/// What must hold after every check: no mount without a pod, no process of ours outside the driver's pod, no canary in
/// any log, event, API object or file of the kubelet's.
async fn sweep(cluster: &Cluster, after: &str) {
    let mut pods = Value::Null;
    // One that cannot end would be counted as living below.
    until("no pod of the check is left", Duration::from_secs(15), async || {
        pods = cluster.kube.json("get pods -A").await;
        let mut namespaces = pods["items"].as_array().into_iter().flatten().map(|it| &it["metadata"]["namespace"]);
        namespaces.all(|it| STANDING.iter().any(|standing| it == standing))
    })
    .await;
    let uids: Vec<String> = pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|pod| pod["metadata"]["uid"].as_str().map(str::to_owned))
        .collect();
    let mut left = Vec::new();
    // The kubelet unmounts a moment after the pod object is gone when the deletion was forced.
    let gone = async || {
        left = mounts_without_pod(&uids);
        left.is_empty()
    };
    if gone_within(Duration::from_secs(15), gone).await.is_err() {
        panic!("after {after:?}: mounts of pods that are gone: {left:#?}");
    }
    let driver: Vec<&str> = pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|pod| pod["metadata"]["namespace"] == crate::cluster::SYSTEM)
        .filter_map(|pod| pod["metadata"]["uid"].as_str())
        .collect();
    until("no process of ours is outside the driver's cgroup", Duration::from_secs(15), async || {
        strays(&driver).is_empty()
    })
    .await;
    let canaries = cluster.canaries();
    let needles: Vec<&[u8]> = canaries.iter().map(String::as_bytes).collect();
    if needles.is_empty() {
        return;
    }
    // Where a canary may be is only the running pod's memory, its mount, and the Secret's own object in etcd.
    for place in ["/var/log", "/var/lib/kubelet"] {
        let found = in_files(Path::new(place), &needles);
        assert!(found.is_empty(), "after {after:?}: canaries in {found:?}");
    }
    let found = in_etcd(&needles).await;
    assert!(found.is_empty(), "after {after:?}: canaries in etcd: {found:?}");
}

/// The files of the whole cluster: logs, the kubelet's and containerd's directories, OpenBao's. Only etcd's may hold one,
/// in a Secret.
async fn on_disk(cluster: &mut Cluster) -> String {
    let canaries = cluster.canaries();
    let needles: Vec<&[u8]> = canaries.iter().map(String::as_bytes).collect();
    assert!(!needles.is_empty(), "no check made a canary");
    let etcd = cluster.dir.join("lib/etcd");
    let mut found = in_files_but(&cluster.dir, &needles, Some(&etcd));
    assert!(found.is_empty(), "canaries in {found:?}");
    // That this would find one: etcd has the Secrets.
    found = in_files(&etcd, &needles);
    assert!(!found.is_empty(), "the search finds not even those of etcd");
    format!("{} values looked for", needles.len())
}

async fn gone_within(limit: Duration, mut holds: impl AsyncFnMut() -> bool) -> Result<(), ()> {
    let end = Instant::now() + limit;
    while !holds().await {
        if Instant::now() > end {
            return Err(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

fn mounts_without_pod(uids: &[String]) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("the mounts");
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    points
        .filter_map(|point| Some((point, point.strip_prefix("/var/lib/kubelet/pods/")?.split('/').next()?)))
        .filter(|(_, uid)| !uids.iter().any(|it| it == uid))
        .map(|(point, _)| point.to_owned())
        .collect()
}

/// Processes of the driver's program that are in no cgroup of its pods.
fn strays(driver: &[&str]) -> Vec<String> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("sealmount")))
        .filter(|pid| {
            let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            !cgroup.is_empty() && !driver.iter().any(|uid| cgroup.contains(uid))
        })
        .map(|pid| pid.to_string())
        .collect()
}

/// Files below `root` in which a needle stands. Mounts below it are searched too: of pods that run on, none is there
/// after a check.
fn in_files(root: &Path, needles: &[&[u8]]) -> Vec<String> {
    in_files_but(root, needles, None)
}

fn in_files_but(root: &Path, needles: &[&[u8]], except: Option<&Path>) -> Vec<String> {
    if Some(root) == except {
        return Vec::new();
    }
    let Ok(kind) = fs::symlink_metadata(root).map(|it| it.file_type()) else { return Vec::new() };
    if kind.is_dir() {
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        return entries.flat_map(|entry| in_files_but(&entry.path(), needles, except)).collect();
    }
    // A file that goes away meanwhile holds nothing any more.
    let counts = if kind.is_file() { canary::in_files(root, needles).unwrap_or_default() } else { Vec::new() };
    if counts.iter().sum::<usize>() > 0 { vec![root.display().to_string()] } else { Vec::new() }
}

/// Keys of etcd, but for Secrets themselves, whose value holds a needle.
async fn in_etcd(needles: &[&[u8]]) -> Vec<String> {
    // All keys: from the byte 0 to the byte 0, as etcd's documentation of range_end says.
    let body = r#"{"key": "AA==", "range_end": "AA=="}"#;
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let reply = http.post("http://127.0.0.1:2379/v3/kv/range").body(body).send().await.expect("etcd answers");
    let bytes = reply.bytes().await.expect("etcd's reply");
    let reply: Value = serde_json::from_slice(&bytes).expect("etcd replies in JSON");
    let decode = |value: &Value| STANDARD.decode(value.as_str().unwrap_or_default()).expect("base64");
    let items = reply["kvs"].as_array().expect("keys of etcd");
    assert!(items.len() > 20, "etcd holds only {} keys", items.len());
    items
        .iter()
        .map(|item| (String::from_utf8_lossy(&decode(&item["key"])).into_owned(), decode(&item["value"])))
        .filter(|(key, _)| !key.starts_with("/registry/secrets/"))
        .filter(|(_, value)| canary::in_bytes(value, needles).iter().sum::<usize>() > 0)
        .map(|(key, _)| key)
        .collect()
}
