//! What Vault says to a read, parsed: keys and values, or that there is nothing.

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use rustify::endpoint::Endpoint;
use rustify::enums::{RequestMethod, RequestType, ResponseType};
use rustify::errors::ClientError;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::request::files::VaultPath;
use crate::request::shown;
use crate::secret::SecretBytes;
use crate::source::{Blame, SourceError, codes};

/// A path, and the version asked for.
pub(in crate::source) type Place = (VaultPath, Option<NonZeroU64>);

/// One request below `/v1/`. vaultrs has typed endpoints for the engines it knows; a path of the allow-list may be any.
pub(super) struct Request {
    /// The method.
    pub(super) method: RequestMethod,
    /// The path, as in Vault's policies; escaped for the URL by rustify, segment by segment.
    pub(super) path: String,
    /// `version` of a KV 2 secret.
    pub(super) version: Option<NonZeroU64>,
    /// A JSON body.
    pub(super) body: Option<Vec<u8>>,
}

impl Endpoint for Request {
    type Response = ();
    const REQUEST_BODY_TYPE: RequestType = RequestType::JSON;
    const RESPONSE_BODY_TYPE: ResponseType = ResponseType::JSON;

    fn path(&self) -> String {
        self.path.clone()
    }

    fn method(&self) -> RequestMethod {
        self.method.clone()
    }

    fn query(&self) -> Result<Option<String>, ClientError> {
        Ok(self.version.map(|version| format!("version={version}")))
    }

    fn body(&self) -> Result<Option<Vec<u8>>, ClientError> {
        Ok(self.body.clone())
    }
}

/// What a place gave.
pub(in crate::source) enum Reading {
    /// Keys and values.
    Found(Document),
    /// Nothing, which an optional entry takes for an answer.
    Absent(Absence),
}

/// A secret's keys.
pub(in crate::source) struct Document {
    /// Its KV 2 version.
    pub(in crate::source) version: Option<u64>,
    /// `None` where the value is null.
    pub(in crate::source) keys: BTreeMap<String, Option<SecretBytes>>,
}

/// Why there is nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::source) enum Absence {
    /// 404.
    NotFound,
    /// 404, and Vault warns that the mount is a KV 2 engine, whose paths have a segment `data`.
    Versioned,
    /// The version was deleted.
    Deleted,
    /// The version was destroyed.
    Destroyed,
}

impl Absence {
    /// As an error about the entry at `field`.
    pub(in crate::source) fn error(self, path: &VaultPath, field: &str) -> SourceError {
        let place = shown(path.as_str());
        let (code, text) = match self {
            Self::NotFound => {
                (codes::NOT_FOUND, format!("Vault has nothing at {place}; check the path and the version"))
            }
            Self::Versioned => {
                let (mount, rest) = path.as_str().split_once('/').unwrap_or((path.as_str(), ""));
                let right = shown(&format!("{mount}/data/{rest}"));
                (codes::NOT_FOUND, format!("{place} lies in a KV 2 engine: write {right}"))
            }
            Self::Deleted => {
                (codes::DELETED, format!("the version at {place} was deleted; undelete it or write a new one"))
            }
            Self::Destroyed => (codes::DELETED, format!("the version at {place} was destroyed; write a new one")),
        };
        SourceError::new(Blame::Pod, code, field, text)
    }
}

/// Vault's frame around every reply. Borrowed: the values are copied once, into their wiped holders.
#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
    #[serde(default)]
    lease_id: Option<String>,
    #[serde(default)]
    warnings: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Versioned<'a> {
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    #[serde(borrow)]
    metadata: &'a RawValue,
}

#[derive(Deserialize)]
struct Metadata {
    version: u64,
    #[serde(default)]
    destroyed: bool,
}

/// Why a reply of status 200 or 404 is no reading.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Not what Vault's API describes.
    NotAReply,
    /// No data.
    Empty,
    /// The data is no object.
    NotAnObject,
    /// A lease was made; the caller revokes it.
    Leased(String),
    /// A version was asked for, and this is no KV 2 secret.
    NoVersions,
    /// The value of this key is no Unicode text.
    BadValue(String),
}

impl Unreadable {
    /// As an error about `path`.
    pub(super) fn error(&self, path: &VaultPath) -> SourceError {
        let place = shown(path.as_str());
        let (blame, code, text) = match self {
            Self::NotAReply => (
                Blame::Platform,
                codes::NOT_A_REPLY,
                format!("the reply to {place} is not Vault's: is the address right?"),
            ),
            Self::Empty => (Blame::Pod, codes::EMPTY_REPLY, format!("the reply to {place} holds no data")),
            Self::NotAnObject => {
                (Blame::Pod, codes::NOT_AN_OBJECT, format!("the data at {place} is no object, so it has no keys"))
            }
            Self::Leased(_) => (
                Blame::Pod,
                codes::LEASED,
                format!(
                    "{place} makes a new secret with a lease at each read, which this version does not serve; the lease was revoked"
                ),
            ),
            Self::NoVersions => (
                Blame::Pod,
                codes::NO_VERSIONS,
                format!("{place} is no KV 2 secret, so it has no versions: leave the version out"),
            ),
            Self::BadValue(key) => (
                Blame::Pod,
                codes::BAD_VALUE,
                format!("the value of key \"{}\" at {place} is no Unicode text", shown(key)),
            ),
        };
        SourceError::new(blame, code, "volumeAttributes.files", text)
    }
}

