//! Each rule by breaking exactly one thing in a valid pod.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use super::facts::{EnvSecret, Mount, Profiles, Projection, Source, Volume};
use super::*;
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
        devices: Vec::new(),
        extended_resources: Vec::new(),
        mounts: mounts.iter().map(|m| Mount { volume: (*m).into(), path: format!("/{m}"), sub_path: None }).collect(),
        id: None,
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
            labels: Vec::new(),
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
        self.container(container).mounts.push(Mount { volume: "db".into(), path: "/db".into(), sub_path: None });
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
    let lines = |faults: &[Fault]| faults.iter().map(|f| format!("{} {}", f.code, f.field)).collect();
    match pod.judge() {
        Ok((_, warnings)) => (Vec::new(), lines(&warnings)),
        Err(refusals) => (lines(&refusals), Vec::new()),
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
            p.container("exporter").mounts[1].sub_path = Some("password".into());
        },
        &["SM130 spec.containers[1].volumeMounts[1]"],
    ),
    (|p| p.debugger(true), &["SM130 spec.ephemeralContainers[0].volumeMounts[1]"]),
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
];

const SAME_UID: Code = rules::SAME_UID;

#[test]
fn one_broken_thing_one_code() {
    for (change, expected) in BROKEN {
        refused(change, expected);
    }
}

#[test]
fn every_rule_is_broken_once() {
    let broken: BTreeSet<&str> =
        BROKEN.iter().flat_map(|(_, e)| *e).map(|line| line.split(' ').next().unwrap()).collect();
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
    warned(|p| p.claim.uid = Some(0), &[]);
    warned(|p| p.claim.uid = Some(4000), &[]);
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
            p.claim.uid = Some(1005);
        },
        &[],
    );
    // A proxy may be the reader, of a certificate for example.
    warned(
        |p| {
            p.container("app").name = "envoy".into();
            p.readers(&["envoy"]);
        },
        &[],
    );
    warned(|p| p.csi().fs_type = Some(String::new()), &[]);
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
    assert!(warnings[0].text.starts_with("waived (moves in March): 1337 is the UID"), "{warnings:?}");

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
    for code in ["SM130", "SM131", "SM132"] {
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
fn the_table_of_codes_is_this_one() {
    let page = include_str!("../../docs/codes.md");
    for rule in RULES {
        let severity = if rule.severity == Severity::Refuse { "refuses" } else { "warns" };
        let waivable = if rule.waivable { "yes" } else { "never" };
        let Rule { code, text, change, source, .. } = rule;
        let row = format!("| `{code}` | {text} | {change} | {source} | {severity} | {waivable} |\n");
        assert!(page.contains(&row), "docs/codes.md lacks:\n{row}");
    }
}
