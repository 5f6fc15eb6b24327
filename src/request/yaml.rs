//! A strict reading of YAML 1.2 that keeps where everything stands and how it was written.
//!
//! People write two texts for this driver: the platform file and the `files` attribute. Both are reported with all
//! their faults at once, each with its place, which a typed deserializer cannot do: it stops at the first. So the
//! text becomes a tree of [`Node`]s here, and each room reads its own fields from it.
//!
//! Refused, since none of it is needed and each has surprised somebody: tags, anchors, aliases, merge keys,
//! directives, several documents, names that are empty, null, lists or maps, and a name written twice. A scalar keeps
//! its source text: `8080`, `0123` and `on` stay as written.

use std::fmt;

use granit_parser::{Event, Parser, ScalarStyle, Span};

use super::shown;

/// The deepest nesting of lists and maps; both grammars need at most six.
const MAX_DEPTH: usize = 16;

/// Where something stands: line and column, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The line.
    pub line: usize,
    /// The column, in characters.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

impl From<Span> for Place {
    fn from(span: Span) -> Self {
        Self { line: span.start.line(), column: span.start.col().saturating_add(1) }
    }
}

/// A value and where it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Where.
    pub place: Place,
    /// What.
    pub value: Value,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Nothing, `~` or `null`, unquoted.
    Null,
    /// A scalar.
    Text {
        /// The text, without quotes, otherwise as written.
        text: String,
        /// Whether it stands without quotes: only then may it be a number or a boolean.
        plain: bool,
    },
    /// A list.
    List(Vec<Node>),
    /// A map, in the order it was written; no name twice.
    Map(Vec<(Name, Node)>),
}

/// A name of a map and where it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// Where.
    pub place: Place,
    /// The source text.
    pub text: String,
}

/// What is wrong with a text as YAML. Quotes no value of it, only names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub place: Place,
    /// What, and what to write instead.
    pub text: String,
}

/// Reads one document. All faults are reported, but for a syntax error, after which nothing can be read.
/// An empty text is [`Value::Null`].
pub fn parse(source: &str) -> Result<Node, Vec<Fault>> {
    let mut reader = Reader { faults: Vec::new(), open: Vec::new(), root: None, documents: 0 };
    let options = granit_parser::options! {
        disallow_directives: true,
        emit_unresolved_aliases: true,
        strict_indentation: true,
        flow_nesting_limit: MAX_DEPTH,
        block_nesting_limit: MAX_DEPTH,
    };
    for event in Parser::new_from_str_with_options(source, options) {
        match event {
            Ok((event, span)) => reader.event(event, span.into()),
            Err(error) => {
                let at = error.marker();
                let place = Place { line: at.line(), column: at.col().saturating_add(1) };
                reader.fault(
                    place, // The parser's words quote at most one character of the text.
                    format!("this is not YAML: {}{}", error.kind(), hint_upto(source, place.line)),
                );
                break;
            }
        }
    }
    if !reader.faults.is_empty() {
        return Err(reader.faults);
    }
    Ok(reader.root.unwrap_or(Node { place: Place { line: 1, column: 1 }, value: Value::Null }))
}

/// What to add to a message about a value that came out empty or broken on `line` of `source`: `#k` after a blank is
/// a comment, and `{{` opens a map. Empty if neither is there. A remark, `# ` with a blank, is none that was meant as
/// a value.
pub fn hint(source: &str, line: usize) -> String {
    let Some(line) = source.lines().nth(line.saturating_sub(1)) else { return String::new() };
    let swallowed = line.split_once(" #").is_some_and(|(_, rest)| !rest.is_empty() && !rest.starts_with(' '));
    match hint_in(line) {
        None if swallowed => ": what stands behind \" #\" is a YAML comment; leave the blank out".into(),
        found => found.unwrap_or_default(),
    }
}

/// The hint for a syntax error, which is noticed at or after the line that causes it: `{from: #k}` never closes.
fn hint_upto(source: &str, line: usize) -> String {
    source.lines().take(line).filter_map(hint_in).last().unwrap_or_default()
}

