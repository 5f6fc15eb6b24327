//! What a check found, for people, for programs, for code scanning (SARIF 2.1.0) and for GitHub's annotations.

use std::fmt::Write;

use serde_json::{Value as Json, json};

use super::{Access, Checked, Finding, Report};
use crate::policy::{RULES, Severity};
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
        let _ = writeln!(out, "{}: {} {}/{}", at(&pod.file, pod.place), pod.kind, pod.namespace, pod.name);
        table(&mut out, &pod.access, style.width);
        for finding in &pod.findings {
            let word = if finding.refuses { style.word("refused", RED) } else { style.word("warning", YELLOW) };
            let _ = writeln!(out, "{}: {word} {}", at_column(&pod.file, finding.place), finding.fault);
            if let Some(hint) = finding.hint.as_ref().filter(|_| style.hints) {
                let _ = writeln!(out, "  patch: {hint}");
            }
        }
        out.push('\n');
    }
    for fault in &report.unreadable {
        let word = style.word("unreadable", RED);
        let _ = writeln!(out, "{}: {word} {}", at_column(&fault.file, fault.place), fault.text);
    }
    let (refused, warned) = report.counts();
    let count = report.pods.len();
    let clean = count.saturating_sub(refused).saturating_sub(warned);
    let pods = if count == 1 { "pod" } else { "pods" };
    let _ = writeln!(out, "{count} {pods}: {refused} refused, {warned} with warnings, {clean} clean");
    out
}

fn file(file: &str) -> &str {
    match file {
        "" => "cluster",
        "-" => "stdin",
        file => file,
    }
}

fn at(name: &str, place: Option<Place>) -> String {
    match place {
        Some(place) => format!("{}:{}", file(name), place.line),
        None => file(name).to_owned(),
    }
}

fn at_column(name: &str, place: Option<Place>) -> String {
    match place {
        Some(place) => format!("{}:{}:{}", file(name), place.line, place.column),
        None => file(name).to_owned(),
    }
}

fn called(access: &Access) -> String {
    match access.product {
        Some(product) => format!("{} ({product})", access.container),
        None => access.container.clone(),
    }
}

fn table(out: &mut String, access: &[Access], width: Option<usize>) {
    const HEAD: [&str; 5] = ["container", "reads", "what", "how", "where or why"];
    let row = |it: &Access| {
        let reads = if it.reads { "yes" } else { "no" };
        [called(it), reads.to_owned(), it.what.clone(), it.how.to_owned(), it.why.clone()]
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
    let summary = json!({"pods": report.pods.len(), "refused": refused, "warned": warned});
    let whole = json!({"version": 1, "pods": pods, "unreadable": unreadable, "summary": summary});
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
        "field": finding.fault.field, "line": line, "column": column, "message": finding.fault.to_string(),
        "change": finding.rule().map(|rule| rule.change), "patch": finding.hint,
    })
}

/// For code scanning.
pub fn sarif(report: &Report) -> String {
    let rules: Vec<Json> = RULES
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
    let location = |file: &str, place: Option<Place>| {
        // SARIF has no null region; without a place it is the file's first line.
        let place = place.unwrap_or(Place { line: 1, column: 1 });
        let region = json!({"startLine": place.line, "startColumn": place.column});
        json!([{"physicalLocation": {"artifactLocation": {"uri": file}, "region": region}}])
    };
    let mut results = Vec::new();
    for pod in &report.pods {
        results.extend(pod.findings.iter().map(|finding| {
            json!({
                "ruleId": finding.fault.code.0, "level": if finding.refuses { "error" } else { "warning" },
                "message": {"text": format!("{} {}/{}: {}", pod.kind, pod.namespace, pod.name, finding.fault)},
                "locations": location(&pod.file, finding.place),
            })
        }));
    }
    let notes: Vec<Json> = report
        .unreadable
        .iter()
        .map(|fault| {
            json!({"level": "error", "message": {"text": fault.text}, "locations": location(&fault.file, fault.place)})
        })
        .collect();
    let driver = json!({"name": "sealmount", "version": env!("CARGO_PKG_VERSION"), "rules": rules});
    let whole = json!({
        "version": "2.1.0", "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "runs": [{
            "tool": {"driver": driver}, "results": results,
            "invocations": [{"executionSuccessful": notes.is_empty(), "toolExecutionNotifications": notes}],
        }],
    });
    format!("{whole:#}\n")
}

/// For GitHub's annotations: one workflow command a line.
pub fn github(report: &Report) -> String {
    let mut out = String::new();
    let mut line = |level: &str, file: &str, place: Option<Place>, title: &str, message: &str| {
        let mut properties = vec![format!("file={}", property(file))];
        if let Some(place) = place {
            properties.push(format!("line={},col={}", place.line, place.column));
        }
        properties.push(format!("title={}", property(title)));
        let _ = writeln!(out, "::{level} {}::{}", properties.join(","), data(message));
    };
    for pod in &report.pods {
        for finding in &pod.findings {
            let level = if finding.refuses { "error" } else { "warning" };
            line(level, &pod.file, finding.place, finding.fault.code.0, &finding.fault.to_string());
        }
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
