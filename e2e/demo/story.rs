//! The demo from top to bottom: set up, publish, attack, rotate, cut off, refuse, end.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use tonic::Status;

use crate::attacks::{self, Column, Scene, seen_on_host, shell};
use crate::lab::canary;
use crate::lab::envoy::{ENVOY_UID, Envoy, Upstream, carry};
use crate::lab::kubelet::{Kubelet, PodSpec, is_mounted, write_yaml};
use crate::lab::node::{Node, Options, binary};
use crate::lab::pod::{Bind, Container, Sandbox, User};
use crate::lab::{Identity, Issuer, OpenBao};
use crate::table::{Cell, Got, Screen};

const APP_UID: u32 = 1000;
const NODE: &str = "node-a";
/// The audience of the connection, which no other token of the pod has.
const VAULT_AUDIENCE: &str = "vault-prod";
/// The audience of the token every container of a pod holds.
const DEFAULT_AUDIENCE: &str = "https://kubernetes.default.svc";
const TOKEN_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The application: opens the current generation, reads both files of it, and says when a pair is new, mixed or not
/// whole. `cd -P` pins one generation; if that one goes away meanwhile the application opens the next, once.
const APP: &str = r#"
# The values end without a newline: read says 1 then, but has them.
line() { value=; read -r value < "$1" || [ -n "$value" ]; }
pair() { cd -P /etc/creds/..data && line username && user=$value && line password && word=$value; }
seen= reads=0
while :; do
    turn=0
    while [ $turn -lt 25 ]; do
        if pair 2> /dev/null || pair 2> /dev/null; then
            now="${user%%-*} ${word%%-*}"
            reads=$((reads + 1))
        else
            now=missing
        fi
        if [ "$now" != "$seen" ]; then seen=$now; echo "set $now"; fi
        turn=$((turn + 1))
    done
    echo "reads $reads"
    sleep 0.02
done
"#;

/// Everything that runs. Dropped in this order: containers before the network they share, the node last.
struct Stage {
    app: Container,
    envoy: Envoy,
    sandbox: Sandbox,
    bao: OpenBao,
    kubelet: Kubelet,
    node: Node,
}

