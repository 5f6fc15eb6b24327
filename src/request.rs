//! Plain facts of one call, parsed once: who asks (a pod), for which volume, and what its attributes say.
//!
//! Everything here is valid by construction: each type has a private field and one constructor, and the
//! constructors are the only place where its rule is written. No secret byte lives here but behind [`crate::secret`].

pub mod attributes;
pub mod files;
pub mod yaml;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::secret::{SecretBytes, SecretText};
use files::Files;

/// The name under which the kubelet knows this driver (`csi.driver` in a pod).
pub const DRIVER: &str = "csi.sealmount.io";

/// The UID the worker runs as. Above what a pod can be given: `runAsUser` is at most 2147483647
/// (kubernetes, core/v1 validation).
pub const WORKER_UID: u32 = 3_000_065_532;

/// Keys below this prefix are written by the kubelet, but also by a pod author: nothing strips them
/// (kubernetes, pkg/volume/csi/csi_mounter.go, `mergeMap`).
pub const RESERVED: &str = "csi.storage.k8s.io/";

/// A stable code of the public surface, such as `SM101`. Documented in one table, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Code(pub &'static str);

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// One thing that is wrong with a request: its code, the pod field to change, and what to do.
///
/// `text` never holds a secret byte and is at most [`Fault::MAX_TEXT`] characters when shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The stable code.
    pub code: Code,
    /// The pod field to change, as a path: `spec.volumes[db].csi.volumeAttributes.files`.
    pub field: String,
    /// What is wrong and what to write instead.
    pub text: String,
}

impl Fault {
    /// A fault's message is cut here, in characters (surface 4).
    pub const MAX_TEXT: usize = 300;
    /// All faults of one answer are cut here, in characters: an Event holds 1 024 with the kubelet's own words.
    pub const MAX_ALL: usize = 800;
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = if self.field.is_empty() {
            format!("{} {}", self.code, self.text)
        } else {
            format!("{} {}: {}", self.code, self.field, self.text)
        };
        if line.chars().count() <= Self::MAX_TEXT {
            return f.write_str(&line);
        }
        let cut: String = line.chars().take(Self::MAX_TEXT - 1).collect();
        write!(f, "{cut}…")
    }
}

/// Several faults as one message: the first three, then how many more (surface 4).
pub fn summary(faults: &[Fault]) -> String {
    let mut text = String::new();
    let mut shown = 0;
    for fault in faults.iter().take(3) {
        let next = fault.to_string();
        if shown > 0 && text.chars().count() + next.chars().count() > Fault::MAX_ALL - 20 {
            break;
        }
        if shown > 0 {
            text.push_str("; ");
        }
        text.push_str(&next);
        shown += 1;
    }
    if faults.len() > shown {
        text.push_str(&format!("; and {} more", faults.len() - shown));
    }
    text
}

/// A name or a path for a message: control characters escaped, cut to 80 characters.
pub fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(80).flat_map(char::escape_debug).collect();
    if text.chars().nth(80).is_some() {
        out.push('…');
    }
    out
}

/// The known name that `text` most likely meant, as an addition to a message: ` (did you mean "for"?)`.
pub fn nearest<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let text: String = text.chars().take(64).collect();
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&text, name), name))
        .filter(|(distance, name)| *distance <= 1.max(name.len() / 3))
        .min()
        .map(|(_, name)| format!(" (did you mean \"{name}\"?)"))
        .unwrap_or_default()
}

/// Why a text is not one of this module's types.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

macro_rules! text_type {
    ($name:ident) => {
        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = Malformed;
            fn try_from(text: String) -> Result<Self, Malformed> {
                Self::parse(&text)
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.0
            }
        }
    };
}

/// A pod's UID as the kubelet uses it in paths: 1 to 64 letters, digits and `-` (a static pod's is an MD5 sum).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PodUid(String);
text_type!(PodUid);

impl PodUid {
    /// Parses a UID.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        if text.is_empty() || text.len() > 64 || !text.bytes().all(plain) {
            return Err(Malformed("a pod UID is 1 to 64 letters, digits and \"-\"".into()));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A pod volume's name: a DNS-1123 label of at most 63 bytes (kubernetes, core/v1 `Volume.name`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);
text_type!(VolumeName);

impl VolumeName {
    /// Parses a volume name.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let edge = |b: Option<&u8>| b.is_some_and(|b| *b != b'-');
        let bytes = text.as_bytes();
        if bytes.len() > 63 || !bytes.iter().copied().all(plain) || !edge(bytes.first()) || !edge(bytes.last()) {
            return Err(Malformed("a volume name is 1 to 63 lower-case letters, digits and \"-\"".into()));
        }
        Ok(Self(text.to_owned()))
    }
}

/// One volume of one pod: the unit of locking, of a mount and of a message.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VolumeId {
    /// The pod.
    pub pod: PodUid,
    /// The volume in the pod's spec.
    pub name: VolumeName,
}

