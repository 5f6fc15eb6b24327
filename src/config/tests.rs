//! One valid file, broken one line at a time; and who may read what.

use std::fs;

use super::*;
use crate::request::{Malformed, PodUid};

/// A directory with a CA beside which the files of these tests lie.
fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    fs::write(directory.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    fs::write(directory.path().join("key.pem"), key.serialize_pem()).unwrap();
    fs::write(directory.path().join("none.pem"), "nothing\n").unwrap();
    let bad = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
    fs::write(directory.path().join("bad.pem"), bad).unwrap();
    directory
}

const VALID: &str = r#"version: 1
connections:
  prod:
    default: true
    address: https://vault.example:8200
    ca_file: ca.pem
    namespace: "teams/{{ pod.namespace }}"
    auth: {method: kubernetes, mount: k8s, audience: vault-prod, role: payments}
    allow:
    - {namespaces: [payments], service_accounts: ["*"], roles: [payments], paths: ["secret/data/{{ pod.namespace }}/*"]}
    refresh: {default: 30m, min: 1m, max: 24h}
limits: {volume_bytes: 1MiB, files: 256}
policy:
  mesh_uids: [1337]
  waivers: []
log: {level: info}
"#;

fn read(text: &str) -> Result<Config, Vec<ConfigFault>> {
    let directory = directory();
    let path = directory.path().join("config.yaml");
    fs::write(&path, text).unwrap();
    load(&path)
}

fn valid() -> Config {
    read(VALID).unwrap()
}

/// Replaces one text of the valid file and gives its faults, or none.
fn broken(from: &str, to: &str) -> Vec<String> {
    assert!(VALID.contains(from), "{from}");
    let faults = read(&VALID.replacen(from, to, 1)).err().unwrap_or_default();
    faults.iter().map(ToString::to_string).collect()
}

#[track_caller]
fn refused(from: &str, to: &str, expected: &str) {
    let faults = broken(from, to);
    assert!(faults.len() == 1 && faults[0].contains(expected), "{to}: {faults:#?}");
}

#[track_caller]
fn taken(from: &str, to: &str) -> Config {
    let faults = broken(from, to);
    assert_eq!(faults, Vec::<String>::new(), "{to}");
    read(&VALID.replacen(from, to, 1)).unwrap()
}

#[test]
fn a_valid_file() {
    let config = valid();
    let prod = &config.connections["prod"];
    assert_eq!((prod.name.as_str(), prod.default, prod.address.as_str()), ("prod", true, "https://vault.example:8200"));
    assert!(prod.ca_pem.starts_with(b"-----BEGIN CERTIFICATE-----"));
    assert_eq!((prod.auth.method, prod.auth.mount.as_str()), (Method::Kubernetes, "k8s"));
    assert_eq!((prod.auth.audience.as_str(), prod.auth.role.as_deref()), ("vault-prod", Some("payments")));
    // What the file leaves out.
    assert_eq!(prod.share_login, ShareLogin::ServiceAccount);
    assert_eq!((prod.timeout, prod.max_token_ttl), (Duration::from_secs(10), Duration::from_secs(3600)));
    assert_eq!((prod.max_reply, prod.requests), (2 << 20, Requests { at_once: 8, per_second: 50 }));
    assert!(prod.redirect_to.is_empty() && prod.server_name.is_none());
    assert_eq!((config.stale_after, config.log_level), (Duration::from_secs(300), tracing::Level::INFO));
    assert_eq!(config.policy, Rules { audiences: vec!["vault-prod".into()], ..Rules::default() });
}

#[test]
fn a_file_with_nothing_in_it_is_no_file() {
    let config = read("version: 1\n").unwrap();
    assert!(config.connections.is_empty());
    let default = Config::default();
    assert_eq!(
        (config.limits, config.stale_after, config.policy),
        (default.limits, default.stale_after, default.policy)
    );
    assert_eq!(config.log_level, default.log_level);
    let sections = "version: 1\nconnections:\nlimits:\npolicy:\nlog: {}\naudit: ~\ndebug_containers:\n";
    assert!(read(sections).is_ok());
}