/// What must not be found anywhere but in the application's files.
struct Canaries {
    usual: String,
    secret: String,
    first: String,
    second: String,
    api_key: String,
    token: String,
}

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
    let (vault_token, default_token) = open_vault(&bao, &issuer, &pod, &canaries).await;
    canaries.token = vault_token.rsplit('.').next().unwrap().to_owned();
    let pod = with_token(pod, &vault_token);
    screen.say(&format!("OpenBao serves TLS on {} and writes an audit log.", bao.address()));
    let (node, kubelet) = Node::start(Options::new(&platform_file(&bao)).file("ca.pem", bao.ca_pem())).await;
    let worker = node.worker().unwrap();
    screen.say(&format!(
        "sealmount node: broker {} (root, no network), worker {worker} (UID {}, capabilities {}).",
        node.broker(),
        status_field(worker, "Uid"),
        status_field(worker, "CapEff"),
    ));
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
    let why = published.as_ref().err().map_or_else(String::new, |status| format!(": {status:?}"));
    screen.check(published.is_ok(), &format!("published in {} ms{why}", took.as_millis()));
    let target = kubelet.target(&pod, "creds");

    let sandbox = Sandbox::new();
    let tokens = sandbox.dir().join("token");
    fs::create_dir(&tokens).unwrap();
    fs::write(tokens.join("token"), &default_token).unwrap();
    for (path, mode) in [(tokens.clone(), 0o755), (tokens.join("token"), 0o644)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
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
    let refusals = misbuilt(&stage, &pod, &columns).await;
    let sockets = [stage.node.csi_socket(), registration_socket(&stage.kubelet).await];
    let cells = refusals.each_ref().map(|(label, cells, _)| (*label, cells.clone()));
    let scene = Scene {
        envoy: &stage.envoy,
        app: &stage.app,
        columns: &columns,
        sockets,
        worker,
        roles: [Some("usual"), None, Some("payments")],
        misbuilt: cells,
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
    for (label, _, refusal) in &refusals {
        show_refusal(screen, label, refusal.as_ref());
    }

    screen.title("The end: the pod goes, OpenBao is still away");
    end(screen, stage, &pod, &canaries).await;
}

fn random(label: &str) -> String {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
    format!("{label}{}", uuid.trim().replace('-', ""))
}

/// The pod of the demo: `app` mounts all three volumes, `envoy` only the one of the usual way.
fn pod(name: &str) -> PodSpec {
    let mount = |name: &str, path: &str| json!({"name": name, "mountPath": path, "readOnly": true});
    PodSpec::new(name, NODE)
        .attribute("vault", "prod")
        .attribute(
            "files",
            "username: secret/data/payments/db#username\npassword: secret/data/payments/db#password\napi-key: \"#api-key\"\n",
        )
        .attribute("refresh", "1s")
        .set("/spec/volumes/1", json!({"name": "usual", "emptyDir": {"medium": "Memory"}}))
        .set("/spec/volumes/2", json!({"name": "native", "secret": {"secretName": "native"}}))
        .set("/spec/containers/0/volumeMounts/1", mount("usual", "/vault/secrets"))
        .set("/spec/containers/0/volumeMounts/2", mount("native", "/etc/native"))
        .set("/spec/containers/1/volumeMounts", json!([mount("usual", "/vault/secrets")]))
}

fn identity(pod: &PodSpec) -> Identity {
    Identity {
        namespace: pod.namespace().into(),
        pod: pod.name().into(),
        pod_uid: pod.uid().into(),
        service_account: pod.service_account().into(),
        service_account_uid: "5d1c6a52-9a0e-4c7b-8f52-8f4c1d0f3a11".into(),
    }
}

fn with_token(pod: PodSpec, jwt: &str) -> PodSpec {
    pod.token(VAULT_AUDIENCE, jwt, SystemTime::now() + Duration::from_secs(3600))
}

/// Secrets, a policy and two roles: `payments` wants the connection's own audience, `usual` takes the token that lies
/// in every container. Gives the pod's tokens for both.
async fn open_vault(bao: &OpenBao, issuer: &Issuer, pod: &PodSpec, canaries: &Canaries) -> (String, String) {
    let who = identity(pod);
    bao.mount_kv().await;
    bao.write_kv2("secret", "payments/db", &pair(1, &canaries.first)).await;
    bao.write_kv2("secret", "payments/usual", &pair(1, &canaries.usual)).await;
    bao.policy("payments", &["secret/data/payments/*"]).await;
    bao.jwt_auth("jwt", issuer).await;
    for (role, audience) in [("payments", VAULT_AUDIENCE), ("usual", DEFAULT_AUDIENCE)] {
        bao.jwt_role("jwt", role, &who, audience, &["payments"], &json!({})).await;
    }
    (issuer.token(&who, VAULT_AUDIENCE), issuer.token(&who, DEFAULT_AUDIENCE))
}

/// Both values carry the number of their set, so that a mixed pair shows.
fn pair(set: u32, canary: &str) -> Value {
    json!({"username": format!("{set}-payments"), "password": format!("{set}-{canary}")})
}

/// The platform team's file.
fn platform_file(bao: &OpenBao) -> String {
    format!(
        r#"version: 1
connections:
  prod:
    default: true
    address: {}
    ca_file: ca.pem
    auth: {{method: jwt, mount: jwt, audience: {VAULT_AUDIENCE}, role: payments}}
    allow:
    - namespaces: [payments]
      service_accounts: [payments]
      roles: [payments]
      paths: ["secret/data/{{{{ pod.namespace }}}}/*"]
      methods: [read]
    refresh: {{default: 1s, min: 1s, max: 1h}}
stale_after: 2s
"#,
        bao.address()
    )
}

/// The volumes of the two other columns, filled, and where all three are.
async fn volumes(
    node: &Node,
    kubelet: &Kubelet,
    pod: &PodSpec,
    bao: &OpenBao,
    default_token: &str,
    canaries: &Canaries,
) -> [Column; 3] {
    let below = node.kubelet_dir().join(format!("pods/{}/volumes", pod.uid()));
    let tmpfs = |kind: &str, name: &str, options: &str| {
        let dir = below.join(kind).join(name);
        DirBuilder::new().recursive(true).mode(0o750).create(&dir).unwrap();
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&dir).status().unwrap();
        assert!(status.success(), "cannot mount a tmpfs at {}", dir.display());
        dir
    };

    // The usual way: an agent logs in with the token of its container and writes into a volume both containers mount.
    let usual = tmpfs("kubernetes.io~empty-dir", "usual", "mode=0777,size=1m");
    let login = json!({"role": "usual", "jwt": default_token});
    let (_, reply) = bao.call("", "POST", "auth/jwt/login", &login).await.unwrap();
    let token = reply["auth"]["client_token"].as_str().unwrap();
    let (_, reply) = bao.call(token, "GET", "secret/data/payments/usual", &Value::Null).await.unwrap();
    write(&usual.join("password"), reply["data"]["data"]["password"].as_str().unwrap(), 0o644);
    chown(usual.join("password"), Some(100), Some(1000)).unwrap();

    // A Secret volume, as the kubelet's atomic writer lays it out.
    let native = tmpfs("kubernetes.io~secret", "native", "mode=1777,size=1m");
    let generation = native.join("..2026_01_01_00_00_00.1");
    DirBuilder::new().mode(0o755).create(&generation).unwrap();
    fs::set_permissions(&generation, fs::Permissions::from_mode(0o755)).unwrap();
    write(&generation.join("password"), &canaries.secret, 0o644);
    symlink("..2026_01_01_00_00_00.1", native.join("..data")).unwrap();
    symlink("..data/password", native.join("password")).unwrap();

    [
        Column { dir: "/vault/secrets", host: usual, canary: canaries.usual.clone() },
        Column { dir: "/etc/native", host: native, canary: canaries.secret.clone() },
        Column { dir: "/etc/creds", host: kubelet.target(pod, "creds"), canary: canaries.first.clone() },
    ]
}

