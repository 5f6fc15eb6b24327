//! Each rule by breaking exactly one thing in a valid pod.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use super::facts::{EnvSecret, Mount, Profiles, Projection, Source, Volume};
use super::*;
use crate::request::files::Files;
use crate::request::{Code, PodUid, VolumeName, attributes_digest};

/// A pod as people write it: the application reads, a proxy was injected, an init container prepared something.
struct Pod {
    volume: VolumeId,
    claim: Claim,
    facts: PodFacts,
    rules: Rules,
    now: SystemTime,
}

fn valid() -> Pod {
    let pod = PodRef {
        namespace: "payments".into(),
        name: "api-0".into(),
        uid: PodUid::parse("0b8e1a3c-5f6d-4e7a-9b8c-1d2e3f4a5b6c").unwrap(),
        service_account: "api".into(),
    };
    let digest = attributes_digest([("for", "app")]);
    let container = |name: &str, kind, index, uid, mounts: &[&str]| Container {
        name: name.into(),
        kind,
        index,
        image: format!("registry.example/{name}:1"),
        run_as_user: uid,
        privileged: false,
        added: Vec::new(),
        drops_all: true,
        escalation: Some(false),
        unmasked_proc: false,
        profiles: Profiles::default(),
        target: None,
        env: Vec::new(),
        env_vault: Vec::new(),
        devices: Vec::new(),
        extended_resources: Vec::new(),
        claims: Vec::new(),
        mounts: mounts.iter().map(|m| mount(m, &format!("/{m}"))).collect(),
        running_uid: None,
    };
    let csi = |attributes| Csi {
        driver: "csi.sealmount.io".into(),
        read_only: true,
        fs_type: None,
        secret: Some("db".into()),
        attributes,
    };
    Pod {
        volume: VolumeId { pod: pod.uid.clone(), name: VolumeName::parse("db").unwrap() },
        claim: Claim {
            readers: Some(vec!["app".into()]),
            uid: None,
            vault: None,
            role: None,
            refresh: None,
            files: None,
            digest,
        },
        facts: PodFacts {
            pod,
            node: "node-1".into(),
            annotations: Vec::new(),
            host_pid: false,
            host_ipc: false,
            host_network: false,
            share_process_namespace: false,
            automount_token: Some(false),
            run_as_user: None,
            profiles: Profiles::default(),
            runtime_class: None,
            containers: vec![
                container("app", Kind::Regular, 0, Some(1000), &["tmp", "db"]),
                container("istio-proxy", Kind::Sidecar, 0, Some(1337), &["tmp"]),
                container("prepare", Kind::Init, 1, Some(1001), &["tmp"]),
                container("exporter", Kind::Regular, 1, Some(1002), &["tmp"]),
            ],
            volumes: vec![
                Volume { name: "tmp".into(), source: Source::EmptyDir },
                Volume { name: "db".into(), source: Source::Csi(csi(digest)) },
            ],
        },
        rules: Rules::default(),
        now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000),
    }
}

fn mount(volume: &str, path: &str) -> Mount {
    Mount { volume: volume.into(), path: path.into(), read_only: false, sub_path: None }
}

impl Pod {
    fn judge(&self) -> Result<(Grant, Vec<Warning>), Vec<Refusal>> {
        judge(&self.volume, &self.claim, &self.facts, &self.rules, self.now)
    }

    fn container(&mut self, name: &str) -> &mut Container {
        self.facts.containers.iter_mut().find(|c| c.name == name).unwrap()
    }

    fn csi(&mut self) -> &mut Csi {
        match &mut self.facts.volumes[1].source {
            Source::Csi(csi) => csi,
            other => panic!("{other:?}"),
        }
    }

    fn mount(&mut self, container: &str) {
        self.container(container).mounts.push(mount("db", "/db"));
    }

    /// An ordinary neighbour.
    fn neighbour(&mut self) -> &mut Container {
        self.container("exporter")
    }

    fn add(&mut self, capabilities: &[&str]) {
        self.neighbour().added.extend(capabilities.iter().map(ToString::to_string));
    }

    /// One more volume, mounted by `container` only.
    fn extra(&mut self, source: Source, container: &str) {
        let name = format!("extra-{}", self.facts.volumes.len());
        self.facts.volumes.push(Volume { name: name.clone(), source });
        self.container(container).mounts.push(mount(&name, "/extra"));
    }

    fn host(&mut self, path: &str, container: &str) {
        self.extra(Source::HostPath(path.into()), container);
    }

    fn annotate(&mut self, key: &str, value: &str) {
        self.facts.annotations.push((key.into(), value.into()));
    }

    /// The files come from Vault.
    fn vault(&mut self) {
        self.claim.files = Some(Files::parse("password: secret/data/payments/db#password").unwrap());
    }

    fn debugger(&mut self, mounts: bool) {
        let mut debugger = self.facts.containers[0].clone();
        debugger.kind = Kind::Ephemeral;
        debugger.name = "debugger".into();
        debugger.mounts.retain(|_| mounts);
        self.facts.containers.push(debugger);
    }

    fn readers(&mut self, names: &[&str]) {
        self.claim.readers = Some(names.iter().map(ToString::to_string).collect());
    }

    fn waive(&mut self, code: &'static str, change: impl Fn(&mut Waiver)) {
        let mut waiver = Waiver {
            code: Code(code),
            namespace: "payments".into(),
            service_account: None,
            container: None,
            until: self.now + Duration::from_secs(1),
            reason: "moves in March".into(),
        };
        change(&mut waiver);
        self.rules.waivers.push(waiver);
    }
}

/// The codes and fields of what refuses, and of what warns.
fn seen(pod: &Pod) -> (Vec<String>, Vec<String>) {
    let line = |fault: &Fault| format!("{} {}", fault.code, fault.field);
    match pod.judge() {
        Ok((_, warnings)) => (Vec::new(), warnings.iter().map(|warning| line(&warning.fault)).collect()),
        Err(refusals) => (refusals.iter().map(line).collect(), Vec::new()),
    }
}