#[test]
fn the_version() {
    refused("version: 1\n", "", "version: is required");
    for version in ["2", "\"1\"", "1.0", "one", "01"] {
        refused(
            "version: 1",
            &format!("version: {version}"),
            "line 1, column 10: version: this driver reads version 1",
        );
    }
    refused("version: 1", "version:", "version: is required");
}

#[test]
fn faults_have_a_place_and_the_nearest_name() {
    refused(
        "    address:",
        "    adress: x\n    address:",
        "line 5, column 5: connections.prod.adress: there is no such field (did you mean \"address\"?)",
    );
    refused(
        "log: {level: info}",
        "lgo: {level: info}",
        "line 16, column 1: lgo: there is no such field (did you mean \"log\"?)",
    );
    refused(
        "level: info",
        "level: inof",
        "line 16, column 14: log.level: takes error, warn, info, debug, trace (did you mean \"info\"?)",
    );
    refused("limits: {", "limits: {fiels: 2, ", "limits.fiels: there is no such field (did you mean \"files\"?)");
    let faults = broken("roles:", "role:");
    assert!(faults[1].contains("there is no such field (did you mean \"roles\"?)"), "{faults:?}");
}

#[test]
fn every_fault_at_once_in_the_files_order() {
    let text = VALID
        .replace("https://vault", "http://vault")
        .replace("1MiB", "1MB")
        .replace("1337", "-1")
        .replace("24h", "1d");
    let faults = read(&text).unwrap_err();
    let lines: Vec<_> = faults.iter().map(|fault| (fault.place.unwrap().line, fault.field.as_str())).collect();
    let expected = [
        (5, "connections.prod.address"),
        (11, "connections.prod.refresh.max"),
        (12, "limits.volume_bytes"),
        (14, "policy.mesh_uids[0]"),
    ];
    assert_eq!(lines, expected, "{faults:#?}");
}

#[test]
fn yaml_beyond_the_grammar() {
    for (from, to, words) in [
        ("default: true", "default: !!bool true", "a tag"),
        ("default: true", "default: &x true", "an anchor"),
        ("default: true", "default: *x", "an alias"),
        ("default: true", "<<: {}", "a merge key"),
        ("default: true", "address: x", "written twice"),
        ("version: 1", "version: 1\n---", "a second document"),
        ("\"teams/{{ pod.namespace }}\"", "{{ pod.namespace }}", "{{"),
        ("ca_file: ca.pem", "ca_file: #ca.pem", "write \"#ca.pem\" in quotes"),
        ("[\"*\"]", "[*]", "line 10"),
    ] {
        let faults = broken(from, to);
        assert!(faults.iter().any(|fault| fault.contains(words)), "{to}: {faults:#?}");
    }
    for text in ["", "[]", "x", "- version: 1", "version: 1\n\tx: 1", "\u{0}"] {
        assert!(read(text).is_err(), "{text:?}");
    }
}

#[test]
fn addresses() {
    for (to, kept) in [
        ("https://vault.example", "https://vault.example"),
        ("https://vault.example:8200/", "https://vault.example:8200"),
        ("https://10.0.0.1:8200", "https://10.0.0.1:8200"),
        ("https://[2001:db8::1]:8200", "https://[2001:db8::1]:8200"),
        ("https://[2001:db8::1]", "https://[2001:db8::1]"),
    ] {
        let config = taken("https://vault.example:8200", &format!("\"{to}\""));
        assert_eq!(config.connections["prod"].address, kept);
    }
    for (to, words) in [
        ("vault.example:8200", "https://host:port"),
        ("ftp://vault.example", "https://host:port"),
        ("https://vault.example/v1", "no path"),
        ("https://vault.example?x=y", "no path"),
        ("https://vault.example#x", "no path"),
        ("https://user:pass@vault.example", "user or password"),
        ("https://", "https://host:port"),
        ("https://:8200", "host"),
        ("https://vault.example:", "port"),
        ("https://vault.example:99999", "port"),
        ("https://{{ pod.namespace }}.example", "no path"),
        ("https://va ult", "no path"),
        ("http://vault.example:8200", "loopback address only"),
        ("http://10.0.0.1:8200", "loopback address only"),
        ("http://localhost:8200", "loopback address only"),
    ] {
        let faults = broken("https://vault.example:8200", &format!("\"{to}\""));
        assert!(
            faults.iter().any(|f| f.contains("connections.prod.address") && f.contains(words)),
            "{to}: {faults:#?}"
        );
    }
    refused("default: true", "redirect_to: [https://a.example, http://b.example]", "redirect_to[1]");
    let redirects =
        taken("default: true", "redirect_to: [https://a.example:8200]").connections["prod"].redirect_to.clone();
    assert_eq!(redirects, ["https://a.example:8200"]);
}

