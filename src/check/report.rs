//! What a check found, for people, for programs, for code scanning (SARIF 2.1.0) and for GitHub's annotations.
//!
//! Names come from manifests that nobody has admitted yet, and a line of a log may be a command to what reads it: what
//! people see has no control character of theirs.

use std::fmt::Write;

use serde_json::{Value as Json, json};

use super::{Access, Checked, Finding, Report, Unjudged, documented};
use crate::policy::{RULES, Rule, Severity};
use crate::request::yaml::Place;

/// How text is shown.
#[derive(Debug, Clone, Copy, Default)]
pub struct Style {
    /// Whether words are coloured.
    pub colour: bool,
    /// Where the lines of the table are cut, in characters.
    pub width: Option<usize>,
    /// Whether patches are shown.
    pub hints: bool,
}

impl Style {
    fn word(self, word: &str, colour: u8) -> String {
        if self.colour { format!("\u{1b}[{colour}m{word}\u{1b}[0m") } else { word.to_owned() }
    }
}

const RED: u8 = 31;
const YELLOW: u8 = 33;

/// For people: each pod with who can read what, then its findings, one a line, then the sum.
pub fn text(report: &Report, style: Style) -> String {
    let mut out = String::new();
    for pod in &report.pods {
        let _ = writeln!(out, "{}: {}", at(&pod.file, pod.place), printable(&name(pod)));
        table(&mut out, &pod.access, style.width);
        for finding in &pod.findings {
            let word = if finding.refuses { style.word("refused", RED) } else { style.word("warning", YELLOW) };
            let text = printable(&finding.fault.to_string());
            let _ = writeln!(out, "{}: {word} {text}", at_column(&pod.file, finding.place));
            if let Some(hint) = finding.hint.as_ref().filter(|_| style.hints) {
                let _ = writeln!(out, "  patch: {hint}");
            }
        }
        out.push('\n');
    }
    for it in &report.unjudged {
        let word = style.word("not judged", YELLOW);
        let _ = writeln!(out, "{}: {word} {}", at_column(&it.file, Some(it.place)), printable(&unjudged(it)));
    }
    for fault in &report.unreadable {
        let word = style.word("unreadable", RED);
        let _ = writeln!(out, "{}: {word} {}", at_column(&fault.file, fault.place), printable(&fault.text));
    }
    let (refused, warned) = report.counts();
    let count = report.pods.len();
    let clean = count.saturating_sub(refused).saturating_sub(warned);
    let pods = if count == 1 { "pod" } else { "pods" };
    let _ = write!(out, "{count} {pods}: {refused} refused, {warned} with warnings, {clean} clean");
    for (count, what) in [(report.unjudged.len(), "not judged"), (report.unreadable.len(), "unreadable")] {
        if count > 0 {
            let _ = write!(out, "; {count} {what}");
        }
    }
    out.push('\n');
    out
}

/// Without control characters, nor others that change how the line looks.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '"' | '\'' | '\\' => out.push(char),
            char => out.extend(char.escape_debug()),
        }
    }
    out
}

fn name(pod: &Checked) -> String {
    format!("{} {}/{}", pod.kind, pod.namespace, pod.name)
}

fn unjudged(it: &Unjudged) -> String {
    format!(
        "{} {}: it uses the driver, and where its pods are described is not known: check what it makes of them, or the \
         cluster (--cluster)",
        it.kind, it.name
    )
}

/// The file of a report's part; none for the standard input and a cluster.
fn file(file: &str) -> Option<&str> {
    Some(file).filter(|file| !matches!(*file, "" | "-"))
}

fn shown_file(name: &str) -> String {
    match name {
        "" => "cluster".into(),
        "-" => "stdin".into(),
        name => printable(name),
    }
}

fn at(name: &str, place: Option<Place>) -> String {
    match place {
        Some(place) => format!("{}:{}", shown_file(name), place.line),
        None => shown_file(name),
    }
}

fn at_column(name: &str, place: Option<Place>) -> String {
    match place {
        Some(place) => format!("{}:{}:{}", shown_file(name), place.line, place.column),
        None => shown_file(name),
    }
}