impl VolumeId {
    /// The id the kubelet gives an inline volume: `csi-` and the hex SHA-256 of pod UID and volume name
    /// (kubernetes, pkg/volume/csi/csi_mounter.go, `makeVolumeHandle`). It cannot be chosen by a pod author.
    pub fn handle(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.pod.as_str());
        hash.update(self.name.as_str());
        let mut text = String::from("csi-");
        for byte in hash.finalize() {
            text.push_str(&format!("{byte:02x}"));
        }
        text
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pod, self.name)
    }
}

/// A file's name inside a volume: 1 to 4 segments joined by `/`, each 1 to 253 bytes of UTF-8 without control
/// characters, not `.`, not starting with `..` (surface 1: `..data` and the generations are the driver's own).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileName(String);
text_type!(FileName);

impl FileName {
    /// The most segments of a name.
    pub const MAX_SEGMENTS: usize = 4;
    /// The longest segment, in bytes: two less than NAME_MAX, as in a Secret's key.
    pub const MAX_SEGMENT: usize = 253;

    /// Parses a name.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        if text.split('/').count() > Self::MAX_SEGMENTS {
            return Err(Malformed(format!("a file name has at most {} segments", Self::MAX_SEGMENTS)));
        }
        for segment in text.split('/') {
            Self::check_segment(segment)?;
        }
        Ok(Self(text.to_owned()))
    }

    /// The name of `key` below `directory`, or by itself. `key` is one segment: it may hold no `/`.
    pub fn join(directory: Option<&Self>, key: &str) -> Result<Self, Malformed> {
        if key.contains('/') {
            return Err(Malformed("a key that holds \"/\" cannot name a file".into()));
        }
        match directory {
            Some(directory) => Self::parse(&format!("{directory}/{key}")),
            None => Self::parse(key),
        }
    }

    fn check_segment(segment: &str) -> Result<(), Malformed> {
        let fault = if segment.is_empty() {
            "a segment of a file name is empty"
        } else if segment.len() > Self::MAX_SEGMENT {
            "a segment of a file name is longer than 253 bytes"
        } else if segment.chars().any(char::is_control) {
            "a file name holds a control character"
        } else if segment == "." || segment.starts_with("..") {
            "a segment of a file name is \".\" or starts with \"..\""
        } else {
            return Ok(());
        };
        Err(Malformed(fault.into()))
    }

    /// The segments, outermost first.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }
}

/// The pod a call is about, as the kubelet names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodRef {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: PodUid,
    /// The pod's service account.
    pub service_account: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Parses `([0-9]+[hms])+`, such as `30m` or `1h30m`. `None` if it is something else, or more than `u64` seconds.
pub fn duration(text: &str) -> Option<Duration> {
    let mut total: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, tail) = rest.split_at(digits);
        let mut tail = tail.chars();
        let seconds = match tail.next()? {
            'h' => 3600,
            'm' => 60,
            's' => 1,
            _ => return None,
        };
        total = number.parse::<u64>().ok()?.checked_mul(seconds)?.checked_add(total)?;
        rest = tail.as_str();
    }
    (!text.is_empty()).then_some(Duration::from_secs(total))
}

/// How often a volume's content is fetched again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refresh {
    /// After this time, jittered by the schedule.
    Every(Duration),
    /// Only when the pod is published anew.
    Never,
}

/// What the volume's attributes ask for: what an app team writes, surface 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// `for`: the containers that may read; `None`: the only one that mounts the volume.
    pub readers: Option<Vec<String>>,
    /// `uid`, at most 2147483647.
    pub uid: Option<u32>,
    /// `vault`: a connection's name.
    pub vault: Option<String>,
    /// `role`.
    pub role: Option<String>,
    /// `refresh`.
    pub refresh: Option<Refresh>,
    /// `files`; `None` with a Secret means every key under its own name.
    pub files: Option<Files>,
    /// [`attributes_digest`] of the attributes as written: the pod's spec must hold the same.
    pub digest: [u8; 32],
}

impl Claim {
    /// The paths of Vault that `files` reads, as often as they are named.
    pub fn vault_paths(&self) -> impl Iterator<Item = &files::VaultPath> {
        self.files.iter().flat_map(Files::vault_paths)
    }

    /// Whether any entry of `files` comes from Vault.
    pub fn reads_vault(&self) -> bool {
        self.vault_paths().next().is_some()
    }
}

/// A digest over attributes but the reserved ones, so that the attributes of a call can be compared with those of
/// the pod's spec after both were parsed.
pub fn attributes_digest<'a>(attributes: impl IntoIterator<Item = (&'a str, &'a str)>) -> [u8; 32] {
    let sorted: BTreeMap<&str, &str> = attributes.into_iter().filter(|(key, _)| !key.starts_with(RESERVED)).collect();
    let mut hash = Sha256::new();
    for (key, value) in sorted {
        for part in [key, value] {
            hash.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
            hash.update(part);
        }
    }
    hash.finalize().into()
}