#[track_caller]
fn refused(change: impl Fn(&mut Pod), expected: &[&str]) {
    let mut pod = valid();
    change(&mut pod);
    assert_eq!(seen(&pod).0, expected);
}

#[track_caller]
fn warned(change: impl Fn(&mut Pod), expected: &[&str]) {
    let mut pod = valid();
    change(&mut pod);
    assert_eq!(seen(&pod), (Vec::new(), expected.iter().map(ToString::to_string).collect()));
}

type Break = fn(&mut Pod);

const AGENT: &str = "vault.hashicorp.com/agent-inject";

/// What breaks a valid pod, and exactly what is reported.
const BROKEN: &[(Break, &[&str])] = &[
    (|p| p.volume.pod = PodUid::parse("other").unwrap(), &["SM101 metadata.uid"]),
    (|p| p.facts.volumes[1].source = Source::EmptyDir, &["SM101 spec.volumes[1]"]),
    (|p| p.csi().driver = "csi.other.io".into(), &["SM101 spec.volumes[1]"]),
    (|p| p.csi().attributes = attributes_digest([("for", "other")]), &["SM101 spec.volumes[1]"]),
    (|p| p.csi().read_only = false, &["SM102 spec.volumes[1].csi.readOnly"]),
    (|p| p.csi().fs_type = Some("ext4".into()), &["SM103 spec.volumes[1].csi.fsType"]),
    (
        |p| {
            p.claim.readers = None;
            p.container("app").mounts.clear();
        },
        &["SM110 spec.containers"],
    ),
    (
        |p| {
            p.claim.readers = None;
            p.mount("exporter");
        },
        &["SM111 spec.volumes[1].csi.volumeAttributes.for"],
    ),
    (|p| p.readers(&["ap"]), &["SM112 spec.volumes[1].csi.volumeAttributes.for"]),
    (|p| p.readers(&["app", "nobody"]), &["SM112 spec.volumes[1].csi.volumeAttributes.for"]),
    (
        |p| {
            p.debugger(true);
            p.readers(&["debugger"]);
        },
        &["SM113 spec.ephemeralContainers[0]"],
    ),
    (
        |p| {
            p.debugger(true);
            p.container("app").mounts.clear();
            p.claim.readers = None;
        },
        &["SM113 spec.ephemeralContainers[0]"],
    ),
    (|p| p.container("app").mounts.clear(), &["SM114 spec.containers[0].volumeMounts"]),
    (|p| p.readers(&["app", "prepare"]), &["SM114 spec.initContainers[1].volumeMounts"]),
    (|p| p.container("app").run_as_user = None, &["SM120 spec.containers[0].securityContext.runAsUser"]),
    (|p| p.container("app").run_as_user = Some(0), &["SM121 spec.containers[0].securityContext.runAsUser"]),
    (
        |p| {
            p.container("app").run_as_user = None;
            p.facts.run_as_user = Some(0);
        },
        &["SM121 spec.securityContext.runAsUser"],
    ),
    (
        |p| {
            p.mount("exporter");
            p.readers(&["app", "exporter"]);
            p.container("exporter").run_as_user = Some(0);
        },
        &["SM121 spec.containers[1].securityContext.runAsUser", "SM122 spec.containers[1].securityContext.runAsUser"],
    ),
    (
        |p| {
            p.mount("exporter");
            p.readers(&["app", "exporter"]);
        },
        &["SM122 spec.containers[1].securityContext.runAsUser"],
    ),
    (
        |p| {
            p.mount("exporter");
            p.readers(&["app", "exporter"]);
            p.container("exporter").run_as_user = None;
        },
        &["SM120 spec.containers[1].securityContext.runAsUser"],
    ),
    (|p| p.container("app").run_as_user = Some(1337), &["SM123 spec.containers[0].securityContext.runAsUser"]),
    (|p| p.claim.uid = Some(1337), &["SM123 spec.volumes[1].csi.volumeAttributes.uid"]),
    (
        |p| {
            p.rules.mesh_uids.clear();
            p.container("istio-proxy").run_as_user = Some(1000);
        },
        &["SM123 spec.containers[0].securityContext.runAsUser"],
    ),
    (
        |p| {
            let proxy = p.container("istio-proxy");
            proxy.name = "sidecar".into();
            proxy.image = "registry:5000/mirror/envoy:v1.36@sha256:00".into();
            proxy.run_as_user = Some(1000);
        },
        &["SM123 spec.containers[0].securityContext.runAsUser"],
    ),
    (
        |p| {
            let proxy = p.container("istio-proxy");
            proxy.name = "sidecar".into();
            proxy.image = "cr.l5d.io/linkerd/proxy:edge".into();
            proxy.run_as_user = Some(1000);
        },
        &["SM123 spec.containers[0].securityContext.runAsUser"],
    ),
    (|p| p.container("app").run_as_user = Some(3_000_065_532), &["SM124 spec.containers[0].securityContext.runAsUser"]),
    (|p| p.mount("exporter"), &["SM130 spec.containers[1].volumeMounts[1]"]),
    (|p| p.mount("istio-proxy"), &["SM130 spec.initContainers[0].volumeMounts[1]"]),
    (|p| p.mount("prepare"), &["SM130 spec.initContainers[1].volumeMounts[1]"]),
    (
        |p| {
            p.mount("exporter");
            p.container("exporter").mounts.last_mut().unwrap().sub_path = Some("password".into());
        },
        &["SM130 spec.containers[1].volumeMounts[1]"],
    ),
    (|p| p.debugger(true), &["SM130 spec.ephemeralContainers[0].volumeMounts[1]"]),
    (
        |p| {
            p.claim.readers = None;
            p.debugger(true);
        },
        &["SM130 spec.ephemeralContainers[0].volumeMounts[1]"],
    ),
    (|p| p.facts.share_process_namespace = true, &["SM131 spec.shareProcessNamespace"]),
    (|p| p.facts.host_pid = true, &["SM132 spec.hostPID"]),
    (|p| p.rules.namespaces.deny = vec!["payments".into()], &["SM140 metadata.namespace"]),
    (|p| p.rules.namespaces.deny = vec!["*".into()], &["SM140 metadata.namespace"]),
    (|p| p.rules.namespaces.allow = vec!["shop".into()], &["SM140 metadata.namespace"]),
    (|p| p.rules.namespaces.allow.clear(), &["SM140 metadata.namespace"]),
    (
        |p| {
            p.container("exporter").run_as_user = Some(1000);
            p.rules.distinct_uids = true;
        },
        &["SM150 spec.containers[1].securityContext.runAsUser"],
    ),
    (
        |p| {
            p.container("exporter").run_as_user = Some(1000);
            p.rules.refuse = vec![SAME_UID];
        },
        &["SM150 spec.containers[1].securityContext.runAsUser"],
    ),
    (|p| p.facts.containers.push(targeting("app")), &["SM133 spec.ephemeralContainers[0].targetContainerName"]),
    (|p| p.facts.runtime_class = Some("gvisor".into()), &["SM141 spec.runtimeClassName"]),
    (|p| p.neighbour().privileged = true, &["SM160 spec.containers[1].securityContext.privileged"]),
    (|p| p.add(&["SYS_ADMIN"]), &["SM161 spec.containers[1].securityContext.capabilities.add[0]"]),
    (|p| p.add(&["NET_RAW", "ALL"]), &["SM161 spec.containers[1].securityContext.capabilities.add[1]"]),
    (|p| p.add(&["SYS_PTRACE"]), &["SM162 spec.containers[1].securityContext.capabilities.add[0]"]),
    (|p| p.add(&["SYS_MODULE"]), &["SM163 spec.containers[1].securityContext.capabilities.add[0]"]),
    (|p| p.add(&["SYS_RAWIO"]), &["SM163 spec.containers[1].securityContext.capabilities.add[0]"]),
    (|p| p.add(&["DAC_READ_SEARCH"]), &["SM164 spec.containers[1].securityContext.capabilities.add[0]"]),
    (|p| p.add(&["NET_RAW", "PERFMON"]), &["SM165 spec.containers[1].securityContext.capabilities.add[1]"]),
    (|p| p.add(&["CHECKPOINT_RESTORE"]), &["SM166 spec.containers[1].securityContext.capabilities.add[0]"]),
    (
        |p| {
            p.add(&["SYS_CHROOT"]);
            p.host("/srv/data", "exporter");
        },
        &["SM167 spec.containers[1].securityContext.capabilities.add[0]"],
    ),
    (|p| p.neighbour().unmasked_proc = true, &["SM168 spec.containers[1].securityContext.procMount"]),
    (
        |p| p.neighbour().profiles.selinux_type = Some("spc_t".into()),
        &["SM169 spec.containers[1].securityContext.seLinuxOptions.type"],
    ),
    (
        |p| p.neighbour().profiles.selinux_type = Some("super_t".into()),
        &["SM169 spec.containers[1].securityContext.seLinuxOptions.type"],
    ),
    (|p| p.host("/var/lib/kubelet/pods", "exporter"), &["SM170 spec.volumes[2].hostPath.path"]),
    (|p| p.host("/var/log", "exporter"), &["SM178 spec.volumes[2].hostPath.path"]),
    (
        |p| p.neighbour().env.push(EnvSecret { field: ".env[3].valueFrom.secretKeyRef".into(), secret: "db".into() }),
        &["SM180 spec.containers[1].env[3].valueFrom.secretKeyRef"],
    ),
    (
        |p| {
            let secret = EnvSecret { field: ".envFrom[0].secretRef".into(), secret: "db".into() };
            p.container("prepare").env.push(secret);
        },
        &["SM180 spec.initContainers[1].envFrom[0].secretRef"],
    ),
    (|p| p.extra(Source::Secret("db".into()), "exporter"), &["SM180 spec.containers[1].volumeMounts[1]"]),
    (
        |p| p.extra(Source::Projected(vec![(4, Projection::Secret("db".into()))]), "istio-proxy"),
        &["SM180 spec.initContainers[0].volumeMounts[1]"],
    ),
    (
        |p| {
            p.vault();
            p.rules.audiences = vec!["vault-prod".into()];
            p.extra(Source::Projected(vec![(1, Projection::Token("vault-prod".into()))]), "istio-proxy");
        },
        &["SM182 spec.volumes[2].projected.sources[1].serviceAccountToken.audience"],
    ),
    (
        |p| {
            p.vault();
            p.annotate(AGENT, "true");
            p.annotate("vault.hashicorp.com/agent-inject-secret-db", "/secret/data/payments/db");
        },
        &["SM184 metadata.annotations[vault.hashicorp.com/agent-inject-secret-db]"],
    ),
    (
        |p| {
            p.vault();
            p.annotate(AGENT, "1");
            let template =
                "{{ with secret \"secret/data/payments/db\" }}export PASSWORD={{ .Data.data.password }}{{ end }}";
            p.annotate("vault.hashicorp.com/agent-inject-template-env", template);
        },
        &["SM184 metadata.annotations[vault.hashicorp.com/agent-inject-template-env]"],
    ),
    (
        |p| {
            p.vault();
            p.neighbour().env_vault.push((2, "secret/data/payments/db".into()));
        },
        &["SM180 spec.containers[1].env[2].value"],
    ),
    (
        |p| p.annotate("sidecar.istio.io/userVolumeMount", "[{\"name\": \"db\", \"mountPath\": \"/db\"}]"),
        &["SM190 metadata.annotations[sidecar.istio.io/userVolumeMount]"],
    ),
    (
        |p| p.annotate("sidecar.istio.io/userVolumeMount", "{\"db\" :\n{\"mountPath\": \"/db\"}}"),
        &["SM190 metadata.annotations[sidecar.istio.io/userVolumeMount]"],
    ),
];

