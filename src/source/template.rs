//! `template:` entries: minijinja, held to what fills in a text.
//!
//! A template comes from a pod's author and is rendered in the process that serves the whole node, so nothing in it
//! may grow without bound. What binds a variable (`for`, `set`, `with`, macros) or repeats (`*`) is left out: with
//! them a few lines double a text until the memory is gone, and a volume's values are no lists to walk. What is left
//! can only concatenate, and fuel bounds that.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use minijinja::value::{Object, Value};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};

use crate::secret::SecretBytes;

/// Why a template gave nothing. Holds no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum TemplateError {
    /// It uses what is not there for templates.
    #[error("{0}")]
    NotHere(&'static str),
    /// It cannot be read. The detail is minijinja's and quotes the template only.
    #[error("line {line}: {detail}")]
    Syntax {
        /// Line of the template, from 1.
        line: usize,
        /// What is wrong.
        detail: String,
    },
    /// A variable that does not exist, or whose optional value is missing.
    #[error("line {line} uses a variable that is not there; there are: {known}")]
    Undefined {
        /// Line of the template, from 1.
        line: usize,
        /// The variables.
        known: String,
    },
    /// A value is not UTF-8.
    #[error("line {0} uses a value that is not UTF-8 text")]
    NotText(usize),
    /// The work or the text is more than a volume may hold.
    #[error("line {0} makes more text than a volume may hold")]
    TooMuch(usize),
    /// Anything else.
    #[error("line {line}: {kind}")]
    Failed {
        /// Line of the template, from 1.
        line: usize,
        /// minijinja's name of the fault.
        kind: String,
    },
}

impl TemplateError {
    /// Whether the template itself is at fault, whatever the values are.
    pub(super) fn is_static(&self) -> bool {
        matches!(self, Self::NotHere(_) | Self::Syntax { .. })
    }
}

/// The most tags of a template, and the longest expression in bytes: minijinja recurses once for each level of either,
/// and thousands of levels end the stack.
const MAX_TAGS: usize = 200;
const MAX_EXPRESSION: usize = 1000;

/// What a template may use: names and values, the first of a name wins.
#[derive(Default)]
pub(super) struct Variables {
    /// By name.
    pub(super) named: Vec<(String, Arc<SecretBytes>)>,
    /// In `files["name"]`.
    pub(super) files: Vec<(String, Arc<SecretBytes>)>,
}

impl Variables {
    fn names(&self) -> String {
        let mut names: Vec<&str> = self.named.iter().map(|(name, _)| name.as_str()).collect();
        let files: Vec<String> = self.files.iter().map(|(name, _)| format!("files[\"{name}\"]")).collect();
        names.extend(files.iter().map(String::as_str));
        names.join(", ")
    }
}

/// One level of names: the variables, or what `files[...]` looks into.
struct Names {
    values: Vec<(String, Arc<SecretBytes>)>,
    below: Option<Arc<Names>>,
    /// Set when a value that is no text was asked for: minijinja's lookup cannot fail, only say "undefined".
    not_text: Arc<AtomicBool>,
}

impl std::fmt::Debug for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Names")
    }
}

impl Object for Names {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let name = key.as_str()?;
        if let Some((_, value)) = self.values.iter().find(|(known, _)| known == name) {
            let text = std::str::from_utf8(value.expose());
            if text.is_err() {
                self.not_text.store(true, Ordering::Relaxed);
            }
            return text.ok().map(Value::from);
        }
        let below = self.below.as_ref()?;
        (name == "files").then(|| Value::from_dyn_object(Arc::clone(below)))
    }
}

/// Checks a template without filling it in.
pub(super) fn check(text: &str) -> Result<(), TemplateError> {
    restrict(text)?;
    environment(u64::MAX, usize::MAX).template_from_str(text).map(drop).map_err(|error| explain(&error, "", false))
}

/// Fills a template in; the result has at most `limit` bytes.
pub(super) fn render(text: &str, variables: Variables, limit: usize) -> Result<SecretBytes, TemplateError> {
    restrict(text)?;
    let known = variables.names();
    // What is not named is not read: a large keystore beside a template costs it nothing.
    let used = variables.named.iter().chain(&variables.files).filter(|(name, _)| text.contains(name.as_str()));
    let longest = used.map(|(_, value)| value.len()).max().unwrap_or(0);
    let not_text = Arc::new(AtomicBool::new(false));
    let names = |values, below| Arc::new(Names { values, below, not_text: Arc::clone(&not_text) });
    let root = names(variables.named, Some(names(variables.files, None)));
    let environment = environment(fuel(longest), limit);
    let explain = |error: Error| explain(&error, &known, not_text.load(Ordering::Relaxed));
    let template = environment.template_from_str(text).map_err(explain)?;
    let mut out = Capped { bytes: Vec::new(), limit };
    template.render_captured_to(Value::from_dyn_object(root), &mut out).map_err(explain)?;
    Ok(SecretBytes::new(out.bytes))
}