/// The hint on a line whose value is a comment or begins like a template.
fn hint_in(line: &str) -> Option<String> {
    if let Some((_, rest)) = line.split_once(": #") {
        let end = rest.find([' ', ',', '}']).unwrap_or(rest.len());
        let key = rest.get(..end).filter(|key| !key.is_empty()).map(shown)?;
        return Some(format!(": #{key} is a YAML comment here; write \"#{key}\" in quotes"));
    }
    line.contains(": {{").then(|| ": {{ opens a YAML map here; write the whole template in quotes".into())
}

/// A list or map whose end has not come yet.
enum Open {
    List(Place, Vec<Node>),
    /// The entries so far, and the name whose value comes next. `Some(None)` is a name that was refused.
    Map(Place, Vec<(Name, Node)>, Option<Option<Name>>),
}

struct Reader {
    faults: Vec<Fault>,
    open: Vec<Open>,
    root: Option<Node>,
    documents: usize,
}

impl Reader {
    fn fault(&mut self, place: Place, text: impl Into<String>) {
        self.faults.push(Fault { place, text: text.into() });
    }

    fn event(&mut self, event: Event<'_>, place: Place) {
        match event {
            Event::DocumentStart(..) => {
                self.documents = self.documents.saturating_add(1);
                if self.documents == 2 {
                    self.fault(place, "a second document begins here; write one");
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.properties(place, anchor, tag.is_some());
                let plain = style == ScalarStyle::Plain;
                let null = plain && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                let value = if null { Value::Null } else { Value::Text { text: text.into_owned(), plain } };
                self.node(Node { place, value });
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.properties(place, anchor, tag.is_some());
                self.open.push(Open::List(place, Vec::new()));
            }
            Event::MappingStart(_, anchor, tag) => {
                self.properties(place, anchor, tag.is_some());
                self.open.push(Open::Map(place, Vec::new(), None));
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open::List(place, items)) => self.node(Node { place, value: Value::List(items) }),
                Some(Open::Map(place, entries, _)) => self.node(Node { place, value: Value::Map(entries) }),
                None => {}
            },
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                self.fault(place, "an alias (*name) is not taken; write the value, or quotes around it");
                self.node(Node { place, value: Value::Null });
            }
            _ => {}
        }
    }

    fn properties(&mut self, place: Place, anchor: usize, tag: bool) {
        if anchor != 0 {
            self.fault(place, "an anchor (&name) is not taken; leave it out, or write quotes around the value");
        }
        if tag {
            self.fault(place, "a tag (!name) is not taken; leave it out, or write quotes around the value");
        }
    }

    /// A node is complete: it is a name, a value, an item or the document.
    fn node(&mut self, node: Node) {
        match self.open.last_mut() {
            None => {
                if self.root.is_none() {
                    self.root = Some(node);
                }
            }
            Some(Open::List(_, items)) => items.push(node),
            Some(Open::Map(_, entries, pending)) => match pending.take() {
                Some(Some(name)) => entries.push((name, node)),
                Some(None) => {}
                None => {
                    let place = node.place;
                    let name = name(node, entries);
                    *pending = Some(name.as_ref().ok().cloned());
                    if let Err(text) = name {
                        self.fault(place, text);
                    }
                }
            },
        }
    }
}

