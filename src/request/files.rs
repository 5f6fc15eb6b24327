//! The `files` attribute: which keys of which secret become which files (surface 1).
//!
//! The grammar is parsed here once; what comes out cannot name a file twice, cannot name a file that is also a
//! directory, and holds only paths that Vault would take as they are.

use std::fmt;
use std::num::NonZeroU64;

use super::yaml::{self, Name, Node, Value};
use super::{Code, Fault, FileName, Malformed, nearest, shown};

/// `files` cannot be read as a YAML map of 1 to 256 entries in 32 KiB.
pub const UNREADABLE: Code = Code("SM020");
/// A name on the left is no file's and no directory's.
pub const BAD_NAME: Code = Code("SM021");
/// Two names cannot stand beside each other.
pub const COLLISION: Code = Code("SM022");
/// The right side of an entry says nothing that can be fetched.
pub const BAD_CONTENT: Code = Code("SM023");
/// An entry has a field that there is not.
pub const UNKNOWN_FIELD: Code = Code("SM024");
/// What a later version may take.
pub const NOT_AVAILABLE: Code = Code("SM025");

/// The fields of an entry's long form.
pub const FIELDS: [&str; 8] = ["from", "path", "version", "key", "template", "with", "decode", "optional"];

/// A parsed `files` map: 1 to 256 entries whose names do not collide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files(Vec<Entry>);

impl Files {
    /// The longest text, in bytes.
    pub const MAX_BYTES: usize = 32 * 1024;
    /// The most entries.
    pub const MAX_ENTRIES: usize = 256;

    /// Parses the attribute. Every fault is reported, in the order of the text; their fields begin with `files`.
    /// No fault quotes a value: somebody may have written a password where its path should stand.
    pub fn parse(text: &str) -> Result<Self, Vec<Fault>> {
        if text.len() > Self::MAX_BYTES {
            return Err(vec![fault(UNREADABLE, None, "is longer than 32 KiB".into())]);
        }
        let root = yaml::parse(text).map_err(|faults| {
            let readable = |f: yaml::Fault| fault(UNREADABLE, None, format!("{}: {}", f.place, f.text));
            faults.into_iter().map(readable).collect::<Vec<_>>()
        })?;
        let entries = match root.value {
            Value::Map(entries) if !entries.is_empty() => entries,
            Value::Map(_) | Value::Null => {
                return Err(vec![fault(
                    UNREADABLE,
                    None,
                    "is empty: write a map, one \"name: path#key\" a line".into(),
                )]);
            }
            Value::Text { .. } | Value::List(_) => {
                return Err(vec![fault(UNREADABLE, None, "is no map: write one \"name: path#key\" a line".into())]);
            }
        };
        if entries.len() > Self::MAX_ENTRIES {
            return Err(vec![fault(UNREADABLE, None, format!("has {} entries; 256 are the most", entries.len()))]);
        }
        let mut faults = Vec::new();
        let mut parsed: Vec<Entry> = Vec::new();
        for (name, node) in &entries {
            let mut found = Vec::new();
            let target = Target::parse(&name.text).map_err(|Malformed(text)| found.push((BAD_NAME, text))).ok();
            let right = Right::parse(text, name, node, &mut found);
            let entry = target.zip(right).and_then(|(target, right)| entry(target, right, &mut found));
            if let Some(entry) = &entry
                && let Some(other) = parsed.iter().find(|other| other.target.collides(&entry.target))
            {
                let text = format!("one of it and \"{}\" is a file where the other needs a directory", other.target);
                found.push((COLLISION, text));
            }
            let line = name.place.line;
            faults
                .extend(found.into_iter().map(|(code, text)| fault(code, Some(name), format!("{text} (line {line})"))));
            parsed.extend(entry);
        }
        if faults.is_empty() { Ok(Self(parsed)) } else { Err(faults) }
    }