#[test]
fn plain_http_to_loopback_needs_two_steps() {
    let loopback = |to: &str| VALID.replace("https://vault.example:8200", to).replace("    ca_file: ca.pem\n", "");
    let insecure = |to: &str| loopback(to).replace("default: true", "allow_insecure_loopback: true");
    for address in ["http://127.0.0.1:8200", "http://127.1.2.3:8200", "\"http://[::1]:8200\""] {
        let faults = read(&loopback(address)).unwrap_err();
        assert!(faults[0].text.contains("allow_insecure_loopback"), "{faults:?}");
        let config = read(&insecure(address)).unwrap();
        assert!(config.connections["prod"].ca_pem.is_empty());
    }
    assert!(read(&insecure("http://10.0.0.1:8200")).is_err());
    assert!(read(&insecure("https://127.0.0.1:8200")).unwrap_err()[0].to_string().contains("ca_file: is required"));
    let both = insecure("http://127.0.0.1:8200").replace("    auth:", "    ca_file: ca.pem\n    auth:");
    assert!(read(&both).unwrap_err()[0].text.contains("leave it out"));
}

#[test]
fn ca_files() {
    refused("    ca_file: ca.pem\n", "", "ca_file: is required");
    refused("ca_file: ca.pem", "ca_file: other.pem", "the file cannot be opened");
    refused("ca_file: ca.pem", "ca_file: none.pem", "no certificate");
    refused("ca_file: ca.pem", "ca_file: key.pem", "no certificate");
    refused("ca_file: ca.pem", "ca_file: bad.pem", "certificate 1 of the file cannot be read");
    for outside in ["../ca.pem", "/etc/ssl/certs/ca-certificates.crt", "x/../../ca.pem"] {
        refused("ca_file: ca.pem", &format!("ca_file: {outside}"), "in the directory of this file");
    }
}

#[test]
fn audiences() {
    for audience in [
        "\"\"",
        "https://kubernetes.default.svc",
        "https://kubernetes.default.svc.cluster.local",
        "kubernetes",
        "api",
        "kubernetes.default.svc",
        "https://kubernetes.default.svc/",
        "https://kubernetes.default.svc:443",
        "https://kubernetes.default.svc.corp.example",
        "k3s",
    ] {
        refused("audience: vault-prod", &format!("audience: {audience}"), "connections.prod.auth.audience");
    }
    refused("audience: vault-prod, ", "", "auth.audience: is required");
    refused("audience: vault-prod", "audience: kubernetes", "the pod's default token");
    taken("audience: vault-prod", "audience: https://vault.example");
}

#[test]
fn auth() {
    refused(
        "    auth: {method: kubernetes, mount: k8s, audience: vault-prod, role: payments}\n",
        "",
        "auth: is required",
    );
    refused("method: kubernetes, ", "", "auth.method: is required");
    refused("method: kubernetes", "method: kubernets", "(did you mean \"kubernetes\"?)");
    for method in ["approle", "cert", "token_file"] {
        refused("method: kubernetes", &format!("method: {method}"), "not available in this version");
    }
    assert_eq!(taken("mount: k8s, ", "").connections["prod"].auth.mount, "kubernetes");
    assert_eq!(taken("method: kubernetes, mount: k8s", "method: jwt").connections["prod"].auth.mount, "jwt");
    assert_eq!(taken("mount: k8s", "mount: a/b").connections["prod"].auth.mount, "a/b");
    for mount in ["/k8s", "k8s/", "a//b", "..", "a%2fb"] {
        refused("mount: k8s", &format!("mount: \"{mount}\""), "auth.mount");
    }
    assert_eq!(taken(", role: payments}", "}").connections["prod"].auth.role, None);
}

