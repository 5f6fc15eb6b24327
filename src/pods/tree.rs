//! Manifests as trees that remember where everything stands. Several documents, anchors and aliases are taken, as
//! `kubectl` takes them; JSON is YAML.

use std::collections::HashSet;

use granit_parser::{Event, Parser, ScalarStyle, Span};
use serde_json::{Map, Number, Value as Json};

use crate::request::shown;
use crate::request::yaml::Place;

/// The deepest nesting of lists and maps: a PodTemplate in a List has some fifteen.
const MAX_DEPTH: usize = 64;
/// The most nodes of one text, copies by aliases counted: a thousand pods have some 200 000.
const MAX_NODES: usize = 4_000_000;

/// A value and where it begins.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) value: Value,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// Null, a boolean, a number or a text.
    Scalar(Json),
    List(Vec<Node>),
    /// In the order it was written; no name twice.
    Map(Vec<(String, Node)>),
}

/// Why a text is no manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) place: Place,
    pub(crate) text: String,
}

impl Node {
    /// An entry of a map.
    pub(crate) fn get(&self, name: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(known, _)| known == name).map(|(_, node)| node),
            Value::Scalar(_) | Value::List(_) => None,
        }
    }

    /// An entry that is a text.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        match &self.get(name)?.value {
            Value::Scalar(Json::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The items of a list; none of anything else.
    pub(crate) fn items(&self) -> &[Node] {
        match &self.value {
            Value::List(items) => items,
            Value::Scalar(_) | Value::Map(_) => &[],
        }
    }

    /// The value without its places.
    pub(crate) fn json(&self) -> Json {
        match &self.value {
            Value::Scalar(scalar) => scalar.clone(),
            Value::List(items) => Json::Array(items.iter().map(Node::json).collect()),
            Value::Map(entries) => {
                Json::Object(entries.iter().map(|(name, node)| (name.clone(), node.json())).collect::<Map<_, _>>())
            }
        }
    }

    /// Where a field of this node stands, by a path such as `spec.volumes[db].csi` or
    /// `metadata.annotations[a.b/c]`: an item of a list by its index or its `name`. Where it is not written, the place
    /// of the nearest part above it that is.
    pub(crate) fn place_of(&self, path: &str) -> Place {
        let mut node = self;
        for step in steps(path) {
            let next = match &node.value {
                Value::List(items) => match step.parse::<usize>() {
                    Ok(index) => items.get(index),
                    Err(_) => items.iter().find(|item| item.text("name") == Some(step)),
                },
                Value::Map(_) => node.get(step),
                Value::Scalar(_) => None,
            };
            match next {
                Some(next) => node = next,
                None => break,
            }
        }
        node.place
    }
}

/// The steps of a path: what stands between dots, or in brackets, where a dot is none.
fn steps(path: &str) -> Vec<&str> {
    let mut steps = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(inside) = rest.strip_prefix('[') {
            let (step, after) = inside.split_once(']').unwrap_or((inside, ""));
            steps.push(step);
            rest = after;
        } else if let Some(after) = rest.strip_prefix('.') {
            rest = after;
        } else {
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            let (step, after) = rest.split_at(end);
            steps.push(step);
            rest = after;
        }
    }
    steps
}

/// The documents of a text, and what is wrong with the others: one that cannot be read hides none that can.
pub(crate) fn parse(source: &str) -> (Vec<Node>, Vec<Fault>) {
    let mut reader = Reader { begun: 1, ..Reader::default() };
    let mut faults = Vec::new();
    let mut rest = source;
    while let Err(fault) = reader.read(rest) {
        // Not the line that the document itself begins with.
        let line = fault.place.line.max(reader.begun.saturating_add(1)).saturating_sub(reader.above);
        faults.push(fault);
        let next = next_document(rest, line).filter(|_| reader.nodes <= MAX_NODES);
        let Some((offset, above)) = next else { break };
        rest = rest.get(offset..).unwrap_or_default();
        reader.above = reader.above.saturating_add(above);
        reader.begun = reader.above.saturating_add(1);
        reader.open.clear();
    }
    (reader.documents, faults)
}

/// The first line from `line` on that begins a document: its offset, and how many lines stand above it.
fn next_document(text: &str, line: usize) -> Option<(usize, usize)> {
    let mut offset: usize = 0;
    for (above, this) in text.split_inclusive('\n').enumerate() {
        let begins =
            this.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if above.saturating_add(1) >= line && begins {
            return Some((offset, above));
        }
        offset = offset.saturating_add(this.len());
    }
    None
}