/// Parses the body of a 404.
pub(super) fn parse_absent(body: &[u8]) -> Absence {
    let frame: Frame<'_> = serde_json::from_slice(body).unwrap_or(Frame { data: None, lease_id: None, warnings: None });
    let versioned: Option<Versioned<'_>> = frame.data.and_then(|data| serde_json::from_str(data.get()).ok());
    if let Some(metadata) = versioned.and_then(|data| serde_json::from_str::<Metadata>(data.metadata.get()).ok()) {
        return if metadata.destroyed { Absence::Destroyed } else { Absence::Deleted };
    }
    // "Invalid path for a versioned K/V secrets engine."
    let hints = frame.warnings.unwrap_or_default().iter().any(|warning| warning.contains("versioned"));
    if hints { Absence::Versioned } else { Absence::NotFound }
}

/// Parses the body of a 200.
pub(super) fn parse(body: &[u8], (path, wanted): &Place) -> Result<Reading, Unreadable> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(Unreadable::Empty);
    }
    let frame: Frame<'_> = serde_json::from_slice(body).map_err(|_| Unreadable::NotAReply)?;
    if let Some(lease) = frame.lease_id.filter(|lease| !lease.is_empty()) {
        return Err(Unreadable::Leased(lease));
    }
    let data = frame.data.ok_or(Unreadable::Empty)?.get();
    if !data.starts_with('{') {
        return Err(Unreadable::NotAnObject);
    }
    let Some((inner, metadata)) = unwrapped(data, path) else {
        if wanted.is_some() {
            return Err(Unreadable::NoVersions);
        }
        return Ok(Reading::Found(Document { version: None, keys: keys(data)? }));
    };
    let inner = match inner.map(RawValue::get) {
        // Vault says 404 with a deleted version; whatever answers 200 without data has none either.
        None => return Ok(Reading::Absent(if metadata.destroyed { Absence::Destroyed } else { Absence::Deleted })),
        Some(inner) if !inner.starts_with('{') => return Err(Unreadable::NotAnObject),
        Some(inner) => inner,
    };
    Ok(Reading::Found(Document { version: Some(metadata.version), keys: keys(inner)? }))
}

/// The KV 2 rule of surface 1: a segment is `data`, the data is exactly {data, metadata}, and metadata.version is an
/// integer. All three, because a KV 1 secret may have keys of these names.
fn unwrapped<'a>(data: &'a str, path: &VaultPath) -> Option<(Option<&'a RawValue>, Metadata)> {
    if !path.as_str().split('/').any(|segment| segment == "data") {
        return None;
    }
    let versioned: Versioned<'a> = serde_json::from_str(data).ok()?;
    let metadata = serde_json::from_str(versioned.metadata.get()).ok()?;
    Some((versioned.data, metadata))
}