#[test]
fn logins_are_shared_as_the_method_allows() {
    let jwt = |share: &str| VALID.replace("method: kubernetes", "method: jwt").replace("default: true", share);
    let of = |text: &str| read(text).map(|config| config.connections["prod"].share_login);
    assert_eq!(of(&jwt("default: true")).unwrap(), ShareLogin::Pod);
    assert_eq!(of(&jwt("share_login: pod")).unwrap(), ShareLogin::Pod);
    assert!(of(&jwt("share_login: service_account")).unwrap_err()[0].text.contains("each pod has its own"));
    assert_eq!(taken("default: true", "share_login: pod").connections["prod"].share_login, ShareLogin::Pod);
}

#[test]
fn what_a_later_version_brings_is_refused() {
    for (from, to, field) in [
        ("default: true", "labels: [team]", "connections.prod.labels"),
        ("default: true", "revoke_certificates: true", "connections.prod.revoke_certificates"),
        ("paths:", "methods: [write], paths:", "allow[0].methods[0]"),
        ("mesh_uids: [1337]", "runtime_classes: {gvisor: {gate: pod}}", "policy.runtime_classes.gvisor.gate"),
        ("limits:", "debug_containers: {allow_namespaces: [x]}\nlimits:", "debug_containers.allow_namespaces"),
        ("limits:", "audit: {output: file}\nlimits:", "audit.output"),
        ("limits:", "audit: {file: a.log}\nlimits:", "audit.file"),
        ("limits:", "audit: {fold: 2m}\nlimits:", "audit.fold"),
    ] {
        let faults = broken(from, to);
        assert!(faults.len() == 1 && faults[0].contains(field), "{faults:#?}");
        assert!(faults[0].contains("available in this version"), "{faults:#?}");
    }
    // Their defaults, and faults in them, are read.
    taken("default: true", "labels: []\n    revoke_certificates: false");
    taken(
        "limits:",
        "audit: {output: stdout, file: null, fold: 1m}\ndebug_containers: {allow_namespaces: []}\nlimits:",
    );
    taken("paths:", "methods: [read], paths:");
    taken("mesh_uids: [1337]", "runtime_classes: {}");
    taken("mesh_uids: [1337]", "runtime_classes: {gvisor: {gate: off}, kata: {}}");
    assert_eq!(broken("mesh_uids: [1337]", "runtime_classes: {gvisor: {gate: x}}").len(), 1);
    refused("limits:", "audit: {output: x}\nlimits:", "takes stdout, file");
    refused("paths:", "methods: [], paths:", "write [read]");
}

#[test]
fn allow_rules_are_whole() {
    for (from, to, field) in [
        ("namespaces: [payments], ", "", "allow[0].namespaces: is required"),
        ("service_accounts: [\"*\"], ", "", "allow[0].service_accounts: is required"),
        ("roles: [payments], ", "", "allow[0].roles: is required"),
        ("paths: [\"secret/data/{{ pod.namespace }}/*\"]", "paths: []", "allow[0].paths: is required"),
        ("namespaces: [payments]", "namespaces: [\"pay*\"]", "allow[0].namespaces[0]: \"*\" stands for a whole name"),
        ("namespaces: [payments]", "namespaces: [\"\"]", "allow[0].namespaces[0]: a name is empty"),
        ("secret/data/{{", "/secret/data/{{", "allow[0].paths[0]: a path begins with the mount's name"),
        ("secret/data/{{", "secret/../{{", "allow[0].paths[0]"),
        ("}}/*", "}}-*", "\"*\" stands for a whole segment"),
        ("secret/data/{{ pod.namespace }}", "secret/data/{{ pod.labels }}", "\"pod.labels\" is no fact of a pod"),
        ("secret/data/{{ pod.namespace }}", "secret/data/{{ pod.namespcae }}", "(did you mean \"pod.namespace\"?)"),
        ("secret/data/{{ pod.namespace }}", "secret/data/{{ pod.namespace", "has no \"}}\""),
    ] {
        let faults = broken(from, to);
        assert!(faults.len() == 1 && faults[0].contains(field), "{to}: {faults:#?}");
    }
    refused("namespaces: [payments]", "namespaces: payments", "write a list");
}

