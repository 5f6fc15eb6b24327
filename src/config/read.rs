//! From the text of the platform file to [`Config`]: every field once, every fault reported.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::{Component, Path};
use std::time::{Duration, SystemTime};

use http::uri::Authority;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};

use super::expand::{Expand, NamePattern, PathPattern};
use super::{Allow, Auth, Config, ConfigFault, Connection, Limits, Method, RefreshBounds, Requests, ShareLogin};
use crate::policy::{Namespaces, RULES, Rules, Severity, Waiver};
use crate::request::files::VaultPath;
use crate::request::yaml::{self, Name, Node, Place, Value};
use crate::request::{Code, Malformed, duration, nearest, shown};

/// Every field there is, by the section it stands in; `*` stands for a name that the platform team chooses, `[]` for
/// an entry of a list.
pub const FIELDS: &[(&str, &[&str])] = &[
    ("", &["version", "connections", "limits", "stale_after", "policy", "debug_containers", "audit", "log"]),
    (
        "connections.*",
        &[
            "default",
            "address",
            "redirect_to",
            "ca_file",
            "server_name",
            "namespace",
            "auth",
            "allow",
            "refresh",
            "max_token_ttl",
            "share_login",
            "timeout",
            "max_reply",
            "requests",
            "labels",
            "revoke_certificates",
            "allow_insecure_loopback",
        ],
    ),
    ("connections.*.auth", &["method", "mount", "audience", "role"]),
    ("connections.*.allow[]", &["namespaces", "service_accounts", "roles", "paths", "methods"]),
    ("connections.*.refresh", &["default", "min", "max"]),
    ("connections.*.requests", &["at_once", "per_second"]),
    ("limits", &["volume_bytes", "files"]),
    ("policy", &["mesh_uids", "distinct_uids", "refuse", "runtime_classes", "node_paths", "namespaces", "waivers"]),
    ("policy.runtime_classes.*", &["gate"]),
    ("policy.namespaces", &["allow", "deny"]),
    ("policy.waivers[]", &["code", "namespace", "service_account", "container", "until", "reason"]),
    ("debug_containers", &["allow_namespaces"]),
    ("audit", &["output", "file", "fold"]),
    ("log", &["level"]),
];

/// The longest platform file, and the longest CA file.
const MAX_FILE: u64 = 1024 * 1024;
const NOT_AVAILABLE: &str = "is not available in this version; leave it out";

/// Reads a file and what it names.
pub(super) fn file(path: &Path) -> Result<Config, Vec<ConfigFault>> {
    let unreadable = |text| vec![ConfigFault { place: None, field: String::new(), text }];
    let bytes = bytes_of(path).map_err(|text| unreadable(format!("{}: {text}", path.display())))?;
    let source = String::from_utf8(bytes).map_err(|_| unreadable(format!("{} is not UTF-8", path.display())))?;
    text(&source, path.parent().unwrap_or_else(|| Path::new(".")))
}

/// Reads a text; the files it names lie in `directory`.
fn text(source: &str, directory: &Path) -> Result<Config, Vec<ConfigFault>> {
    let root = yaml::parse(source).map_err(|faults| {
        let fault = |f: yaml::Fault| ConfigFault { place: Some(f.place), field: String::new(), text: f.text };
        faults.into_iter().map(fault).collect::<Vec<_>>()
    })?;
    let mut reader = Reader { source, directory, faults: Vec::new() };
    let config = reader.config(&root);
    if reader.faults.is_empty() {
        return Ok(config);
    }
    reader.faults.sort_by_key(|fault| fault.place);
    Err(reader.faults)
}

fn bytes_of(path: &Path) -> Result<Vec<u8>, String> {
    let file = File::open(path).map_err(|error| format!("cannot be opened: {error}"))?;
    let mut bytes = Vec::new();
    let most = MAX_FILE.saturating_add(1);
    file.take(most).read_to_end(&mut bytes).map_err(|error| format!("cannot be read: {error}"))?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length == most) {
        return Err("is longer than 1 MiB".into());
    }
    Ok(bytes)
}

/// A map of the file and its path in it.
struct Section<'a> {
    path: String,
    place: Place,
    entries: &'a [(Name, Node)],
}