    /// The entries in the order they were written.
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// Every place that an entry or a template's `with` looks at, as often as it is named.
    pub fn locations(&self) -> impl Iterator<Item = &Location> {
        self.0.iter().flat_map(Entry::locations)
    }

    /// The paths of Vault among them.
    pub fn vault_paths(&self) -> impl Iterator<Item = &VaultPath> {
        self.locations().filter_map(|location| match location {
            Location::Vault { path, .. } => Some(path),
            Location::Secret => None,
        })
    }
}

fn fault(code: Code, name: Option<&Name>, text: String) -> Fault {
    let field = match name {
        Some(name) => format!("files[\"{}\"]", shown(&name.text)),
        None => "files".into(),
    };
    Fault { code, field, text }
}

/// What was found wrong with one entry.
type Found = Vec<(Code, String)>;

/// The right side of an entry, before it is known whether it fits the left.
struct Right {
    content: Content,
    base64: bool,
    optional: bool,
}

impl Right {
    /// `None` only if a fault was added.
    fn parse(source: &str, name: &Name, node: &Node, found: &mut Found) -> Option<Self> {
        let content = match &node.value {
            Value::Map(fields) => return Self::long(source, fields, found),
            Value::Text { text, .. } => short(text).map_err(|(code, text)| (code, text + &hint(source, name, code))),
            Value::Null => Err((BAD_CONTENT, format!("has no value{}", yaml::hint(source, name.place.line)))),
            Value::List(_) => Err((BAD_CONTENT, "is a list; write \"path#key\" or a map".into())),
        };
        let content = content.map_err(|fault| found.push(fault)).ok()?;
        Some(Self { content, base64: false, optional: false })
    }

    fn long(source: &str, fields: &[(Name, Node)], found: &mut Found) -> Option<Self> {
        let before = found.len();
        for (name, _) in fields {
            if !FIELDS.contains(&name.text.as_str()) {
                let near = nearest(&name.text, FIELDS);
                found.push((UNKNOWN_FIELD, format!("there is no field \"{}\"{near}", shown(&name.text))));
            }
        }
        let get = |wanted: &str| fields.iter().find(|(name, _)| name.text == wanted);
        let mut text = |wanted: &str| {
            let (name, node) = get(wanted)?;
            let fault = match &node.value {
                Value::Text { text, .. } if !text.is_empty() => return Some(text.as_str()),
                Value::Text { .. } => format!("{wanted} is empty"),
                Value::Null => format!("{wanted} has no value{}", yaml::hint(source, name.place.line)),
                Value::List(_) | Value::Map(_) => format!("{wanted} is no text; write it in quotes"),
            };
            found.push((BAD_CONTENT, fault));
            None
        };
        let (from, path, version, key) = (text("from"), text("path"), text("version"), text("key"));
        let (template, decode, optional) = (text("template"), text("decode"), text("optional"));

        let sources: Vec<&str> = ["from", "path", "template"].into_iter().filter(|name| get(name).is_some()).collect();
        if sources.len() != 1 {
            found.push((BAD_CONTENT, "write exactly one of from:, path: (with key:) and template:".into()));
        }
        for (field, wants) in [("key", "path"), ("version", "path"), ("with", "template")] {
            if get(field).is_some() && get(wants).is_none() {
                found.push((BAD_CONTENT, format!("{field}: belongs beside {wants}:")));
            }
        }
        if decode.is_some_and(|how| how != "base64") {
            found.push((BAD_CONTENT, "decode: takes base64 only".into()));
        }
        if get("decode").is_some() && get("template").is_some() {
            found.push((BAD_CONTENT, "decode: belongs to the entry whose value the template uses".into()));
        }
        if optional.is_some_and(|text| text != "true" && text != "false") {
            found.push((BAD_CONTENT, "optional: takes true or false".into()));
        }
        let content = if let Some(text) = template {
            let with = get("with").map(|(_, node)| with(node, found)).unwrap_or_default();
            Some(Content::Template { text: text.to_owned(), with })
        } else if let Some(text) = from {
            let name = get("from").map(|(name, _)| name);
            short(text)
                .map_err(|(code, text)| {
                    found.push((code, text + &name.map_or_else(String::new, |n| hint(source, n, code))))
                })
                .ok()
        } else if let Some(path) = path {
            if get("key").is_none() {
                found.push((NOT_AVAILABLE, WHOLE_PATH.into()));
            }
            let location = location(path, version).map_err(|text| found.push((BAD_CONTENT, text))).ok();
            location.zip(key).map(|(location, key)| Content::Key(KeyRef { location, key: key.to_owned() }))
        } else {
            None
        };
        if found.len() > before {
            return None;
        }
        content.map(|content| Self { content, base64: decode.is_some(), optional: optional == Some("true") })
    }
}