#[test]
fn times_sizes_and_numbers() {
    for (from, to, field) in [
        ("min: 1m", "min: 0s", "refresh.min"),
        ("min: 1m", "min: 1", "refresh.min"),
        ("min: 1m", "min: 25h", "refresh.min: is more than max"),
        ("default: 30m", "default: 30s", "refresh.default: lies outside"),
        ("default: 30m", "default: 25h", "refresh.default: lies outside"),
        ("1MiB", "1MB", "limits.volume_bytes"),
        ("1MiB", "0", "limits.volume_bytes"),
        ("1MiB", "65MiB", "limits.volume_bytes"),
        ("1MiB", "-1MiB", "limits.volume_bytes"),
        ("1MiB", "99999999999999GiB", "limits.volume_bytes"),
        ("1MiB", "MiB", "limits.volume_bytes"),
        ("files: 256", "files: 257", "limits.files"),
        ("files: 256", "files: 0", "limits.files"),
        ("files: 256", "files: \"256\"", "limits.files"),
        ("default: true", "default: yes", "prod.default: write true or false"),
        ("default: true", "default: \"true\"", "prod.default: write true or false"),
        ("default: true", "timeout: 61s", "prod.timeout"),
        ("default: true", "max_reply: 1GiB", "prod.max_reply"),
        ("default: true", "max_token_ttl: 1s", "prod.max_token_ttl"),
        ("default: true", "requests: {at_once: 0}", "prod.requests.at_once"),
        ("default: true", "requests: {per_second: 0}", "prod.requests.per_second"),
        ("default: true", "server_name: \"a b\"", "prod.server_name"),
        ("default: true", "namespace2: x", "prod.namespace2"),
        ("limits:", "stale_after: 0s\nlimits:", "stale_after"),
        ("default: true", "default: [true]", "write one value"),
        ("refresh: {default: 30m, min: 1m, max: 24h}", "refresh: 30m", "refresh: write a map"),
    ] {
        let faults = broken(from, to);
        assert!(faults.len() == 1 && faults[0].contains(field), "{to}: {faults:#?}");
    }
    for (to, bytes) in [("4096", 4096), ("512KiB", 512 << 10), ("64MiB", 64 << 20)] {
        assert_eq!(taken("1MiB", to).limits.volume_bytes, bytes);
    }
    assert_eq!(taken("default: true", "server_name: vault").connections["prod"].server_name.as_deref(), Some("vault"));
    assert_eq!(taken("default: true", "server_name: null").connections["prod"].server_name, None);
}

#[test]
fn connections_have_names_and_one_default() {
    let second = "  other:\n    default: true\n    address: https://b.example\n    ca_file: ca.pem\n    auth: {method: jwt, audience: b}\nlimits:";
    refused("limits:", second, "connections.other.default: \"prod\" is the default already");
    assert_eq!(taken("limits:", &second.replace("true", "false")).connections.len(), 2);
    for name in ["\"a b\"", "a/b", "-a", "\"\"", &"a".repeat(64)] {
        refused("  prod:", &format!("  {name}:"), "a connection's name is");
    }
}

#[test]
fn settings_of_the_rules() {
    let rules = |to: &str| taken("mesh_uids: [1337]", to).policy;
    assert_eq!(rules("mesh_uids: [1, 2]").mesh_uids, [1, 2]);
    assert_eq!(rules("mesh_uids: []").mesh_uids, [0_u32; 0]);
    assert!(rules("distinct_uids: true").distinct_uids);
    assert_eq!(rules("node_paths: [/data/kubelet, /mnt/docker]").node_paths, ["/data/kubelet", "/mnt/docker"]);
    for wrong in ["/", "data", "/data/", "/data//x", "/data/../etc", "\"\"", "/./data"] {
        refused("mesh_uids: [1337]", &format!("node_paths: [{wrong}]"), "policy.node_paths[0]: write a directory");
    }
    refused("mesh_uids: [1337]", "node_paths: [/var/run/mine]", "policy.node_paths[0]: is a link on every node");
    assert_eq!(rules("refuse: [SM150]").refuse, [Code("SM150")]);
    refused("mesh_uids: [1337]", "refuse: [SM130]", "refused already");
    refused("mesh_uids: [1337]", "refuse: [SM15O]", "there is no rule \"SM15O\" (did you mean");
    let namespaces = rules("namespaces: {allow: [a, b], deny: [\"*\"]}").namespaces;
    assert_eq!((namespaces.allow, namespaces.deny), (vec!["a".to_owned(), "b".into()], vec!["*".to_owned()]));
    assert_eq!(rules("namespaces: {deny: [x]}").namespaces.allow, ["*"]);
    assert!(rules("namespaces: {allow: []}").namespaces.allow.is_empty());
    refused("mesh_uids: [1337]", "namespaces: {deny: [\"x*\"]}", "policy.namespaces.deny[0]");
}

