//! One valid call, broken one thing at a time.

use base64::engine::general_purpose::STANDARD;

use super::super::proto::csi::volume_capability::{BlockVolume, MountVolume};
use super::*;
use crate::request::attributes::ATTRIBUTES;
use crate::request::{Refresh, attributes_digest};

const UID: &str = "0b8e1a3c-5f6d-4e7a-9b8c-1d2e3f4a5b6c";
const EXPIRES: &str = "2030-01-02T03:04:05Z";

fn node() -> Node {
    Node::new("/var/lib/kubelet/".into())
}

fn jwt(payload: &str) -> String {
    format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(payload))
}

fn payload(aud: &str, namespace: &str, pod: &str, uid: &str, account: &str) -> String {
    format!(
        r#"{{"aud":{aud},"exp":1,"kubernetes.io":{{"namespace":"{namespace}","node":{{"name":"n","uid":"u"}},
        "pod":{{"name":"{pod}","uid":"{uid}"}},"serviceaccount":{{"name":"{account}","uid":"sa-uid"}},"warnafter":1}}}}"#
    )
}

fn token_map(audience: &str, payload: &str) -> String {
    format!(r#"{{"{audience}":{{"token":"{}","expirationTimestamp":"{EXPIRES}"}}}}"#, jwt(payload))
}

fn own_tokens() -> String {
    token_map("vault-prod", &payload("[\"vault-prod\"]", "payments", "api-0", UID, "api"))
}

fn valid() -> NodePublishVolumeRequest {
    let volume = VolumeId { pod: PodUid::parse(UID).unwrap(), name: VolumeName::parse("db").unwrap() };
    let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    NodePublishVolumeRequest {
        volume_id: volume.handle(),
        publish_context: HashMap::new(),
        staging_target_path: String::new(),
        target_path: format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/db/mount"),
        volume_capability: Some(VolumeCapability {
            access_mode: None,
            access_type: Some(AccessType::Mount(MountVolume::default())),
        }),
        readonly: true,
        secrets: map(&[("password", "hunter2"), (TOKENS, &own_tokens())]),
        volume_context: map(&[
            ("csi.storage.k8s.io/pod.namespace", "payments"),
            ("csi.storage.k8s.io/pod.name", "api-0"),
            ("csi.storage.k8s.io/pod.uid", UID),
            ("csi.storage.k8s.io/serviceAccount.name", "api"),
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("vault", "prod"),
            ("role", "payments"),
            ("for", "app"),
            ("uid", "999"),
            ("refresh", "5m"),
            ("files", "user: \"#password\"\npassword: secret/data/db#password\n"),
        ]),
    }
}

type Request = NodePublishVolumeRequest;

fn set(request: &mut Request, key: &str, value: &str) {
    request.volume_context.insert(key.into(), value.into());
}

fn mount(request: &mut Request) -> &mut MountVolume {
    match request.volume_capability.as_mut().and_then(|c| c.access_type.as_mut()) {
        Some(AccessType::Mount(mount)) => mount,
        _ => panic!(),
    }
}

fn faults(request: Request) -> Vec<Fault> {
    match publish(request, &node()) {
        Ok(_) => Vec::new(),
        Err(faults) => faults,
    }
}

#[track_caller]
fn refused(change: impl FnOnce(&mut Request), expected: &[&str]) {
    let mut request = valid();
    change(&mut request);
    let seen: Vec<_> = faults(request).iter().map(|fault| format!("{} {}", fault.code, fault.field)).collect();
    assert_eq!(seen, expected);
}

#[track_caller]
fn says(change: impl FnOnce(&mut Request), words: &str) {
    let mut request = valid();
    change(&mut request);
    let faults = faults(request);
    assert!(faults.iter().any(|fault| fault.text.contains(words)), "{faults:?}");
}

#[track_caller]
fn taken(change: impl FnOnce(&mut Request)) -> Publish {
    let mut request = valid();
    change(&mut request);
    publish(request, &node()).unwrap_or_else(|faults| panic!("{faults:?}"))
}

#[test]
fn a_valid_call() {
    let parsed = taken(|_| ());
    assert_eq!(parsed.volume.to_string(), format!("{UID}/db"));
    let pod = PodRef {
        namespace: "payments".into(),
        name: "api-0".into(),
        uid: PodUid::parse(UID).unwrap(),
        service_account: "api".into(),
    };
    assert_eq!(parsed.pod, pod);
    let claim = parsed.claim;
    assert_eq!((claim.readers, claim.uid), (Some(vec!["app".to_owned()]), Some(999)));
    assert_eq!((claim.vault.as_deref(), claim.role.as_deref()), (Some("prod"), Some("payments")));
    assert_eq!(claim.refresh, Some(Refresh::Every(std::time::Duration::from_secs(300))));
    assert_eq!(claim.files.unwrap().entries().len(), 2);
    let secret = parsed.secret.unwrap();
    assert_eq!(secret.keys().collect::<Vec<_>>(), ["password"]);
    assert_eq!(secret["password"].expose(), b"hunter2");
    let token = &parsed.tokens["vault-prod"];
    assert!(token.jwt.expose().starts_with("e30."));
    assert_eq!(token.service_account_uid, "sa-uid");
    assert_eq!(token.expires.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs(), 1_893_553_445);
}

#[test]
fn the_digest_is_over_what_the_author_wrote() {
    let written: Vec<(String, String)> =
        valid().volume_context.into_iter().filter(|(key, _)| !key.starts_with(RESERVED)).collect();
    let digest = attributes_digest(written.iter().map(|(k, v)| (k.as_str(), v.as_str())));
    assert_eq!(taken(|_| ()).claim.digest, digest);
    assert_ne!(taken(|r| set(r, "uid", "1000")).claim.digest, digest);
}

#[test]
fn id_and_path() {
    refused(|r| r.volume_id.clear(), &["SM001 volume_id"]);
    refused(|r| r.volume_id = "csi-00".into(), &["SM001 volume_id"]);
    refused(|r| r.target_path.clear(), &["SM002 target_path"]);
    let other = [
        "/var/lib/kubelet/pods/UID/volumes/kubernetes.io~csi/db/mount/",
        "/var/lib/kubelet/pods/UID/volumes/kubernetes.io~csi/db",
        "/var/lib/kubelet/pods/UID/volumes/kubernetes.io~csi/db/mount/x",
        "/var/lib/kubelet/pods/UID/volumes/kubernetes.io~csi//db/mount",
        "/var/lib/kubelet//pods/UID/volumes/kubernetes.io~csi/db/mount",
        "/var/lib/kubelet/pods/UID/volumes/other/db/mount",
        "/var/lib/kubelet/pods/UID/x/../volumes/kubernetes.io~csi/db/mount",
        "/var/lib/kubelet/pods/../pods/UID/volumes/kubernetes.io~csi/db/mount",
        "/var/lib/kubelet/pods/UID/volumes/kubernetes.io~csi/../mount",
        "/var/lib/kubelet/pods/UID/volumes/kubernetes.io~csi/DB/mount",
        "/var/lib/other/pods/UID/volumes/kubernetes.io~csi/db/mount",
        "var/lib/kubelet/pods/UID/volumes/kubernetes.io~csi/db/mount",
        "/etc",
    ];
    for path in other {
        refused(|r| r.target_path = path.replace("UID", UID), &["SM002 target_path"]);
    }
    // Another pod's path, with the id that belongs to it.
    refused(
        |r| {
            let volume = VolumeId { pod: PodUid::parse("other").unwrap(), name: VolumeName::parse("db").unwrap() };
            r.volume_id = volume.handle();
            r.target_path = r.target_path.replace(UID, "other");
        },
        &["SM004 csi.storage.k8s.io/pod.uid"],
    );
    // Another volume's path, with the id of this one.
    refused(|r| r.target_path = r.target_path.replace("/db/", "/dc/"), &["SM001 volume_id"]);
}

#[test]
fn a_call_with_nothing_but_an_id() {
    let request = Request { volume_id: valid().volume_id, ..Request::default() };
    let codes: Vec<_> = faults(request).iter().map(|fault| fault.code.0).collect();
    assert!(codes.contains(&"SM002") && codes.contains(&"SM003") && codes.contains(&"SM004"), "{codes:?}");
}

#[test]
fn capability() {
    refused(|r| r.volume_capability = None, &["SM003 volume_capability"]);
    let block = || Some(VolumeCapability { access_mode: None, access_type: Some(AccessType::Block(BlockVolume {})) });
    refused(|r| r.volume_capability = block(), &["SM003 volume_capability"]);
    let none = || Some(VolumeCapability { access_mode: None, access_type: None });
    refused(|r| r.volume_capability = none(), &["SM003 volume_capability"]);
    refused(|r| mount(r).mount_flags.push("noatime".into()), &["SM003 volume_capability"]);
    refused(|r| mount(r).volume_mount_group = "2000".into(), &["SM003 volume_capability"]);
    refused(|r| mount(r).fs_type = "ext4".into(), &["SM103 spec.volumes[db].csi.fsType"]);
    refused(|r| r.readonly = false, &["SM102 spec.volumes[db].csi.readOnly"]);
}

#[test]
fn facts_of_the_pod() {
    for name in ["pod.namespace", "pod.name", "pod.uid", "serviceAccount.name", "ephemeral"] {
        let key = format!("{RESERVED}{name}");
        let line = format!("SM004 {key}");
        refused(|r| drop(r.volume_context.remove(&key)), &[&line]);
        for value in ["", "a/b", "A", "..", "x\n"] {
            refused(|r| set(r, &key, value), &[&line]);
        }
    }
    refused(|r| set(r, "csi.storage.k8s.io/ephemeral", "false"), &["SM004 csi.storage.k8s.io/ephemeral"]);
    refused(|r| set(r, "csi.storage.k8s.io/pod.namespace", "a.b"), &["SM004 csi.storage.k8s.io/pod.namespace"]);
}

#[test]
fn planted_keys() {
    for key in ["csi.storage.k8s.io/fsType", "csi.storage.k8s.io/", "csi.storage.k8s.io/pod.node"] {
        let line = format!("SM005 spec.volumes[db].csi.volumeAttributes.{key}");
        refused(|r| set(r, key, "x"), &[&line]);
    }
    // Tokens in both places: those in the attributes are the author's.
    let line = format!("SM005 spec.volumes[db].csi.volumeAttributes.{TOKENS}");
    refused(|r| set(r, TOKENS, &own_tokens()), &[&line]);
}

#[test]
fn tokens_of_older_kubelets_come_in_the_attributes() {
    let parsed = taken(|r| {
        r.secrets.remove(TOKENS);
        set(r, TOKENS, &own_tokens());
    });
    assert!(parsed.tokens.contains_key("vault-prod"));
    let parsed = taken(|r| drop(r.secrets.remove(TOKENS)));
    assert!(parsed.tokens.is_empty());
}

#[test]
fn tokens_must_be_this_pods() {
    let aud = "[\"vault-prod\"]";
    let own = payload(aud, "payments", "api-0", UID, "api");
    for (payload, words) in [
        (payload("[\"other\"]", "payments", "api-0", UID, "api"), "for another audience"),
        (payload("\"other\"", "payments", "api-0", UID, "api"), "for another audience"),
        (payload(aud, "shop", "api-0", UID, "api"), "another pod's"),
        (payload(aud, "payments", "api-1", UID, "api"), "another pod's"),
        (payload(aud, "payments", "api-0", "other", "api"), "another pod's"),
        (payload(aud, "payments", "api-0", UID, "other"), "another service account's"),
        (own.replace("\"pod\"", "\"x\""), "no token bound to a pod"),
        ("{}".into(), "no token bound to a pod"),
        ("x".into(), "no token bound to a pod"),
    ] {
        let map = token_map("vault-prod", &payload);
        let change = |r: &mut Request| drop(r.secrets.insert(TOKENS.into(), map.clone()));
        refused(change, &[&format!("SM006 {TOKENS}")]);
        says(change, words);
    }
    for map in [
        String::new(),
        "[]".into(),
        "{\"vault-prod\":\"x\"}".into(),
        own_tokens().replace(EXPIRES, "tomorrow"),
        own_tokens().replace("e30.", "e30"),
        own_tokens().replace("e30.", "e30.e30."),
        own_tokens().replace("e30.", "e30.*"),
    ] {
        refused(|r| drop(r.secrets.insert(TOKENS.into(), map)), &[&format!("SM006 {TOKENS}")]);
    }
    // One audience of several; a text instead of a list; the API server's own is not kept.
    for aud in ["[\"x\",\"vault-prod\"]", "\"vault-prod\""] {
        let map = token_map("vault-prod", &payload(aud, "payments", "api-0", UID, "api"));
        assert_eq!(taken(|r| drop(r.secrets.insert(TOKENS.into(), map))).tokens.len(), 1);
    }
    let map = token_map("", "{}");
    assert_eq!(taken(|r| drop(r.secrets.insert(TOKENS.into(), map))).tokens.len(), 0);
}

#[test]
fn attributes() {
    let at = |code: &str, name: &str| format!("{code} spec.volumes[db].csi.volumeAttributes.{name}");
    refused(|r| set(r, "vualt", "prod"), &[&at("SM010", "vualt")]);
    says(|r| set(r, "vualt", "prod"), "(did you mean \"vault\"?)");
    let long = (0..2_000).map(|number| format!("c{number}")).collect::<Vec<_>>().join(",");
    for value in ["", " ", "app,", "app,,b", "app, app", "App", "a.b", "a/b", &"a".repeat(64), &long] {
        refused(|r| set(r, "for", value), &[&at("SM011", "for")]);
    }
    assert_eq!(taken(|r| set(r, "for", " app , b")).claim.readers.unwrap(), ["app", "b"]);
    let many = |count: usize| (0..count).map(|number| format!("c{number}")).collect::<Vec<_>>().join(",");
    assert_eq!(taken(|r| set(r, "for", &many(64))).claim.readers.unwrap().len(), 64);
    refused(|r| set(r, "for", &many(65)), &[&at("SM011", "for")]);
    for value in ["", "01", "00", "-1", "+1", "1.0", "1k", " 1", "2147483648", "99999999999999999999", "root", "١"] {
        refused(|r| set(r, "uid", value), &[&at("SM012", "uid")]);
    }
    for (value, uid) in [("0", 0), ("1", 1), ("2147483647", 2_147_483_647)] {
        assert_eq!(taken(|r| set(r, "uid", value)).claim.uid, Some(uid));
    }
    for name in ["vault", "role"] {
        for value in ["", "a\nb", &"a".repeat(254)] {
            refused(|r| set(r, name, value), &[&at("SM013", name)]);
        }
    }
    for value in ["", "5", "5d", "1.5h", "m", "Never", "5m ", "-5m", "5m,"] {
        refused(|r| set(r, "refresh", value), &[&at("SM014", "refresh")]);
    }
    assert_eq!(taken(|r| set(r, "refresh", "never")).claim.refresh, Some(Refresh::Never));
    refused(|r| set(r, "files", "..a: p/x#k"), &[&at("SM021", "files[\"..a\"]")]);
}

#[test]
fn what_is_asked_for_has_a_source_and_every_source_a_use() {
    let at = |code: &str, name: &str| format!("{code} spec.volumes[db].csi.{name}");
    let bare = |r: &mut Request| {
        for name in ["vault", "role", "refresh", "files"] {
            r.volume_context.remove(name);
        }
    };
    let parsed = taken(bare);
    assert!(parsed.claim.files.is_none() && parsed.secret.is_some());
    refused(
        |r| {
            bare(r);
            r.secrets.remove("password");
        },
        &[&at("SM015", "volumeAttributes.files")],
    );
    refused(|r| set(r, "files", "a: p/x#k"), &[&at("SM016", "nodePublishSecretRef")]);
    refused(|r| drop(r.secrets.remove("password")), &[&at("SM017", "nodePublishSecretRef")]);
    for (name, value) in [("vault", "prod"), ("role", "payments"), ("refresh", "5m"), ("refresh", "never")] {
        let line = at("SM018", &format!("volumeAttributes.{name}"));
        refused(|r| (bare(r), set(r, name, value)).1, &[&line]);
        refused(|r| (bare(r), set(r, "files", "a: \"#password\""), set(r, name, value)).2, &[&line]);
    }
    let optional = "a: p/x#k\nb: {from: \"#password\", optional: true}";
    taken(|r| (r.secrets.remove("password"), set(r, "files", optional)).1);
    // A template's variable is a use.
    taken(|r| set(r, "files", "a: {template: x, with: {b: \"#password\", c: p/x#k}}"));
}

#[test]
fn keys_with_a_slash_are_no_keys_of_a_secret() {
    let parsed = taken(|r| drop(r.secrets.insert("example.com/x".into(), "y".into())));
    assert_eq!(parsed.secret.unwrap().len(), 1);
}

#[test]
fn every_fault_at_once() {
    refused(
        |r| {
            r.readonly = false;
            r.volume_id = "csi-00".into();
            r.volume_capability = None;
            set(r, "uid", "x");
            set(r, "files", "a: p/x#\nb: p/x");
            set(r, "zzz", "x");
            r.volume_context.remove("csi.storage.k8s.io/pod.name");
        },
        &[
            "SM001 volume_id",
            "SM003 volume_capability",
            "SM102 spec.volumes[db].csi.readOnly",
            "SM004 csi.storage.k8s.io/pod.name",
            "SM010 spec.volumes[db].csi.volumeAttributes.zzz",
            "SM012 spec.volumes[db].csi.volumeAttributes.uid",
            "SM023 spec.volumes[db].csi.volumeAttributes.files[\"a\"]",
            "SM025 spec.volumes[db].csi.volumeAttributes.files[\"b\"]",
        ],
    );
}

/// Wherever something secret may stand, also by mistake, no fault shows it.
#[test]
fn no_fault_holds_a_value() {
    type Change = Box<dyn Fn(&mut Request)>;
    let needle = "c4n4ry-needle";
    let encoded = STANDARD.encode(needle);
    let mut changes: Vec<Change> = vec![
        Box::new(move |r| r.volume_id = needle.into()),
        Box::new(move |r| r.target_path = format!("/{needle}")),
        Box::new(move |r| mount(r).fs_type = needle.into()),
        Box::new(move |r| mount(r).mount_flags.push(needle.into())),
        Box::new(move |r| mount(r).volume_mount_group = needle.into()),
        Box::new(move |r| drop(r.secrets.insert(TOKENS.into(), needle.into()))),
        Box::new(move |r| drop(r.secrets.insert(TOKENS.into(), token_map("vault-prod", needle)))),
        Box::new(move |r| drop(r.secrets.insert(TOKENS.into(), own_tokens().replace(EXPIRES, needle)))),
        Box::new(move |r| drop(r.secrets.insert(TOKENS.into(), own_tokens().replace("c2ln", &format!(".{needle}"))))),
        Box::new(move |r| set(r, "files", &format!("a: {needle}"))),
        Box::new(move |r| set(r, "files", &format!("a: [{needle}"))),
        Box::new(move |r| set(r, "zzz", needle)),
    ];
    for key in valid().volume_context.into_keys() {
        changes.push(Box::new(move |r| set(r, &key, &format!("{needle}\n/"))));
    }
    let mut seen = 0;
    for change in changes {
        let mut request = valid();
        request.secrets.insert("password".into(), needle.into());
        request.secrets.insert(needle.into(), "x".into());
        request.readonly = false;
        change(&mut request);
        let faults = faults(request);
        let shown = format!("{faults:?} {}", crate::request::summary(&faults));
        assert!(!shown.contains(needle) && !shown.contains(&encoded) && !shown.contains("hunter2"), "{shown}");
        seen += faults.len();
    }
    assert!(seen > 30, "{seen}");
}

#[test]
fn huge_and_hostile_attributes_are_answered() {
    let huge = "x".repeat(1 << 20);
    for name in ["vault", "role", "for", "uid", "refresh", "files", "zzz", "csi.storage.k8s.io/pod.name"] {
        let mut request = valid();
        set(&mut request, name, &huge);
        let faults = faults(request);
        assert!(!faults.is_empty() && crate::request::summary(&faults).chars().count() <= Fault::MAX_ALL, "{name}");
    }
    let mut request = valid();
    for n in 0..10_000 {
        set(&mut request, &format!("attribute-{n}"), "x");
    }
    let faults = faults(request);
    assert_eq!(faults.len(), 10_000);
    assert!(crate::request::summary(&faults).ends_with("and 9997 more"));
    let mut request = valid();
    set(&mut request, &huge, "x");
    assert!(crate::request::summary(&self::faults(request)).chars().count() <= Fault::MAX_ALL);
}

#[test]
fn unpublish_needs_nothing_but_id_and_path() {
    let Request { volume_id, target_path, .. } = valid();
    let of = |volume_id: &str, target_path: &str| {
        let request = NodeUnpublishVolumeRequest { volume_id: volume_id.into(), target_path: target_path.into() };
        unpublish(&request, &node()).map_err(|faults| faults.iter().map(|f| f.code.0).collect::<Vec<_>>())
    };
    assert_eq!(of(&volume_id, &target_path).unwrap().to_string(), format!("{UID}/db"));
    assert_eq!(of("", &target_path), Err(vec!["SM001"]));
    assert_eq!(of(&volume_id, ""), Err(vec!["SM002"]));
    assert_eq!(of("csi-00", &target_path), Err(vec!["SM001"]));
    assert_eq!(of(&volume_id, "/etc"), Err(vec!["SM002"]));
    assert_eq!(of("", ""), Err(vec!["SM001", "SM002"]));
}

#[test]
fn stats_know_only_paths_of_volumes() {
    let Request { volume_id, target_path, .. } = valid();
    let of = |volume_id: &str, volume_path: &str| {
        let request = NodeGetVolumeStatsRequest {
            volume_id: volume_id.into(),
            volume_path: volume_path.into(),
            staging_target_path: String::new(),
        };
        stats(&request, &node())
    };
    assert!(of(&volume_id, &target_path).is_some());
    assert!(of(&volume_id, "some/path").is_none());
    assert!(of("csi-00", &target_path).is_none());
}

#[test]
fn every_attribute_and_field_stands_in_its_table() {
    let page = include_str!("../../../docs/attributes.md");
    let mut attributes = crate::request::tests::documented(page, "Attributes");
    attributes.sort_unstable();
    let mut known = ATTRIBUTES;
    known.sort_unstable();
    assert_eq!(attributes, known);
    assert_eq!(crate::request::tests::documented(page, "files"), crate::request::files::FIELDS);
}