/// How many instructions a template may take when its longest value has so many bytes. A `~` within an expression of
/// [`MAX_EXPRESSION`] copies at most a third as many values as that has bytes; this keeps all copies near 3 GiB, a
/// fraction of a second, and leaves thousands of instructions to values of an ordinary length.
fn fuel(longest: usize) -> u64 {
    let longest = u64::try_from(longest).unwrap_or(u64::MAX).max(1);
    ((16 << 20) / longest).clamp(200, 20_000)
}

fn environment(fuel: u64, limit: usize) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_keep_trailing_newline(true);
    environment.set_fuel(Some(fuel));
    // The result of each is capped: a chain of them would grow without end otherwise.
    let capped = move |text: String| {
        if text.len() > limit { Err(Error::from(ErrorKind::WriteFailure)) } else { Ok(text) }
    };
    environment.add_filter("urlencode", move |text: &str| capped(urlencode(text)));
    environment.add_filter("b64encode", move |text: &str| capped(STANDARD.encode(text)));
    environment.add_filter("tojson", move |text: &str| capped(serde_json::Value::String(text.to_owned()).to_string()));
    environment.add_filter("trim", move |text: &str| capped(text.trim().to_owned()));
    environment
}

/// Percent-encodes all but RFC 3986's unreserved characters. Jinja's own filter leaves `/`, which ends the user part
/// of a URL: a password that holds one would not connect.
fn urlencode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

fn explain(error: &Error, known: &str, not_text: bool) -> TemplateError {
    let line = error.line().unwrap_or(1);
    match error.kind() {
        ErrorKind::SyntaxError | ErrorKind::UnknownFilter | ErrorKind::UnknownTest | ErrorKind::UnknownFunction => {
            TemplateError::Syntax { line, detail: error.detail().unwrap_or("it cannot be read").to_owned() }
        }
        ErrorKind::UndefinedError if not_text => TemplateError::NotText(line),
        ErrorKind::UndefinedError => TemplateError::Undefined { line, known: known.to_owned() },
        ErrorKind::OutOfFuel | ErrorKind::WriteFailure => TemplateError::TooMuch(line),
        // A detail of these may quote a value.
        kind => TemplateError::Failed { line, kind: kind.to_string() },
    }
}

/// Refuses what could grow without bound. Reads a template as minijinja's lexer does, but never further than
/// it: within an expression neither braces nor unbalanced brackets are let through, so both see the same end.
fn restrict(text: &str) -> Result<(), TemplateError> {
    let mut rest = text;
    let mut tags = 0;
    while let Some(at) = rest.find("{{").into_iter().chain(rest.find("{%")).chain(rest.find("{#")).min() {
        let (_, found) = rest.split_at(at);
        let (open, inside) = found.split_at(2);
        let close = match open {
            "{#" => {
                rest = inside.split_once("#}").map_or("", |(_, after)| after);
                continue;
            }
            "{%" => "%}",
            _ => "}}",
        };
        if open == "{%" {
            let tag = inside.trim_start_matches(['-', '+']).trim_start();
            let word: String = tag.chars().take_while(char::is_ascii_alphanumeric).collect();
            if !["if", "elif", "else", "endif"].contains(&word.as_str()) {
                return Err(TemplateError::NotHere("of the tags only if, elif, else and endif are there"));
            }
            tags += 1;
            if tags > MAX_TAGS {
                return Err(TemplateError::NotHere("a template has at most 200 tags"));
            }
        }
        rest = expression(inside, close)?;
    }
    Ok(())
}

/// The text after the end of an expression.
fn expression<'a>(inside: &'a str, close: &str) -> Result<&'a str, TemplateError> {
    let mut depth = 0_usize;
    let mut quote: Option<char> = None;
    let mut escaped = false;
    for (at, character) in inside.char_indices() {
        if let Some(delimiter) = quote {
            match character {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                _ if character == delimiter => quote = None,
                _ => {}
            }
            continue;
        }
        if at > MAX_EXPRESSION {
            return Err(TemplateError::NotHere("an expression has at most 1000 bytes"));
        }
        let here = inside.get(at..).unwrap_or_default();
        if here.starts_with(close) {
            if depth > 0 {
                return Err(TemplateError::NotHere("a bracket is not closed within its expression"));
            }
            return Ok(here.get(close.len()..).unwrap_or_default());
        }
        match character {
            '\'' | '"' => quote = Some(character),
            '(' | '[' => depth = depth.saturating_add(1),
            ')' | ']' if depth == 0 => {
                return Err(TemplateError::NotHere("a bracket is closed that was not opened"));
            }
            ')' | ']' => depth = depth.saturating_sub(1),
            '*' | '{' | '}' | '%' => {
                return Err(TemplateError::NotHere("an expression has no \"*\", \"%\" or braces here"));
            }
            _ => {}
        }
    }
    Err(TemplateError::NotHere("an expression has no end"))
}

/// A text that grows to a limit.
struct Capped {
    bytes: Vec<u8>,
    limit: usize,
}

impl Write for Capped {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if self.bytes.len().saturating_add(more.len()) > self.limit {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(named: &[(&str, &[u8])]) -> Variables {
        let values = |(name, bytes): &(&str, &[u8])| ((*name).to_owned(), Arc::new(SecretBytes::new(bytes.to_vec())));
        Variables { named: named.iter().map(values).collect(), files: named.iter().map(values).collect() }
    }