#[test]
fn waivers_are_dated_and_reasoned() {
    let waiver =
        "{code: SM123, namespace: shop, service_account: web, container: proxy, until: 2027-03-31, reason: moves}";
    let waivers = taken("waivers: []", &format!("waivers: [{waiver}]")).policy.waivers;
    let until = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_806_537_600);
    let expected = crate::policy::Waiver {
        code: Code("SM123"),
        namespace: "shop".into(),
        service_account: Some("web".into()),
        container: Some("proxy".into()),
        until,
        reason: "moves".into(),
    };
    assert_eq!(waivers, [expected]);
    for (from, to, words) in [
        ("SM123", "SM130", "SM130 is never waived"),
        ("SM123", "SM131", "SM131 is never waived"),
        ("SM123", "SM132", "SM132 is never waived"),
        ("SM123", "SM999", "there is no rule"),
        ("code: SM123, ", "", "waivers[0].code: is required"),
        ("namespace: shop, ", "", "waivers[0].namespace: is required"),
        ("until: 2027-03-31, ", "", "waivers[0].until: is required"),
        (", reason: moves", "", "waivers[0].reason: is required"),
        (", reason: moves", ", reason: \" \"", "waivers[0].reason: is empty"),
        ("2027-03-31", "March", "waivers[0].until: write a day"),
        ("2027-03-31", "2027-02-30", "waivers[0].until: write a day"),
    ] {
        refused("waivers: []", &format!("waivers: [{}]", waiver.replace(from, to)), words);
    }
    let timed = waiver.replace("2027-03-31", "\"2027-03-31T12:00:00Z\"");
    assert_eq!(
        taken("waivers: []", &format!("waivers: [{timed}]")).policy.waivers[0].until,
        until - Duration::from_secs(43_200)
    );
}

#[test]
fn a_file_that_cannot_be_read() {
    let directory = directory();
    let faults = load(&directory.path().join("none.yaml")).unwrap_err();
    assert!(faults.len() == 1 && faults[0].to_string().contains("none.yaml: cannot be opened"), "{faults:?}");
    fs::write(directory.path().join("latin.yaml"), b"version: 1 # \xe9\n").unwrap();
    assert!(load(&directory.path().join("latin.yaml")).unwrap_err()[0].text.contains("UTF-8"));
    fs::write(directory.path().join("long.yaml"), "#".repeat((1 << 20) + 1)).unwrap();
    assert!(load(&directory.path().join("long.yaml")).unwrap_err()[0].text.contains("1 MiB"));
}

#[test]
fn the_example_is_valid_and_holds_every_field() {
    let text = include_str!("../../deploy/config.example.yaml");
    let config = read(text).unwrap_or_else(|faults| panic!("{faults:#?}"));
    assert_eq!(config.policy, Rules { audiences: vec!["vault-prod".into()], ..Rules::default() });
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.stale_after, Config::default().stale_after);
    let words: Vec<&str> = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).collect();
    for (section, fields) in FIELDS {
        for field in *fields {
            assert!(words.contains(field), "{section}.{field}");
        }
    }
    for line in text.lines() {
        let line = line.trim_start_matches([' ', '-']);
        assert!(
            line.is_empty() || line.starts_with('#') || !line.contains('#'),
            "a comment stands above its field: {line}"
        );
    }
}

