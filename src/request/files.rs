//! The `files` attribute: which keys of which secret become which files (surface 1).
//!
//! The grammar is parsed here once; what comes out cannot name a file twice, cannot name a file that is also a
//! directory, and holds only paths that Vault would take as they are.

use std::fmt;
use std::num::NonZeroU64;

use super::{FileName, Malformed};

/// A parsed `files` map: 1 to 256 entries whose names do not collide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files(Vec<Entry>);

impl Files {
    /// The entries in the order they were written.
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }
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

/// The left side of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// One file.
    File(FileName),
    /// A name ending in `/`: each key becomes a file below it. `None` is `./`, the volume's root.
    Directory(Option<FileName>),
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
