//! Manifests as trees that remember where everything stands. Several documents, anchors and aliases are taken, as
//! `kubectl` takes them; JSON is YAML.

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
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Value,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// Null, a boolean, a number or a text.
    Scalar(Json),
    List(Vec<Node>),
    /// In the order it was written; no name twice.
    Map(Vec<(String, Node)>),
}

/// Why a text is no manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) place: Place,
    pub(super) text: String,
}

impl Node {
    /// An entry of a map.
    pub(super) fn get(&self, name: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(known, _)| known == name).map(|(_, node)| node),
            Value::Scalar(_) | Value::List(_) => None,
        }
    }

    /// An entry that is a text.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match &self.get(name)?.value {
            Value::Scalar(Json::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The items of a list; none of anything else.
    pub(super) fn items(&self) -> &[Node] {
        match &self.value {
            Value::List(items) => items,
            Value::Scalar(_) | Value::Map(_) => &[],
        }
    }

    /// The value without its places.
    pub(super) fn json(&self) -> Json {
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
    pub(super) fn place_of(&self, path: &str) -> Place {
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

/// The documents of a text.
pub(super) fn parse(source: &str) -> Result<Vec<Node>, Fault> {
    let options = granit_parser::options! {
        emit_unresolved_aliases: true,
        flow_nesting_limit: MAX_DEPTH,
        block_nesting_limit: MAX_DEPTH,
    };
    let mut reader = Reader::default();
    for event in Parser::new_from_str_with_options(source, options) {
        match event {
            Ok((event, span)) => reader.event(event, span)?,
            Err(error) => {
                let at = error.marker();
                let place = Place { line: at.line(), column: at.col().saturating_add(1) };
                return Err(Fault { place, text: format!("this is not YAML: {}", error.kind()) });
            }
        }
    }
    Ok(reader.documents)
}

/// A list or map whose end has not come yet.
struct Open {
    place: Place,
    anchor: usize,
    value: Value,
    /// The name whose value comes next.
    name: Option<String>,
    /// What merge keys bring: for names that the map does not have itself (YAML 1.1).
    merged: Vec<(String, Node)>,
}

#[derive(Default)]
struct Reader {
    documents: Vec<Node>,
    open: Vec<Open>,
    anchors: Vec<(usize, Node, usize)>,
    nodes: usize,
}

impl Reader {
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Fault> {
        let place = Place::from(span);
        match event {
            Event::DocumentStart(..) => self.anchors.clear(),
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
                            if !entries.iter().any(|(known, _)| *known == name) {
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
            Event::UnresolvedAlias(name) => {
                return Err(Fault { place, text: format!("there is no anchor &{} above", shown(&name)) });
            }
            _ => {}
        }
        Ok(())
    }

    fn begin(&mut self, place: Place, anchor: usize, value: Value) {
        self.open.push(Open { place, anchor, value, name: None, merged: Vec::new() });
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
            let size = size(&node);
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
            (Value::Map(entries), None) => {
                let name = match node.value {
                    Value::Scalar(Json::String(text)) => text,
                    Value::Scalar(Json::Bool(flag)) => flag.to_string(),
                    Value::Scalar(Json::Number(number)) => number.to_string(),
                    _ => {
                        let text = "a name is no text; if this is a {{ template }}, fill it in first".into();
                        return Err(Fault { place: node.place, text });
                    }
                };
                if entries.iter().any(|(known, _)| *known == name) {
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

/// What an unquoted scalar means to `kubectl`: YAML 1.1's booleans but `y` and `n`, numbers, null, else text
/// (sigs.k8s.io/yaml).
fn plain(text: &str) -> Json {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Json::Null,
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => return Json::Bool(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => return Json::Bool(false),
        _ => {}
    }
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let radix = |prefix: &str, radix| i64::from_str_radix(digits.strip_prefix(prefix)?, radix).ok();
    let sign = if text.starts_with('-') { -1 } else { 1 };
    let whole = if digits.starts_with("0x") {
        radix("0x", 16)
    } else if digits.starts_with("0o") {
        radix("0o", 8)
    } else if digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        // As Go's reader has it: 0644 is octal.
        radix("0", 8)
    } else if digits.bytes().all(|byte| byte.is_ascii_digit()) {
        digits.parse().ok()
    } else {
        None
    };
    if let Some(whole) = whole {
        return Json::Number(Number::from(sign * whole));
    }
    let numeric = digits.starts_with(|first: char| first.is_ascii_digit() || first == '.')
        && digits.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'+' | b'-'));
    let number = text.parse::<f64>().ok().filter(|_| numeric).and_then(Number::from_f64);
    number.map_or_else(|| Json::String(text.to_owned()), Json::Number)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(source: &str) -> Json {
        Json::Array(parse(source).unwrap().iter().map(Node::json).collect())
    }

    #[test]
    fn scalars_are_what_kubectl_takes_them_for() {
        let source = "[a, 1, -2, 0644, 0x1f, 1.5, 1e3, true, off, null, ~, '1', \"true\", 1.2.3, 10Mi, 1_000, '']";
        let expected = json!([[
            "a", 1, -2, 420, 31, 1.5, 1000.0, true, false, null, null, "1", "true", "1.2.3", "10Mi", "1_000", ""
        ]]);
        assert_eq!(read(source), expected);
    }

    #[test]
    fn documents_anchors_and_merges() {
        assert_eq!(read("a: 1\n---\nb: 2\n---\n"), json!([{"a": 1}, {"b": 2}, null]));
        let source = "x: &x {a: 1, b: 2}\ny: *x\nz: {<<: *x, b: 3}\n";
        assert_eq!(read(source), json!([{"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 2}, "z": {"a": 1, "b": 3}}]));
        assert_eq!(read("{\"a\": [1, {\"b\": null}]}"), json!([{"a": [1, {"b": null}]}]));
    }

    #[test]
    fn says_where_and_what_is_wrong() {
        for (source, line, column, text) in [
            ("a: [b", 1, 6, "this is not YAML"),
            ("a: 1\na: 2", 2, 1, "written twice"),
            ("a: *b", 1, 4, "no anchor &b"),
            ("a: {{ b }}", 1, 5, "a name is no text; if this is a {{ template }}"),
        ] {
            let fault = parse(source).unwrap_err();
            assert!(fault.text.contains(text), "{source}: {fault:?}");
            assert_eq!(fault.place.line, line, "{source}: {fault:?}");
            assert!(fault.place.column <= column + 1, "{source}: {fault:?}");
        }
    }

    #[test]
    fn a_bomb_of_aliases_is_refused() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x]\n");
        for n in 1..12 {
            let p = n - 1;
            bomb.push_str(&format!("a{n}: &a{n} [*a{p}, *a{p}, *a{p}, *a{p}, *a{p}, *a{p}, *a{p}, *a{p}]\n"));
        }
        assert!(parse(&bomb).unwrap_err().text.contains("aliases counted"));
    }

    #[test]
    fn finds_fields_by_index_name_and_key() {
        let source =
            "metadata:\n  annotations:\n    a.b/c: d\nspec:\n  volumes:\n  - name: db\n    csi:\n      driver: x\n";
        let node = parse(source).unwrap().remove(0);
        let place = |path: &str| node.place_of(path).to_string();
        assert_eq!(place("metadata.annotations[a.b/c]"), "line 3, column 12");
        assert_eq!(place("spec.volumes[0].csi.driver"), "line 8, column 15");
        assert_eq!(place("spec.volumes[db].csi.driver"), "line 8, column 15");
        assert_eq!(place("spec.volumes[db].csi.readOnly"), "line 8, column 7");
        assert_eq!(place("spec.volumes[3]"), "line 6, column 5");
        assert_eq!(place("spec.hostPID"), "line 5, column 3");
    }
}
