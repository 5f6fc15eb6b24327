//! The attributes of a volume, as a pod's author writes them (surface 1): parsed once, all faults at once. No fault
//! quotes a value of an attribute but names in `files`.

use std::collections::HashMap;

use super::files::{Entry, Files, Location};
use super::{Claim, Code, Fault, RESERVED, Refresh, attributes_digest, duration, nearest, shown};

/// The pod's author wrote a key that only the kubelet writes.
pub const RESERVED_KEY: Code = Code("SM005");
/// There is no such attribute.
pub const UNKNOWN_ATTRIBUTE: Code = Code("SM010");
/// `for` is no list of container names.
pub const FOR: Code = Code("SM011");
/// `uid` is no UID.
pub const UID: Code = Code("SM012");
/// `vault` or `role` is no name.
pub const NAME: Code = Code("SM013");
/// `refresh` is no interval.
pub const REFRESH: Code = Code("SM014");
/// Nothing is asked for.
pub const NOTHING_ASKED: Code = Code("SM015");
/// The pod names a Secret that no entry uses.
pub const SECRET_UNUSED: Code = Code("SM016");
/// An entry uses the pod's Secret, and there is none.
pub const SECRET_MISSING: Code = Code("SM017");
/// An attribute that is about Vault, and no entry is.
pub const WITHOUT_VAULT: Code = Code("SM018");

/// The attributes that a pod's author may write (surface 1).
pub const ATTRIBUTES: [&str; 6] = ["vault", "role", "files", "for", "uid", "refresh"];

/// `runAsUser` is at most this (kubernetes, core/v1 validation).
const MAX_UID: u32 = 2_147_483_647;
/// The longest `vault` or `role`, in bytes.
const MAX_NAME: usize = 253;
/// The most containers in `for`: each is looked for among those of the pod.
const MAX_READERS: usize = 64;

/// Where a pod's author wrote what is wrong.
#[derive(Debug)]
pub struct Field(String);

impl Field {
    /// The fields of the volume of this name.
    pub fn of(volume: &str) -> Self {
        Self(format!("spec.volumes[{volume}].csi"))
    }

    /// A field of its source.
    pub fn csi(&self, name: &str) -> String {
        format!("{}.{name}", self.0)
    }

    /// One of its attributes.
    pub fn attribute(&self, name: &str) -> String {
        format!("{}.volumeAttributes.{}", self.0, shown(name))
    }
}

/// Lower-case letters, digits, `-` and `.`, at most so many bytes: what every name of Kubernetes used here is.
pub fn is_dns(text: &str, most: usize) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    !text.is_empty() && text.len() <= most && text.bytes().all(plain) && !text.starts_with(['-', '.'])
}

/// An author's use of such a key.
pub fn reserved(key: &str, field: &Field) -> Fault {
    let text = "only the kubelet writes this key; take it out of the pod".into();
    Fault { code: RESERVED_KEY, field: field.attribute(key), text }
}

/// What the attributes ask for. `None` only if a fault was added. `has_secret` says whether the pod names a Secret that
/// has a key.
pub fn parse(
    context: &HashMap<String, String>,
    has_secret: bool,
    field: &Field,
    faults: &mut Vec<Fault>,
) -> Option<Claim> {
    let before = faults.len();
    let mut own: Vec<&str> = context.keys().map(String::as_str).filter(|key| !key.starts_with(RESERVED)).collect();
    own.sort_unstable();
    for key in own.into_iter().filter(|key| !ATTRIBUTES.contains(key)) {
        let text = format!("there is no such attribute{}", nearest(key, ATTRIBUTES));
        faults.push(Fault { code: UNKNOWN_ATTRIBUTE, field: field.attribute(key), text });
    }
    let mut attributes = Attributes { context, field, faults };
    let readers = attributes.read("for", FOR, readers);
    let uid = attributes.read("uid", UID, uid);
    let vault = attributes.read("vault", NAME, name);
    let role = attributes.read("role", NAME, name);
    let refresh = attributes.read("refresh", REFRESH, refresh);

    let files = match context.get("files").map(|text| Files::parse(text)) {
        None => None,
        Some(Ok(files)) => Some(files),
        Some(Err(found)) => {
            let at = |fault: Fault| Fault { field: field.csi(&format!("volumeAttributes.{}", fault.field)), ..fault };
            faults.extend(found.into_iter().map(at));
            None
        }
    };
    // What cannot be read is reported as such, not also as missing.
    if files.is_some() || !context.contains_key("files") {
        sources(context, files.as_ref(), has_secret, field, faults);
    }
    let plain = context.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let digest = attributes_digest(plain);
    (faults.len() == before).then_some(Claim { readers, uid, vault, role, refresh, files, digest })
}

