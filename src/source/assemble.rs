//! From what was read to the files of the volume: picks keys, decodes, expands directories, fills templates in.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::template::{self, TemplateError, Variables};
use super::vault::read::{Place, Reading};
use super::{Blame, SourceError, codes, kubernetes};
use crate::config::Limits;
use crate::request::files::{Content, Entry, Files, KeyRef, Location, Target};
use crate::request::{FileName, Publish, shown};
use crate::secret::SecretBytes;

/// Standard base64, with or without padding (surface 1).
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What the entries' places gave.
pub(super) struct Found<'a> {
    /// The call, with the Secret's data.
    pub(super) publish: &'a Publish,
    /// What Vault said, by place.
    pub(super) vault: BTreeMap<Place, Arc<Reading>>,
}

/// A value, or why there is none. The reason is an error only where the entry is not optional.
type Lookup<'a> = Result<&'a [u8], SourceError>;

impl Found<'_> {
    fn key(&self, key: &KeyRef, field: &str) -> Lookup<'_> {
        let missing = |place: &str| {
            let text = format!("{place} has no key \"{}\", or it is null", shown(&key.key));
            SourceError::new(Blame::Pod, codes::MISSING_KEY, field, text)
        };
        match self.place(&key.location, field)? {
            Keys::Secret(data) => data.get(&key.key).map(SecretBytes::expose).ok_or_else(|| missing("the Secret")),
            Keys::Vault(path, data) => data
                .get(&key.key)
                .and_then(Option::as_ref)
                .map(SecretBytes::expose)
                .ok_or_else(|| missing(&shown(path))),
        }
    }

    fn place(&self, location: &Location, field: &str) -> Result<Keys<'_>, SourceError> {
        let (path, version) = match location {
            Location::Secret => return kubernetes::data(self.publish).map(Keys::Secret),
            Location::Vault { path, version } => (path, version),
        };
        match self.vault.get_key_value(&(path.clone(), *version)) {
            Some(((path, _), reading)) => match &**reading {
                Reading::Found(document) => Ok(Keys::Vault(path.as_str(), &document.keys)),
                Reading::Absent(absence) => Err(absence.error(path, field)),
            },
            // Every place of `files` was read before this; another answer would be a file without its content.
            None => Err(SourceError::new(Blame::Platform, codes::NOT_A_REPLY, field, "the path was not read")),
        }
    }
}

enum Keys<'a> {
    Secret(&'a BTreeMap<String, SecretBytes>),
    Vault(&'a str, &'a BTreeMap<String, Option<SecretBytes>>),
}

impl<'a> Keys<'a> {
    /// The keys that are not null.
    fn all(&self) -> Vec<(&'a str, &'a [u8])> {
        match self {
            Self::Secret(data) => data.iter().map(|(key, value)| (key.as_str(), value.expose())).collect(),
            Self::Vault(_, data) => {
                data.iter().filter_map(|(key, value)| Some((key.as_str(), value.as_ref()?.expose()))).collect()
            }
        }
    }
}

/// Checks what needs no value: every template can be read.
pub(super) fn check(files: &Files) -> Result<(), SourceError> {
    for entry in files.entries() {
        if let Content::Template { text, .. } = &entry.content {
            template::check(text).map_err(|error| template_error(&error, &field(entry)))?;
        }
    }
    Ok(())
}

/// The files, sorted by name, no name twice, no name the directory of another.
pub(super) fn files(
    files: &Files,
    found: &Found<'_>,
    limits: Limits,
) -> Result<Vec<(FileName, SecretBytes)>, SourceError> {
    let mut written: BTreeMap<&FileName, Option<Arc<SecretBytes>>> = BTreeMap::new();
    for entry in files.entries() {
        if let (Target::File(name), Content::Key(key)) = (&entry.target, &entry.content) {
            let value = unless_missing(entry, found.key(key, &field(entry)))?;
            let value = value.map(|bytes| decoded(entry, None, bytes)).transpose()?;
            written.insert(name, value.map(Arc::new));
        }
    }
    let limit = usize::try_from(limits.volume_bytes).unwrap_or(usize::MAX);
    let mut templates: BTreeMap<&FileName, Option<SecretBytes>> = BTreeMap::new();
    for entry in files.entries() {
        if let (Target::File(name), Content::Template { text, with }) = (&entry.target, &entry.content) {
            let field = field(entry);
            let variables = unless_missing(entry, variables(&written, with, found, &field))?;
            let filled = variables.map(|variables| template::render(text, variables, limit));
            templates.insert(name, filled.transpose().map_err(|error| template_error(&error, &field))?);
        }
    }
    let mut all: BTreeMap<FileName, SecretBytes> = BTreeMap::new();
    for entry in files.entries() {
        if let (Target::Directory(directory), Content::All(location)) = (&entry.target, &entry.content) {
            for (name, value) in expanded(entry, directory.as_ref(), location, found)? {
                // An entry written out wins, also when it is optional and has no content.
                if written.contains_key(&name) || templates.contains_key(&name) {
                    continue;
                }
                let taken = format!("two entries make the file \"{}\"; write one of them out", shown(name.as_str()));
                if all.insert(name, value).is_some() {
                    return Err(SourceError::new(Blame::Pod, codes::COLLISION, field(entry), taken));
                }
            }
        }
    }
    let written =
        written.into_iter().filter_map(|(name, value)| Some((name, SecretBytes::new(value?.expose().to_vec()))));
    let templates = templates.into_iter().filter_map(|(name, value)| Some((name, value?)));
    all.extend(written.chain(templates).map(|(name, value)| (name.clone(), value)));
    within(limits, all.into_iter().collect())
}