const WHOLE_PATH: &str = "a whole path is not available in this version; name a key: path#key";
const WRITE_LONG: &str = "more than one \"#\" or \"?\": write path: and key:, where both are literal";

/// The hint on a short form that has no `#`: often it stood behind a blank.
fn hint(source: &str, name: &Name, code: Code) -> String {
    if code == NOT_AVAILABLE { yaml::hint(source, name.place.line) } else { String::new() }
}

/// `[ P [ "?version=" N ] ] "#" ( K | "*" )`
fn short(text: &str) -> Result<Content, (Code, String)> {
    let bad = |text: &str| (BAD_CONTENT, text.to_owned());
    let Some((before, key)) = text.split_once('#') else {
        let whole = if text.contains("{{") { "a template goes into {template: \"...\"}" } else { WHOLE_PATH };
        return Err((NOT_AVAILABLE, whole.to_owned()));
    };
    if key.contains(['#', '?']) || before.matches('?').count() > 1 {
        return Err(bad(WRITE_LONG));
    }
    if key.is_empty() {
        return Err(bad("no key after \"#\"; \"#*\" takes every key"));
    }
    let location = match before.split_once('?') {
        None if before.is_empty() => Location::Secret,
        None => location(before, None).map_err(|text| (BAD_CONTENT, text))?,
        Some(("", _)) => return Err(bad("a version needs a path; a Kubernetes Secret has none")),
        Some((path, query)) => {
            let version = query.strip_prefix("version=").ok_or_else(|| bad("after \"?\" only version=N may stand"))?;
            location(path, Some(version)).map_err(|text| (BAD_CONTENT, text))?
        }
    };
    Ok(if key == "*" { Content::All(location) } else { Content::Key(KeyRef { location, key: key.to_owned() }) })
}

fn location(path: &str, version: Option<&str>) -> Result<Location, String> {
    let path = VaultPath::parse(path).map_err(|Malformed(text)| text)?;
    let Some(version) = version else { return Ok(Location::Vault { path, version: None }) };
    let plain = version.bytes().all(|b| b.is_ascii_digit()) && !version.starts_with('0');
    let number = version.parse().ok().filter(|_| plain);
    let number: NonZeroU64 = number.ok_or("a version is a whole number from 1")?;
    if !path.as_str().split('/').skip(1).any(|segment| segment == "data") {
        return Err("only KV version 2 has versions: its paths hold a segment \"data\"".into());
    }
    Ok(Location::Vault { path, version: Some(number) })
}

/// `{ident: short}`
fn with(node: &Node, found: &mut Found) -> Vec<(String, KeyRef)> {
    let Value::Map(entries) = &node.value else {
        found.push((BAD_CONTENT, "with: is no map; write {name: \"path#key\"}".into()));
        return Vec::new();
    };
    let mut out = Vec::new();
    for (name, node) in entries {
        let mut bad = |code, text: &str| found.push((code, format!("with.{}: {text}", shown(&name.text))));
        if !is_identifier(&name.text) || name.text == "files" {
            bad(BAD_CONTENT, "a variable is letters, digits and \"_\", not a digit first, not \"files\"");
        }
        let Value::Text { text, .. } = &node.value else {
            bad(BAD_CONTENT, "write \"path#key\" or \"#key\", in quotes");
            continue;
        };
        match short(text) {
            Ok(Content::Key(key)) => out.push((name.text.clone(), key)),
            Ok(_) => bad(BAD_CONTENT, "\"#*\" is no single value"),
            Err((code, text)) => bad(code, &text),
        }
    }
    out
}