fn keys(object: &str) -> Result<BTreeMap<String, Option<SecretBytes>>, Unreadable> {
    let values: BTreeMap<String, &RawValue> = serde_json::from_str(object).map_err(|_| Unreadable::NotAReply)?;
    let render = |(key, value): (String, &RawValue)| match value.get() {
        "null" => Ok((key, None)),
        text if text.starts_with('"') => match serde_json::from_str::<String>(text) {
            Ok(text) => Ok((key, Some(SecretBytes::new(text.into_bytes())))),
            Err(_) => Err(Unreadable::BadValue(key)),
        },
        // Numbers, booleans, arrays and objects as they were sent: no digit lost, no key moved.
        text => Ok((key, Some(SecretBytes::new(text.as_bytes().to_vec())))),
    };
    values.into_iter().map(render).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(path: &str, version: u64) -> Place {
        (VaultPath::parse(path).unwrap(), NonZeroU64::new(version))
    }

    type Keys = Vec<(String, Option<String>)>;

    fn read(path: &str, version: u64, data: &str) -> Result<(Option<u64>, Keys), Unreadable> {
        let body = format!(r#"{{"request_id":"x","lease_id":"","data":{data},"warnings":null}}"#);
        match parse(body.as_bytes(), &place(path, version))? {
            Reading::Found(document) => {
                let text = |bytes: SecretBytes| String::from_utf8(bytes.expose().to_vec()).unwrap();
                let keys = document.keys.into_iter().map(|(key, value)| (key, value.map(text))).collect();
                Ok((document.version, keys))
            }
            Reading::Absent(absence) => panic!("absent: {absence:?}"),
        }
    }

    fn keys_of(path: &str, data: &str) -> Keys {
        read(path, 0, data).unwrap().1
    }

    #[test]
    fn values_as_received() {
        let data = r#"{"s":"a\n\"ü","n":1.10,"big":123456789012345678901234567890,"b":true,"o":{"z":1, "a":[ ]},"l":[1,2],"x":null,"e":"","a.b":"dot"}"#;
        let expected = [
            ("a.b", Some("dot")),
            ("b", Some("true")),
            ("big", Some("123456789012345678901234567890")),
            ("e", Some("")),
            ("l", Some("[1,2]")),
            ("n", Some("1.10")),
            ("o", Some(r#"{"z":1, "a":[ ]}"#)),
            ("s", Some("a\n\"ü")),
            ("x", None),
        ];
        let expected: Vec<_> = expected.iter().map(|(k, v)| ((*k).to_owned(), v.map(str::to_owned))).collect();
        assert_eq!(keys_of("kv1/db", data), expected);
    }

    #[test]
    fn unwraps_kv_2_only_where_all_three_hold() {
        let kv2 = r#"{"data":{"k":"v"},"metadata":{"version":7,"created_time":"x"}}"#;
        assert_eq!(read("secret/data/db", 0, kv2).unwrap(), (Some(7), vec![("k".into(), Some("v".into()))]));
        assert_eq!(read("secret/data/db", 7, kv2).unwrap().0, Some(7));
        // No segment `data`.
        assert_eq!(keys_of("secret/db", kv2).len(), 2);
        // More or less than the two keys.
        assert_eq!(keys_of("secret/data/db", r#"{"data":{},"metadata":{"version":1},"more":1}"#).len(), 3);
        assert_eq!(keys_of("secret/data/db", r#"{"data":"d"}"#).len(), 1);
        // A version that is no integer, or none.
        assert_eq!(keys_of("secret/data/db", r#"{"data":{},"metadata":{"version":"1"}}"#).len(), 2);
        assert_eq!(keys_of("secret/data/db", r#"{"data":{},"metadata":"m"}"#).len(), 2);
    }

    #[test]
    fn each_fault_is_its_own() {
        assert_eq!(read("secret/db", 3, "{}").unwrap_err(), Unreadable::NoVersions);
        assert_eq!(read("secret/db", 0, "null").unwrap_err(), Unreadable::Empty);
        assert_eq!(read("secret/db", 0, "[1]").unwrap_err(), Unreadable::NotAnObject);
        assert_eq!(read("secret/db", 0, "\"s\"").unwrap_err(), Unreadable::NotAnObject);
        assert_eq!(read("secret/db", 0, r#"{"k":"\ud800"}"#).unwrap_err(), Unreadable::BadValue("k".into()));
        let kv2 = r#"{"data":[1],"metadata":{"version":7}}"#;
        assert_eq!(read("secret/data/db", 0, kv2).unwrap_err(), Unreadable::NotAnObject);
        for (body, expected) in [
            (" ", Unreadable::Empty),
            ("<html>", Unreadable::NotAReply),
            ("{\"data\":{\"k\":\"v", Unreadable::NotAReply),
            ("{}", Unreadable::Empty),
            (r#"{"lease_id":"db/creds/1","data":{"k":"v"}}"#, Unreadable::Leased("db/creds/1".into())),
        ] {
            let error = parse(body.as_bytes(), &place("secret/db", 0)).err();
            assert_eq!(error, Some(expected), "{body}");
        }
    }

    #[test]
    fn a_fault_quotes_no_value() {
        for fault in [Unreadable::Leased("canary".into()), Unreadable::NotAReply, Unreadable::BadValue("key".into())] {
            assert!(!fault.error(&place("secret/db", 0).0).to_string().contains("canary"));
        }
    }

    #[test]
    fn absence() {
        let absent = |body: &str| parse_absent(body.as_bytes());
        assert_eq!(absent(r#"{"errors":[]}"#), Absence::NotFound);
        assert_eq!(absent("<html>"), Absence::NotFound);
        assert_eq!(absent(r#"{"warnings":["Invalid path for a versioned K/V secrets engine."]}"#), Absence::Versioned);
        let deleted = r#"{"data":{"data":null,"metadata":{"version":2,"deletion_time":"x","destroyed":false}}}"#;
        assert_eq!(absent(deleted), Absence::Deleted);
        assert_eq!(absent(&deleted.replace("false", "true")), Absence::Destroyed);
        let hint = Absence::Versioned.error(&VaultPath::parse("secret/payments/db").unwrap(), "f").to_string();
        assert!(hint.contains("write secret/data/payments/db"), "{hint}");
    }
}