/// A list or map whose end has not come yet.
struct Open {
    place: Place,
    anchor: usize,
    value: Value,
    /// The name whose value comes next.
    name: Option<String>,
    /// The names of a map so far.
    names: HashSet<String>,
    /// What merge keys bring: for names that the map does not have itself (YAML 1.1).
    merged: Vec<(String, Node)>,
}

#[derive(Default)]
struct Reader {
    documents: Vec<Node>,
    open: Vec<Open>,
    anchors: Vec<(usize, Node, usize)>,
    nodes: usize,
    /// The lines above the part of the text that is read.
    above: usize,
    /// The line with which the last document began.
    begun: usize,
}

impl Reader {
    /// Reads a text up to its end or its first fault.
    fn read(&mut self, source: &str) -> Result<(), Fault> {
        let options = granit_parser::options! {
            emit_unresolved_aliases: true,
            flow_nesting_limit: MAX_DEPTH,
            block_nesting_limit: MAX_DEPTH,
        };
        for event in Parser::new_from_str_with_options(source, options) {
            match event {
                Ok((event, span)) => self.event(event, span)?,
                Err(error) => {
                    let at = error.marker();
                    let place = self.place(Place { line: at.line(), column: at.col().saturating_add(1) });
                    return Err(Fault { place, text: format!("this is not YAML: {}", error.kind()) });
                }
            }
        }
        Ok(())
    }

    /// A place in the whole text.
    fn place(&self, place: Place) -> Place {
        Place { line: place.line.saturating_add(self.above), ..place }
    }

    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Fault> {
        let place = self.place(Place::from(span));
        match event {
            Event::DocumentStart(..) => {
                self.begun = place.line;
                self.anchors.clear();
            }
            Event::Scalar(text, style, anchor, tag) => {
                // Only what a tag of text says is taken: others would need a schema.
                let value = if style == ScalarStyle::Plain && tag.is_none() { plain(&text) } else { text.into() };
                self.node(Node { place, value: Value::Scalar(value) }, anchor)?;
            }
            Event::SequenceStart(_, anchor, _) => self.begin(place, anchor, Value::List(Vec::new())),
            Event::MappingStart(_, anchor, _) => self.begin(place, anchor, Value::Map(Vec::new())),
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(mut open) = self.open.pop() {
                    if let Value::Map(entries) = &mut open.value {
                        for (name, node) in open.merged {
                            if open.names.insert(name.clone()) {
                                entries.push((name, node));
                            }
                        }
                    }
                    self.node(Node { place: open.place, value: open.value }, open.anchor)?;
                }
            }
            Event::Alias(anchor) => {
                let known = self.anchors.iter().rev().find(|(known, ..)| *known == anchor);
                let Some((_, node, size)) = known else {
                    return Err(Fault { place, text: "an alias stands inside its own anchor".into() });
                };
                let (node, size) = (node.clone(), *size);
                self.count(size, place)?;
                self.put(node)?;
            }
            // Its name may be a password that begins with a star.
            Event::UnresolvedAlias(_) => {
                return Err(Fault { place, text: "there is no such anchor above".into() });
            }
            _ => {}
        }
        Ok(())
    }

    fn begin(&mut self, place: Place, anchor: usize, value: Value) {
        self.open.push(Open { place, anchor, value, name: None, names: HashSet::new(), merged: Vec::new() });
    }

    /// A text of aliases of aliases must not cost more than one without.
    fn count(&mut self, nodes: usize, place: Place) -> Result<(), Fault> {
        self.nodes = self.nodes.saturating_add(nodes);
        match self.nodes <= MAX_NODES {
            true => Ok(()),
            false => Err(Fault { place, text: format!("more than {MAX_NODES} values, aliases counted") }),
        }
    }

    fn node(&mut self, node: Node, anchor: usize) -> Result<(), Fault> {
        self.count(1, node.place)?;
        if anchor != 0 {
            // Kept for its aliases: anchors within anchors are copies too.
            let size = size(&node);
            self.count(size, node.place)?;
            self.anchors.push((anchor, node.clone(), size));
        }
        self.put(node)
    }

    /// A node is complete: it is a name, a value, an item or a document.
    fn put(&mut self, node: Node) -> Result<(), Fault> {
        let Some(open) = self.open.last_mut() else {
            self.documents.push(node);
            return Ok(());
        };
        match (&mut open.value, open.name.take()) {
            (Value::List(items), _) => items.push(node),
            (Value::Map(_), Some(name)) if name == "<<" => {
                let sources = match node.value {
                    Value::List(items) => items,
                    _ => vec![node],
                };
                for source in sources {
                    if let Value::Map(more) = source.value {
                        open.merged.extend(more);
                    }
                }
            }
            (Value::Map(entries), Some(name)) => entries.push((name, node)),
            (Value::Map(_), None) => {
                let name = match node.value {
                    Value::Scalar(Json::String(text)) => text,
                    Value::Scalar(Json::Bool(flag)) => flag.to_string(),
                    Value::Scalar(Json::Number(number)) => number.to_string(),
                    _ => {
                        let text = "a name is no text; if this is a {{ template }}, fill it in first".into();
                        return Err(Fault { place: node.place, text });
                    }
                };
                if !open.names.insert(name.clone()) {
                    let text = format!("\"{}\" is written twice", shown(&name));
                    return Err(Fault { place: node.place, text });
                }
                open.name = Some(name);
            }
            (Value::Scalar(_), _) => {}
        }
        Ok(())
    }
}