/// What a valid pod is warned of, thing by thing.
const WARNED: &[(Break, &[&str])] = &[
    (|p| p.claim.uid = Some(4000), &["SM125 spec.volumes[1].csi.volumeAttributes.uid"]),
    (
        |p| {
            p.container("app").run_as_user = None;
            p.claim.uid = Some(999);
            p.container("app").running_uid = Some(70);
        },
        &["SM126 spec.volumes[1].csi.volumeAttributes.uid"],
    ),
    (|p| p.neighbour().run_as_user = Some(1000), &["SM150 spec.containers[1].securityContext.runAsUser"]),
    (|p| p.neighbour().run_as_user = None, &["SM151 spec.containers[1].securityContext.runAsUser"]),
    (|p| p.facts.host_ipc = true, &["SM152 spec.hostIPC"]),
    (|p| p.facts.host_network = true, &["SM153 spec.hostNetwork"]),
    (|p| p.neighbour().devices.push("tmp".into()), &["SM171 spec.containers[1].volumeDevices[0]"]),
    (
        |p| p.neighbour().extended_resources.push("vendor.example/gpu".into()),
        &["SM172 spec.containers[1].resources.limits"],
    ),
    (|p| p.neighbour().claims.push("gpu".into()), &["SM172 spec.containers[1].resources.claims[0]"]),
    (
        |p| p.neighbour().profiles.seccomp_unconfined = Some(true),
        &["SM173 spec.containers[1].securityContext.seccompProfile.type"],
    ),
    (
        |p| p.neighbour().profiles.apparmor_unconfined = Some(true),
        &["SM174 spec.containers[1].securityContext.appArmorProfile.type"],
    ),
    (|p| p.neighbour().escalation = None, &["SM175 spec.containers[1].securityContext.allowPrivilegeEscalation"]),
    (|p| p.add(&["NET_ADMIN", "NET_RAW"]), &["SM176 spec.containers[1].securityContext.capabilities.add[0]"]),
    // Without PERFMON it loads nothing that reads memory.
    (|p| p.add(&["BPF"]), &["SM176 spec.containers[1].securityContext.capabilities.add[0]"]),
    (
        |p| {
            p.neighbour().run_as_user = Some(0);
            p.neighbour().drops_all = false;
        },
        &["SM176 spec.containers[1].securityContext"],
    ),
    (|p| p.container("app").privileged = true, &["SM177 spec.containers[0].securityContext"]),
    (
        |p| {
            p.claim.uid = Some(0);
            p.container("app").run_as_user = Some(0);
            p.container("app").drops_all = false;
        },
        &["SM177 spec.containers[0].securityContext"],
    ),
    (
        |p| p.container("app").env.push(EnvSecret { field: ".envFrom[0].secretRef".into(), secret: "db".into() }),
        &["SM181 spec.containers[0].envFrom[0].secretRef"],
    ),
    (
        |p| {
            p.vault();
            p.container("app").env_vault.push((0, "secret/data/payments/db".into()));
        },
        &["SM181 spec.containers[0].env[0].value"],
    ),
    (
        |p| {
            p.vault();
            p.extra(Source::Projected(vec![(0, Projection::Token(String::new()))]), "exporter");
        },
        &["SM183 spec.automountServiceAccountToken"],
    ),
    (
        |p| {
            p.vault();
            p.neighbour().mounts.push(mount("kube-api-access", AUTOMOUNT));
        },
        &["SM183 spec.automountServiceAccountToken"],
    ),
    (
        |p| {
            p.vault();
            p.facts.node.clear();
            p.facts.automount_token = None;
        },
        &["SM183 spec.automountServiceAccountToken"],
    ),
    (
        |p| p.annotate("sidecar.istio.io/bootstrapOverride", "mine"),
        &["SM191 metadata.annotations[sidecar.istio.io/bootstrapOverride]"],
    ),
    (
        |p| p.annotate("sidecar.istio.io/enableCoreDump", "true"),
        &["SM192 metadata.annotations[sidecar.istio.io/enableCoreDump]"],
    ),
    (
        |p| p.annotate("sidecar.istio.io/interceptionMode", "TPROXY"),
        &["SM193 metadata.annotations[sidecar.istio.io/interceptionMode]"],
    ),
    (
        |p| p.annotate("sidecar.istio.io/capNetBindService", "true"),
        &["SM193 metadata.annotations[sidecar.istio.io/capNetBindService]"],
    ),
];