#[test]
fn every_field_stands_in_the_table() {
    let page = include_str!("../../docs/configuration.md");
    let documented = crate::request::tests::documented(page, "Fields");
    let mut fields: Vec<String> = Vec::new();
    for (section, names) in FIELDS {
        fields.extend(names.iter().map(|name| format!("{section}.{name}").trim_start_matches('.').to_owned()));
    }
    fields.sort();
    let mut sorted = documented.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, fields);
}

// === who may read what ===

fn pod() -> PodRef {
    PodRef {
        namespace: "payments".into(),
        name: "api-0".into(),
        uid: PodUid::parse("u-1").unwrap(),
        service_account: "api".into(),
    }
}

fn claim() -> Claim {
    Claim { readers: None, uid: None, vault: None, role: None, refresh: None, files: None, digest: [0; 32] }
}

fn path(text: &str) -> VaultPath {
    VaultPath::parse(text).unwrap()
}

#[test]
fn the_connection_a_claim_means() {
    let config = valid();
    let named = |name: &str| Claim { vault: Some(name.into()), ..claim() };
    assert_eq!(config.connection(&claim()).unwrap().name, "prod");
    assert_eq!(config.connection(&named("prod")).unwrap().name, "prod");
    let fault = config.connection(&named("prdo")).unwrap_err();
    assert_eq!(fault.code, UNKNOWN_CONNECTION);
    assert!(fault.text.contains("(did you mean \"prod\"?)"));
    let none = taken("default: true", "default: false");
    assert_eq!(none.connection(&claim()).unwrap_err().code, NO_DEFAULT_CONNECTION);
    assert_eq!(Config::default().connection(&claim()).unwrap_err().code, NO_DEFAULT_CONNECTION);
}

#[test]
fn the_role_a_claim_means() {
    let config = valid();
    let prod = &config.connections["prod"];
    assert_eq!(prod.role(&claim()).unwrap(), "payments");
    assert_eq!(prod.role(&Claim { role: Some("other".into()), ..claim() }).unwrap(), "other");
    let none = taken(", role: payments}", "}");
    assert_eq!(none.connections["prod"].role(&claim()).unwrap_err().code, NO_ROLE);
}

#[test]
fn the_interval_a_claim_means() {
    let config = valid();
    let of = |refresh| config.connections["prod"].refresh(&Claim { refresh, ..claim() });
    let every = |seconds| Refresh::Every(Duration::from_secs(seconds));
    assert_eq!(of(None), Ok(every(1800)));
    assert_eq!(of(Some(Refresh::Never)), Ok(Refresh::Never));
    for seconds in [60, 300, 86_400] {
        assert_eq!(of(Some(every(seconds))), Ok(every(seconds)));
    }
    for seconds in [0, 59, 86_401] {
        assert_eq!(of(Some(every(seconds))).unwrap_err().code, REFRESH_BOUNDS);
    }
}

#[test]
fn one_rule_must_cover_all_of_it() {
    let config = valid();
    let permits = |pod: &PodRef, role: &str, at: &str| config.connections["prod"].permits(pod, role, &path(at));
    assert_eq!(permits(&pod(), "payments", "secret/data/payments/db"), Ok(()));
    assert_eq!(permits(&pod(), "payments", "secret/data/payments/a/b/c"), Ok(()));
    for (at, role) in [
        ("secret/data/payments", "payments"),
        ("secret/data/shop/db", "payments"),
        ("secret/data/paymentsx/db", "payments"),
        ("secret/payments/db", "payments"),
        ("x/secret/data/payments/db", "payments"),
        ("secret/data/payments/db", "admin"),
    ] {
        let fault = permits(&pod(), role, at).unwrap_err();
        assert_eq!((fault.code, fault.field.as_str()), (NOT_ALLOWED, "platform file: connections.prod.allow"), "{at}");
        assert!(fault.text.contains("ask the platform team"));
    }
    assert!(permits(&PodRef { namespace: "shop".into(), ..pod() }, "payments", "secret/data/shop/db").is_err());
    let one = taken("[\"*\"]", "[other]");
    assert!(one.connections["prod"].permits(&pod(), "payments", &path("secret/data/payments/db")).is_err());
    let nobody = taken(
        "limits:",
        "  x:\n    address: https://b.example\n    ca_file: ca.pem\n    auth: {method: jwt, audience: b}\nlimits:",
    );
    assert!(nobody.connections["x"].permits(&pod(), "payments", &path("secret/data/payments/db")).is_err());
}