fn size(node: &Node) -> usize {
    let inside: usize = match &node.value {
        Value::Scalar(_) => 0,
        Value::List(items) => items.iter().map(size).sum(),
        Value::Map(entries) => entries.iter().map(|(_, node)| size(node)).sum(),
    };
    inside.saturating_add(1)
}

/// What an unquoted scalar means to `kubectl`: YAML 1.1's booleans, null, what Go takes for a number, else text
/// (sigs.k8s.io/yaml, resolve.go).
fn plain(text: &str) -> Json {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Json::Null,
        "true" | "True" | "TRUE" | "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => return Json::Bool(true),
        "false" | "False" | "FALSE" | "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => {
            return Json::Bool(false);
        }
        _ => {}
    }
    if !text.starts_with(|first: char| first.is_ascii_digit() || matches!(first, '.' | '+' | '-')) {
        return text.into();
    }
    let digits = text.replace('_', "");
    let number = whole(&digits).or_else(|| fraction(&digits));
    number.map_or_else(|| text.into(), Json::Number)
}

/// A whole number as `strconv.ParseInt` with base 0 takes it, and `ParseUint` after it: `0644` is octal.
fn whole(text: &str) -> Option<Number> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, digits.get(2..)?),
        [b'0', b'o' | b'O', ..] => (8, digits.get(2..)?),
        [b'0', b'b' | b'B', ..] => (2, digits.get(2..)?),
        [b'0', _, ..] => (8, digits),
        _ => (10, digits),
    };
    // Rust would take a second sign here.
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let size = u64::from_str_radix(digits, radix).ok()?;
    match text.as_bytes().first() {
        Some(b'-') => 0_i64.checked_sub_unsigned(size).map(Number::from),
        Some(b'+') => i64::try_from(size).ok().map(Number::from),
        _ => Some(Number::from(size)),
    }
}