impl<'a> Section<'a> {
    fn get(&self, name: &str) -> Option<(&'a Name, &'a Node)> {
        self.entries.iter().find(|(known, _)| known.text == name).map(|(name, node)| (name, node))
    }

    /// Whether a field is written, and not as null.
    fn has(&self, name: &str) -> bool {
        self.get(name).is_some_and(|(_, node)| node.value != Value::Null)
    }

    /// Whether a list is absent, null or has no entry.
    fn is_empty(&self, name: &str) -> bool {
        !self.has(name) || self.get(name).is_some_and(|(_, node)| node.value == Value::List(Vec::new()))
    }

    fn field(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    fn place(&self, name: &str) -> Place {
        self.get(name).map_or(self.place, |(_, node)| node.place)
    }
}

struct Reader<'a> {
    source: &'a str,
    directory: &'a Path,
    faults: Vec<ConfigFault>,
}

/// How a scalar is read: its text, and whether it stands without quotes.
type Parsed<T> = Result<T, String>;

impl<'a> Reader<'a> {
    fn fault(&mut self, place: Place, field: impl Into<String>, text: impl Into<String>) {
        self.faults.push(ConfigFault { place: Some(place), field: field.into(), text: text.into() });
    }

    /// A map whose fields are those of `section` in [`FIELDS`]. Null is an empty map.
    fn section<'n>(&mut self, node: &'n Node, path: String, section: &str) -> Section<'n> {
        let known = FIELDS.iter().find(|(name, _)| *name == section).map_or(&[][..], |(_, fields)| fields);
        let map = self.names(node, path);
        for (name, _) in map.entries {
            if !known.contains(&name.text.as_str()) {
                let near = nearest(&name.text, known.iter().copied());
                self.fault(name.place, map.field(&shown(&name.text)), format!("there is no such field{near}"));
            }
        }
        map
    }

    /// A map whose names are the platform team's. Null is an empty map.
    fn names<'n>(&mut self, node: &'n Node, path: String) -> Section<'n> {
        let entries = match &node.value {
            Value::Map(entries) => entries.as_slice(),
            Value::Null => &[],
            Value::Text { .. } | Value::List(_) => {
                self.fault(node.place, path.as_str(), "write a map");
                &[]
            }
        };
        Section { path, place: node.place, entries }
    }

    /// A section below another; absent is empty.
    fn below<'n>(&mut self, map: &Section<'n>, name: &str, section: &str) -> Section<'n> {
        match map.get(name) {
            Some((_, node)) => self.section(node, map.field(name), section),
            None => Section { path: map.field(name), place: map.place, entries: &[] },
        }
    }

    /// A scalar; `None` if it is absent or null, or a fault was added.
    fn plain<T>(&mut self, map: &Section<'_>, name: &str, parse: impl FnOnce(&str, bool) -> Parsed<T>) -> Option<T> {
        let (_, node) = map.get(name)?;
        self.scalar(node, &map.field(name), parse)
    }

    fn scalar<T>(&mut self, node: &Node, field: &str, parse: impl FnOnce(&str, bool) -> Parsed<T>) -> Option<T> {
        let parsed = match &node.value {
            Value::Null => return None,
            Value::Text { text, plain } => parse(text, *plain),
            Value::List(_) | Value::Map(_) => Err("is a list or a map; write one value".into()),
        };
        parsed.map_err(|text| self.fault(node.place, field, text)).ok()
    }

    /// A scalar that must be there.
    fn required<T>(&mut self, map: &Section<'_>, name: &str, parse: impl FnOnce(&str, bool) -> Parsed<T>) -> Option<T> {
        if !map.has(name) {
            let hint = map.get(name).map(|(name, _)| yaml::hint(self.source, name.place.line)).unwrap_or_default();
            self.fault(map.place(name), map.field(name), format!("is required{hint}"));
        }
        self.plain(map, name, parse)
    }

    /// A list; absent and null are empty.
    fn list<T>(&mut self, map: &Section<'_>, name: &str, parse: impl Fn(&str, bool) -> Parsed<T>) -> Vec<T> {
        let mut out = Vec::new();
        for (index, node) in self.items(map, name).iter().enumerate() {
            let field = format!("{}[{index}]", map.field(name));
            if node.value == Value::Null {
                self.fault(node.place, field.as_str(), "is empty");
            }
            out.extend(self.scalar(node, &field, &parse));
        }
        out
    }

    fn items<'n>(&mut self, map: &Section<'n>, name: &str) -> &'n [Node] {
        match map.get(name).map(|(_, node)| (node.place, &node.value)) {
            None | Some((_, Value::Null)) => &[],
            Some((_, Value::List(items))) => items,
            Some((place, _)) => {
                self.fault(place, map.field(name), "write a list: [..]");
                &[]
            }
        }
    }

    /// Refuses what this version does not do, if it is asked for.
    fn later(&mut self, map: &Section<'_>, name: &str, asked: bool) {
        if asked {
            self.fault(map.place(name), map.field(name), NOT_AVAILABLE);
        }
    }

    fn config(&mut self, root: &Node) -> Config {
        let defaults = Config::default();
        let map = self.section(root, String::new(), "");
        self.required(&map, "version", |text, plain| match (text, plain) {
            ("1", true) => Ok(()),
            _ => Err("this driver reads version 1".into()),
        });

        let mut connections = BTreeMap::new();
        if let Some((_, node)) = map.get("connections") {
            let named = self.names(node, "connections".into());
            for (name, node) in named.entries {
                if let Some(connection) = self.connection(name, node) {
                    connections.insert(name.text.clone(), connection);
                }
            }
            let mut first = None;
            for (name, node) in named.entries {
                if connections.get(&name.text).is_some_and(|connection| connection.default) {
                    if let Some(first) = first {
                        let text = format!("\"{first}\" is the default already; there is at most one");
                        self.fault(node.place, format!("connections.{}.default", name.text), text);
                    }
                    first = first.or(Some(name.text.as_str()));
                }
            }
        }

        let limits = self.below(&map, "limits", "limits");
        let limits = Limits {
            volume_bytes: self
                .plain(&limits, "volume_bytes", size(4 * KIB..=64 * MIB))
                .unwrap_or(defaults.limits.volume_bytes),
            files: self.plain(&limits, "files", number(1..=Limits::MAX_FILES)).unwrap_or(defaults.limits.files),
        };
        let stale_after = self.plain(&map, "stale_after", interval(1..=DAY)).unwrap_or(defaults.stale_after);
        let mut policy = self.policy(&map);
        policy.audiences = connections.values().map(|connection| connection.auth.audience.clone()).collect();

        let debug = self.below(&map, "debug_containers", "debug_containers");
        let namespaces = self.list(&debug, "allow_namespaces", name_or_any);
        self.later(&debug, "allow_namespaces", !namespaces.is_empty());

        let audit = self.below(&map, "audit", "audit");
        let output = self.plain(&audit, "output", one_of(&[("stdout", false), ("file", true)]));
        self.later(&audit, "output", output == Some(true));
        self.later(&audit, "file", audit.has("file"));
        let fold = self.plain(&audit, "fold", interval(1..=DAY));
        self.later(&audit, "fold", fold.is_some_and(|fold| fold != Duration::from_secs(60)));

        let log = self.below(&map, "log", "log");
        let levels = [
            ("error", tracing::Level::ERROR),
            ("warn", tracing::Level::WARN),
            ("info", tracing::Level::INFO),
            ("debug", tracing::Level::DEBUG),
            ("trace", tracing::Level::TRACE),
        ];
        let log_level = self.plain(&log, "level", one_of(&levels)).unwrap_or(defaults.log_level);
        Config { connections, limits, stale_after, policy, log_level }
    }

    /// `None` only if a fault was added.
    fn connection(&mut self, name: &Name, node: &Node) -> Option<Connection> {
        let path = format!("connections.{}", shown(&name.text));
        if !is_connection_name(&name.text) {
            let text = "a connection's name is 1 to 63 letters, digits, \"-\", \"_\" and \".\"";
            self.fault(name.place, path.as_str(), text);
        }
        let before = self.faults.len();
        let map = self.section(node, path, "connections.*");
        let default = self.plain(&map, "default", flag).unwrap_or(false);
        let insecure = self.plain(&map, "allow_insecure_loopback", flag).unwrap_or(false);
        let server = |text: &str, _: bool| address(text, insecure);
        let address = self.required(&map, "address", server);
        let redirect_to = self.list(&map, "redirect_to", server);
        let ca_pem = self.ca(&map, address.is_some());
        let server_name = self.plain(&map, "server_name", |text, _| match ServerName::try_from(text) {
            Ok(_) => Ok(text.to_owned()),
            Err(_) => Err("is no DNS name or IP address".into()),
        });
        let namespace = self.plain(&map, "namespace", |text, _| {
            let checked = VaultPath::parse(text).and_then(|_| Expand::parse(text));
            checked.map_err(|Malformed(text)| text.replace("path", "namespace"))
        });
        let auth = self.auth(&map);
        let allow = self.allow(&map);
        let refresh = self.refresh(&map);
        let max_token_ttl = self.plain(&map, "max_token_ttl", interval(60..=30 * DAY));
        let share_login = self.share_login(&map, auth.as_ref());
        let timeout = self.plain(&map, "timeout", interval(1..=60));
        let max_reply = self.plain(&map, "max_reply", size(KIB..=16 * MIB));
        let requests = self.below(&map, "requests", "connections.*.requests");
        let requests = Requests {
            at_once: self.plain(&requests, "at_once", number(1..=256)).unwrap_or(8),
            per_second: self.plain(&requests, "per_second", number(1..=10_000)).unwrap_or(50),
        };
        let labels = self.list(&map, "labels", text_of);
        self.later(&map, "labels", !labels.is_empty());
        let revoke = self.plain(&map, "revoke_certificates", flag);
        self.later(&map, "revoke_certificates", revoke == Some(true));

        if self.faults.len() > before {
            return None;
        }
        Some(Connection {
            name: name.text.clone(),
            default,
            address: address?,
            redirect_to,
            ca_pem,
            server_name,
            namespace,
            auth: auth?,
            allow,
            refresh,
            max_token_ttl: max_token_ttl.unwrap_or(Duration::from_secs(HOUR)),
            share_login,
            timeout: timeout.unwrap_or(Duration::from_secs(10)),
            max_reply: max_reply.unwrap_or(2 * MIB),
            requests,
        })
    }

    fn ca(&mut self, map: &Section<'_>, address_is_fine: bool) -> Vec<u8> {
        let address = map.get("address").map(|(_, node)| &node.value);
        if matches!(address, Some(Value::Text { text, .. }) if text.starts_with("http://")) {
            if address_is_fine && map.has("ca_file") {
                self.fault(map.place("ca_file"), map.field("ca_file"), "plain http has no certificate; leave it out");
            }
            return Vec::new();
        }
        let directory = self.directory;
        self.required(map, "ca_file", |text, _| {
            // The worker may read this directory and no other.
            if !Path::new(text).components().all(|part| matches!(part, Component::Normal(_))) {
                return Err("name a file in the directory of this file, or below it".into());
            }
            let pem = bytes_of(&directory.join(text)).map_err(|text| format!("the file {text}"))?;
            certificates(&pem)?;
            Ok(pem)
        })
        .unwrap_or_default()
    }

    /// `None` only if a fault was added.
    fn auth(&mut self, map: &Section<'_>) -> Option<Auth> {
        if !map.has("auth") {
            self.fault(map.place("auth"), map.field("auth"), "is required");
            return None;
        }
        let map = self.below(map, "auth", "connections.*.auth");
        let methods = [
            ("kubernetes", Some(Method::Kubernetes)),
            ("jwt", Some(Method::Jwt)),
            ("approle", None),
            ("cert", None),
            ("token_file", None),
        ];
        let method = self.required(&map, "method", one_of(&methods));
        self.later(&map, "method", method == Some(None));
        let mount = self.plain(&map, "mount", |text, _| match VaultPath::parse(text) {
            Ok(path) => Ok(path.to_string()),
            Err(Malformed(text)) => Err(text.replace("path", "mount")),
        });
        let audience = self.required(&map, "audience", audience);
        let role = self.plain(&map, "role", text_of);
        let method = method??;
        let mount = mount.unwrap_or_else(|| match method {
            Method::Kubernetes => "kubernetes".into(),
            Method::Jwt => "jwt".into(),
        });
        Some(Auth { method, mount, audience: audience?, role })
    }

    fn allow(&mut self, map: &Section<'_>) -> Vec<Allow> {
        let mut rules = Vec::new();
        for (index, node) in self.items(map, "allow").iter().enumerate() {
            let path = format!("{}[{index}]", map.field("allow"));
            let rule = self.section(node, path, "connections.*.allow[]");
            for name in ["namespaces", "service_accounts", "roles", "paths"] {
                if rule.is_empty(name) {
                    let text = "is required: a list with at least one entry; \"*\", in quotes, is any";
                    self.fault(rule.place(name), rule.field(name), text);
                }
            }
            self.list(&rule, "methods", |text, _| match text {
                "read" => Ok(()),
                _ => Err("only read is available in this version".into()),
            });
            if rule.has("methods") && rule.is_empty("methods") {
                self.fault(rule.place("methods"), rule.field("methods"), "write [read], or leave it out");
            }
            let names = |text: &str, _: bool| NamePattern::parse(text).map_err(|Malformed(text)| text);
            rules.push(Allow {
                namespaces: self.list(&rule, "namespaces", names),
                service_accounts: self.list(&rule, "service_accounts", names),
                roles: self.list(&rule, "roles", names),
                paths: self.list(&rule, "paths", |text, _| PathPattern::parse(text).map_err(|Malformed(text)| text)),
            });
        }
        rules
    }

    fn refresh(&mut self, map: &Section<'_>) -> RefreshBounds {
        let map = self.below(map, "refresh", "connections.*.refresh");
        let mut get =
            |name, usual| self.plain(&map, name, interval(1..=365 * DAY)).unwrap_or_else(|| Duration::from_secs(usual));
        let (default, min, max) = (get("default", HOUR / 2), get("min", 60), get("max", DAY));
        if min > max {
            self.fault(map.place("min"), map.field("min"), "is more than max");
        } else if default < min || default > max {
            let text = format!("lies outside min ({}s) and max ({}s)", min.as_secs(), max.as_secs());
            self.fault(map.place("default"), map.field("default"), text);
        }
        RefreshBounds { default, min, max }
    }

    fn share_login(&mut self, map: &Section<'_>, auth: Option<&Auth>) -> ShareLogin {
        let ways = [("service_account", ShareLogin::ServiceAccount), ("pod", ShareLogin::Pod)];
        let written = self.plain(map, "share_login", one_of(&ways));
        if auth.is_none_or(|auth| auth.method == Method::Kubernetes) {
            return written.unwrap_or(ShareLogin::ServiceAccount);
        }
        if written == Some(ShareLogin::ServiceAccount) {
            let text = "with jwt each pod has its own login, since roles can bind claims of the pod; write pod";
            self.fault(map.place("share_login"), map.field("share_login"), text);
        }
        ShareLogin::Pod
    }

    fn policy(&mut self, root: &Section<'_>) -> Rules {
        let defaults = Rules::default();
        let map = self.below(root, "policy", "policy");
        let mesh_uids = self.list(&map, "mesh_uids", number(0..=2_147_483_647));
        let distinct_uids = self.plain(&map, "distinct_uids", flag).unwrap_or(defaults.distinct_uids);
        let refuse = self.list(&map, "refuse", |text, _| {
            let rule = RULES.iter().find(|rule| rule.code.0 == text).ok_or_else(|| unknown_code(text))?;
            match rule.severity {
                Severity::Warn => Ok(rule.code),
                Severity::Refuse => Err("is refused already".into()),
            }
        });
        let mut runtime_classes = Vec::new();
        if let Some((_, node)) = map.get("runtime_classes") {
            let classes = self.names(node, map.field("runtime_classes"));
            for (name, node) in classes.entries {
                let class = self.section(node, classes.field(&shown(&name.text)), "policy.runtime_classes.*");
                let gate = self.plain(&class, "gate", one_of(&[("enforce", true), ("pod", true), ("off", false)]));
                self.later(&class, "gate", gate == Some(true));
                runtime_classes.push(name.text.clone());
            }
        }
        let node_paths = self.list(&map, "node_paths", node_path);
        let namespaces = self.below(&map, "namespaces", "policy.namespaces");
        let namespaces = Namespaces {
            allow: match namespaces.has("allow") {
                true => self.list(&namespaces, "allow", name_or_any),
                false => defaults.namespaces.allow.clone(),
            },
            deny: self.list(&namespaces, "deny", name_or_any),
        };
        let mut waivers = Vec::new();
        for (index, node) in self.items(&map, "waivers").iter().enumerate() {
            waivers.extend(self.waiver(node, format!("{}[{index}]", map.field("waivers"))));
        }
        let mesh_uids = if map.has("mesh_uids") { mesh_uids } else { defaults.mesh_uids.clone() };
        Rules { mesh_uids, distinct_uids, refuse, runtime_classes, node_paths, namespaces, waivers, ..defaults }
    }

    /// `None` only if a fault was added.
    fn waiver(&mut self, node: &Node, path: String) -> Option<Waiver> {
        let map = self.section(node, path, "policy.waivers[]");
        let code = self.required(&map, "code", |text, _| {
            let rule = RULES.iter().find(|rule| rule.code.0 == text).ok_or_else(|| unknown_code(text))?;
            if rule.may_be_waived() { Ok(rule.code) } else { Err(format!("{text} is never waived")) }
        });
        let namespace = self.required(&map, "namespace", text_of);
        let service_account = self.plain(&map, "service_account", text_of);
        let container = self.plain(&map, "container", text_of);
        let until = self.required(&map, "until", |text, _| end_of(text));
        let reason = self.required(&map, "reason", text_of);
        let (code, namespace, until, reason): (Code, _, _, _) = (code?, namespace?, until?, reason?);
        Some(Waiver { code, namespace, service_account, container, until, reason })
    }
}

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

