//! The pods of the attacks: an application with its secret in three ways, and neighbours that attack it.

use std::time::Duration;

use serde_json::{Value, json};

use super::table::Got;
use crate::cluster::Cluster;
use crate::images;
use crate::install::payments;
use crate::lab::envoy::{Place, Proxy, Upstream, bootstrap, errno};
use crate::machine::NODE_ADDRESS;

/// The namespace of the README's role.
pub(super) const NAMESPACE: &str = "payments";
/// That role.
pub(super) const ROLE: &str = "payments-api";
/// Where the volumes are mounted, by the names of the columns.
pub(super) const COLUMNS: [&str; 3] = ["usual", "native", "sealed"];
/// What each column's values begin with, as attackers may know.
pub(super) const MARKS: [&str; 3] = ["usual", "native", "canary"];
/// The application's UID.
pub(super) const APP: u32 = 1000;
/// Envoy's, as Istio's proxy has it.
pub(super) const ENVOY: u32 = 1337;
/// Of the init container that writes the usual way's files.
const WRITER: u32 = 2001;
/// How long a pod may take to be ready.
pub(super) const READY: Duration = Duration::from_secs(60);
/// The path of every column's secret.
pub(super) fn path(column: &str) -> String {
    format!("/run/{column}/password")
}

/// The cluster with the values of this check.
pub(super) struct Scene<'a> {
    pub(super) cluster: &'a Cluster,
    /// What `password` holds in each column.
    pub(super) values: [String; 3],
}

impl<'a> Scene<'a> {
    /// Makes the namespace, the Secrets and what Vault holds.
    pub(super) async fn new(cluster: &'a mut Cluster) -> Self {
        let sealed = cluster.canary();
        // Not looked for by the sweep: the usual way writes to disk.
        let values = [random("usual"), random("native"), sealed];
        payments(cluster).await;
        cluster.secret(NAMESPACE, "native", &[("password", &values[1])]).await;
        cluster.secret(NAMESPACE, "usual", &[("password", &values[0])]).await;
        for (name, value) in [("usual", &values[0]), ("db", &values[2])] {
            cluster.bao.write_kv2("secret", &format!("payments/{name}"), &json!({"password": value})).await;
        }
        let config = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "envoy"},
            "data": {
                "first.json": envoy(cluster, 15000, &values[0]).to_string(),
                "second.json": envoy(cluster, 16000, &values[0]).to_string(),
            },
        });
        cluster.kube.apply(NAMESPACE, &config.to_string()).await;
        Self { cluster, values }
    }

    /// As controllers make pods: `kubectl apply` would leave the whole manifest in an annotation, and Envoy mounts those.
    async fn create(&self, pod: &Value) {
        let created = self.cluster.kube.try_with(&["create", "-n", NAMESPACE, "-f", "-"], &pod.to_string()).await;
        created.unwrap_or_else(|error| panic!("kubectl create: {error}"));
    }

    /// Makes a pod and waits until it is ready.
    pub(super) async fn start(&self, pod: &Value) -> Value {
        self.create(pod).await;
        self.cluster.kube.ready(NAMESPACE, pod["metadata"]["name"].as_str().expect("a name"), READY).await
    }

    /// An attack of the program `app` in a container, and its line.
    pub(super) async fn line(&self, pod: &str, container: &str, attack: &[&str]) -> Result<String, String> {
        let mut command = vec!["/bin/app"];
        command.extend(attack);
        let ran = self.cluster.kube.exec(NAMESPACE, pod, container, &command).await;
        let out = ran.out.trim_end();
        match out.strip_prefix("= ") {
            Some(gain) => Ok(gain.to_owned()),
            None if out.is_empty() => panic!("{attack:?} in {pod}/{container}: {}", ran.err),
            None => Err(out.to_owned()),
        }
    }

    /// The same against one column's value.
    pub(super) async fn attack(&self, pod: &str, container: &str, column: usize, attack: &[&str]) -> Got {
        match self.line(pod, container, attack).await {
            Ok(gain) if gain.contains(&self.values[column]) => Got::read(),
            Ok(gain) if gain.split(' ').any(|name| name == "password") => Got::Gain("LISTED"),
            Ok(gain) => Got::Odd(gain.chars().take(60).collect()),
            Err(errno) => Got::Denied(errno),
        }
    }

    /// The same in all three columns, with `{}` for the column and `%` for its mark.
    pub(super) async fn each(&self, pod: &str, container: &str, attack: &[&str]) -> [Got; 3] {
        let one = async |column: usize| {
            let words: Vec<String> =
                attack.iter().map(|it| it.replace("{}", COLUMNS[column]).replace('%', MARKS[column])).collect();
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            self.attack(pod, container, column, &words).await
        };
        // One after the other, so that none takes another's process for the application's.
        [one(0).await, one(1).await, one(2).await]
    }

    /// A read by Envoy's filter.
    pub(super) async fn by_envoy(&self, proxy: &Proxy, path: &str) -> [Got; 3] {
        let one = async |column: usize| match proxy.read(&path.replace("{}", COLUMNS[column])).await {
            Ok(bytes) if String::from_utf8_lossy(&bytes).contains(&self.values[column]) => Got::read(),
            Ok(bytes) => Got::Odd(format!("{} other bytes", bytes.len())),
            Err(text) => errno(&text).map_or_else(|| Got::Odd(text.clone()), Got::denied),
        };
        let (usual, native, sealed) = tokio::join!(one(0), one(1), one(2));
        [usual, native, sealed]
    }

    /// Makes a pod that the driver must refuse with this code and field, as its event says.
    pub(super) async fn refused(&self, pod: &Value, code_and_field: &str) -> Got {
        let name = pod["metadata"]["name"].as_str().expect("a name");
        self.create(pod).await;
        // Its end too: `volumeMounts[1]` is not `volumeMounts[1].name`.
        self.cluster.kube.event(NAMESPACE, name, &format!("{code_and_field}:"), READY).await;
        let status = self.cluster.kube.pod(NAMESPACE, name).await.expect("the pod");
        assert_eq!(status["status"]["phase"], "Pending", "{name} runs although it was refused");
        self.cluster.kube.run(&format!("delete pod -n {NAMESPACE} {name} --wait=false --grace-period=0")).await;
        Got::Refused(code_and_field.to_owned())
    }
}