/// A debug container of another UID that shares the processes of a container.
fn targeting(target: &str) -> Container {
    let mut debugger = valid().facts.containers[3].clone();
    debugger.kind = Kind::Ephemeral;
    debugger.index = 0;
    debugger.name = "debugger".into();
    debugger.target = Some(target.into());
    debugger.mounts.clear();
    debugger
}

const SAME_UID: Code = rules::SAME_UID;

#[test]
fn one_broken_thing_one_code() {
    for (change, expected) in BROKEN {
        refused(change, expected);
    }
}

#[test]
fn every_rule_is_broken_once() {
    for (change, expected) in WARNED {
        warned(change, expected);
    }
    let broken: BTreeSet<&str> =
        BROKEN.iter().chain(WARNED).flat_map(|(_, e)| *e).map(|line| line.split(' ').next().unwrap()).collect();
    let rules: BTreeSet<&str> = RULES.iter().map(|rule| rule.code.0).collect();
    assert_eq!(broken, rules);
    assert_eq!(rules.len(), RULES.len(), "a code twice");
}

#[test]
fn a_valid_pod_is_granted() {
    let pod = valid();
    let (grant, warnings) = pod.judge().unwrap();
    assert_eq!(warnings, []);
    assert_eq!(grant.readers(), ["app"]);
    assert_eq!(grant.owner(), Owner { uid: 1000, gid: 0 });
    assert_eq!((grant.volume(), grant.pod()), (&pod.volume, &pod.facts.pod));
}