fn flag(text: &str, plain: bool) -> Parsed<bool> {
    match (text, plain) {
        ("true", true) => Ok(true),
        ("false", true) => Ok(false),
        _ => Err("write true or false".into()),
    }
}

fn text_of(text: &str, _: bool) -> Parsed<String> {
    if text.trim().is_empty() || text.chars().any(char::is_control) {
        return Err("is empty, or holds a control character".into());
    }
    Ok(text.to_owned())
}

fn name_or_any(text: &str, _: bool) -> Parsed<String> {
    NamePattern::parse(text).map(|_| text.to_owned()).map_err(|Malformed(text)| text)
}

/// A directory of the node, as it is: what is no plain path would match nothing, or everything.
fn node_path(text: &str, plain: bool) -> Parsed<String> {
    let mut parts = text.split('/').skip(1);
    if !text.starts_with('/') || parts.any(|part| part.is_empty() || part == "." || part == "..") {
        return Err("write a directory of the node such as /data/kubelet".into());
    }
    if text == "/var/run" || text.starts_with("/var/run/") {
        return Err("is a link on every node; write /run".into());
    }
    text_of(text, plain)
}

fn one_of<T: Copy>(known: &[(&'static str, T)]) -> impl Fn(&str, bool) -> Parsed<T> {
    move |text, _| match known.iter().find(|(name, _)| *name == text) {
        Some((_, value)) => Ok(*value),
        None => {
            let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            Err(format!("takes {}{}", names.join(", "), nearest(text, names.iter().copied())))
        }
    }
}

fn number(range: RangeInclusive<u32>) -> impl Fn(&str, bool) -> Parsed<u32> {
    move |text, plain| {
        let digits = plain && text.bytes().all(|b| b.is_ascii_digit());
        let number = text.parse().ok().filter(|number| digits && range.contains(number));
        number.ok_or_else(|| format!("takes a whole number from {} to {}", range.start(), range.end()))
    }
}

fn interval(seconds: RangeInclusive<u64>) -> impl Fn(&str, bool) -> Parsed<Duration> {
    move |text, _| {
        let interval = duration(text).filter(|interval| seconds.contains(&interval.as_secs()));
        let (least, most) = (seconds.start(), seconds.end());
        interval.ok_or_else(|| format!("takes an interval such as 30s, 5m or 1h30m, from {least}s to {most}s"))
    }
}

/// A size such as `512KiB`, `64MiB`, `1GiB` or `4096`, in bytes; what the command line takes too.
pub fn bytes(text: &str) -> Option<u64> {
    let units = [("GiB", 1024 * MIB), ("MiB", MIB), ("KiB", KIB), ("", 1)];
    let (number, unit) = units.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, bytes)))?;
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    number.parse::<u64>().ok().filter(|_| digits)?.checked_mul(*unit)
}

