//! A pod as a mesh makes it: the application, Envoy as native sidecar and as container, an agent, and neighbours.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::scene::{
    APP, ENVOY, MARKS, NAMESPACE, READY, ROLE, Scene, app, container, mesh, native, neighbour, plain_root, pod, proxy,
    random,
};
use super::table::{self, Got, Row};
use crate::cluster::{Cluster, until};
use crate::lab::canary;
use crate::lab::envoy::Proxy;
use crate::machine::NODE_ADDRESS;

const POD: &str = "attacked";
const ALL: [&str; 3] = ["usual", "native", "sealed"];
/// What a process sees as its root, by way of /proc.
const OWN_ROOT: &str = "/proc/self/root";
/// What every container of a pod gets.
pub(super) const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

pub(super) async fn run(cluster: &mut Cluster) -> String {
    let second = cluster.canary();
    let scene = Scene::new(cluster).await;
    let pod = start(&scene).await;
    let (first, plain) = (proxy(&pod, 15000), proxy(&pod, 16000));
    let mut rows = files(&scene, &first, &plain).await;
    rows.push(held_files(&scene).await);
    rows.push(listeners(&scene).await);
    rows.extend(admin(&scene, &first).await);
    rows.extend(processes(&scene).await);
    rows.push(environment(&scene).await);
    rows.extend(driver(&scene, &first).await);
    rows.extend(tokens(&scene, &first).await);
    rows.extend(on_the_wire(&scene, &second).await);
    rows.push(by_dns(&scene).await);
    rows.extend(in_a_user_namespace(&scene).await);
    table::add(rows)
}