struct Attributes<'a> {
    context: &'a HashMap<String, String>,
    field: &'a Field,
    faults: &'a mut Vec<Fault>,
}

impl Attributes<'_> {
    fn read<T>(&mut self, name: &str, code: Code, parse: fn(&str) -> Result<T, String>) -> Option<T> {
        let parsed = parse(self.context.get(name)?);
        parsed.map_err(|text| self.faults.push(Fault { code, field: self.field.attribute(name), text })).ok()
    }
}

/// Whether what is asked for has a source, and every source and attribute a use.
fn sources(
    context: &HashMap<String, String>,
    files: Option<&Files>,
    has_secret: bool,
    field: &Field,
    faults: &mut Vec<Fault>,
) {
    let mut fault = |code, field: String, text: &str| faults.push(Fault { code, field, text: text.into() });
    let reference = || field.csi("nodePublishSecretRef");
    let entries = || files.into_iter().flat_map(Files::entries);
    let of_secret = |entry: &Entry| entry.locations().any(|location| matches!(location, Location::Secret));
    let uses_vault = files.is_some_and(|files| files.vault_paths().next().is_some());
    match files {
        None if !has_secret => {
            let text = "nothing is asked for; write files:, or nodePublishSecretRef: of a Secret that has a key";
            fault(NOTHING_ASKED, field.attribute("files"), text);
        }
        Some(_) if has_secret && !entries().any(of_secret) => {
            let text = "no entry of files uses this Secret; leave it out, or write \"#key\" in an entry";
            fault(SECRET_UNUSED, reference(), text);
        }
        // An optional key of a Secret without keys is a missing key like any other.
        Some(_) if !has_secret && entries().any(|entry| of_secret(entry) && !entry.optional) => {
            let text = "an entry of files uses the pod's Secret, and there is none, or it has no key";
            fault(SECRET_MISSING, reference(), text);
        }
        _ => {}
    }
    if !uses_vault {
        for name in ["vault", "role", "refresh"].into_iter().filter(|name| context.contains_key(*name)) {
            let text = match name {
                "refresh" => "the kubelet brings a Secret every 60 to 90 s by itself; leave refresh out",
                _ => "no entry of files is in Vault; leave this out, or write \"path#key\" in an entry",
            };
            fault(WITHOUT_VAULT, field.attribute(name), text);
        }
    }
}

fn readers(text: &str) -> Result<Vec<String>, String> {
    let mut names: Vec<String> = Vec::new();
    for name in text.split(',').map(str::trim) {
        if name.is_empty() {
            return Err("a name is empty; write the containers, comma-separated".into());
        }
        if !is_dns(name, 63) || name.contains('.') {
            return Err("a container's name is 1 to 63 lower-case letters, digits and \"-\"".into());
        }
        if names.iter().any(|other| other == name) {
            return Err(format!("\"{}\" is named twice", shown(name)));
        }
        if names.len() == MAX_READERS {
            return Err(format!("name at most {MAX_READERS} containers"));
        }
        names.push(name.to_owned());
    }
    Ok(names)
}

fn uid(text: &str) -> Result<u32, String> {
    let plain = text == "0" || (!text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit()));
    let uid = text.parse().ok().filter(|uid| plain && *uid <= MAX_UID);
    uid.ok_or_else(|| format!("a UID is a number from 0 to {MAX_UID}, without leading zeros, in quotes"))
}

fn name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > MAX_NAME || text.chars().any(char::is_control) {
        return Err(format!("a name is 1 to {MAX_NAME} bytes, without control characters"));
    }
    Ok(text.to_owned())
}

fn refresh(text: &str) -> Result<Refresh, String> {
    if text == "never" {
        return Ok(Refresh::Never);
    }
    duration(text).map(Refresh::Every).ok_or_else(|| "write an interval such as 5m or 1h30m, or never".into())
}