/// Whether a template can use a name as a variable; other entries are `files["name"]` there.
pub fn is_identifier(text: &str) -> bool {
    !text.starts_with(|c: char| c.is_ascii_digit())
        && !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn entry(target: Target, right: Right, found: &mut Found) -> Option<Entry> {
    let fits = match (&target, &right.content) {
        (Target::File(_), Content::Key(_) | Content::Template { .. }) | (Target::Directory(_), Content::All(_)) => {
            Ok(())
        }
        (Target::File(_), Content::All(_)) => Err("\"#*\" takes every key: end the name with \"/\""),
        (Target::Directory(_), Content::Key(_)) => Err("a name that ends with \"/\" takes every key: write \"#*\""),
        (Target::Directory(_), Content::Template { .. }) => {
            Err("a template makes one file: no \"/\" at the name's end")
        }
    };
    fits.map_err(|text| found.push((BAD_CONTENT, text.to_owned()))).ok()?;
    let Right { content, base64, optional } = right;
    Some(Entry { target, content, base64, optional })
}

/// One entry: a name on the left, where its content comes from on the right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file, or the directory that takes every key.
    pub target: Target,
    /// What fills it.
    pub content: Content,
    /// `decode: base64`, applied to each value before templates see it.
    pub base64: bool,
    /// A missing key, a 404 or a deleted version leaves the file out instead of failing.
    pub optional: bool,
}

impl Entry {
    /// Every place that the entry or its template's `with` looks at.
    pub fn locations(&self) -> impl Iterator<Item = &Location> {
        let (one, many): (Option<&Location>, &[(String, KeyRef)]) = match &self.content {
            Content::Key(key) => (Some(&key.location), &[]),
            Content::All(location) => (Some(location), &[]),
            Content::Template { with, .. } => (None, with),
        };
        one.into_iter().chain(many.iter().map(|(_, key)| &key.location))
    }
}

/// The left side of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// One file.
    File(FileName),
    /// A name ending in `/`: each key becomes a file below it. `None` is `./`, the volume's root.
    Directory(Option<FileName>),
}

impl Target {
    fn parse(text: &str) -> Result<Self, Malformed> {
        let Some(name) = text.strip_suffix('/') else { return Ok(Self::File(FileName::parse(text)?)) };
        if name == "." {
            return Ok(Self::Directory(None));
        }
        let name = FileName::parse(name)?;
        if name.segments().count() >= FileName::MAX_SEGMENTS {
            return Err(Malformed("a file below this directory would have more than 4 segments".into()));
        }
        Ok(Self::Directory(Some(name)))
    }

    /// Whether one needs a directory where the other is a file.
    fn collides(&self, other: &Self) -> bool {
        let below = |file: &Self, other: &Self| {
            let Self::File(file) = file else { return false };
            match other {
                Self::File(other) => other.as_str().strip_prefix(file.as_str()).is_some_and(|t| t.starts_with('/')),
                Self::Directory(Some(directory)) => {
                    directory == file
                        || directory.as_str().strip_prefix(file.as_str()).is_some_and(|t| t.starts_with('/'))
                }
                Self::Directory(None) => false,
            }
        };
        below(self, other) || below(other, self)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(name) => f.write_str(&shown(name.as_str())),
            Self::Directory(Some(name)) => write!(f, "{}/", shown(name.as_str())),
            Self::Directory(None) => f.write_str("./"),
        }
    }
}

/// The right side of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// One key. Only with [`Target::File`].
    Key(KeyRef),
    /// `#*`: every key. Only with [`Target::Directory`].
    All(Location),
    /// A template. Only with [`Target::File`].
    Template {
        /// The template's text.
        text: String,
        /// Variables that are not served as files, by name.
        with: Vec<(String, KeyRef)>,
    },
}

