//! The demo from top to bottom: set up, publish, attack, rotate, cut off, refuse, end.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use sealmount::request::DRIVER;
use serde_json::json;
use tonic::Status;

use crate::attacks::{self, Column, Scene, seen_on_host, shell};
use crate::lab::canary;
use crate::lab::envoy::ENVOY_UID;
use crate::lab::kubelet::{PodSpec, is_mounted, write_yaml};
use crate::lab::node::{Node, Options, binary};
use crate::lab::pod::{Bind, Container, Sandbox, User};
use crate::lab::{Issuer, OpenBao};
use crate::stage::{
    APP_UID, Canaries, Stage, VAULT_AUDIENCE, open_vault, pair, platform_file, pod, service_account, start_app,
    start_envoy, volumes, with_token,
};
use crate::table::{Cell, Got, Screen};

/// Runs the whole demo.
pub(crate) async fn run(screen: &mut Screen) {
    let issuer = Issuer::new();
    let mut canaries = Canaries {
        usual: random("usual"),
        secret: random("native"),
        first: random("sealed"),
        second: random("rotated"),
        api_key: random("apikey"),
        token: String::new(),
    };

    screen.title("A real OpenBao, the driver, a pod");
    let bao = OpenBao::start().await;
    let pod = pod("payments-6c9d").secret("payments-api", &[("api-key", &canaries.api_key)]);
    let pod = with_token(pod, &issuer);
    canaries.token = pod.tokens[VAULT_AUDIENCE].0.rsplit('.').next().unwrap().to_owned();
    let default_token = open_vault(&bao, &issuer, &pod, &canaries).await;
    screen.say(&format!("OpenBao serves TLS on {} and writes an audit log.", bao.address()));
    let (node, kubelet) = Node::start(Options::new(&platform_file(&bao)).file("ca.pem", bao.ca_pem())).await;
    let worker = node.worker().unwrap();
    let facts = ["Uid", "CapEff", "NoNewPrivs", "Seccomp"].map(|field| status_field(worker, field));
    screen.check(
        facts[0].parse::<u32>().unwrap() > i32::MAX as u32 && facts[1..] == ["0000000000000000", "1", "2"],
        &format!(
            "sealmount node: broker {} (root); worker {worker} (UID {}, capabilities {}, no new privileges, seccomp)",
            node.broker(),
            facts[0],
            facts[1],
        ),
    );
    screen.say("This program plays the kubelet: it found the registration socket and registered csi.sealmount.io.");
    screen.say("The volume, as the application's team writes it:");
    let mut yaml = String::new();
    write_yaml(&mut yaml, &json!([pod.manifest["spec"]["volumes"][0]]), 0);
    screen.show(&yaml);

    kubelet.admit(&pod);
    let columns = volumes(&node, &kubelet, &pod, &bao, &default_token, &canaries).await;
    let before = Instant::now();
    let published = kubelet.publish(&pod, "creds").await;
    let took = before.elapsed();
    screen.check(published.is_ok(), &format!("published in {} ms{}", took.as_millis(), why(&published)));
    if published.is_err() {
        screen.say("Nothing more can be shown. The node's log:");
        screen.show(&node.log());
        return;
    }
    let target = kubelet.target(&pod, "creds");

    let sandbox = Sandbox::new();
    let tokens = service_account(&sandbox, &default_token);
    let app = start_app(&sandbox, &columns, &tokens);
    let envoy = start_envoy(&sandbox, &columns, &tokens, &bao, &node).await;
    let mut stage = Stage { app, envoy, sandbox, bao, kubelet, node };

    screen.title("What the volume is");
    show_volume(screen, &target, &stage.app, &canaries);

    screen.title("What a compromised Envoy gets");
    screen.say(
        "Envoy 1.40 runs as UID 1337 in a container of its own; its Lua filter does what an HTTP request asks for. \
         The other rows are tried by a shell of UID 1337 with the view the line above them names.",
    );
    let refusals = misbuilt(&stage, &issuer, &pod, &columns).await;
    let sockets = [stage.node.csi_socket(), stage.kubelet.registration_socket(Duration::from_secs(2)).await.unwrap()];
    let rows = refusals.each_ref().map(|pod| (pod.label, pod.cells.clone(), pod.promised[0]));
    let scene = Scene {
        envoy: &stage.envoy,
        app: &stage.app,
        columns: &columns,
        sockets,
        worker,
        roles: [Some("usual"), None, Some("payments")],
        misbuilt: rows,
    };
    attacks::run(&scene, screen).await;
    screen.say(
        "READ, LISTED, FOUND: the attacker has it. The middle column says where a Secret volume that only the app \
         mounts is already as safe; it needs the secret in etcd, and its files are 0644 for whoever reaches them.",
    );

    screen.title("Rotation: a new password is written to OpenBao");
    rotate(screen, &stage, &pod, &canaries).await;

    screen.title("Outage: OpenBao is stopped");
    outage(screen, &mut stage, &pod, &canaries).await;

    screen.title("Refused pods");
    for pod in &refusals {
        let message = pod.answer.as_ref().err().map_or("", Status::message);
        let named = pod.promised.iter().all(|word| message.contains(word));
        screen.check(named, &format!("{}{}", pod.label, why(&pod.answer)));
    }

    screen.title("The end: the pod goes, OpenBao is still away");
    end(screen, stage, &pod, &canaries).await;
}