/// A secret value that begins so.
pub(super) fn random(mark: &str) -> String {
    let mut bytes = [0_u8; 12];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes).expect("random bytes");
    format!("{mark}{}", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// The Envoy of a pod: its filter one port above its admin interface, and two above it a listener that passes on to the
/// agent what the application asks, as a mesh does.
pub(super) fn proxy(pod: &Value, admin: u16) -> Proxy {
    let address = pod["status"]["podIP"].as_str().expect("an address");
    let at = |port| Place::Tcp(address.to_owned(), port);
    Proxy { http: at(admin + 1), admin: at(admin) }
}

/// Its configuration. The credential of the usual way stands in it.
fn envoy(cluster: &Cluster, admin: u16, credential: &str) -> Value {
    let at = |port| Place::Tcp("0.0.0.0".to_owned(), port);
    let node = |port| Place::Tcp(NODE_ADDRESS.to_owned(), port);
    let authority = Some(cluster.bao.ca_pem());
    let upstreams = [
        Upstream { name: "openbao", place: node(8200), ca_pem: authority },
        Upstream { name: "apiserver", place: node(443), ca_pem: authority },
        Upstream { name: "kubelet", place: node(10250), ca_pem: authority },
        Upstream { name: "agent", place: Place::Tcp("127.0.0.1".to_owned(), 8100), ca_pem: None },
    ];
    let mut config = bootstrap(&Proxy { http: at(admin + 1), admin: at(admin) }, &upstreams);
    // The kubelet's certificate is its own.
    for cluster in config["static_resources"]["clusters"].as_array_mut().expect("clusters") {
        if cluster["name"] == "kubelet" {
            cluster["transport_socket"]["typed_config"]["common_tls_context"] = json!({});
        }
    }
    let listeners = config["static_resources"]["listeners"].as_array_mut().expect("listeners");
    let mut passing = listeners[0].clone();
    passing["name"] = json!("passing");
    passing["address"]["socket_address"]["port_value"] = json!(admin + 2);
    let connections = &mut passing["filter_chains"][0]["filters"][0]["typed_config"];
    connections["http_filters"][0] = json!({"name": "tap", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.tap.v3.Tap",
        "common_config": {"admin_config": {"config_id": "tap"}},
    }});
    connections["route_config"] = json!({"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{
        "match": {"prefix": "/"},
        "route": {"cluster": "agent"},
        "request_headers_to_add": [{"header": {"key": "authorization", "value": credential}}],
    }]}]});
    listeners.push(passing);
    config
}

/// Where a container mounts a column.
pub(super) fn mount(column: &str) -> Value {
    json!({"name": column, "mountPath": format!("/run/{column}")})
}