/// One ServiceAccount token of the pod, for one audience.
#[allow(missing_debug_implementations)] // holds a token
pub struct Token {
    /// The JWT.
    pub jwt: SecretText,
    /// When it expires.
    pub expires: SystemTime,
    /// The UID of the service account it speaks for: a login shared by name alone would outlive the account.
    pub service_account_uid: String,
}

/// A whole NodePublishVolume, parsed (`csi/parse.rs`): nothing in it is taken on trust from the pod's author.
#[allow(missing_debug_implementations)] // holds secrets
pub struct Publish {
    /// The volume; id and target path of the call were checked against it.
    pub volume: VolumeId,
    /// The pod.
    pub pod: PodRef,
    /// What the attributes ask for.
    pub claim: Claim,
    /// The data of the Secret in `nodePublishSecretRef`, if the pod names one with at least one key.
    pub secret: Option<BTreeMap<String, SecretBytes>>,
    /// The pod's tokens by audience; their claims were checked to name this pod.
    pub tokens: BTreeMap<String, Token>,
}

/// Who owns the files of a volume: the readers' UID, and the group, which never has a right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// The UID inside the container (a mount is idmapped by the runtime where user namespaces are on).
    pub uid: u32,
    /// Always 0: no group bit is ever set, so the group decides nothing.
    pub gid: u32,
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    /// The first column of the first table below a heading of a page.
    pub(crate) fn documented<'a>(page: &'a str, heading: &str) -> Vec<&'a str> {
        let (_, below) = page.split_once(&format!("\n## {heading}\n")).unwrap();
        let rows = below.lines().skip_while(|line| !line.starts_with("| `")).take_while(|line| line.starts_with("| `"));
        rows.map(|row| row.split('`').nth(1).unwrap()).collect()
    }

    /// Every `Code("...")` of the code.
    fn codes() -> BTreeSet<String> {
        let mut codes = BTreeSet::new();
        let mut left = vec![PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src")];
        while let Some(path) = left.pop() {
            if path.is_dir() {
                left.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            } else if path.extension() == Some("rs".as_ref()) && !path.ends_with(Path::new("tests.rs")) {
                let text = fs::read_to_string(path).unwrap();
                codes.extend(
                    text.split("Code(\"SM").skip(1).map(|rest| format!("SM{}", rest.split('"').next().unwrap())),
                );
            }
        }
        codes
    }

    #[test]
    fn every_code_stands_in_the_table_once() {
        let page = include_str!("../docs/codes.md");
        let rows: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
        let documented: BTreeSet<String> = rows.iter().map(ToString::to_string).collect();
        assert_eq!(documented, codes());
        assert_eq!(documented.len(), rows.len(), "a code twice");
    }

    #[test]
    fn durations() {
        for (text, seconds) in [("0s", 0), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("1s1s", 2), ("007m", 420)] {
            assert_eq!(duration(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "5", "m", "5d", "5 m", "-5m", "1.5h", "5m ", "never", "99999999999999999h", "5m3", "٣m"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn file_names() {
        for text in ["a", "a/b/c/d", ".a", "ü", "a b", "a..b"] {
            assert_eq!(FileName::parse(text).unwrap().as_str(), text);
        }
        assert!(FileName::parse(&"a".repeat(253)).is_ok());
        let long = "a".repeat(254);
        for text in ["", "/a", "a/", "a//b", ".", "..", "..a", "a/..", "a/./b", "a\0", "a\u{85}", "a/b/c/d/e", &long] {
            assert!(FileName::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn joins_one_segment_only() {
        let tls = FileName::parse("tls").unwrap();
        assert_eq!(FileName::join(Some(&tls), "key").unwrap().as_str(), "tls/key");
        assert_eq!(FileName::join(None, "key").unwrap().as_str(), "key");
        for key in ["a/b", "", "..", "..data", "a\nb"] {
            assert!(FileName::join(Some(&tls), key).is_err(), "{key:?}");
        }
        let deep = FileName::parse("a/b/c/d").unwrap();
        assert!(FileName::join(Some(&deep), "e").is_err());
    }

    #[test]
    fn suggests_the_nearest_name_only_if_it_is_near() {
        assert_eq!(nearest("frmo", ["for", "from"]), " (did you mean \"from\"?)");
        assert_eq!(nearest("completely", ["for", "from"]), "");
    }

    #[test]
    fn shows_names_short_and_without_control_characters() {
        assert_eq!(shown("a\u{1b}\n"), "a\\u{1b}\\n");
        assert_eq!(shown(&"x".repeat(99)).chars().count(), 81);
    }
}