async fn start(scene: &Scene<'_>) -> Value {
    let mut app = app(&ALL);
    app["env"] = json!([{"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "usual", "key": "password"}}}]);
    let agent =
        |name: &str, uid, port: &str| container(name, uid, &["/bin/app", "agent", name, port, "/run/usual/password"]);
    let mut plain = mesh("envoy-plain", 16000);
    plain["securityContext"]["runAsGroup"] = json!(APP);
    let mut sniffer = plain_root("sniffer");
    sniffer["command"] = json!(["/bin/app", "trap", "8200", "/tmp/trap"]);
    let mut twin = neighbour("twin", APP);
    twin["securityContext"]["seccompProfile"] = json!({"type": "Unconfined"});
    let containers = [
        app,
        plain,
        // Agents run with the proxy's UID so that its redirection leaves them alone, or as root.
        agent("agent", ENVOY, "8100"),
        agent("agent-root", 0, "8101"),
        neighbour("root", 0),
        sniffer,
        twin,
    ];
    let pod = pod(POD, &ALL, Some(native(mesh("istio-proxy", 15000))), &containers);
    scene.start(&pod).await
}

/// Rows 1, 3, 4 and 11: what is in reach as a file.
async fn files(scene: &Scene<'_>, first: &Proxy, plain: &Proxy) -> Vec<Row> {
    let both = async |path: &str| (scene.by_envoy(first, path).await, scene.by_envoy(plain, path).await);
    let (by_first, by_plain) = both("/run/{}/password").await;
    let (data_first, data_plain) = both("/run/{}/..data/password").await;
    let shell = scene.each(POD, "istio-proxy", &["read", "/run/{}/password"]).await;
    let list = scene.each(POD, "istio-proxy", &["list", "/run/{}"]).await;
    let (own_first, _) = both(&format!("{OWN_ROOT}/run/{{}}/password")).await;
    let roots = scene.each(POD, "istio-proxy", &["roots", "/run/{}/password"]).await;
    let root = scene.each(POD, "root", &["read", "/run/{}/password"]).await;
    let root_roots = scene.each(POD, "root", &["roots", "/run/{}/password"]).await;
    let twin = scene.each(POD, "twin", &["read", "/run/{}/password"]).await;
    let warned = scene.cluster.kube.event(NAMESPACE, POD, "SM150 ", READY).await;
    assert!(warned.message.contains("twin"), "{warned:?}");
    let twin_roots = scene.each(POD, "twin", &["roots", "/run/{}/password"]).await;
    vec![
        Row::new(1, "read by the filter of Envoy, native sidecar; fsGroup, the app's group supplementary", by_first),
        Row::new(1, "read by the filter of Envoy, plain container; with the app's GID", by_plain),
        Row::new(1, "read by a shell of UID 1337", shell),
        Row::new(1, "list the directory", list),
        Row::new(1, "follow `..data`, native sidecar", data_first),
        Row::new(1, "follow `..data`, plain container", data_plain),
        Row::new(4, "Envoy: `/proc/self/root`", own_first),
        Row::new(4, "UID 1337: `/proc/PID/root` of every process it sees", roots),
        Row::new(11, "root without capabilities: read", root),
        Row::new(11, "root without capabilities: `/proc/PID/root`", root_roots),
        Row::new(11, "a neighbour with the app's UID and no seccomp profile: read (a warning names it)", twin),
        Row::new(11, "a neighbour with the app's UID: `/proc/PID/root`", twin_roots),
    ]
}

/// Row 3: every file that Envoy's container holds.
async fn held_files(scene: &Scene<'_>) -> Row {
    let marks = ["agents-vault", "payments/usual", "vault.example", "payments/db", ROLE];
    let mut attack = vec!["search"];
    attack.extend(scene.values.iter().map(String::as_str));
    attack.extend(marks);
    let found = scene.line(POD, "istio-proxy", &attack).await.expect("a search");
    let has = |needle: &str| found.contains(&format!("{needle}@"));
    // The token that every container gets is of the API server's audience; that one is found.
    assert!(found.contains(r#"aud:["https://kubernetes.default.svc"#), "the search finds no token: {found}");
    let ours = ["vault.example", "payments/db", ROLE].iter().any(|it| has(it)) || found.contains("vault-prod");
    let seen = [
        Got::found(has(&scene.values[0]) && has("agents-vault") && has("payments/usual")),
        Got::found(has(&scene.values[1])),
        Got::found(has(&scene.values[2]) || ours),
    ];
    let text = "the value, Vault's address, role, path or a token of its audience in any file of Envoy's container";
    Row::new(3, text, seen)
}

/// Row 5: who listens in the pod's network namespace.
async fn listeners(scene: &Scene<'_>) -> Row {
    let found = scene.line(POD, "istio-proxy", &["sockets"]).await.expect("a list");
    let all: BTreeSet<&str> = found.split(' ').collect();
    let usual = ["tcp:8100", "tcp:8101", "unix:@agent", "unix:@agent-root"];
    // Two Envoys, the application's own, and this row's neighbour.
    let own = ["tcp:15000", "tcp:15001", "tcp:15002", "tcp:16000", "tcp:16001", "tcp:16002", "tcp:8200", "unix:@app"];
    let rest: Vec<&str> = all.iter().filter(|it| !usual.contains(it) && !own.contains(it)).copied().collect();
    let others = if rest.is_empty() { Got::found(false) } else { Got::Odd(format!("nobody's: {rest:?}")) };
    let seen = [Got::found(usual.iter().all(|it| all.contains(it))), others.clone(), others];
    Row::new(5, "what hands out secrets and listens in the pod's network namespace", seen)
}

/// Row 6: Envoy's admin interface.
async fn admin(scene: &Scene<'_>, proxy: &Proxy) -> Vec<Row> {
    let mut all = Vec::new();
    let pages = ["config_dump?include_eds", "certs", "clusters", "stats", "memory", "server_info", "heap_dump"];
    for page in pages {
        let answer = proxy.admin(&format!("/{page}")).await.unwrap_or_else(|| panic!("no admin page {page}"));
        all.extend(answer.body);
    }
    let found = |bytes: &[u8]| {
        let needles: Vec<&[u8]> = scene.values.iter().map(String::as_bytes).collect();
        let counts = canary::in_bytes(bytes, &needles);
        [counts[0], counts[1], counts[2]].map(|count| Got::found(count > 0))
    };
    let tapped = tap(scene, proxy).await;
    vec![
        Row::new(6, "Envoy's admin: config_dump, certs, clusters, stats, memory, heap_dump", found(&all)),
        Row::new(6, "Envoy's tap, while the app gets its secret", found(&tapped)),
    ]
}

/// What `/tap` shows while the application asks the agent through Envoy, and reads its files.
async fn tap(scene: &Scene<'_>, proxy: &Proxy) -> Vec<u8> {
    let crate::lab::envoy::Place::Tcp(host, port) = &proxy.admin else { panic!("a TCP port") };
    let mut stream = TcpStream::connect((host.as_str(), *port)).await.expect("the admin interface");
    let body = json!({"config_id": "tap", "tap_config": {
        "match": {"any_match": true},
        "output_config": {"sinks": [{"format": "JSON_BODY_AS_STRING", "streaming_admin": {}}]},
    }})
    .to_string();
    let head = format!("POST /tap HTTP/1.1\r\nhost: envoy\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(head.as_bytes()).await.expect("ask for a tap");
    let mut seen = vec![0; 4096];
    // Its head: the tap is on.
    let length = stream.read(&mut seen).await.expect("an answer");
    seen.truncate(length);
    assert!(seen.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&seen));
    for column in ["native", "sealed"] {
        assert!(scene.cluster.reads(NAMESPACE, POD, "app", &format!("/run/{column}/password")).await.is_ok());
    }
    let got = shell(scene, "app", "wget -qO- http://127.0.0.1:15002/").await;
    assert_eq!(got, scene.values[0], "the agent through Envoy");
    let limit = Duration::from_secs(5);
    let whole = async {
        while canary::in_bytes(&seen, &[scene.values[0].as_bytes()])[0] == 0 {
            if stream.read_buf(&mut seen).await.expect("the tap") == 0 {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(limit, whole).await;
    seen
}

async fn shell(scene: &Scene<'_>, container: &str, script: &str) -> String {
    let ran = scene.cluster.kube.exec(NAMESPACE, POD, container, &["sh", "-c", script]).await;
    assert_eq!(ran.code, 0, "{script} in {container}: {}", ran.err);
    ran.out.trim().to_owned()
}

/// Rows 8 and 9: into a process that holds the secret, known by its socket. In the usual way that is the agent.
async fn processes(scene: &Scene<'_>) -> Vec<Row> {
    let mut rows = Vec::new();
    for (who, agent, label) in
        [("istio-proxy", "agent", "UID 1337"), ("root", "agent-root", "root without capabilities")]
    {
        let seen = [
            scene.attack(POD, who, 0, &["peer", agent, MARKS[0]]).await,
            scene.attack(POD, who, 1, &["peer", "app", MARKS[1]]).await,
            scene.attack(POD, who, 2, &["peer", "app", MARKS[2]]).await,
        ];
        let text = format!("{label}: pidfd_getfd from who holds it, found by its unix socket (SO_PEERPIDFD)");
        rows.push(Row::new(8, &text, seen));
    }
    // What Envoy's filter read before is in its memory.
    let seen = scene.each(POD, "istio-proxy", &["memory", "%"]).await;
    rows.push(Row::new(9, "UID 1337: the memory of every process it sees, Envoy's own too (it read row 1)", seen));
    let seen = scene.each(POD, "sniffer", &["memory", "%"]).await;
    // The usual way: agents of the attackers' UIDs, and processes that are shared.
    let agent =
        |name: &str, uid, port: &str| container(name, uid, &["/bin/app", "agent", name, port, "/run/usual/password"]);
    let containers = [
        agent("agent", ENVOY, "8100"),
        agent("agent-root", 0, "8101"),
        neighbour("proxy", ENVOY),
        neighbour("root", 0),
    ];
    let mut fetched = pod("fetched", &["usual"], None, &containers);
    fetched["spec"]["shareProcessNamespace"] = json!(true);
    scene.start(&fetched).await;
    for (label, in_fetched, who) in [("UID 1337", "proxy", "agent"), ("root without capabilities", "root", "root")] {
        for (what, attack) in [("ptrace", "ptrace"), ("process_vm_readv", "vm-readv")] {
            let seen = [
                scene.attack("fetched", in_fetched, 0, &[attack, MARKS[0]]).await,
                scene.attack(POD, who, 1, &[attack, MARKS[1]]).await,
                scene.attack(POD, who, 2, &[attack, MARKS[2]]).await,
            ];
            let text =
                format!("{label}: {what} of every process it sees (usual way: an agent of its UID, shared processes)");
            rows.push(Row::new(8, &text, seen));
        }
    }
    let usual = scene.attack("fetched", "proxy", 0, &["memory", MARKS[0]]).await;
    let [_, native, sealed] = seen;
    rows.push(Row::new(
        9,
        "the memory of the driver (the kubelet; usual way: an agent of the proxy's UID, shared processes)",
        [usual, native, sealed],
    ));
    rows
}

/// Row 10: the application's environment, while it can read its file.
async fn environment(scene: &Scene<'_>) -> Row {
    let environment = shell(scene, "app", "tr '\\0' '\\n' < /proc/1/environ").await;
    for (column, value) in ALL.iter().zip(&scene.values) {
        let read = scene.cluster.reads(NAMESPACE, POD, "app", &format!("/run/{column}/password")).await;
        assert_eq!(read.as_deref(), Ok(value.as_str()), "the application reads its own");
    }
    let seen = scene.values.each_ref().map(|value| Got::found(environment.contains(value.as_str())));
    Row::new(10, "the app's environment", seen)
}

/// Row 12: the driver from a pod.
async fn driver(scene: &Scene<'_>, proxy: &Proxy) -> Vec<Row> {
    let agent = async || {
        let got = shell(scene, "istio-proxy", "wget -qO- http://127.0.0.1:8100/").await;
        if got == scene.values[0] { Got::read() } else { Got::Odd(got) }
    };
    let says = async |attack: &[&str]| match scene.line(POD, "sniffer", attack).await {
        Ok(gain) => Got::Gain(if gain == "connected" { "CONNECTED" } else { "ANSWERED" }),
        Err(errno) => Got::Denied(errno),
    };
    let at = |port: u16| format!("{NODE_ADDRESS}:{port}");
    let pod = scene.cluster.driver().await;
    let driver = format!("{}:9810", pod["status"]["podIP"].as_str().expect("an address"));
    let plugins = "/var/lib/kubelet/plugins/csi.sealmount.io/csi.sock";
    let registration = "/var/lib/kubelet/plugins_registry/csi.sealmount.io@reg.sock";
    let devices = "/var/lib/kubelet/device-plugins/kubelet.sock";
    let sockets = [agent().await, says(&["connect", devices]).await, says(&["connect", plugins]).await];
    let registry = [agent().await, Got::Nothing, says(&["connect", registration]).await];
    let page = metrics(scene, &driver).await;
    let metrics = [agent().await, says(&["dial", &at(10255)]).await, page];
    let loopback = [agent().await, says(&["dial", "127.0.0.1:10248"]).await, says(&["dial", "127.0.0.1:9810"]).await];
    let on_node = [agent().await, says(&["dial", &at(10248)]).await, says(&["dial", &at(9810)]).await];
    let headers = [
        ("x-upstream", "kubelet"),
        ("x-method", "GET"),
        ("x-path", "/pods"),
        ("x-body", "TOKEN"),
        ("x-bearer", "yes"),
        ("x-token-file", TOKEN),
    ];
    let answer = proxy.ask(&headers).await;
    let kubelet = match answer.status {
        401 | 403 => Got::Denied(format!("HTTP {}", answer.status)),
        200 => Got::Gain("READ"),
        other => Got::Odd(format!("HTTP {other}: {}", String::from_utf8_lossy(&answer.body))),
    };
    vec![
        Row::new(12, "the driver's CSI socket (the kubelet's own; usual way: the agent's port)", sockets),
        Row::new(12, "the driver's registration socket", registry),
        Row::new(12, "the driver's metrics (the kubelet's read-only port)", metrics),
        Row::new(12, "the driver's port on the pod's loopback (the kubelet's health port)", loopback),
        Row::new(12, "the driver's port on the node (the kubelet's health port)", on_node),
        Row::new(12, "the kubelet's API with the pod's token", [agent().await, kubelet.clone(), kubelet]),
    ]
}

/// The driver's page of metrics, where the chart serves it to the cluster: counters, and no way to change anything.
async fn metrics(scene: &Scene<'_>, address: &str) -> Got {
    if let Err(errno) = scene.line(POD, "sniffer", &["dial", address]).await {
        return Got::Denied(errno);
    }
    let page = shell(scene, "sniffer", &format!("wget -qO- http://{address}/metrics")).await;
    assert!(page.contains("sealmount_publishes_total"), "{page}");
    let post = format!("wget -S -O- --post-data=x http://{address}/metrics 2>&1 | grep HTTP/ || true");
    let post = shell(scene, "sniffer", &post).await;
    assert!(post.contains("405"), "{post}");
    let told = ["secret/data", "vault.example", POD, NAMESPACE];
    let needles = scene.values.iter().map(String::as_str).chain(told);
    let told: Vec<&str> = needles.filter(|it| page.contains(it)).collect();
    if told.is_empty() { Got::denied("counters only") } else { Got::Odd(format!("tells {told:?}")) }
}

/// Row 13: what the pod's ServiceAccount gives to Envoy.
async fn tokens(scene: &Scene<'_>, proxy: &Proxy) -> Vec<Row> {
    let cluster = scene.cluster;
    role_without_audience(scene).await;
    let grant = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "reads"}, "rules": [
            {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["usual"], "verbs": ["get"]},
        ]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "reads"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reads"},
            "subjects": [{"kind": "ServiceAccount", "name": "api", "namespace": NAMESPACE}]},
    ]});
    cluster.kube.apply(NAMESPACE, &grant.to_string()).await;
    cluster.secret(NAMESPACE, "sealed", &[("password", &scene.values[2])]).await;
    let usual = from_vault(scene, proxy, "usual", "usual", 0, TOKEN).await;
    let sealed = from_vault(scene, proxy, ROLE, "db", 2, TOKEN).await;
    let mut seen = Vec::new();
    for name in ALL {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/secrets/{name}");
        let headers = [
            ("x-upstream", "apiserver"),
            ("x-method", "GET"),
            ("x-path", path.as_str()),
            ("x-body", "TOKEN"),
            ("x-bearer", "yes"),
            ("x-token-file", TOKEN),
        ];
        let answer = proxy.ask(&headers).await;
        seen.push(match answer.status {
            200 => Got::read(),
            401 | 403 => Got::Denied(format!("HTTP {}", answer.status)),
            other => Got::Odd(format!("HTTP {other}: {}", String::from_utf8_lossy(&answer.body))),
        });
    }
    let [a, b, c] = seen.try_into().expect("three columns");
    vec![
        Row::new(
            13,
            "Envoy asks Vault with the automounted token (usual way: a role without an audience)",
            [usual, Got::Nothing, sealed],
        ),
        Row::new(13, "Envoy asks the API server with it (usual way: an app that reads its Secret itself)", [a, b, c]),
    ]
}

/// As many write it: bound to the account, without an audience.
pub(super) async fn role_without_audience(scene: &Scene<'_>) {
    let role = json!({
        "bound_service_account_names": "api", "bound_service_account_namespaces": NAMESPACE,
        "token_policies": "payments", "token_ttl": "10m",
    });
    scene.cluster.bao.root("POST", "auth/kubernetes/role/usual", &role).await;
}

/// Logs in with a token of the pod's and reads the path.
pub(super) async fn from_vault(
    scene: &Scene<'_>,
    proxy: &Proxy,
    role: &str,
    secret: &str,
    column: usize,
    token: &str,
) -> Got {
    let body = format!(r#"{{"role":"{role}","jwt":"TOKEN"}}"#);
    let login = proxy.call("openbao", "/v1/auth/kubernetes/login", &body, Some(token)).await;
    if login.status != 200 {
        let odd = || Got::Odd(format!("HTTP {}: {}", login.status, String::from_utf8_lossy(&login.body)));
        return if login.status == 403 { Got::denied("HTTP 403") } else { odd() };
    }
    let reply: Value = serde_json::from_slice(&login.body).expect("OpenBao replies in JSON");
    let path = format!("/v1/secret/data/payments/{secret}");
    let client = reply["auth"]["client_token"].as_str().expect("a token");
    let headers =
        [("x-upstream", "openbao"), ("x-method", "GET"), ("x-path", path.as_str()), ("x-vault-token", client)];
    let answer = proxy.ask(&headers).await;
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    if text.contains(&scene.values[column]) { Got::read() } else { Got::Odd(format!("HTTP {}: {text}", answer.status)) }
}

/// Rows 5 and 7: captured and led astray, while volumes are published, refreshed and read.
async fn on_the_wire(scene: &Scene<'_>, second: &str) -> Vec<Row> {
    let (cluster, kube) = (scene.cluster, scene.cluster.kube);
    // Every container of the pod has this file; so every name of the pod's is the attacker's.
    shell(scene, "sniffer", "echo '127.0.0.1 vault.example' >> /etc/hosts").await;
    let next = random("native");
    let marks: [&str; 5] = [&scene.values[0], &scene.values[1], &next, &scene.values[2], second];
    let mut attack = vec!["capture", "/tmp/stop"];
    attack.extend(marks);
    let captured = scene.line(POD, "sniffer", &attack);
    let life = async {
        until("the capture runs", READY, async || {
            kube.exec(NAMESPACE, POD, "sniffer", &["test", "-e", "/tmp/capture"]).await.code == 0
        })
        .await;
        // The usual way: from the agent over localhost, and an agent that knows Vault by its name.
        shell(scene, "app", "wget -qO- http://127.0.0.1:8100/").await;
        shell(scene, "app", LOGIN).await;
        cluster.secret(NAMESPACE, "native", &[("password", &next)]).await;
        cluster.bao.write_kv2("secret", "payments/db", &json!({"password": second})).await;
        let mut published = pod("published", &ALL, None, &[app(&ALL)]);
        published["spec"]["hostAliases"] = json!([{"ip": "127.0.0.1", "hostnames": ["vault.example"]}]);
        scene.start(&published).await;
        let other = cluster.reads(NAMESPACE, "published", "app", "/run/sealed/password").await;
        assert_eq!(other.as_deref(), Ok(second), "published from the real Vault");
        until("the refresh from the real Vault", Duration::from_secs(150), async || {
            cluster.reads(NAMESPACE, POD, "app", "/run/sealed/password").await.as_deref() == Ok(second)
        })
        .await;
        shell(scene, "sniffer", "touch /tmp/stop").await;
    };
    let (captured, ()) = tokio::join!(captured, life);
    let counts: Vec<usize> =
        captured.expect("root may capture").split(' ').map(|it| it.parse().expect("a count")).collect();
    let [frames, usual, native, next_native, sealed, next_sealed] = counts[..] else { panic!("{counts:?}") };
    assert!(frames > 0 && usual > 0, "{counts:?}");
    let seen = [usual, native + next_native, sealed + next_sealed].map(|count| Got::found(count > 0));
    let led = led_astray(&shell(scene, "sniffer", "cat /tmp/trap").await);
    vec![
        Row::new(5, "root beside Envoy, in its network: captures all interfaces during publish, refresh, read", seen),
        Row::new(7, "the sidecar points Vault's name to itself (/etc/hosts, hostAliases); publish and refresh", led),
    ]
}

/// As an agent in the pod logs in that knows Vault by its name.
const LOGIN: &str = "wget -qO- --post-data=\"$(cat /var/run/secrets/kubernetes.io/serviceaccount/token)\" \
    http://vault.example:8200/v1/auth/kubernetes/login";

/// What the trap took: the one request that the pod made, and none of the driver's.
fn led_astray(trapped: &str) -> [Got; 3] {
    let from_app = trapped.contains("POST /v1/auth/kubernetes/login");
    let requests = trapped.lines().filter(|it| it.starts_with("from ")).count();
    [
        if from_app { Got::Gain("TOKEN TAKEN") } else { Got::denied("nothing came") },
        Got::Nothing,
        if requests > 1 { Got::Odd(trapped.to_owned()) } else { Got::denied("real Vault asked") },
    ]
}

/// Row 7: the pod asks its sidecar for names, and gets the sidecar's own address for each.
async fn by_dns(scene: &Scene<'_>) -> Row {
    let (cluster, kube) = (scene.cluster, scene.cluster.kube);
    let at_root = |name: &str, command: Value| {
        let mut container = plain_root(name);
        container["command"] = command;
        container
    };
    let containers = [
        app(&ALL),
        at_root("names", json!(["/bin/app", "names", "127.0.0.1"])),
        at_root("trap", json!(["/bin/app", "trap", "8200", "/tmp/trap"])),
    ];
    let mut misled = pod("misled", &ALL, None, &containers);
    misled["spec"]["dnsPolicy"] = json!("None");
    misled["spec"]["dnsConfig"] = json!({"nameservers": ["127.0.0.1"]});
    let volumes = misled["spec"]["volumes"].as_array_mut().expect("volumes");
    let sealed = volumes.iter_mut().find(|it| it["name"] == "sealed").expect("ours");
    sealed["csi"]["volumeAttributes"]["refresh"] = json!("10s");
    scene.start(&misled).await;
    let ran = kube.exec(NAMESPACE, "misled", "app", &["sh", "-c", LOGIN]).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    let next = cluster.canary();
    cluster.bao.write_kv2("secret", "payments/db", &json!({"password": next})).await;
    until("the refresh from the real Vault", Duration::from_secs(150), async || {
        cluster.reads(NAMESPACE, "misled", "app", "/run/sealed/password").await.as_deref() == Ok(next.as_str())
    })
    .await;
    let trapped = kube.exec(NAMESPACE, "misled", "trap", &["cat", "/tmp/trap"]).await.out;
    Row::new(7, "the sidecar is the pod's DNS and answers with itself; publish and refresh", led_astray(&trapped))
}

/// Row 11: the same in a pod with a user namespace of its own.
async fn in_a_user_namespace(scene: &Scene<'_>) -> Vec<Row> {
    let containers = [app(&ALL), plain_root("root"), neighbour("twin", APP)];
    let mut pod = pod("userns", &ALL, Some(native(mesh("istio-proxy", 15000))), &containers);
    pod["spec"]["hostUsers"] = json!(false);
    let running = scene.start(&pod).await;
    assert!(
        scene.cluster.reads(NAMESPACE, "userns", "app", "/run/sealed/password").await.is_ok(),
        "the app reads its own"
    );
    let envoy = scene.by_envoy(&proxy(&running, 15000), "/run/{}/password").await;
    let root = scene.each("userns", "root", &["roots", "/run/{}/password"]).await;
    vec![
        Row::new(11, "hostUsers: false: Envoy reads", envoy),
        Row::new(11, "hostUsers: false: root with the usual capabilities, `/proc/PID/root`", root),
    ]
}