fn size(range: RangeInclusive<u64>) -> impl Fn(&str, bool) -> Parsed<u64> {
    move |text, _| {
        let (least, most) = (range.start(), range.end());
        bytes(text)
            .filter(|bytes| range.contains(bytes))
            .ok_or_else(|| format!("takes a size such as 512KiB or 1MiB, from {least} to {most} bytes"))
    }
}

fn unknown_code(text: &str) -> String {
    format!("there is no rule \"{}\"{}", shown(text), nearest(text, RULES.iter().map(|rule| rule.code.0)))
}

fn is_connection_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    !text.is_empty() && text.len() <= 63 && text.bytes().all(plain) && !text.starts_with(['-', '.'])
}

/// `https://host[:port]`, or `http://` for a loopback address where that is allowed.
fn address(text: &str, insecure: bool) -> Parsed<String> {
    let text = text.strip_suffix('/').unwrap_or(text);
    let (scheme, rest) = text.split_once("://").ok_or("write https://host:port")?;
    if rest.contains('@') {
        return Err("holds a user or password; leave it out".into());
    }
    let authority: Authority = rest.parse().map_err(|_| "write https://host:port, no path and no query")?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() || ServerName::try_from(host).is_err() {
        return Err("the host is no DNS name or IP address".into());
    }
    // `Authority` takes a port that is empty or too large.
    if authority.port_u16().is_none() && !rest.ends_with(authority.host()) {
        return Err("the port is no number from 1 to 65535".into());
    }
    match scheme {
        "https" => Ok(text.to_owned()),
        "http" if !host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) => {
            Err("plain http goes to a loopback address only (127.0.0.1 or [::1]); write https".into())
        }
        "http" if !insecure => Err("plain http needs allow_insecure_loopback: true".into()),
        "http" => Ok(text.to_owned()),
        _ => Err("write https://host:port".into()),
    }
}