    fn filled(text: &str, named: &[(&str, &[u8])]) -> Result<String, TemplateError> {
        let bytes = render(text, variables(named), 4096)?;
        Ok(String::from_utf8(bytes.expose().to_vec()).unwrap())
    }

    #[test]
    fn fills_in() {
        let named: &[(&str, &[u8])] = &[("user", b"app"), ("password", b"p/w @1"), ("db.url", b"x")];
        for (text, expected) in [
            ("postgres://{{ user }}:{{ password | urlencode }}@db/pay", "postgres://app:p%2Fw%20%401@db/pay"),
            ("{{ files[\"db.url\"] }}\n", "x\n"),
            ("{{ files['db.url'] }}", "x"),
            ("{# {{ nothing }} #}{{- user -}} ", "app"),
            ("{% if user == 'app' %}yes{% else %}no{% endif %}", "yes"),
            ("{{ (user ~ ':' ~ password) | b64encode }}", "YXBwOnAvdyBAMQ=="),
            ("{\"p\": {{ password | tojson }}}", "{\"p\": \"p/w @1\"}"),
            ("{{ \"}} * {%\" }}", "}} * {%"),
            ("{{ ' x ' | trim }}", "x"),
            ("{{ 'a' if nothing is defined else 'b' }}", "b"),
            ("<b>{{ user }}</b> & 100% * { }", "<b>app</b> & 100% * { }"),
            ("no expression", "no expression"),
        ] {
            assert_eq!(filled(text, named).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn names_what_is_wrong_and_no_value() {
        let named: &[(&str, &[u8])] = &[("user", b"canary"), ("key.p12", b"\xff\xfe")];
        for (text, expected) in [
            (
                "a\n{{ pasword }}",
                "line 2 uses a variable that is not there; there are: user, key.p12, files[\"user\"], files[\"key.p12\"]",
            ),
            ("{{ files['key.p12'] }}", "line 1 uses a value that is not UTF-8 text"),
            ("{{ user | nothing }}", "line 1: filter nothing is unknown"),
            ("{{ user", "an expression has no end"),
            ("{{ user - 1 }}", "line 1: invalid operation"),
            (
                "{{ user.more }}",
                "line 1 uses a variable that is not there; there are: user, key.p12, files[\"user\"], files[\"key.p12\"]",
            ),
        ] {
            let error = filled(text, named).unwrap_err().to_string();
            assert_eq!(error, expected, "{text}");
            assert!(!error.contains("canary"));
        }
    }

    #[test]
    fn refuses_what_could_grow() {
        for text in [
            "{% set x = user ~ user %}",
            "{% for x in [user] %}{% endfor %}",
            "{%- with x = user %}{% endwith %}",
            "{% macro m() %}{% endmacro %}",
            "{% include 'x' %}",
            "{% raw %}{% endraw %}",
            "{% filter urlencode %}{% endfilter %}",
            "{{ 'x' * 100 }}",
            "{{ {'a': 1} }}",
            "{{ (user }} * 9 }}",
            "{{ '\\'' * 9 }}",
            "{{ user ) }}",
            "{% if user %}{{ 'x' * 9 }}{% endif %}",
            "{#- #}{{ 'x' * 9 }}",
        ] {
            assert!(matches!(check(text), Err(TemplateError::NotHere(_))), "{text}");
            assert!(matches!(filled(text, &[("user", b"u")]), Err(TemplateError::NotHere(_))), "{text}");
        }
    }

    #[test]
    fn bounds_work_and_text() {
        let long = vec![b'a'; 4000];
        let named: &[(&str, &[u8])] = &[("user", &long)];
        assert_eq!(filled("{{ user }}{{ user }}", named), Err(TemplateError::TooMuch(1)));
        let chain = |terms: usize| format!("{{{{ ({}) == '' }}}}", vec!["user"; terms].join("~"));
        assert_eq!(filled(&chain(180), named).as_deref(), Ok("False"));
        assert_eq!(filled(&chain(180).repeat(20), named), Err(TemplateError::TooMuch(1)));
        // As many expressions as fit into the attribute, beside a large value that is not used.
        let many: String = "{{ a }}".repeat(4096);
        let named: &[(&str, &[u8])] = &[("a", b"x"), ("keystore", &vec![b'k'; 1 << 20])];
        assert_eq!(filled(&many, named), Ok("x".repeat(4096)));
        assert!(matches!(check(&chain(5000)), Err(TemplateError::NotHere(_))));
        let named: &[(&str, &[u8])] = &[("user", &long)];
        let nested = |depth: usize| format!("{}{}", "{% if user %}".repeat(depth), "{% endif %}".repeat(depth));
        assert_eq!(filled(&nested(100), named).as_deref(), Ok(""));
        assert!(matches!(check(&nested(2000)), Err(TemplateError::NotHere(_))));
        let filters = format!("{{{{ user{} }}}}", " | urlencode | b64encode".repeat(40));
        assert_eq!(filled(&filters, named), Err(TemplateError::TooMuch(1)));
    }
}