fn name(node: Node, entries: &[(Name, Node)]) -> Result<Name, String> {
    let (text, plain) = match node.value {
        Value::Text { text, plain } => (text, plain),
        Value::Null => return Err("a name is empty or null; write it in quotes".into()),
        Value::List(_) | Value::Map(_) => {
            return Err("a name is a list or a map; if this is a {{ template }}, write it in quotes".into());
        }
    };
    if plain && text == "<<" {
        return Err("a merge key (<<) is not taken; write the entries out".into());
    }
    if let Some((first, _)) = entries.iter().find(|(name, _)| name.text == text) {
        return Err(format!("\"{}\" is written twice, first in line {}", shown(&text), first.place.line));
    }
    Ok(Name { place: node.place, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(source: &str) -> Vec<String> {
        parse(source).unwrap_err().into_iter().map(|f| format!("{}: {}", f.place, f.text)).collect()
    }

    #[test]
    fn keeps_the_source_text_of_names_and_values() {
        let node = parse("8080: 0123\ntrue: on\n\"null\": \"~\"\n").unwrap();
        let Value::Map(entries) = node.value else { panic!() };
        let seen: Vec<_> = entries
            .iter()
            .map(|(name, node)| match &node.value {
                Value::Text { text, plain } => (name.text.as_str(), text.as_str(), *plain),
                _ => panic!(),
            })
            .collect();
        assert_eq!(seen, [("8080", "0123", true), ("true", "on", true), ("null", "~", false)]);
    }

    #[test]
    fn tells_null_from_text() {
        for text in ["a:", "a: ~", "a: null", "a: #k"] {
            let Value::Map(entries) = parse(text).unwrap().value else { panic!() };
            assert_eq!(entries.first().unwrap().1.value, Value::Null, "{text}");
        }
        assert_eq!(parse("").unwrap().value, Value::Null);
    }

    #[test]
    fn refuses_what_surprises() {
        for (source, fault) in [
            ("a: !!str b", "line 1, column 10: a tag"),
            ("a: ! b", "line 1, column 6: a tag"),
            ("a: &x b", "line 1, column 7: an anchor"),
            ("a: *x", "line 1, column 4: an alias"),
            ("<<: {a: b}", "line 1, column 1: a merge key"),
            ("a: b\na: c", "line 2, column 1: \"a\" is written twice, first in line 1"),
            ("8080: b\n\"8080\": c", "line 2, column 1: \"8080\" is written twice"),
            ("~: b", "line 1, column 1: a name is empty"),
            ("null: b", "line 1, column 1: a name is empty"),
            (": b", "line 1, column 1: a name is empty"),
            ("[a]: b", "line 1, column 1: a name is a list"),
            ("? {a: b}\n: c", "line 1, column 3: a name is a list"),
            ("a: {{ b }}", "line 1, column 5: a name is a list or a map; if this is a {{ template }}"),
            ("a: b\n---\nc: d", "line 2, column 1: a second document"),
            ("%YAML 1.1\n---\na: b", "line 1, column 1: this is not YAML"),
            ("a: [b", "this is not YAML"),
            ("a: {from: #k}", ": #k is a YAML comment here; write \"#k\" in quotes"),
            ("# a: #k\na: {{ b }}:{{ c }}", ": {{ opens a YAML map here"),
            ("a: [[[[[[[[[[[[[[[[[[[[b]]]]]]]]]]]]]]]]]]]]", "line 1"),
        ] {
            let seen = faults(source);
            assert!(seen.iter().any(|f| f.contains(fault)), "{source}: {seen:?}");
        }
    }

    #[test]
    fn reports_every_fault_at_once() {
        assert_eq!(faults("a: !t b\n<<: c\na: *d\n").len(), 4);
    }

    #[test]
    fn a_bomb_of_aliases_costs_nothing() {
        let mut bomb = String::from("a0: &a0 [x]\n");
        for n in 1..200 {
            bomb.push_str(&format!("a{n}: &a{n} [*a{p}, *a{p}]\n", p = n - 1));
        }
        assert!(faults(&bomb).len() > 500);
    }

    #[test]
    fn a_remark_is_no_hint_on_a_syntax_error() {
        let faults = faults("a: b # why\nc: #\nd: e #f\ng: [h");
        assert!(faults.iter().all(|fault| !fault.contains("comment")), "{faults:?}");
    }

    #[test]
    fn hints_at_comments_and_templates() {
        assert_eq!(hint("a: b\nc: #k", 2), ": #k is a YAML comment here; write \"#k\" in quotes");
        assert_eq!(hint("c: {{ k }}", 1), ": {{ opens a YAML map here; write the whole template in quotes");
        assert_eq!(hint("c: k", 1), "");
        assert_eq!(hint("c: k", 7), "");
        assert_eq!(hint("c: # a remark", 1), "");
        assert_eq!(hint("c: p/x # a remark", 1), "");
        assert_eq!(hint("c: p/x #k", 1), ": what stands behind \" #\" is a YAML comment; leave the blank out");
    }
}