/// A container of user `uid` without capabilities, with the usual way's volume.
pub(super) fn container(name: &str, uid: u32, command: &[&str]) -> Value {
    json!({
        "name": name, "image": images::APP, "imagePullPolicy": "Never", "command": command,
        "securityContext": {
            "runAsUser": uid, "runAsGroup": uid, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [mount("usual")],
    })
}

/// A neighbour that waits for orders.
pub(super) fn neighbour(name: &str, uid: u32) -> Value {
    container(name, uid, &["/bin/app", "pause"])
}

/// A neighbour with capabilities.
pub(super) fn capable(name: &str, uid: u32, capabilities: &[&str]) -> Value {
    let mut container = neighbour(name, uid);
    container["securityContext"] = json!({"runAsUser": uid, "capabilities": {"drop": ["ALL"], "add": capabilities}});
    container
}

/// root with the capabilities that a runtime gives by itself.
pub(super) fn plain_root(name: &str) -> Value {
    let mut container = neighbour(name, 0);
    container["securityContext"] = json!({"runAsUser": 0});
    container
}

/// The application, with these columns.
pub(super) fn app(columns: &[&str]) -> Value {
    let paths: Vec<String> = columns.iter().map(|it| path(it)).collect();
    let mut command = vec!["/bin/app", "own", "app"];
    command.extend(paths.iter().map(String::as_str));
    let mut app = container("app", APP, &command);
    app["volumeMounts"] = columns.iter().map(|it| mount(it)).collect();
    app["securityContext"]["seccompProfile"] = json!({"type": "RuntimeDefault"});
    app
}

/// Envoy itself, with the admin interface on this port.
pub(super) fn mesh(name: &str, admin: u16) -> Value {
    let file = if admin == 15000 { "first" } else { "second" };
    let file = format!("/etc/envoy/{file}.json");
    let log = ["--concurrency", "1", "-l", "warning", "--disable-hot-restart"];
    let mut command = vec!["/bin/envoy", "-c", &file];
    command.extend(log);
    let mut mesh = container(name, ENVOY, &command);
    mesh["image"] = json!(images::ENVOY);
    let mounts = mesh["volumeMounts"].as_array_mut().expect("mounts");
    mounts.push(json!({"name": "bootstrap", "mountPath": "/etc/envoy"}));
    mounts.push(json!({"name": "podinfo", "mountPath": "/etc/istio/pod"}));
    mesh["readinessProbe"] = json!({"httpGet": {"path": "/ready", "port": admin}, "periodSeconds": 1});
    mesh
}

/// As injectors add it: an init container that goes on.
pub(super) fn native(mut container: Value) -> Value {
    container["restartPolicy"] = json!("Always");
    container
}

/// The volumes of these columns.
fn volumes(columns: &[&str]) -> Vec<Value> {
    let all = [
        json!({"name": "usual", "emptyDir": {}}),
        json!({"name": "native", "secret": {"secretName": "native"}}),
        json!({"name": "sealed", "csi": {"driver": "csi.sealmount.io", "readOnly": true, "volumeAttributes": {
            "vault": "prod", "for": "app", "refresh": "1m", "files": "password: secret/data/payments/db#password",
        }}}),
    ];
    all.into_iter().filter(|it| columns.iter().any(|name| it["name"] == *name)).collect()
}

/// A pod of these containers with the volumes of these columns. The usual way's files are written by an init container,
/// 0644, in the kubelet's own layout.
pub(super) fn pod(name: &str, columns: &[&str], injected: Option<Value>, containers: &[Value]) -> Value {
    let script = "mkdir -p /run/usual/..1 && cp /run/source/password /run/usual/..1/password && \
        chmod 0644 /run/usual/..1/password && ln -s ..1 /run/usual/..data && \
        ln -s ..data/password /run/usual/password";
    let mut writer = container("writer", WRITER, &["/bin/busybox", "sh", "-c", script]);
    writer["volumeMounts"].as_array_mut().expect("mounts").push(json!({"name": "source", "mountPath": "/run/source"}));
    let mut all = volumes(columns);
    all.extend([
        json!({"name": "source", "secret": {"secretName": "usual"}}),
        json!({"name": "bootstrap", "configMap": {"name": "envoy"}}),
        json!({"name": "podinfo", "downwardAPI": {"items": [
            {"path": "annotations", "fieldRef": {"fieldPath": "metadata.annotations"}},
            {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        ]}}),
    ]);
    if !columns.contains(&"usual") {
        all.push(json!({"name": "usual", "emptyDir": {}}));
    }
    let mut first = vec![writer];
    first.extend(injected);
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}, "annotations": {
            // The way an agent's injector is told.
            "vault.hashicorp.com/service": "http://agents-vault:8200",
            "vault.hashicorp.com/agent-inject-secret-db": "secret/data/payments/usual",
        }},
        "spec": {
            "serviceAccountName": "api", "terminationGracePeriodSeconds": 1, "dnsPolicy": "Default",
            "securityContext": {"fsGroup": 2000, "supplementalGroups": [APP]},
            "initContainers": first, "containers": containers, "volumes": all,
        },
    })
}