/// What a call answered if not OK, to stand behind a sentence.
fn why(outcome: &Result<(), Status>) -> String {
    outcome.as_ref().err().map_or_else(String::new, |status| format!(": {:?}: {}", status.code(), status.message()))
}

fn random(label: &str) -> String {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
    format!("{label}{}", uuid.trim().replace('-', ""))
}

/// A field of /proc/PID/status.
fn status_field(pid: u32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{field}:"))).unwrap();
    line.split_whitespace().next().unwrap().to_owned()
}

fn show_volume(screen: &mut Screen, target: &Path, app: &Container, canaries: &Canaries) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(4) == target.to_str()).unwrap_or_default();
    let (mount, superblock) = line.split_once(" - ").unwrap_or_default();
    screen.show(&format!("{} {superblock}", mount.split(' ').nth(5).unwrap_or("not mounted")));
    let mut tree = Vec::new();
    walk(target, target, &mut tree);
    let files: Vec<&Entry> = tree.iter().filter(|entry| entry.mode & 0o170_000 == 0o100_000).collect();
    for entry in &tree {
        screen.show(&entry.to_string());
    }
    let sealed = !files.is_empty() && files.iter().all(|entry| entry.mode & 0o7777 == 0o400 && entry.uid == APP_UID);
    screen.check(sealed, &format!("{} files, each 0400 and owned by UID {APP_UID}", files.len()));
    let out = app.exec(User::new(APP_UID), &["sh", "-c", "cd /etc/creds && tail -n +1 username password api-key"]);
    let out = String::from_utf8_lossy(&out.unwrap().out).into_owned();
    screen.say("What the application reads, as UID 1000 in its container:");
    screen.show(&out.replace("\n\n", "\n"));
    let whole = out.contains("1-payments") && out.contains(&canaries.first) && out.contains(&canaries.api_key);
    screen.check(whole, "it reads both keys from OpenBao and the one from the Kubernetes Secret");
}

struct Entry {
    mode: u32,
    uid: u32,
    gid: u32,
    name: String,
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.mode & 0o170_000 {
            0o040_000 => 'd',
            0o120_000 => 'l',
            _ => '-',
        };
        let bit = |shift: u32, letter: char| if self.mode >> shift & 1 == 1 { letter } else { '-' };
        let bits: String = (0..9).rev().map(|shift| bit(shift, ['x', 'w', 'r'][shift as usize % 3])).collect();
        write!(f, "{kind}{bits}  {:>5} {:>3}  {}", self.uid, self.gid, self.name)
    }
}

/// Everything below `root` in the order of names, as root on the host sees it.
fn walk(root: &Path, path: &Path, tree: &mut Vec<Entry>) {
    let Ok(stat) = fs::symlink_metadata(path) else { return };
    let mut name = Path::new("/etc/creds").join(path.strip_prefix(root).unwrap()).display().to_string();
    if let Ok(to) = fs::read_link(path) {
        name.push_str(&format!(" -> {}", to.display()));
    }
    tree.push(Entry { mode: stat.mode(), uid: stat.uid(), gid: stat.gid(), name });
    if stat.is_dir() {
        let mut below: Vec<PathBuf> = fs::read_dir(path).unwrap().map(|it| it.unwrap().path()).collect();
        below.sort();
        below.iter().for_each(|it| walk(root, it, tree));
    }
}