#[test]
fn two_rules_do_not_add_up() {
    let rules = "    - {namespaces: [payments], service_accounts: [api], roles: [admin], paths: [a/b]}\n    refresh:";
    let config = taken("    refresh:", rules);
    let permits = |role: &str, at: &str| config.connections["prod"].permits(&pod(), role, &path(at)).is_ok();
    assert!(permits("admin", "a/b"));
    assert!(!permits("payments", "a/b") && !permits("admin", "secret/data/payments/db"));
}

#[test]
fn stars_in_paths() {
    let covers = |pattern: &str, at: &str| PathPattern::parse(pattern).unwrap().covers(&pod(), &path(at)).unwrap();
    for (pattern, at) in [
        ("a/b", "a/b"),
        ("a/*", "a/b"),
        ("a/*", "a/b/c"),
        ("*", "a"),
        ("*", "a/b"),
        ("a/*/c", "a/b/c"),
        ("*/data/*", "kv/data/x/y"),
        ("a/{{ pod.service_account }}-{{ pod.name }}", "a/api-api-0"),
        ("a/{{pod.uid}}/*", "a/u-1/x"),
    ] {
        assert!(covers(pattern, at), "{pattern} {at}");
    }
    for (pattern, at) in [
        ("a/b", "a/b/c"),
        ("a/b", "a"),
        ("a/*", "a"),
        ("a/*/c", "a/c"),
        ("a/*/c", "a/b/b/c"),
        ("a/*/c", "a/b/c/d"),
        ("a/{{ pod.name }}", "a/api-1"),
        ("a/{{ pod.name }}", "a/{{ pod.name }}"),
    ] {
        assert!(!covers(pattern, at), "{pattern} {at}");
    }
}

#[test]
fn a_fact_adds_no_segment_and_no_star() {
    let text = Expand::parse("teams/{{ pod.namespace }}").unwrap();
    assert_eq!(text.expand(&pod()).unwrap(), "teams/payments");
    assert_eq!(text.to_string(), "teams/{{ pod.namespace }}");
    for namespace in ["a/b", "..", "a..b", "a%2fb", ""] {
        let pod = PodRef { namespace: namespace.into(), ..pod() };
        assert_eq!(text.expand(&pod).unwrap_err().code, NOT_EXPANDABLE, "{namespace}");
        assert!(PathPattern::parse("a/{{ pod.namespace }}").unwrap().covers(&pod, &path("a/b")).is_err());
    }
    let star = PodRef { namespace: "*".into(), ..pod() };
    assert!(!PathPattern::parse("a/{{ pod.namespace }}").unwrap().covers(&star, &path("a/b")).unwrap());
    for bad in ["{{", "}}", "{{ pod }}", "{{ pod.namespace }", "{{ }}", "{{ pod.namespace | upper }}"] {
        assert!(matches!(Expand::parse(bad), Err(Malformed(_))), "{bad}");
    }
}

#[test]
fn the_token_is_the_one_for_the_connections_audience() {
    let config = valid();
    let token = || Token {
        jwt: crate::secret::SecretText::new("x".into()),
        expires: std::time::SystemTime::UNIX_EPOCH,
        service_account_uid: String::new(),
    };
    let mut publish = Publish {
        volume: crate::request::VolumeId { pod: pod().uid, name: crate::request::VolumeName::parse("db").unwrap() },
        pod: pod(),
        claim: claim(),
        secret: None,
        tokens: BTreeMap::from([("other".to_owned(), token())]),
    };
    let prod = &config.connections["prod"];
    let fault = prod.token(&publish).err().unwrap();
    assert_eq!((fault.code, fault.field.as_str()), (NO_TOKEN, "CSIDriver csi.sealmount.io: spec.tokenRequests"));
    publish.tokens.insert("vault-prod".into(), token());
    assert!(prod.token(&publish).is_ok());
}