fn write(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn start_app(sandbox: &Sandbox, columns: &[Column; 3], tokens: &Path) -> Container {
    let mut binds: Vec<Bind> = columns.iter().map(|column| Bind::ro(&column.host, column.dir)).collect();
    binds.push(Bind::ro(tokens, TOKEN_DIR));
    sandbox.run("app", User::new(APP_UID), &binds, &["sh", "-c", APP])
}

async fn start_envoy(sandbox: &Sandbox, columns: &[Column; 3], tokens: &Path, bao: &OpenBao, node: &Node) -> Envoy {
    let road = sandbox.dir().join("openbao.sock");
    carry(&road, bao.port());
    let binds =
        [Bind::ro(&columns[0].host, columns[0].dir), Bind::ro(tokens, TOKEN_DIR), Bind::ro(&road, "/openbao.sock")];
    let csi = node.csi_socket();
    let upstreams = [
        Upstream { name: "openbao", socket: "/openbao.sock", ca_pem: Some(bao.ca_pem()) },
        Upstream { name: "driver", socket: csi.to_str().unwrap(), ca_pem: None },
    ];
    Envoy::start(sandbox, &binds, &upstreams).await
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

async fn registration_socket(kubelet: &Kubelet) -> PathBuf {
    kubelet.registration_socket(Duration::from_secs(2)).await.unwrap()
}

/// A pod that an attacker could use: what it shows, the row of the table, and the driver's refusal.
type Misbuilt = (&'static str, [Cell; 3], Result<(), Status>);

/// Two pods built so that the promise could not hold. Without a driver that looks, the mistake works.
async fn misbuilt(stage: &Stage, pod: &PodSpec, columns: &[Column; 3]) -> [Misbuilt; 2] {
    let second = "a second container of UID 1337 mounts it";
    let shared = "shared processes, and Envoy has UID 1000";
    let vault_token = &pod.tokens[VAULT_AUDIENCE].0;
    let bad = |name: &str| {
        let mut bad = with_token(self::pod(name), vault_token);
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
    let first = (second, [read(&columns[0]), read(&columns[1]), refusal_cell(&refusal)], refusal);

    let read = |column: &Column| {
        let file = format!("/proc/{}/root{}/password", stage.app.pid(), column.dir);
        shell(seen_on_host(User::new(APP_UID), &file, &column.canary))
    };
    let shares = bad("payments-shared")
        .set("/spec/shareProcessNamespace", json!(true))
        .set("/spec/containers/1/securityContext/runAsUser", json!(APP_UID));
    let refusal = refused(stage, &shares).await;
    [first, (shared, [read(&columns[0]), read(&columns[1]), refusal_cell(&refusal)], refusal)]
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

fn refusal_cell(outcome: &Result<(), Status>) -> Cell {
    shell(match outcome {
        Ok(()) => Got::Odd("published".into()),
        Err(status) => Got::Refused(code(status.message())),
    })
}

/// The first code of a message, such as `SM101`; empty if it has none.
fn code(message: &str) -> String {
    let words = message.split(|c: char| !c.is_ascii_alphanumeric());
    let is_code = |word: &&str| {
        word.strip_prefix("SM").is_some_and(|it| it.len() == 3 && it.bytes().all(|byte| byte.is_ascii_digit()))
    };
    words.into_iter().find(is_code).unwrap_or_default().to_owned()
}

fn show_refusal(screen: &mut Screen, label: &str, outcome: Result<&(), &Status>) {
    let message = outcome.err().map_or("published", Status::message).to_owned();
    let kind = outcome.err().map_or(String::new(), |status| format!("{:?}: ", status.code()));
    let named = !code(&message).is_empty() && message.contains("spec.");
    screen.check(named, &format!("{label}: {kind}{message}"));
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
    screen.check(every.is_ok(), "every republish answered OK");
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
    let mut every = Ok(());
    let mut report = String::new();
    let end = Instant::now() + Duration::from_secs(15);
    while !(report.contains("failing since") && report.contains("STALE")) && Instant::now() < end {
        every = every.and(stage.kubelet.publish(pod, "creds").await);
        tokio::time::sleep(Duration::from_millis(200)).await;
        let out = Command::new(binary()).arg("status").arg("--csi-socket").arg(stage.node.csi_socket()).output();
        let out = out.unwrap();
        report = String::from_utf8_lossy(&if out.status.success() { out.stdout } else { out.stderr }).into_owned();
    }
    screen.check(every.is_ok(), "every republish answered OK");
    let read = stage.app.exec(User::new(APP_UID), &["cat", "/etc/creds/password", "/etc/creds/api-key"]).unwrap();
    let counts = canary::in_bytes(&read.out, &[canaries.second.as_bytes(), canaries.api_key.as_bytes()]);
    screen.check(counts == [1, 1], "the content stays: the app reads the same files");
    screen.say("`sealmount status` on the node:");
    screen.show(&report);
    screen.check(
        report.contains("failing since") && report.contains("STALE"),
        "status says that the content is stale, since when and why",
    );
}

async fn end(screen: &mut Screen, stage: Stage, pod: &PodSpec, canaries: &Canaries) {
    let Stage { mut app, envoy, sandbox, bao, kubelet, node } = stage;
    app.stop();
    drop(envoy);
    let unpublished = kubelet.unpublish(pod, "creds").await;
    let why = unpublished.as_ref().err().map_or_else(String::new, |status| format!(": {status:?}"));
    screen.check(unpublished.is_ok(), &format!("unpublished without OpenBao{why}"));
    let ours = node.kubelet_dir().join(format!("pods/{}/volumes/kubernetes.io~csi", pod.uid()));
    let mounts = node.mounts().into_iter().filter(|path| path.starts_with(&ours)).count();
    screen
        .check(mounts == 0 && kubelet.is_gone(pod, "creds"), "nothing of the volume is mounted, no directory is left");

    let needles = [&canaries.first, &canaries.second, &canaries.api_key, &canaries.token].map(|it| it.as_bytes());
    let sum = |counts: std::io::Result<Vec<usize>>| counts.map_or(usize::MAX, |counts| counts.iter().sum::<usize>());
    let before = Instant::now();
    let mut found = [usize::MAX; 2];
    // The buffers of a connection go when it is closed for being idle.
    while found != [0, 0] && before.elapsed() < Duration::from_secs(15) {
        let worker = node.worker().unwrap_or(0);
        found = [node.broker(), worker].map(|pid| sum(canary::in_memory(pid, &needles)));
        if found != [0, 0] {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
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
    let places = [node.dir(), sandbox.dir(), &bao.audit_log()];
    let on_disk: usize = places.iter().map(|place| sum(canary::in_files(place, &needles))).sum();
    screen.check(on_disk == 0, &format!("in logs, manifests, configuration and OpenBao's audit log: {on_disk}"));
}
