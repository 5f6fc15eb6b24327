//! Texts of the platform file that depend on the pod, and the patterns of `allow`.
//!
//! A fact is put in where the file says `{{ pod.namespace }}` and nowhere else; what is put in can never add a
//! segment, climb, or be a pattern itself.

use std::fmt;

use super::NOT_EXPANDABLE;
use crate::request::files::VaultPath;
use crate::request::{Fault, Malformed, PodRef, nearest, shown};

/// A fact of the pod that the platform file may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fact {
    Namespace,
    ServiceAccount,
    Name,
    Uid,
}

/// The facts by their names in the file.
pub const FACTS: [&str; 4] = ["pod.namespace", "pod.service_account", "pod.name", "pod.uid"];

impl Fact {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "pod.namespace" => Some(Self::Namespace),
            "pod.service_account" => Some(Self::ServiceAccount),
            "pod.name" => Some(Self::Name),
            "pod.uid" => Some(Self::Uid),
            _ => None,
        }
    }

    fn of(self, pod: &PodRef) -> &str {
        match self {
            Self::Namespace => &pod.namespace,
            Self::ServiceAccount => &pod.service_account,
            Self::Name => &pod.name,
            Self::Uid => pod.uid.as_str(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Fact(Fact),
}

/// A text with facts of the pod in it: `teams/{{ pod.namespace }}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expand {
    source: String,
    parts: Vec<Part>,
}

impl fmt::Display for Expand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)
    }
}

impl Expand {
    /// Parses a text; the only expressions are the names in [`FACTS`].
    pub fn parse(source: &str) -> Result<Self, Malformed> {
        let mut parts = Vec::new();
        let mut rest = source;
        while let Some((before, after)) = rest.split_once("{{") {
            let (name, tail) = after.split_once("}}").ok_or_else(|| Malformed("\"{{\" has no \"}}\"".into()))?;
            let name = name.trim();
            let fact = Fact::parse(name).ok_or_else(|| {
                let near = nearest(name, FACTS);
                Malformed(format!("\"{}\" is no fact of a pod{near}; there are {}", shown(name), FACTS.join(", ")))
            })?;
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            parts.push(Part::Fact(fact));
            rest = tail;
        }
        if rest.contains("}}") {
            return Err(Malformed("\"}}\" has no \"{{\"".into()));
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self { source: source.to_owned(), parts })
    }

    /// The text for one pod. A fact that is empty or holds `/`, `..` or `%` is refused: it could change what the
    /// text around it means.
    pub fn expand(&self, pod: &PodRef) -> Result<String, Fault> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Text(part) => text.push_str(part),
                Part::Fact(fact) => {
                    let value = fact.of(pod);
                    if value.is_empty() || value.contains(['/', '%']) || value.contains("..") {
                        return Err(Fault {
                            code: NOT_EXPANDABLE,
                            field: String::new(),
                            text: format!(
                                "\"{}\" cannot stand in the platform file's \"{}\": no \"/\", \"..\" or \"%\"",
                                shown(value),
                                shown(&self.source)
                            ),
                        });
                    }
                    text.push_str(value);
                }
            }
        }
        Ok(text)
    }
}

/// A name of `allow`, or `*` for any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamePattern {
    /// `*`.
    Any,
    /// Exactly this.
    Name(String),
}

impl NamePattern {
    /// Parses a pattern. `*` stands for a whole name, so it stands alone.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        match text {
            "*" => Ok(Self::Any),
            "" => Err(Malformed("a name is empty".into())),
            _ if text.contains('*') => Err(Malformed("\"*\" stands for a whole name: write it alone".into())),
            _ => Ok(Self::Name(text.to_owned())),
        }
    }

    /// Whether it covers a name.
    pub fn covers(&self, name: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Name(only) => only == name,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Any,
    Text(Expand),
}

/// A path of `allow`: segments with facts of the pod, where `*` stands for one whole segment, and at the end for any
/// number of them, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathPattern {
    segments: Vec<Segment>,
    /// Whether the last segment is `*`.
    open: bool,
}

impl PathPattern {
    /// Parses a pattern. What is no fact and no `*` keeps the rules of [`VaultPath`].
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let mut segments = Vec::new();
        let mut plain = Vec::new();
        for segment in text.split('/') {
            if segment == "*" {
                segments.push(Segment::Any);
                plain.push("x");
                continue;
            }
            if segment.contains('*') {
                return Err(Malformed("\"*\" stands for a whole segment: write it between \"/\"".into()));
            }
            segments.push(Segment::Text(Expand::parse(segment)?));
            plain.push(segment);
        }
        VaultPath::parse(&plain.join("/"))?;
        let open = matches!(segments.last(), Some(Segment::Any));
        Ok(Self { segments, open })
    }

    /// Whether it covers a path when expanded for `pod`.
    pub fn covers(&self, pod: &PodRef, path: &VaultPath) -> Result<bool, Fault> {
        let names: Vec<&str> = path.as_str().split('/').collect();
        let long_enough =
            if self.open { names.len() >= self.segments.len() } else { names.len() == self.segments.len() };
        if !long_enough {
            return Ok(false);
        }
        for (segment, name) in self.segments.iter().zip(names) {
            if let Segment::Text(text) = segment
                && text.expand(pod)? != name
            {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