/// Refuses what a volume cannot hold: two names of which one is the other's directory, more files or bytes than the
/// platform allows. `files` is sorted.
pub(super) fn within(
    limits: Limits,
    files: Vec<(FileName, SecretBytes)>,
) -> Result<Vec<(FileName, SecretBytes)>, SourceError> {
    let wrong = |code, text| Err(SourceError::new(Blame::Pod, code, "volumeAttributes.files", text));
    let names: std::collections::BTreeSet<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    for (name, _) in &files {
        let mut parent = name.as_str();
        while let Some((above, _)) = parent.rsplit_once('/') {
            if names.contains(above) {
                let text = format!("\"{}\" would be a file and the directory of another", shown(above));
                return wrong(codes::COLLISION, text);
            }
            parent = above;
        }
    }
    if u32::try_from(files.len()).is_ok_and(|count| count > limits.files) || u32::try_from(files.len()).is_err() {
        let text = format!("{} files are more than the {} a volume may have (limits.files)", files.len(), limits.files);
        return wrong(codes::OVER_LIMITS, text);
    }
    let bytes =
        files.iter().fold(0_u64, |sum, (_, value)| sum.saturating_add(u64::try_from(value.len()).unwrap_or(u64::MAX)));
    if bytes > limits.volume_bytes {
        let limit = limits.volume_bytes;
        let text = format!("{bytes} bytes are more than the {limit} a volume may hold (limits.volume_bytes)");
        return wrong(codes::OVER_LIMITS, text);
    }
    Ok(files)
}

fn expanded(
    entry: &Entry,
    directory: Option<&FileName>,
    location: &Location,
    found: &Found<'_>,
) -> Result<Vec<(FileName, SecretBytes)>, SourceError> {
    let field = field(entry);
    let keys = unless_missing(entry, found.place(location, &field))?.map(|keys| keys.all());
    let Some(keys) = keys else { return Ok(Vec::new()) };
    if keys.is_empty() && !entry.optional {
        return Err(SourceError::new(Blame::Pod, codes::NO_KEYS, field, "there is no key to make a file of"));
    }
    let files = keys.into_iter().map(|(key, value)| {
        let name = FileName::join(directory, key).map_err(|why| {
            let text = format!("key \"{}\" cannot name a file: {why}; write the keys out instead of \"*\"", shown(key));
            SourceError::new(Blame::Pod, codes::BAD_FILE_NAME, &field, text)
        })?;
        Ok((name, decoded(entry, Some(key), value)?))
    });
    files.collect()
}

fn variables(
    written: &BTreeMap<&FileName, Option<Arc<SecretBytes>>>,
    with: &[(String, KeyRef)],
    found: &Found<'_>,
    field: &str,
) -> Result<Variables, SourceError> {
    let mut variables = Variables::default();
    for (name, key) in with {
        let value = SecretBytes::new(found.key(key, field)?.to_vec());
        variables.named.push((name.clone(), Arc::new(value)));
    }
    for (name, value) in written {
        let Some(value) = value else { continue };
        let (name, value) = (name.as_str().to_owned(), Arc::clone(value));
        let list = if is_identifier(&name) { &mut variables.named } else { &mut variables.files };
        list.push((name, value));
    }
    Ok(variables)
}

/// What minijinja's lexer takes as one name.
fn is_identifier(name: &str) -> bool {
    let start = |c: char| c == '_' || c.is_ascii_alphabetic();
    name.starts_with(start) && name.chars().all(|c| start(c) || c.is_ascii_digit())
}

fn unless_missing<T>(entry: &Entry, value: Result<T, SourceError>) -> Result<Option<T>, SourceError> {
    match value {
        Ok(value) => Ok(Some(value)),
        Err(error) if entry.optional && error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}

fn decoded(entry: &Entry, key: Option<&str>, bytes: &[u8]) -> Result<SecretBytes, SourceError> {
    if !entry.base64 {
        return Ok(SecretBytes::new(bytes.to_vec()));
    }
    let text: Vec<u8> = bytes.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let text = SecretBytes::new(text);
    // The decoder's own error quotes the offending byte, which is one of the secret's.
    BASE64.decode(text.expose()).map(SecretBytes::new).map_err(|_| {
        let key = key.map_or_else(String::new, |key| format!(" of key \"{}\"", shown(key)));
        let text = format!("the value{key} is not standard base64; leave decode out, or store it encoded");
        SourceError::new(Blame::Pod, codes::NOT_BASE64, field(entry), text)
    })
}

fn template_error(error: &TemplateError, field: &str) -> SourceError {
    let code = if error.is_static() { codes::BAD_TEMPLATE } else { codes::TEMPLATE_FAILED };
    SourceError::new(Blame::Pod, code, field, format!("template: {error}"))
}

fn field(entry: &Entry) -> String {
    let name = match &entry.target {
        Target::File(name) => shown(name.as_str()),
        Target::Directory(Some(name)) => format!("{}/", shown(name.as_str())),
        Target::Directory(None) => "./".to_owned(),
    };
    format!("volumeAttributes.files[\"{name}\"]")
}