#[test]
fn shapes_that_are_fine() {
    warned(|p| p.claim.readers = None, &[]);
    // A debug container that mounts nothing of ours.
    warned(|p| p.debugger(false), &["SM150 spec.ephemeralContainers[0].securityContext.runAsUser"]);
    // An image whose USER decides, told apart by the owner written out.
    warned(
        |p| {
            p.container("app").run_as_user = None;
            p.claim.uid = Some(999);
        },
        &[],
    );
    // An init container that reads, then the application.
    warned(
        |p| {
            p.mount("prepare");
            p.readers(&["prepare", "app"]);
            p.container("prepare").run_as_user = Some(1000);
        },
        &[],
    );
    // Several UIDs, one owner written out.
    warned(
        |p| {
            p.mount("exporter");
            p.readers(&["app", "exporter"]);
            p.claim.uid = Some(1000);
        },
        &["SM125 spec.volumes[1].csi.volumeAttributes.uid"],
    );
    // A proxy may be the reader, of a certificate for example.
    warned(
        |p| {
            p.container("app").name = "envoy".into();
            p.readers(&["envoy"]);
        },
        &[],
    );
    // With the mesh's UID too: a gateway and its certificate.
    warned(
        |p| {
            let gateway = p.container("app");
            gateway.name = "envoy".into();
            gateway.run_as_user = Some(1337);
            p.readers(&["envoy"]);
            p.container("istio-proxy").run_as_user = Some(1500);
        },
        &[],
    );
    warned(|p| p.csi().fs_type = Some(String::new()), &[]);
    // Whatever a mount's subPathExpr or mountPropagation say, it is one: no fact tells them apart.
    warned(|p| p.container("app").mounts[1].sub_path = Some("password".into()), &[]);
}

#[test]
fn what_istio_says_it_added_is_the_meshs() {
    let same = |p: &mut Pod| p.neighbour().run_as_user = Some(1000);
    warned(same, &["SM150 spec.containers[1].securityContext.runAsUser"]);
    let added = |p: &mut Pod| {
        same(p);
        p.annotate("sidecar.istio.io/status", "{\"initContainers\": [\"init\"], \"containers\": [\"exporter\"]}");
    };
    refused(added, &["SM123 spec.containers[0].securityContext.runAsUser"]);
}

#[test]
fn the_owner_is_the_uid_attribute_then_the_containers_then_the_pods() {
    let mut pod = valid();
    pod.facts.run_as_user = Some(2000);
    assert_eq!(pod.judge().unwrap().0.owner().uid, 1000);
    pod.container("app").run_as_user = None;
    assert_eq!(pod.judge().unwrap().0.owner().uid, 2000);
    pod.claim.uid = Some(3000);
    assert_eq!(pod.judge().unwrap().0.owner().uid, 3000);
}

#[test]
fn readers_come_in_the_pods_order() {
    let mut pod = valid();
    pod.mount("exporter");
    pod.container("exporter").run_as_user = Some(1000);
    pod.readers(&["exporter", "app"]);
    assert_eq!(pod.judge().unwrap().0.readers(), ["app", "exporter"]);
}

#[test]
fn an_ordinary_neighbour_with_the_same_uid_is_a_warning() {
    warned(
        |p| p.container("exporter").run_as_user = Some(1000),
        &["SM150 spec.containers[1].securityContext.runAsUser"],
    );
    warned(
        |p| {
            p.facts.run_as_user = Some(1000);
            p.container("exporter").run_as_user = None;
        },
        &["SM150 spec.containers[1].securityContext.runAsUser"],
    );
}

#[test]
fn several_faults_are_reported_together() {
    refused(
        |p| {
            p.facts.host_pid = true;
            p.facts.share_process_namespace = true;
            p.mount("istio-proxy");
            p.mount("exporter");
        },
        &[
            "SM130 spec.initContainers[0].volumeMounts[1]",
            "SM130 spec.containers[1].volumeMounts[1]",
            "SM131 spec.shareProcessNamespace",
            "SM132 spec.hostPID",
        ],
    );
}

#[test]
fn a_waiver_turns_a_waivable_refusal_into_a_warning() {
    let line = "SM123 spec.containers[0].securityContext.runAsUser";
    let mesh = |change: fn(&mut Waiver)| {
        move |p: &mut Pod| {
            p.container("app").run_as_user = Some(1337);
            p.waive("SM123", change);
        }
    };
    let mut pod = valid();
    mesh(|_| ())(&mut pod);
    let (_, warnings) = pod.judge().unwrap();
    assert!(warnings[0].waived);
    assert!(warnings[0].fault.text.starts_with("waived (moves in March): 1337 is the UID"), "{warnings:?}");

    warned(mesh(|w| w.service_account = Some("api".into())), &[line]);
    warned(mesh(|w| w.container = Some("istio-proxy".into())), &[line]);
    refused(mesh(|w| w.namespace = "shop".into()), &[line]);
    refused(mesh(|w| w.service_account = Some("other".into())), &[line]);
    refused(mesh(|w| w.container = Some("other".into())), &[line]);
    refused(mesh(|w| w.until -= Duration::from_secs(1)), &[line]);
    refused(mesh(|w| w.code = SAME_UID), &[line]);
}

#[test]
fn some_refusals_are_never_waived() {
    for rule in RULES.iter().filter(|rule| !rule.waivable) {
        for (change, expected) in BROKEN.iter().filter(|(_, e)| e.iter().all(|line| line.starts_with(rule.code.0))) {
            let waived = |p: &mut Pod| {
                change(p);
                p.waive(rule.code.0, |_| ());
            };
            refused(waived, expected);
        }
    }
    for code in ["SM130", "SM131", "SM132", "SM160", "SM161", "SM162"] {
        assert!(RULES.iter().any(|rule| rule.code.0 == code && !rule.waivable));
    }
}

#[test]
fn a_message_names_what_to_change_and_fits() {
    for (change, _) in BROKEN {
        let mut pod = valid();
        change(&mut pod);
        for refusal in pod.judge().unwrap_err() {
            let rule = RULES.iter().find(|rule| rule.code == refusal.code).unwrap();
            assert!(refusal.text.ends_with(rule.change), "{refusal}");
            assert!(!refusal.to_string().ends_with('…'), "{refusal}");
        }
    }
    let mut pod = valid();
    pod.readers(&["ap"]);
    assert!(pod.judge().unwrap_err()[0].text.starts_with("the pod has no container \"ap\" (did you mean \"app\"?)"));
}