/// A pod that an attacker could use.
struct Misbuilt {
    /// What is wrong with it.
    label: &'static str,
    /// What it gives away in each column.
    cells: [Cell; 3],
    /// The code and the field of the refusal it must get.
    promised: [&'static str; 2],
    /// What the driver answered.
    answer: Result<(), Status>,
}

/// Two pods built so that the promise could not hold. Without a driver that looks, the mistake works.
async fn misbuilt(stage: &Stage, issuer: &Issuer, pod: &PodSpec, columns: &[Column; 3]) -> [Misbuilt; 2] {
    let bad = |name: &str| {
        let mut bad = with_token(self::pod(name), issuer);
        bad.secrets = pod.secrets.clone();
        bad.set("/spec/volumes/0/csi/nodePublishSecretRef", json!({"name": "payments-api"}))
    };

    let binds = [Bind::ro(&columns[0].host, columns[0].dir), Bind::ro(&columns[1].host, columns[1].dir)];
    let other = stage.sandbox.run("second-envoy", User::new(ENVOY_UID), &binds, &["sleep", "infinity"]);
    let read = |column: &Column| {
        let file = format!("{}/password", column.dir);
        shell(attacks::from_outcome(&other.exec(User::new(ENVOY_UID), &["cat", &file]).unwrap(), &column.canary))
    };
    let mounts = bad("payments-mounted").set(
        "/spec/containers/1/volumeMounts/1",
        json!({"name": "creds", "mountPath": "/etc/creds", "readOnly": true}),
    );
    let refusal = refused(stage, &mounts).await;
    let first = Misbuilt {
        label: "a second container of UID 1337 mounts it",
        cells: [read(&columns[0]), read(&columns[1]), refusal_cell(&refusal, "SM130")],
        promised: ["SM130", "spec.containers[1].volumeMounts[1]"],
        answer: refusal,
    };

    let read = |column: &Column| {
        let file = format!("/proc/{}/root{}/password", stage.app.pid(), column.dir);
        shell(seen_on_host(User::new(APP_UID), &file, &column.canary))
    };
    let shares = bad("payments-shared")
        .set("/spec/shareProcessNamespace", json!(true))
        .set("/spec/containers/1/securityContext/runAsUser", json!(APP_UID));
    let refusal = refused(stage, &shares).await;
    let second = Misbuilt {
        label: "shared processes, and Envoy has UID 1000",
        cells: [read(&columns[0]), read(&columns[1]), refusal_cell(&refusal, "SM131")],
        promised: ["SM131", "spec.shareProcessNamespace"],
        answer: refusal,
    };
    [first, second]
}

async fn refused(stage: &Stage, pod: &PodSpec) -> Result<(), Status> {
    stage.kubelet.admit(pod);
    let outcome = stage.kubelet.publish(pod, "creds").await;
    let left = is_mounted(&stage.kubelet.target(pod, "creds"));
    stage.kubelet.forget(pod);
    match outcome {
        // A refusal that leaves a mount behind is none.
        Err(_) if left => Ok(()),
        other => other,
    }
}

/// The promised code if the refusal names it, else the first it names.
fn refusal_cell(answer: &Result<(), Status>, promised: &str) -> Cell {
    shell(match answer {
        Ok(()) => Got::Odd("published".into()),
        Err(status) if status.message().contains(promised) => Got::Refused(promised.into()),
        Err(status) => Got::Refused(status.message().chars().take(5).collect()),
    })
}

async fn rotate(screen: &mut Screen, stage: &Stage, pod: &PodSpec, canaries: &Canaries) {
    let before = Instant::now();
    stage.bao.write_kv2("secret", "payments/db", &pair(2, &canaries.second)).await;
    let mut every = Ok(());
    let end = before + Duration::from_secs(15);
    while !stage.app.log().contains("set 2 2") && Instant::now() < end {
        // The kubelet calls again every 60 to 90 s and at every event of the pod; here it does so ten times a second.
        every = every.and(stage.kubelet.publish(pod, "creds").await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let took = before.elapsed();
    let log = stage.app.log();
    let sets: Vec<&str> = log.lines().filter(|line| line.starts_with("set")).collect();
    let reads = log.lines().rev().find_map(|line| line.strip_prefix("reads ")).unwrap_or("0").to_owned();
    screen.check(every.is_ok(), &format!("every republish answered OK{}", why(&every)));
    screen.check(
        sets.last() == Some(&"set 2 2"),
        &format!("the app read the new set after {:.1} s, without a restart", took.as_secs_f32()),
    );
    screen.check(
        sets == ["set 1 1", "set 2 2"],
        &format!("no moment of a half set: {reads} reads of both files, seen in this order: {}", sets.join(", ")),
    );
}

async fn outage(screen: &mut Screen, stage: &mut Stage, pod: &PodSpec, canaries: &Canaries) {
    stage.bao.stop();
    let before = Instant::now();
    // The content is due after a second; from then on the driver tries for 30 s before it calls that a failure.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let answer = stage.kubelet.publish(pod, "creds").await;
    screen.check(answer.is_ok(), &format!("a republish answers OK{}", why(&answer)));
    let read = stage.app.exec(User::new(APP_UID), &["cat", "/etc/creds/password", "/etc/creds/api-key"]).unwrap();
    let counts = canary::in_bytes(&read.out, &[canaries.second.as_bytes(), canaries.api_key.as_bytes()]);
    screen.check(counts == [1, 1], "the content stays: the app reads the same files");
    let said = |report: &str| report.contains("failing since") && report.contains("STALE");
    let mut report = String::new();
    while !said(&report) && before.elapsed() < Duration::from_secs(45) {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut status = Command::new(binary());
        let out = status.arg("status").arg("--csi-socket").arg(stage.node.csi_socket()).output().unwrap();
        report = String::from_utf8_lossy(&if out.status.success() { out.stdout } else { out.stderr }).into_owned();
    }
    screen.say(&format!("`sealmount status` on the node, {} s after the stop:", before.elapsed().as_secs()));
    screen.show(&report);
    screen.check(said(&report), "status says that the content is stale, since when and why");
    let answer = stage.kubelet.publish(pod, "creds").await;
    screen.check(answer.is_ok(), &format!("and a republish still answers OK{}", why(&answer)));
}

async fn end(screen: &mut Screen, stage: Stage, pod: &PodSpec, canaries: &Canaries) {
    let Stage { mut app, envoy, sandbox, bao, kubelet, node } = stage;
    app.stop();
    drop(envoy);
    let unpublished = kubelet.unpublish(pod, "creds").await;
    screen.check(unpublished.is_ok(), &format!("unpublished without OpenBao{}", why(&unpublished)));
    let ours = node.kubelet_dir().join(format!("pods/{}/volumes/kubernetes.io~csi", pod.uid()));
    let mounts = node.mounts().into_iter().filter(|path| path.starts_with(&ours)).count();
    screen
        .check(mounts == 0 && kubelet.is_gone(pod, "creds"), "nothing of the volume is mounted, no directory is left");

    let needles = [&canaries.first, &canaries.second, &canaries.api_key, &canaries.token].map(|it| it.as_bytes());
    let before = Instant::now();
    let mut found = memory_of(&node, &needles);
    // The buffers of a connection go when it is closed for being idle.
    while found != [0, 0] && before.elapsed() < Duration::from_secs(15) {
        tokio::time::sleep(Duration::from_millis(500)).await;
        found = memory_of(&node, &needles);
    }
    screen.check(
        found == [0, 0],
        &format!(
            "secrets and the pod's token in the memory of the broker: {}, of the worker: {} (after {:.1} s)",
            found[0],
            found[1],
            before.elapsed().as_secs_f32()
        ),
    );
    let places: [&Path; 3] = [node.dir(), sandbox.dir(), &bao.audit_log()];
    let count = |place| canary::in_files(place, &needles).unwrap().iter().sum::<usize>();
    let on_disk: usize = places.into_iter().map(count).sum();
    screen.check(on_disk == 0, &format!("in logs, manifests, configuration and OpenBao's audit log: {on_disk}"));
}

/// How often the needles stand in the memory of broker and worker. The driver's name must be found there, or the
/// search would prove nothing.
fn memory_of(node: &Node, needles: &[&[u8]]) -> [usize; 2] {
    let with_name: Vec<&[u8]> = needles.iter().copied().chain([DRIVER.as_bytes()]).collect();
    [node.broker(), node.worker().unwrap()].map(|pid| {
        let counts = canary::in_memory(pid, &with_name).unwrap();
        let (name, secrets) = counts.split_last().unwrap();
        assert!(*name > 0, "the memory of process {pid} could not be read");
        secrets.iter().sum()
    })
}