/// A number with a fraction or an exponent, as YAML writes it; `1.` and `.5` too.
fn fraction(text: &str) -> Option<Number> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'+' | b'-'));
    text.parse().ok().filter(|_| plain).and_then(Number::from_f64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(source: &str) -> Json {
        let (documents, faults) = parse(source);
        assert_eq!(faults, [], "{source}");
        Json::Array(documents.iter().map(Node::json).collect())
    }

    #[test]
    fn scalars_are_what_kubectl_takes_them_for() {
        let source = "[a, 1, -2, 0644, 0x1f, 1.5, 1e3, true, off, null, ~, '1', \"true\", 1.2.3, 10Mi, '']";
        let expected =
            json!([["a", 1, -2, 420, 31, 1.5, 1000.0, true, false, null, null, "1", "true", "1.2.3", "10Mi", ""]]);
        assert_eq!(read(source), expected);
        for (source, expected) in [
            ("y", json!(true)),
            ("N", json!(false)),
            ("1_000", json!(1000)),
            ("0b101", json!(5)),
            ("0o17", json!(15)),
            ("-0x10", json!(-16)),
            ("+7", json!(7)),
            ("-0x8000000000000000", json!(i64::MIN)),
            ("18446744073709551615", json!(u64::MAX)),
            (".5", json!(0.5)),
            ("089", json!(89.0)),
            // No numbers: a sign after the prefix, one too large for its sign, digits of another base, a date.
            ("0x-5", json!("0x-5")),
            ("0x+5", json!("0x+5")),
            ("-0x8000000000000001", json!("-0x8000000000000001")),
            ("0b2", json!("0b2")),
            ("0x", json!("0x")),
            ("2026-01-01", json!("2026-01-01")),
            ("_1", json!("_1")),
            ("1e999", json!("1e999")),
        ] {
            assert_eq!(read(&format!("a: {source}\n"))[0]["a"], expected, "{source}");
        }
    }

    #[test]
    fn documents_anchors_and_merges() {
        assert_eq!(read("a: 1\n---\nb: 2\n---\n"), json!([{"a": 1}, {"b": 2}, null]));
        let source = "p: &x {a: 1, b: 2}\nq: *x\nr: {<<: *x, b: 3}\n";
        assert_eq!(read(source), json!([{"p": {"a": 1, "b": 2}, "q": {"a": 1, "b": 2}, "r": {"a": 1, "b": 3}}]));
        assert_eq!(read("{\"a\": [1, {\"b\": null}]}"), json!([{"a": [1, {"b": null}]}]));
    }

    #[test]
    fn says_where_and_what_is_wrong() {
        for (source, line, column, text) in [
            ("a: [b", 1, 4, "this is not YAML"),
            ("a: 1\na: 2", 2, 1, "written twice"),
            ("a: *b", 1, 4, "no such anchor"),
            ("a: {{ b }}", 1, 5, "a name is no text; if this is a {{ template }}"),
        ] {
            let fault = parse(source).1.remove(0);
            assert!(fault.text.contains(text), "{source}: {fault:?}");
            assert_eq!((fault.place.line, fault.place.column), (line, column), "{source}: {fault:?}");
        }
    }

    #[test]
    fn a_document_that_cannot_be_read_hides_no_other() {
        let source = "a: 1\n---\nb: [\n---\nc: 1\nc: 2\n--- # third\nd: *e\n---\nf: 1\n";
        for source in [source.to_owned(), source.replace('\n', "\r\n")] {
            let (documents, faults) = parse(&source);
            let documents: Vec<Json> = documents.iter().map(Node::json).collect();
            assert_eq!(documents, [json!({"a": 1}), json!({"f": 1})], "{source}: {faults:?}");
            assert_eq!(faults.iter().map(|fault| fault.place.line).collect::<Vec<_>>(), [3, 6, 8], "{faults:?}");
        }
        assert_eq!(parse("--- [\n---\na: 1\n").0.len(), 1);
        assert_eq!(parse("---\n--- [").1.len(), 1);
    }

    #[test]
    fn a_bomb_of_aliases_is_refused() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x]\n");
        for n in 1..12 {
            let p = n - 1;
            bomb.push_str(&format!("a{n}: &a{n} [*a{p}, *a{p}, *a{p}, *a{p}, *a{p}, *a{p}, *a{p}, *a{p}]\n"));
        }
        assert!(parse(&bomb).1.remove(0).text.contains("aliases counted"));
        // Each anchor keeps a copy of all within it.
        let inside = vec!["x"; 100_000].join(",");
        let begin: String = (0..50).map(|n| format!("&a{n} [")).collect();
        let nested = format!("{begin}{inside}{}", "]".repeat(50));
        assert!(parse(&nested).1.remove(0).text.contains("aliases counted"));
    }

    #[test]
    fn finds_fields_by_index_name_and_key() {
        let source =
            "metadata:\n  annotations:\n    a.b/c: d\nspec:\n  volumes:\n  - name: db\n    csi:\n      driver: x\n";
        let node = parse(source).0.remove(0);
        let place = |path: &str| node.place_of(path).to_string();
        assert_eq!(place("metadata.annotations[a.b/c]"), "line 3, column 12");
        assert_eq!(place("spec.volumes[0].csi.driver"), "line 8, column 15");
        assert_eq!(place("spec.volumes[db].csi.driver"), "line 8, column 15");
        assert_eq!(place("spec.volumes[db].csi.readOnly"), "line 8, column 7");
        assert_eq!(place("spec.volumes[3]"), "line 6, column 5");
        assert_eq!(place("spec.hostPID"), "line 5, column 3");
    }
}