/// One key of one secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyRef {
    /// The secret.
    pub location: Location,
    /// The literal top-level key.
    pub key: String,
}

/// Where a key is looked up.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Location {
    /// The Secret in the pod's `nodePublishSecretRef`.
    Secret,
    /// A path of the volume's Vault connection.
    Vault {
        /// The API path, as in Vault's policies.
        path: VaultPath,
        /// A version, KV 2 only.
        version: Option<NonZeroU64>,
    },
}

/// An API path as in Vault's policies: no leading `/v1/` or `/`, no empty segment, `.`, `..`, `%` or control
/// character. Never rewritten.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VaultPath(String);

impl VaultPath {
    /// Parses a path.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let fault = if text.is_empty() {
            "a path is empty"
        } else if text.starts_with('/') || text.starts_with("v1/") {
            "a path begins with the mount's name, as in Vault's policies: no leading \"/\" or \"v1/\""
        } else if text.chars().any(char::is_control) {
            "a path holds a control character"
        } else if text.contains('%') {
            "a path holds \"%\"; write the name as it is, nothing is decoded"
        } else if text.split('/').any(str::is_empty) {
            "a path has an empty segment: \"//\", or \"/\" at the end"
        } else if text.split('/').any(|segment| segment == "." || segment == "..") {
            "a segment of a path is \".\" or \"..\""
        } else {
            return Ok(Self(text.to_owned()));
        };
        Err(Malformed(fault.into()))
    }

    /// The path.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VaultPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Entry {
        match Files::parse(text) {
            Ok(files) => files.entries().first().unwrap().clone(),
            Err(faults) => panic!("{text}: {faults:?}"),
        }
    }

    fn codes(text: &str) -> Vec<&'static str> {
        Files::parse(text).expect_err(text).into_iter().map(|fault| fault.code.0).collect()
    }

    fn says(text: &str, words: &str) {
        let faults = Files::parse(text).expect_err(text);
        assert!(faults.iter().any(|fault| fault.to_string().contains(words)), "{text}: {faults:?}");
    }

    fn file(name: &str) -> Target {
        Target::File(FileName::parse(name).unwrap())
    }

    fn vault(path: &str, version: Option<u64>) -> Location {
        Location::Vault { path: VaultPath::parse(path).unwrap(), version: version.and_then(NonZeroU64::new) }
    }

    fn key(location: Location, key: &str) -> Content {
        Content::Key(KeyRef { location, key: key.into() })
    }

    #[test]
    fn short_forms() {
        for (text, content) in [
            ("a: secret/data/db#password", key(vault("secret/data/db", None), "password")),
            ("a: secret/db#pass.word", key(vault("secret/db", None), "pass.word")),
            ("a: secret/data/db?version=3#p", key(vault("secret/data/db", Some(3)), "p")),
            ("a: \"#k\"", key(Location::Secret, "k")),
            ("a: '#tls.crt'", key(Location::Secret, "tls.crt")),
            ("a: {from: \"#k\"}", key(Location::Secret, "k")),
            ("a: {path: secret/data/db, key: \"a#b?c\"}", key(vault("secret/data/db", None), "a#b?c")),
            ("a: {path: \"secret/a#b?c\", key: \"*\"}", key(vault("secret/a#b?c", None), "*")),
            ("a: {path: secret/data/db, version: 7, key: k}", key(vault("secret/data/db", Some(7)), "k")),
        ] {
            let entry = one(text);
            assert_eq!((entry.target, entry.content), (file("a"), content), "{text}");
            assert!(!entry.base64 && !entry.optional);
        }
    }

    #[test]
    fn names_stay_as_written() {
        for name in
            ["8080", "0123", "true", "on", "1e3", "0xB", "a.b", ".hidden", "tls/key", "a/b/c/d", "2001-01-01", "ü"]
        {
            assert_eq!(one(&format!("{name}: p/x#k")).target, file(name), "{name}");
        }
        assert_eq!(Files::parse("0xB: p/x#k\n11: p/x#k").unwrap().entries().len(), 2);
    }

    #[test]
    fn names_that_are_none() {
        let long = format!("{}: p/x#k", "a".repeat(254));
        for text in [
            "/a: p/x#k",
            "a//b: p/x#k",
            "..: p/x#k",
            "..data: p/x#k",
            ".: p/x#k",
            "a/..: p/x#k",
            "a/b/c/d/e: p/x#k",
            "\"a\\0b\": p/x#k",
            "\"a\\nb\": p/x#k",
            "\"\": p/x#k",
            "/: \"p/x#*\"",
            "../: \"p/x#*\"",
            "a/b/c/d/: \"p/x#*\"",
            long.as_str(),
        ] {
            assert_eq!(codes(text), ["SM021"], "{text}");
        }
    }

    #[test]
    fn directories_take_every_key() {
        let entry = one("tls/: secret/data/tls#*");
        assert_eq!(entry.target, Target::Directory(Some(FileName::parse("tls").unwrap())));
        assert_eq!(entry.content, Content::All(vault("secret/data/tls", None)));
        assert_eq!(one("./: \"#*\"").target, Target::Directory(None));
        assert_eq!(one("a/b/c/: {from: \"p/x#*\", optional: true}").content, Content::All(vault("p/x", None)));
        says("tls: p/x#*", "end the name with \"/\"");
        says("tls/: p/x#k", "write \"#*\"");
        says("tls/: {path: p/x, key: \"*\"}", "write \"#*\"");
        says("tls/: {template: x}", "a template makes one file");
    }

    #[test]
    fn short_forms_that_are_none() {
        for (text, words) in [
            ("a: p/x#", "no key after"),
            ("a: \"#\"", "no key after"),
            ("a: p/x#b#c", "write path: and key:"),
            ("a: p/x#b?c", "write path: and key:"),
            ("a: p/data/x?version=1?version=2#b", "write path: and key:"),
            ("a: p/data/x?v=1#b", "only version=N"),
            ("a: \"?version=1#b\"", "a version needs a path"),
            ("a: p/data/x?version=0#b", "a whole number from 1"),
            ("a: p/data/x?version=01#b", "a whole number from 1"),
            ("a: p/data/x?version=-1#b", "a whole number from 1"),
            ("a: p/data/x?version=#b", "a whole number from 1"),
            ("a: p/x?version=1#b", "only KV version 2"),
            ("a: data/x?version=1#b", "only KV version 2"),
            ("a: [p/x#b]", "is a list"),
            ("a: {from: [b]}", "from is no text"),
        ] {
            assert_eq!(codes(text), ["SM023"], "{text}");
            says(text, words);
        }
    }

    #[test]
    fn paths_as_in_vaults_policies() {
        for path in ["/secret/x", "v1/secret/x", "/v1/secret/x", "a//b", "a/", "a/./b", "a/../b", "..", "a%2fb"] {
            assert_eq!(codes(&format!("a: \"{path}#k\"")), ["SM023"], "{path}");
            assert!(VaultPath::parse(path).is_err());
        }
        assert_eq!(codes("a: \"a\\tb#k\""), ["SM023"]);
        assert!(VaultPath::parse("").is_err());
        for path in ["secret/data/..a", "secret/v1/x", "a b/c", "cubbyhole"] {
            assert_eq!(VaultPath::parse(path).unwrap().as_str(), path);
        }
    }

    #[test]
    fn a_whole_path_waits_for_a_later_version() {
        for text in ["a: secret/data/db", "a: {from: secret/data/db}", "a: {path: secret/data/db}"] {
            assert_eq!(codes(text), ["SM025"], "{text}");
            says(text, "not available in this version");
        }
        says("a: hello {{ b }}", "goes into {template");
    }

    #[test]
    fn hints_at_what_yaml_did() {
        for text in ["a: #k", "a:\n  from: #k\n", "a: {from: #k}", "a: {from: #k, optional: true}", "b: x/y#k\na: #k"] {
            says(text, "write \"#k\" in quotes");
        }
        says("a: {{ b }}", "{{");
        says("a: {template: {{ b }}}", "{{");
        says("a: {{ b }}:{{ c }}", "{{ opens a YAML map here");
        says("a: secret/data/db #k", "is a YAML comment");
    }

    #[test]
    fn refuses_what_yaml_has_beyond_the_grammar() {
        for text in [
            "a: !!binary p/x#k",
            "a: !x p/x#k",
            "a: &x p/x#k",
            "a: &x p/x#k\nb: *x",
            "<<: {a: p/x#k}",
            "a: p/x#k\na: p/y#k",
            "~: p/x#k",
            "? [a]\n: p/x#k",
            "a: p/x#k\n---\nb: p/x#k",
            "%YAML 1.1\n---\na: p/x#k",
            "",
            "# nothing",
            "{}",
            "[]",
            "a",
            "- a: p/x#k",
            "a: b: c",
        ] {
            assert!(codes(text).iter().all(|code| *code == "SM020"), "{text}: {:?}", codes(text));
        }
    }

    #[test]
    fn limits() {
        let entries = |n: usize| (0..n).map(|i| format!("f{i}: p/x#k\n")).collect::<String>();
        assert_eq!(Files::parse(&entries(256)).unwrap().entries().len(), 256);
        assert_eq!(codes(&entries(257)), ["SM020"]);
        let padded = |n: usize| format!("a: p/x#k\n#{}", "x".repeat(n - 10));
        assert!(Files::parse(&padded(Files::MAX_BYTES)).is_ok());
        assert_eq!(codes(&padded(Files::MAX_BYTES + 1)), ["SM020"]);
    }

    #[test]
    fn long_forms() {
        let entry = one("k.p12: {from: \"#k.p12.b64\", decode: base64, optional: true}");
        assert!(entry.base64 && entry.optional);
        assert!(!one("a: {from: p/x#k, optional: false}").optional);
        for (text, words) in [
            ("a: {}", "exactly one of"),
            ("a: {optional: true}", "exactly one of"),
            ("a: {from: p/x#k, path: p/x, key: k}", "exactly one of"),
            ("a: {from: p/x#k, template: b}", "exactly one of"),
            ("a: {from: p/x#k, key: k}", "key: belongs beside path:"),
            ("a: {from: p/data/x#k, version: 1}", "version: belongs beside path:"),
            ("a: {from: p/x#k, with: {b: p/x#k}}", "with: belongs beside template:"),
            ("a: {from: p/x#k, decode: base46}", "decode: takes base64 only"),
            ("a: {from: p/x#k, optional: yes}", "optional: takes true or false"),
            ("a: {from: ''}", "from is empty"),
            ("a: {from: ~}", "from has no value"),
            ("a: {path: p/data/x, key: k, version: 1.5}", "a whole number from 1"),
            ("a: {template: b, decode: base64}", "decode: belongs to the entry"),
        ] {
            assert_eq!(codes(text), ["SM023"], "{text}");
            says(text, words);
        }
        assert_eq!(codes("a: {form: p/x#k}"), ["SM024", "SM023"]);
        says("a: {frmo: p/x#k}", "there is no field \"frmo\" (did you mean \"from\"?)");
    }

    #[test]
    fn templates() {
        let entry = one("db.url:\n  template: \"x{{ u }}:{{ p }}\"\n  with: {u: \"#u\", p: p/data/x?version=2#p}\n");
        let with = vec![
            ("u".to_owned(), KeyRef { location: Location::Secret, key: "u".into() }),
            ("p".to_owned(), KeyRef { location: vault("p/data/x", Some(2)), key: "p".into() }),
        ];
        assert_eq!(entry.content, Content::Template { text: "x{{ u }}:{{ p }}".into(), with });
        for text in [
            "a: {template: x, with: b}",
            "a: {template: x, with: {b-c: p/x#k}}",
            "a: {template: x, with: {0b: p/x#k}}",
            "a: {template: x, with: {files: p/x#k}}",
            "a: {template: x, with: {b: \"p/x#*\"}}",
            "a: {template: x, with: {b: [p/x#k]}}",
            "a: {template: ''}",
        ] {
            assert_eq!(codes(text), ["SM023"], "{text}");
        }
        assert_eq!(codes("a: {template: x, with: {b: p/x}}"), ["SM025"]);
    }

    #[test]
    fn names_that_cannot_stand_together() {
        for text in ["a: p/x#k\na/b: p/x#k", "a/b: p/x#k\na: p/x#k", "a: p/x#k\na/: p/x#*", "a/b: p/x#k\na/b/c/: p/x#*"]
        {
            assert_eq!(codes(text), ["SM022"], "{text}");
        }
        for text in ["a/: p/x#*\na/b: p/x#k", "./: p/x#*\na: p/x#k", "ab: p/x#k\na/b: p/x#k", "a/: p/x#*\na/b/: p/y#*"]
        {
            assert_eq!(Files::parse(text).unwrap().entries().len(), 2, "{text}");
        }
    }

    #[test]
    fn every_fault_at_once_with_line_and_name() {
        let faults = Files::parse("..a: p/x#k\nb: p/x#\nc: {form: p/x#k}\nd: p/x#k\nd/e: p/x#k\n").unwrap_err();
        let lines: Vec<_> = faults.iter().map(ToString::to_string).collect();
        assert_eq!(faults.iter().map(|f| f.code.0).collect::<Vec<_>>(), ["SM021", "SM023", "SM024", "SM023", "SM022"]);
        assert!(
            lines.iter().any(|line| line.starts_with("SM023 files[\"b\"]: ") && line.ends_with("(line 2)")),
            "{lines:?}"
        );
    }

    #[test]
    fn no_fault_quotes_a_value() {
        let needle = "hunter2needle";
        for text in [
            "a: hunter2needle",
            "a: {from: hunter2needle}",
            "a: {path: hunter2needle}",
            "a: /hunter2needle#hunter2needle",
            "a: {template: [hunter2needle]}",
            "a: {from: p/x#k, decode: hunter2needle}",
            "a: &x hunter2needle#k",
            "hunter2needle",
            "a: [hunter2needle",
            "a: \"hunter2needle",
            "a: p/data/x?hunter2needle#k",
            "a: {from: p#k, optional: hunter2needle}",
            "a: {template: x, with: {b: hunter2needle}}",
            "a: {template: x, with: hunter2needle}",
            "a: *hunter2needle",
        ] {
            let faults = Files::parse(text).expect_err(text);
            assert!(!format!("{faults:?}").contains(needle), "{text}: {faults:?}");
        }
    }

    #[test]
    fn the_examples_of_the_manual_are_valid() {
        let page = include_str!("../../docs/attributes.md");
        let entries = |text: &str| Files::parse(text).map(|files| files.entries().len());
        let (_, below) = page.split_once("      files: |\n").unwrap();
        let block: Vec<&str> = below.lines().map_while(|line| line.strip_prefix("        ")).collect();
        assert_eq!(entries(&block.join("\n")), Ok(5));
        let (_, below) = page.split_once("**The short form**").unwrap();
        let block: Vec<&str> = below.lines().filter_map(|line| line.strip_prefix("    ")).collect();
        assert_eq!(entries(&block.join("\n")), Ok(7));
    }

    #[test]
    fn locations_count_templates_too() {
        let files = Files::parse("a: \"#k\"\nb: {template: x, with: {c: p/x#k}}\nd/: p/y#*\n").unwrap();
        let seen: Vec<_> = files.locations().cloned().collect();
        assert_eq!(seen, [Location::Secret, vault("p/x", None), vault("p/y", None)]);
    }
}