/// A container for the first column. Two colons at the beginning of a line are a command to GitHub's runner.
fn called(access: &Access) -> String {
    let name = printable(&access.container).replace("::", ":\\u{3a}");
    match access.product {
        Some(product) => format!("{name} ({product})"),
        None => name,
    }
}

fn table(out: &mut String, access: &[Access], width: Option<usize>) {
    const HEAD: [&str; 5] = ["container", "reads", "what", "how", "where or why"];
    let row = |it: &Access| {
        let reads = if it.reads { "yes" } else { "no" };
        [called(it), reads.to_owned(), printable(&it.what), it.how.to_owned(), printable(&it.why)]
    };
    let rows: Vec<[String; 5]> = std::iter::once(HEAD.map(str::to_owned)).chain(access.iter().map(row)).collect();
    if access.is_empty() {
        let _ = writeln!(out, "  no container is given a secret");
        return;
    }
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let line = format!("  {}", cells.join("  "));
        let line = line.trim_end();
        let _ = match width {
            Some(most) if line.chars().count() > most => {
                let cut: String = line.chars().take(most.saturating_sub(1)).collect();
                writeln!(out, "{cut}…")
            }
            _ => writeln!(out, "{line}"),
        };
    }
}

/// For programs. `version` is raised when a field changes its meaning or goes.
pub fn json(report: &Report) -> String {
    let (refused, warned) = report.counts();
    let pods: Vec<Json> = report.pods.iter().map(pod_json).collect();
    let unreadable: Vec<Json> = report
        .unreadable
        .iter()
        .map(|fault| {
            let (line, column) = numbers(fault.place);
            json!({"file": fault.file, "line": line, "column": column, "message": fault.text})
        })
        .collect();
    let unjudged: Vec<Json> = report
        .unjudged
        .iter()
        .map(|it| {
            let Place { line, column } = it.place;
            json!({"file": it.file, "line": line, "column": column, "kind": it.kind, "name": it.name})
        })
        .collect();
    let summary = json!({"pods": report.pods.len(), "refused": refused, "warned": warned});
    let whole = json!({
        "version": 1, "pods": pods, "unreadable": unreadable, "unjudged": unjudged, "summary": summary,
    });
    format!("{whole:#}\n")
}

fn numbers(place: Option<Place>) -> (Option<usize>, Option<usize>) {
    (place.map(|place| place.line), place.map(|place| place.column))
}

fn pod_json(pod: &Checked) -> Json {
    let access: Vec<Json> = pod
        .access
        .iter()
        .map(|it| {
            json!({
                "container": it.container, "product": it.product, "what": it.what, "how": it.how, "reads": it.reads,
                "why": it.why,
            })
        })
        .collect();
    let findings: Vec<Json> = pod.findings.iter().map(finding_json).collect();
    json!({
        "file": pod.file, "line": numbers(pod.place).0, "kind": pod.kind, "namespace": pod.namespace,
        "name": pod.name, "access": access, "findings": findings,
    })
}

fn finding_json(finding: &Finding) -> Json {
    let (line, column) = numbers(finding.place);
    json!({
        "code": finding.fault.code.0, "severity": if finding.refuses { "refuse" } else { "warn" },
        "waived": finding.waived, "field": finding.fault.field, "line": line, "column": column, "message": finding.fault.to_string(),
        "change": finding.rule().map(|rule| rule.change), "patch": finding.hint,
    })
}