/// An audience of this connection's own. With an API server's, Vault could use the token against the API server, and
/// any proxy that holds the pod's automounted token could log in to Vault.
fn audience(text: &str, plain: bool) -> Parsed<String> {
    let text = text_of(text, plain)?;
    let host = text.trim_start_matches("https://").trim_end_matches('/').trim_end_matches(":443");
    let is_server = host == "api" || host == "kubernetes" || host == "k3s" || host.starts_with("kubernetes.default");
    if is_server {
        return Err(
            "this is an API server's audience: Vault could act as the pod with it, and the pod's default token \
                    would log in to Vault; write one of its own, such as vault-prod"
                .into(),
        );
    }
    Ok(text)
}

fn certificates(pem: &[u8]) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    for (index, certificate) in CertificateDer::pem_slice_iter(pem).enumerate() {
        let certificate = certificate.map_err(|_| "the file is not PEM")?;
        let number = index.saturating_add(1);
        roots.add(certificate).map_err(|_| format!("certificate {number} of the file cannot be read"))?;
    }
    if roots.is_empty() { Err("the file holds no certificate (BEGIN CERTIFICATE)".into()) } else { Ok(()) }
}

/// A time (RFC 3339), or a day, which counts to its end in UTC.
fn end_of(text: &str) -> Parsed<SystemTime> {
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(SystemTime::from(time));
    }
    let day = text.parse::<jiff::civil::Date>().and_then(|day| day.tomorrow()?.to_zoned(jiff::tz::TimeZone::UTC));
    day.map(|day| SystemTime::from(day.timestamp())).map_err(|_| "write a day such as 2027-03-31".into())
}