#[test]
fn a_host_path_is_judged_by_where_it_leads() {
    for path in [
        "/",
        "//",
        "/.",
        "/var",
        "/var/lib",
        "/var/lib/kubelet",
        "/var/lib//kubelet/./pods/",
        "/var/lib/kubelet/plugins/csi.sealmount.io/csi.sock",
        "/run",
        "/var/run",
        "/var/run/containerd/containerd.sock",
        "/run/containerd",
        "/var/run/docker.sock",
        "/proc",
        "/proc/1/root",
        "/sys/fs/cgroup",
        "/dev",
        "/dev/mem",
        "/etc",
        "/etc/kubernetes/manifests",
        "/var/lib/etcd",
        "/run/systemd/private",
        "/var/run/dbus/system_bus_socket",
    ] {
        refused(|p| p.host(path, "exporter"), &["SM170 spec.volumes[2].hostPath.path"]);
        // The reader's own way to the node is not a way of others to its files.
        warned(|p| p.host(path, "app"), &[]);
    }
    for path in [
        "/srv",
        "/data",
        "/processes",
        "/run/udev",
        "/run/log/journal",
        "/var/lib/kubelets",
        "/var/log/app",
        "/tmp",
        "/etc/localtime",
        "/etc/ssl/certs",
        "/etc/os-release",
        "/usr/share/zoneinfo",
        "/lib/modules",
    ] {
        warned(|p| p.host(path, "exporter"), &[]);
    }
    // What root runs or follows, where it may be written.
    for path in ["/var/log", "/var/log/pods/", "/usr", "/usr/bin/runc", "/bin", "/lib", "/etc/systemd/system", "/opt"] {
        refused(|p| p.host(path, "exporter"), &["SM178 spec.volumes[2].hostPath.path"]);
        warned(|p| p.host(path, "app"), &[]);
        let read_only = |p: &mut Pod| {
            p.host(path, "exporter");
            p.neighbour().mounts[1].read_only = true;
        };
        warned(read_only, &[]);
    }
    // Reading is a way already.
    let read_only = |p: &mut Pod| {
        p.host("/var/lib", "exporter");
        p.neighbour().mounts[1].read_only = true;
    };
    refused(read_only, &["SM170 spec.volumes[2].hostPath.path"]);
    // A subPath narrows; an expression may become any path, and no fact holds it.
    let below = |path: &'static str, sub_path: &'static str| {
        move |p: &mut Pod| {
            p.host(path, "exporter");
            p.neighbour().mounts[1].sub_path = Some(sub_path.into());
        }
    };
    warned(below("/var", "data"), &[]);
    warned(below("/", "srv/app"), &[]);
    refused(below("/var", "run/docker.sock"), &["SM170 spec.volumes[2].hostPath.path"]);
    refused(below("/", "./var//lib"), &["SM170 spec.volumes[2].hostPath.path"]);
    let listed = |p: &mut Pod| p.rules.node_paths = vec!["/data/docker".into()];
    for path in ["/data", "/data/docker/overlay2"] {
        let both = |p: &mut Pod| {
            listed(p);
            p.host(path, "exporter");
        };
        refused(both, &["SM170 spec.volumes[2].hostPath.path"]);
    }
    let moved = |p: &mut Pod| p.rules.kubelet_dir = "/kept/kubelet/".into();
    for path in ["/kept", "/kept/kubelet/pods"] {
        warned(|p| p.host(path, "exporter"), &[]);
        let both = |p: &mut Pod| {
            moved(p);
            p.host(path, "exporter");
        };
        refused(both, &["SM170 spec.volumes[2].hostPath.path"]);
    }
    // A volume that no container mounts leads nowhere.
    warned(|p| p.facts.volumes.push(Volume { name: "x".into(), source: Source::HostPath("/".into()) }), &[]);
}

/// What gives a container a way out of its walls.
const RIGHTS: &[fn(&mut Container)] = &[
    |c| c.privileged = true,
    |c| c.added.push("SYS_ADMIN".into()),
    |c| c.added.push("ALL".into()),
    |c| c.added.push("SYS_PTRACE".into()),
    |c| c.added.push("SYS_MODULE".into()),
    |c| c.added.push("SYS_RAWIO".into()),
    |c| c.added.push("DAC_READ_SEARCH".into()),
    |c| c.added.push("PERFMON".into()),
    |c| c.added.push("CHECKPOINT_RESTORE".into()),
    |c| c.unmasked_proc = true,
    |c| c.profiles.selinux_type = Some("spc_t".into()),
];