/// For code scanning.
pub fn sarif(report: &Report) -> String {
    let mut rules: Vec<Json> = RULES
        .iter()
        .map(|rule| {
            let level = if rule.severity == Severity::Refuse { "error" } else { "warning" };
            json!({
                "id": rule.code.0, "shortDescription": {"text": rule.text},
                "help": {"text": format!("{}. Why: {}.", rule.change, rule.source)},
                "defaultConfiguration": {"level": level},
            })
        })
        .collect();
    let others = documented().filter(|(code, ..)| !RULES.iter().any(|rule| rule.code.0 == *code));
    rules.extend(others.map(|(code, what, change)| {
        json!({
            "id": code, "shortDescription": {"text": what}, "help": {"text": change},
            "defaultConfiguration": {"level": "error"},
        })
    }));
    // What is in no file has a name alone.
    let location = |path: &str, place: Option<Place>, name: &str| match file(path) {
        Some(path) => {
            // SARIF has no null region; without a place it is the file's first line.
            let place = place.unwrap_or(Place { line: 1, column: 1 });
            let region = json!({"startLine": place.line, "startColumn": place.column});
            json!([{"physicalLocation": {"artifactLocation": {"uri": uri(path)}, "region": region}}])
        }
        None => json!([{"logicalLocations": [{"fullyQualifiedName": name, "kind": "resource"}]}]),
    };
    let mut results = Vec::new();
    for pod in &report.pods {
        let name = name(pod);
        results.extend(pod.findings.iter().map(|finding| {
            json!({
                "ruleId": finding.fault.code.0, "level": if finding.refuses { "error" } else { "warning" },
                "message": {"text": format!("{name}: {}", finding.fault)},
                "locations": location(&pod.file, finding.place, &name),
            })
        }));
    }
    let unreadable = report.unreadable.iter().map(|fault| {
        let name = shown_file(&fault.file);
        let locations = location(&fault.file, fault.place, &name);
        json!({"level": "error", "message": {"text": fault.text}, "locations": locations})
    });
    let unjudged = report.unjudged.iter().map(|it| {
        let locations = location(&it.file, Some(it.place), &it.name);
        json!({"level": "note", "message": {"text": unjudged(it)}, "locations": locations})
    });
    let notes: Vec<Json> = unreadable.chain(unjudged).collect();
    let driver = json!({"name": "sealmount", "version": env!("CARGO_PKG_VERSION"), "rules": rules});
    let whole = json!({
        "version": "2.1.0", "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "runs": [{
            "tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results,
            "invocations": [{
                "executionSuccessful": report.unreadable.is_empty(), "toolExecutionNotifications": notes,
            }],
        }],
    });
    format!("{whole:#}\n")
}

/// A path as a URI reference (RFC 3986): relative, or of this machine.
fn uri(path: &str) -> String {
    let scheme = if path.starts_with('/') { "file://" } else { "" };
    let mut out = scheme.to_owned();
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => out.push(char::from(byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// For GitHub's annotations: one workflow command a line. What is in no file is told by its name alone.
pub fn github(report: &Report) -> String {
    let mut out = String::new();
    let mut line = |level: &str, path: &str, place: Option<Place>, title: &str, message: &str| {
        let mut properties = Vec::new();
        if let Some(path) = file(path) {
            properties.push(format!("file={}", property(path)));
            if let Some(place) = place {
                properties.push(format!("line={},col={}", place.line, place.column));
            }
        }
        properties.push(format!("title={}", property(title)));
        let _ = writeln!(out, "::{level} {}::{}", properties.join(","), data(&printable(message)));
    };
    for pod in &report.pods {
        for finding in &pod.findings {
            let level = if finding.refuses { "error" } else { "warning" };
            let message = format!("{}: {}", name(pod), finding.fault);
            line(level, &pod.file, finding.place, finding.fault.code.0, &message);
        }
    }
    for it in &report.unjudged {
        line("notice", &it.file, Some(it.place), "not judged", &unjudged(it));
    }
    for fault in &report.unreadable {
        line("error", &fault.file, fault.place, "unreadable", &fault.text);
    }
    out
}

/// What a workflow command takes as its message (GitHub, actions/toolkit, command.ts).
fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// And as a property.
fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

/// The rules as a Markdown table, for the documents: with `whole` what each is about, why, and whether it may be waived.
pub fn rules(whole: bool) -> String {
    let mut table = match whole {
        true => {
            "| code | what is wrong | what to write | why | | may be waived |\n|---|---|---|---|---|---|\n".to_owned()
        }
        false => "| code | | what is wrong | what to write |\n|---|---|---|---|\n".to_owned(),
    };
    for Rule { code, severity, text, change, source, waivable, .. } in RULES {
        let severity = match severity {
            Severity::Refuse => "refuses",
            Severity::Warn => "warns",
        };
        let waivable = if *waivable { "yes" } else { "never" };
        table.push_str(&match whole {
            true => format!("| `{code}` | {text} | {change} | {source} | {severity} | {waivable} |\n"),
            false => format!("| `{code}` | {severity} | {text} | {change} |\n"),
        });
    }
    table
}