#[test]
fn a_right_refuses_in_every_neighbour_and_not_in_the_reader() {
    for right in RIGHTS {
        for name in ["istio-proxy", "prepare", "exporter"] {
            let mut pod = valid();
            right(pod.container(name));
            assert_eq!(pod.judge().unwrap_err().len(), 1, "{:?}", pod.container(name));
        }
        let mut debugged = valid();
        debugged.facts.containers.push(targeting("exporter"));
        right(debugged.container("debugger"));
        assert!(debugged.judge().is_err());
        let mut pod = valid();
        right(pod.container("app"));
        let (_, warnings) = pod.judge().unwrap();
        let expected: &[&str] = if pod.container("app").privileged { &["SM177"] } else { &[] };
        assert_eq!(warnings.iter().map(|warning| warning.fault.code.0).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn a_pods_profile_holds_where_a_container_has_none() {
    let pod_wide = |p: &mut Pod| p.facts.profiles.selinux_type = Some("spc_t".into());
    refused(pod_wide, &["SM169 spec.securityContext.seLinuxOptions.type"; 3]);
    let own = |p: &mut Pod| {
        pod_wide(p);
        for container in &mut p.facts.containers {
            container.profiles.selinux_type = Some("container_t".into());
        }
    };
    warned(own, &[]);
    let some = |p: &mut Pod| {
        pod_wide(p);
        p.container("istio-proxy").profiles.selinux_type = Some("container_t".into());
        p.container("prepare").profiles.selinux_type = Some("container_t".into());
    };
    refused(some, &["SM169 spec.securityContext.seLinuxOptions.type"]);
    warned(
        |p| p.facts.profiles.seccomp_unconfined = Some(true),
        &["SM173 spec.securityContext.seccompProfile.type"; 3],
    );
}

#[test]
fn two_broken_things_give_both_codes() {
    let about_neighbours: Vec<_> = BROKEN
        .iter()
        .filter(|(_, lines)| lines.iter().all(|line| &line[..5] >= "SM130" && !line.starts_with("SM15")))
        // Where `for` is left out, another mount is a question about the reader.
        .filter(|(change, _)| {
            let mut pod = valid();
            change(&mut pod);
            pod.claim.readers.is_some()
        })
        .collect();
    let codes = |pod: &Pod| -> BTreeSet<String> {
        pod.judge().err().into_iter().flatten().map(|refusal| refusal.code.to_string()).collect()
    };
    for (first, one) in &about_neighbours {
        for (second, other) in &about_neighbours {
            let mut pod = valid();
            first(&mut pod);
            second(&mut pod);
            let both: BTreeSet<String> = one.iter().chain(*other).map(|line| line[..5].to_owned()).collect();
            let mut found = codes(&pod);
            // A debug container with the reader's UID is a warning until processes are shared.
            if ["SM131", "SM132", "SM133"].iter().any(|code| both.contains(*code)) {
                found.remove("SM150");
            }
            assert_eq!(found, both);
        }
    }
}

#[test]
fn uids_that_are_fine_as_they_are() {
    // OpenShift gives all containers of a namespace one UID of its range.
    warned(
        |p| {
            for container in &mut p.facts.containers {
                container.run_as_user = Some(1_000_680_000);
            }
            p.container("istio-proxy").run_as_user = Some(1337);
        },
        &[
            "SM150 spec.initContainers[1].securityContext.runAsUser",
            "SM150 spec.containers[1].securityContext.runAsUser",
        ],
    );
    // Where processes are shared the same UID is a way, and so is one that is not known.
    for uid in [Some(1000), None] {
        let mut pod = valid();
        pod.facts.share_process_namespace = true;
        pod.neighbour().run_as_user = uid;
        assert_eq!(pod.judge().unwrap_err().len(), 2, "{uid:?}");
        let mut pod = valid();
        pod.facts.host_pid = true;
        pod.neighbour().run_as_user = uid;
        assert_eq!(pod.judge().unwrap_err().len(), 2, "{uid:?}");
        // A debug container in the reader's processes, and none in another's.
        let code = if uid.is_some() { "SM150" } else { "SM151" };
        let line = format!("{code} spec.ephemeralContainers[0].securityContext.runAsUser");
        let mut pod = valid();
        pod.facts.containers.push(Container { run_as_user: uid, ..targeting("app") });
        let target = "SM133 spec.ephemeralContainers[0].targetContainerName".to_owned();
        assert_eq!(seen(&pod).0, [target, line.clone()]);
        let mut pod = valid();
        pod.facts.containers.push(Container { run_as_user: uid, ..targeting("exporter") });
        assert_eq!(seen(&pod), (Vec::new(), vec![line]));
    }
    // Once the neighbour runs, its real UID counts.
    warned(
        |p| {
            p.neighbour().run_as_user = None;
            p.neighbour().running_uid = Some(70);
        },
        &[],
    );
    warned(
        |p| {
            p.neighbour().run_as_user = None;
            p.neighbour().running_uid = Some(1000);
        },
        &["SM150 spec.containers[1].securityContext.runAsUser"],
    );
    // An image that starts as root may drop to the owner.
    warned(
        |p| {
            p.container("app").run_as_user = None;
            p.container("app").running_uid = Some(0);
            p.claim.uid = Some(999);
        },
        &[],
    );
}

#[test]
fn a_listed_runtime_class_is_fine() {
    warned(
        |p| {
            p.facts.runtime_class = Some("gvisor".into());
            p.rules.runtime_classes = vec!["gvisor".into()];
        },
        &[],
    );
}

#[test]
fn other_secrets_tokens_and_annotations_are_fine() {
    warned(|p| p.extra(Source::Secret("other".into()), "exporter"), &[]);
    warned(|p| p.extra(Source::Projected(vec![(0, Projection::Token("other".into()))]), "exporter"), &[]);
    warned(|p| p.facts.volumes.push(Volume { name: "x".into(), source: Source::Secret("db".into()) }), &[]);
    warned(|p| p.annotate("sidecar.istio.io/userVolumeMount", "[{\"name\": \"other\"}]"), &[]);
    warned(|p| p.annotate("traffic.sidecar.istio.io/excludeOutboundPorts", "5432"), &[]);
    warned(|p| p.annotate("sidecar.istio.io/interceptionMode", "REDIRECT"), &[]);
    warned(
        |p| {
            p.vault();
            p.annotate(AGENT, "true");
            p.annotate("vault.hashicorp.com/agent-inject-secret-db", "secret/data/payments/other");
            p.neighbour().env_vault.push((0, "secret/data/payments/other".into()));
        },
        &[],
    );
    // The injector was not asked.
    for asked in [None, Some("false"), Some("yes")] {
        let path = |p: &mut Pod| {
            p.vault();
            asked.into_iter().for_each(|asked| p.annotate(AGENT, asked));
            p.annotate("vault.hashicorp.com/agent-inject-secret-db", "secret/data/payments/db");
        };
        warned(path, &[]);
    }
    // The volume's name where it is no mount's.
    let other = "[{\"name\": \"logs\", \"mountPath\": \"/logs\", \"subPath\": \"db\"}]";
    warned(|p| p.annotate("sidecar.istio.io/userVolumeMount", other), &[]);
    // An event is one text: what the author writes there makes no new ones.
    let mut pod = valid();
    pod.annotate("sidecar.istio.io/bootstrapOverride", "mine");
    assert!(!pod.judge().unwrap().1[0].fault.text.contains("mine"));
    // Another volume of this driver for another container: it has a reader of its own.
    warned(
        |p| {
            let source = p.facts.volumes[1].source.clone();
            p.extra(source, "exporter");
        },
        &[],
    );
}

/// A small generator, so that a failure comes again (Knuth's MMIX constants).
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

/// What random pods are made of: any of it may be added to any pod.
const ADDITIONS: &[Break] = &[
    |p| p.facts.share_process_namespace = true,
    |p| p.facts.host_pid = true,
    |p| p.facts.host_ipc = true,
    |p| p.facts.host_network = true,
    |p| p.mount("exporter"),
    |p| p.mount("prepare"),
    |p| p.debugger(false),
    |p| p.debugger(true),
    |p| p.facts.containers.push(targeting("app")),
    |p| p.facts.containers.push(targeting("exporter")),
    |p| p.add(&["NET_ADMIN"]),
    |p| p.add(&["DAC_OVERRIDE", "CHOWN"]),
    |p| p.add(&["SYS_CHROOT"]),
    |p| p.add(&["BPF"]),
    |p| p.add(&["PERFMON"]),
    |p| p.add(&["SYS_PTRACE"]),
    |p| p.neighbour().privileged = true,
    |p| p.neighbour().unmasked_proc = true,
    |p| p.neighbour().escalation = None,
    |p| p.host("/var/log", "exporter"),
    |p| p.host("/var/lib", "istio-proxy"),
    |p| p.host("/", "app"),
    |p| p.extra(Source::Secret("db".into()), "exporter"),
    |p| p.extra(Source::Secret("other".into()), "exporter"),
    |p| p.extra(Source::EmptyDir, "exporter"),
    |p| p.container("istio-proxy").added.push("SYS_ADMIN".into()),
    |p| p.container("prepare").profiles.selinux_type = Some("spc_t".into()),
    |p| p.facts.runtime_class = Some("other".into()),
    |p| p.neighbour().run_as_user = Some(1000),
    |p| p.neighbour().run_as_user = None,
    |p| p.host("/run/systemd/private", "exporter"),
    |p| p.host("/var/lib/etcd", "istio-proxy"),
    |p| p.host("/usr/bin", "prepare"),
    |p| p.neighbour().env.push(EnvSecret { field: ".envFrom[0].secretRef".into(), secret: "db".into() }),
    |p| p.container("prepare").env.push(EnvSecret { field: ".envFrom[0].secretRef".into(), secret: "other".into() }),
    |p| p.container("prepare").added.push("DAC_READ_SEARCH".into()),
    |p| p.container("istio-proxy").added.push("CHECKPOINT_RESTORE".into()),
    |p| p.container("istio-proxy").added.push("SYS_RAWIO".into()),
    |p| p.container("istio-proxy").added.push("SYS_MODULE".into()),
    |p| p.add(&["ALL"]),
    |p| {
        p.vault();
        p.rules.audiences = vec!["vault-prod".into()];
        p.extra(Source::Projected(vec![(0, Projection::Token("vault-prod".into()))]), "exporter");
    },
    // `for` is written in these pods: without it one more container that mounts is a question about the reader, and one
    // that does not is never a reader.
    |p| {
        let mut more = valid().facts.containers[3].clone();
        more.name = format!("more-{}", p.facts.containers.len());
        p.facts.containers.push(more);
    },
    |p| {
        let mut more = valid().facts.containers[3].clone();
        more.name = format!("more-{}", p.facts.containers.len());
        more.privileged = true;
        p.facts.containers.push(more);
    },
];

/// Whether a container but the readers has a way to the files: written from the kernel's side as sets of what opens
/// one, and without a look at the rules.
fn another_can_read(pod: &Pod) -> bool {
    const LIFTS_WALLS: [&str; 8] = [
        "ALL",
        "SYS_ADMIN",
        "SYS_PTRACE",
        "SYS_MODULE",
        "SYS_RAWIO",
        "DAC_READ_SEARCH",
        "PERFMON",
        "CHECKPOINT_RESTORE",
    ];
    const OF_THE_NODE: [&str; 6] = ["/", "/var/lib", "/proc", "/run", "/run/systemd/private", "/var/lib/etcd"];
    const RUN_BY_THE_NODE: [&str; 2] = ["/usr/bin", "/var/log"];
    let facts = &pod.facts;
    let of_volume = |name: &str| facts.volumes.iter().find(|volume| volume.name == name).map(|volume| &volume.source);
    facts.share_process_namespace
        || facts.host_pid
        || facts.containers.iter().filter(|container| container.name != "app").any(|container| {
            let adds = |name: &str| container.added.iter().any(|added| added == name);
            container.privileged
                || container.unmasked_proc
                || LIFTS_WALLS.iter().any(|name| adds(name))
                || container.profiles.selinux_type.as_deref() == Some("spc_t")
                || container.target.as_deref() == Some("app")
                || container.env.iter().any(|variable| variable.secret == "db")
                || container.mounts.iter().any(|mount| match of_volume(&mount.volume) {
                    Some(Source::HostPath(path)) => {
                        OF_THE_NODE.contains(&path.as_str())
                            || RUN_BY_THE_NODE.contains(&path.as_str()) && !mount.read_only
                            || adds("SYS_CHROOT")
                    }
                    Some(Source::Secret(name)) => name == "db",
                    Some(Source::Projected(sources)) => {
                        sources.iter().any(|(_, source)| *source == Projection::Token("vault-prod".into()))
                    }
                    Some(Source::Csi(_)) => true,
                    _ => false,
                })
        })
}

#[test]
fn what_is_granted_nobody_else_can_read_and_no_addition_makes_a_grant_of_a_refusal() {
    let mut chance = Chance(7);
    let (mut granted, mut refused) = (0, 0);
    for _ in 0..4_000 {
        let mut pod = valid();
        for _ in 0..chance.below(4) {
            ADDITIONS[chance.below(ADDITIONS.len())](&mut pod);
        }
        match pod.judge() {
            Ok(_) => {
                granted += 1;
                assert!(!another_can_read(&pod), "granted: {:#?}", pod.facts);
            }
            Err(_) => {
                refused += 1;
                ADDITIONS[chance.below(ADDITIONS.len())](&mut pod);
                assert!(pod.judge().is_err(), "an addition made a grant: {:#?}", pod.facts);
            }
        }
    }
    assert!(granted > 500 && refused > 500, "{granted} granted, {refused} refused");
}
