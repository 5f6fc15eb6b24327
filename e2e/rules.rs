//! The house rules that the compiler does not check: which room may use which, where privilege and secrets may be,
//! and what the tree must not hold. Each rule is a function from text to faults, and has a sample that breaks it.
// A rule stops at what it cannot read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

/// The arrows between rooms (`src/<room>.rs` and `src/<room>/`). They point down only: a room uses what stands in its
/// line, itself, and the two leaves `request` and `secret`, which hold the plain facts everyone speaks of.
const ARROWS: &[(&str, &[&str])] = &[
    ("lib", &[]),
    ("main", &["cli"]),
    ("cli", &["admin", "broker", "check", "config", "harden", "log", "node", "pods", "policy"]),
    ("check", &["config", "pods", "policy"]),
    // The only file that knows every concrete type.
    (
        "node",
        &[
            "admin",
            "broker",
            "config",
            "csi",
            "events",
            "harden",
            "health",
            "log",
            "metrics",
            "pods",
            "policy",
            "publish",
            "registration",
            "schedule",
            "source",
        ],
    ),
    ("csi", &["broker::client", "broker::wire", "config", "metrics", "pods", "policy", "publish", "source"]),
    ("registration", &["csi"]),
    ("admin", &["health", "publish"]),
    ("schedule", &[]),
    ("health", &[]),
    (
        "publish",
        &["broker::client", "broker::wire", "config", "events", "metrics", "pods", "policy", "schedule", "source"],
    ),
    ("pods", &["broker::client", "broker::wire", "metrics", "policy"]),
    ("source", &["config", "metrics", "policy"]),
    ("events", &["metrics"]),
    ("config", &["policy"]),
    ("policy", &[]),
    ("metrics", &[]),
    ("log", &[]),
    ("harden", &[]),
    // The privileged half: nothing of the worker.
    ("broker", &["harden"]),
    ("request", &[]),
    ("secret", &[]),
];
const LEAVES: [&str; 2] = ["request", "secret"];

/// Crates that only these files may use; a name ending in `/` is a directory.
const CRATES: &[(&[&str], &[&str])] = &[
    (
        &["tonic", "tonic_prost", "prost"],
        &["admin.rs", "csi.rs", "csi/", "node.rs", "registration.rs", "pods/kubelet.rs"],
    ),
    (&["kube", "k8s_openapi"], &["pods/", "events.rs"]),
    (&["vaultrs", "rustify", "reqwest"], &["source/vault.rs", "source/vault/"]),
    // `check` asks how wide its terminal is.
    (&["nix", "rustix", "libc"], &["broker/", "harden.rs", "cli/check.rs"]),
    (&["landlock", "seccompiler"], &["harden.rs"]),
];

/// Rooms that may use only these crates: a line for each room whose smallness is a promise.
const ONLY: &[(&str, &[&str])] = &[
    // No runtime, no TLS, no HTTP, no YAML, no JSON beside root.
    ("broker", &["libc", "nix", "postcard", "rustix", "serde", "thiserror", "tracing"]),
    ("policy", &["jiff", "serde", "thiserror"]),
    ("request", &["granit_parser", "jiff", "serde", "sha2", "strsim", "thiserror"]),
    ("secret", &["hmac", "secrecy", "sha2", "zeroize"]),
];

/// What a pure room must not name: policy answers from what it is given, so that `check` and the node agree.
const IMPURE: [&str; 8] =
    ["async", "await", "std::fs", "std::env", "std::net", "std::process", "SystemTime::now", "Instant::now"];

/// Where unsafe may stand.
const UNSAFE: [&str; 3] = ["harden.rs", "broker/mounts.rs", "broker/volume.rs"];

/// Lines of the privileged half, without comments, blanks and tests. What they hold: the wire and its types (120), the
/// volume on the kernel's side (620), the poll loop with its children (330), sockets and worker (240).
const BROKER_LINES: usize = 1320;

/// A source file: its path below the tree's root, its text, and its code (see [`code_of`]).
struct Source {
    path: String,
    text: String,
    code: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.into(), text: text.into(), code: without_tests(&code_of(text)) }
    }

    /// The path below `src/`.
    fn name(&self) -> &str {
        self.path.strip_prefix("src/").unwrap_or(&self.path)
    }

    /// The room: `csi` for `src/csi.rs` and `src/csi/parse.rs`.
    fn room(&self) -> &str {
        self.name().split('/').next().unwrap().trim_end_matches(".rs")
    }

    /// The part of the broker that the worker runs is a room of its own.
    fn privileged(&self) -> bool {
        self.room() == "broker" && self.name() != "broker/client.rs"
    }

    fn is_test(&self) -> bool {
        self.path.ends_with("/tests.rs")
    }

    fn in_one_of(&self, names: &[&str]) -> bool {
        names.iter().any(|n| if n.ends_with('/') { self.name().starts_with(n) } else { self.name() == *n })
    }
}

// === reading Rust just well enough ===

/// The text with comments, strings and characters blanked, each byte by a space; newlines stay.
fn code_of(text: &str) -> String {
    let b = text.as_bytes();
    let mut out = b.to_vec();
    let blank = |out: &mut Vec<u8>, from: usize, to: usize| {
        out[from..to].iter_mut().filter(|c| **c != b'\n').for_each(|c| *c = b' ');
    };
    let at = |i: usize| b.get(i).copied().unwrap_or(0);
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    let mut i = 0;
    while i < b.len() {
        let start = i;
        if at(i) == b'/' && at(i + 1) == b'/' {
            while i < b.len() && b[i] != b'\n' {
                i += 1;
            }
        } else if at(i) == b'/' && at(i + 1) == b'*' {
            let mut depth = 0;
            loop {
                match (at(i), at(i + 1)) {
                    (b'/', b'*') => (depth, i) = (depth + 1, i + 2),
                    (b'*', b'/') => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
                if depth == 0 || i >= b.len() {
                    break;
                }
            }
        } else if at(i) == b'r' && (i == 0 || !word(b[i - 1]) || b[i - 1] == b'b') && {
            let hashes = b[i + 1..].iter().take_while(|c| **c == b'#').count();
            at(i + 1 + hashes) == b'"'
        } {
            let hashes = b[i + 1..].iter().take_while(|c| **c == b'#').count();
            let end = format!("\"{}", "#".repeat(hashes));
            let body = i + 2 + hashes;
            i = text[body..].find(&end).map_or(b.len(), |p| body + p + end.len());
        } else if at(i) == b'"' {
            i += 1;
            while i < b.len() && b[i] != b'"' {
                i += if b[i] == b'\\' { 2 } else { 1 };
            }
            i += 1;
        } else if at(i) == b'\'' && (at(i + 1) == b'\\' || char_ends(text, i + 1) == Some(b'\'')) {
            i += 1;
            while i < b.len() && b[i] != b'\'' {
                i += if b[i] == b'\\' { 2 } else { 1 };
            }
            i += 1;
        } else {
            i += 1;
            continue;
        }
        i = i.min(b.len());
        blank(&mut out, start, i);
    }
    String::from_utf8(out).unwrap()
}

/// The byte after the character at `i`: tells 'a' from a lifetime.
fn char_ends(text: &str, i: usize) -> Option<u8> {
    let width = text.get(i..)?.chars().next()?.len_utf8();
    text.as_bytes().get(i + width).copied()
}

/// Blanks every item under `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    let mut out = code.to_owned();
    let mut from = 0;
    while let Some(start) = out[from..].find("#[cfg(test)]").map(|p| from + p) {
        let body = out[start..].find(['{', ';']).map_or(out.len(), |p| start + p);
        let end = if out[body..].starts_with('{') { closing(&out, body) } else { (body + 1).min(out.len()) };
        let blank: String = out[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        out.replace_range(start..end, &blank);
        from = start + blank.len();
    }
    out
}

/// Behind the bracket that closes the one at `open`.
fn closing(code: &str, open: usize) -> usize {
    let mut depth = 0;
    for (i, c) in code[open..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return open + i + 1;
        }
    }
    code.len()
}

/// Names, `::`, and single characters.
fn tokens(code: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let mut rest = code.trim_start();
    while !rest.is_empty() {
        let word = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let first = rest.chars().next().map_or(0, char::len_utf8);
        let len = if word > 0 {
            word
        } else if rest.starts_with("::") {
            2
        } else {
            first
        };
        out.push(&rest[..len]);
        rest = rest[len..].trim_start();
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Every path in this code, with `use` trees spelled out: `use crate::{a, b::{c, d}}` gives three.
fn paths(code: &str) -> BTreeSet<String> {
    let tokens = tokens(code);
    let at = |i: usize| tokens.get(i).copied().unwrap_or("");
    let mut found = BTreeSet::new();
    let mut i = 0;
    while i < tokens.len() {
        let goes_on = i > 0 && (at(i - 1) == "." || at(i - 1) == "::" && i > 1 && at(i - 2).ends_with(is_word));
        if at(i) == "use" {
            i = use_tree(&tokens, i + 1, "", &mut found);
        } else if at(i).starts_with(is_word) && at(i + 1) == "::" && !goes_on {
            let mut path = at(i).to_owned();
            while at(i + 1) == "::" && at(i + 2).starts_with(is_word) {
                path = format!("{path}::{}", at(i + 2));
                i += 2;
            }
            found.insert(path);
            i += 1;
        } else {
            i += 1;
        }
    }
    found
}

/// Spells out the `use` tree at token `i`; gives the token behind it.
fn use_tree(tokens: &[&str], mut i: usize, prefix: &str, found: &mut BTreeSet<String>) -> usize {
    let mut path = prefix.to_owned();
    loop {
        match tokens.get(i).copied().unwrap_or(";") {
            "::" => {}
            "{" => {
                while !["}", ";"].contains(tokens.get(i).unwrap_or(&";")) {
                    i = use_tree(tokens, i + 1, &path, found);
                }
                return i + 1;
            }
            "as" => i += 1,
            name if name.starts_with(is_word) || name == "*" => {
                let colons = if path.is_empty() { "" } else { "::" };
                path = format!("{path}{colons}{name}");
            }
            _ => {
                if path != prefix {
                    found.insert(path);
                }
                return i;
            }
        }
        i += 1;
    }
}

// === the rules ===

fn arrows(source: &Source) -> Vec<String> {
    let room = source.room();
    let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == room) else {
        return vec![format!("{}: a new room: give it a line in ARROWS", source.path)];
    };
    let mut faults = Vec::new();
    for path in paths(&source.code) {
        let mut segments: Vec<&str> = path.split("::").collect();
        let top_level = !source.name().contains('/');
        if segments.starts_with(&["super", "super"]) {
            faults.push(format!("{}: `{path}`: write crate::", source.path));
        }
        match segments[0] {
            "crate" => {}
            "sealmount" if room == "main" => {}
            "super" if top_level && room != "lib" => {}
            // `super` in a room's file is the room; for the broker the side matters.
            "super" if room == "broker" => segments.splice(0..1, ["crate", "broker"]).for_each(drop),
            _ => continue,
        }
        let Some(used) = segments.get(1) else { continue };
        let part = format!("{used}::{}", segments.get(2).unwrap_or(&""));
        let own = *used == room;
        let fine = if source.name() == "broker/client.rs" {
            // What both sides know stands in broker.rs and broker/wire.rs.
            let privileged = ["layout", "mounts", "serve", "volume"].contains(segments.get(2).unwrap_or(&""));
            LEAVES.contains(used) || *used == "metrics" || *used == "harden" || (own && !privileged)
        } else if own && source.privileged() {
            part != "broker::client"
        } else {
            own || LEAVES.contains(used) || allowed.contains(used) || allowed.contains(&part.as_str())
        };
        if !fine {
            faults.push(format!("{}: `{path}`: no arrow from {room} to {used}", source.path));
        }
    }
    faults
}

fn crates(source: &Source, dependencies: &BTreeSet<String>) -> Vec<String> {
    let mut faults = Vec::new();
    let used = paths(&source.code);
    let used: BTreeSet<&str> = used.iter().filter_map(|p| p.trim_start_matches(':').split("::").next()).collect();
    for (names, files) in CRATES {
        if !source.in_one_of(files) {
            let wrong = names.iter().filter(|n| used.contains(**n));
            faults.extend(wrong.map(|n| format!("{}: `{n}` belongs into {}", source.path, files.join(", "))));
        }
    }
    let small = ONLY.iter().filter(|(room, _)| *room == source.room() && (*room != "broker" || source.privileged()));
    for (room, allowed) in small {
        let wrong = used.iter().filter(|u| dependencies.contains(**u) && !allowed.contains(u));
        faults.extend(wrong.map(|u| format!("{}: {room} does without `{u}`", source.path)));
    }
    faults
}

fn purity(source: &Source) -> Vec<String> {
    let is_named = |name: &str| {
        source
            .code
            .match_indices(name)
            .any(|(i, _)| !source.code[..i].ends_with(is_word) && !source.code[i + name.len()..].starts_with(is_word))
    };
    let named = IMPURE.iter().filter(|name| source.room() == "policy" && is_named(name));
    named.map(|name| format!("{}: policy is pure: `{name}`", source.path)).collect()
}

fn unsafety(source: &Source) -> Vec<String> {
    let mut faults = Vec::new();
    let lines: Vec<&str> = source.text.lines().collect();
    let uses: Vec<usize> = (source.code.lines().enumerate())
        .filter(|(_, line)| line.split(|c| !is_word(c)).any(|w| w == "unsafe"))
        .map(|(i, _)| i)
        .collect();
    if !uses.is_empty() && !source.in_one_of(&UNSAFE) {
        faults.push(format!("{}:{}: unsafe belongs into {}", source.path, uses[0] + 1, UNSAFE.join(", ")));
    }
    if source.name() == "broker/volume.rs" {
        let start = source.code.find("fn fork(").unwrap_or(0);
        let fork = start..source.code[start..].find('{').map_or(start, |p| closing(&source.code, start + p));
        let line = |at: usize| source.code[..at].matches('\n').count();
        let outside = uses.iter().filter(|i| !(line(fork.start)..=line(fork.end)).contains(*i));
        faults.extend(outside.map(|i| format!("{}:{}: unsafe only for the fork", source.path, i + 1)));
    }
    for i in uses {
        if !lines[i.saturating_sub(6)..=i].iter().any(|line| line.contains("SAFETY:")) {
            faults.push(format!("{}:{}: unsafe without a SAFETY line", source.path, i + 1));
        }
    }
    faults
}

/// A struct or enum as written.
struct Type<'a> {
    path: &'a str,
    name: String,
    /// The names its fields' types are made of.
    holds: BTreeSet<String>,
    /// What stands between the item before and this one.
    attributes: &'a str,
}

fn types(source: &Source) -> Vec<Type<'_>> {
    let mut found = Vec::new();
    for (keyword, is_enum) in [("struct ", false), ("enum ", true)] {
        for (i, _) in source.code.match_indices(keyword).filter(|(i, _)| !source.code[..*i].ends_with(is_word)) {
            let rest = &source.code[i + keyword.len()..];
            let name: String = rest.chars().take_while(|c| is_word(*c)).collect();
            let Some(open) = rest.find(['{', ';']) else { continue };
            let end = if rest[open..].starts_with('{') { closing(rest, open) } else { open };
            let mut depth = 0;
            let mut holds = BTreeSet::new();
            for token in tokens(&rest[name.len()..end]) {
                match token {
                    "{" | "(" => depth += 1,
                    "}" | ")" => depth -= 1,
                    // On the first level of an enum stand its variants' names.
                    word if !is_enum || depth > 1 => drop(holds.insert(word.to_owned())),
                    _ => {}
                }
            }
            let before = source.code[..i].rfind(['}', ';']).map_or(0, |p| p + 1);
            found.push(Type { path: &source.path, name, holds, attributes: &source.code[before..i] });
        }
    }
    found
}

/// Types that hold a secret, also through another type, must not derive a way to print or to store it.
fn printable_secrets(sources: &[Source]) -> Vec<String> {
    const HOLDERS: [&str; 6] = ["SecretBytes", "SecretText", "SecretString", "SecretSlice", "SecretBox", "Zeroizing"];
    let all: Vec<Type> = sources.iter().flat_map(types).collect();
    let mut secret: BTreeSet<usize> = BTreeSet::new();
    // A name means the type of the same file, or else the only type of that name.
    let meant = |word: &str, path: &str| {
        let named: Vec<usize> = (0..all.len()).filter(|i| all[*i].name == word).collect();
        let own = named.iter().copied().find(|i| all[*i].path == path);
        own.or(if named.len() == 1 { Some(named[0]) } else { None })
    };
    loop {
        let holds = |it: &Type| {
            let mut words = it.holds.iter();
            words.any(|w| HOLDERS.contains(&w.as_str()) || meant(w, it.path).is_some_and(|i| secret.contains(&i)))
        };
        let more: Vec<usize> = (0..all.len()).filter(|i| !secret.contains(i) && holds(&all[*i])).collect();
        if more.is_empty() {
            break;
        }
        secret.extend(more);
    }
    let mut faults = Vec::new();
    for Type { path, name, attributes, .. } in secret.iter().map(|i| &all[*i]) {
        for derive in attributes.split("derive(").skip(1) {
            let list = &derive[..derive.find(')').unwrap_or(derive.len())];
            let wrong = list.split(|c| !is_word(c)).find(|w| ["Debug", "Serialize", "Display"].contains(w));
            faults.extend(wrong.map(|w| format!("{path}: {name} holds a secret and derives {w}")));
        }
    }
    faults
}

/// Messages that carry what must not be printed are listed in proto/build.rs.
fn printable_messages(proto: &str, build: &str) -> Vec<String> {
    let package = proto.lines().find_map(|l| l.strip_prefix("package ")).unwrap_or("").trim_end_matches(';');
    let mut faults = Vec::new();
    let mut message = "";
    for line in proto.lines() {
        if let Some(rest) = line.trim().strip_prefix("message ") {
            message = rest.split([' ', '{']).next().unwrap();
        }
        let field = line.split("//").next().unwrap().split('=').next().unwrap().split_whitespace().next_back();
        if matches!(field, Some("secrets" | "volume_context")) && !build.contains(&format!("\".{package}.{message}\""))
        {
            faults.push(format!("proto: {message} holds `{}`: add it to NO_DEBUG in proto/build.rs", field.unwrap()));
        }
    }
    faults
}

fn dependency_comments(manifest: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let (mut inside, mut before) = (false, "");
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.ends_with("dependencies]");
        } else if inside && line.contains(" = ") && !line.starts_with('#') {
            let said = before.strip_prefix("# ").is_some_and(|text| !text.starts_with("---") && !text.is_empty());
            if !said {
                faults.push(format!("Cargo.toml: what is it for? `{line}`"));
            }
        }
        before = line;
    }
    faults
}

/// Lines of code in the privileged half.
fn broker_lines(sources: &[Source]) -> usize {
    let privileged = sources.iter().filter(|s| s.path.starts_with("src/") && s.privileged() && !s.is_test());
    privileged.flat_map(|s| s.code.lines()).filter(|line| !line.trim().is_empty()).count()
}

/// Three blocks: std, crates, this crate.
fn import_blocks(source: &Source, dependencies: &BTreeSet<String>) -> Vec<String> {
    let kind = |line: &str| {
        let path = line.split_once("use ")?.1;
        let first = path.split(|c: char| !(c.is_alphanumeric() || c == '_')).next()?;
        Some(match first {
            "std" | "core" | "alloc" => 0,
            dependency if dependencies.contains(dependency) => 1,
            _ => 2,
        })
    };
    let mut last = 0;
    let mut blank = true;
    for line in source.text.lines() {
        let is_use = line.starts_with("use ") || line.starts_with("pub use ");
        let continues = line.starts_with([' ', '}', '#']) || line.starts_with("//") || line.starts_with("mod ");
        if is_use && let Some(next) = kind(line) {
            let wrong = if blank { next < last } else { next != last };
            if wrong {
                return vec![format!("{}: imports are three blocks, std, crates, crate: `{line}`", source.path)];
            }
            last = next;
            blank = false;
        } else if line.is_empty() {
            blank = true;
        } else if !continues && !line.starts_with("pub mod ") {
            break;
        }
    }
    Vec::new()
}

fn file_names(path: &str) -> Vec<String> {
    let stem = Path::new(path).file_stem().and_then(|s| s.to_str()).unwrap_or("");
    let vague = ["util", "utils", "helper", "helpers", "manager", "common", "misc"].contains(&stem);
    if vague || (stem == "mod" && path.starts_with("src/")) {
        return vec![format!("{path}: name the file after what it does")];
    }
    Vec::new()
}

/// Paths of one machine, and notes to oneself.
fn leftovers(path: &str, text: &str) -> Vec<String> {
    let machine = [
        concat!("/ro", "ot/"),
        concat!("/wo", "rk/"),
        concat!("/ho", "me/"),
        concat!("/tm", "p/wt"),
        concat!("/tm", "p/tgt"),
    ];
    let notes = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];
    let mut faults = Vec::new();
    for (i, line) in text.lines().enumerate() {
        for needle in machine {
            // Only where a path starts: what a process sees as its root is no machine's.
            let starts = |p: usize| line[..p].chars().next_back().is_none_or(|c| " \t\"'`(=:,<[".contains(c));
            if line.match_indices(needle).any(|(p, _)| starts(p)) {
                faults.push(format!("{path}:{}: a path of one machine: {needle}", i + 1));
            }
        }
        let noted = notes.iter().find(|n| line.split(|c: char| !c.is_alphanumeric()).any(|w| w == **n));
        faults.extend(noted.map(|n| format!("{path}:{}: {n}", i + 1)));
    }
    faults
}

// === the tree ===

fn tree() -> Vec<(String, String)> {
    fn walk(root: &Path, below: &Path, out: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(root.join(below)).unwrap() {
            let entry = entry.unwrap();
            let path = below.join(entry.file_name());
            let name = entry.file_name();
            if entry.file_type().unwrap().is_dir() {
                if name != ".git" && name != "target" {
                    walk(root, &path, out);
                }
            } else if name != ".git"
                && let Ok(text) = fs::read_to_string(root.join(&path))
            {
                out.push((path.to_str().unwrap().to_owned(), text));
            }
        }
    }
    let mut out = Vec::new();
    walk(Path::new(env!("CARGO_MANIFEST_DIR")), Path::new(""), &mut out);
    assert!(out.iter().any(|(path, _)| path == "src/lib.rs"), "the tree is not where it was built");
    out
}

fn file(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The crate's own sources.
fn sources() -> Vec<Source> {
    let rust = tree().into_iter().filter(|(path, _)| path.starts_with("src/") && path.ends_with(".rs"));
    rust.map(|(path, text)| Source::new(&path, &text)).collect()
}

/// The names of all dependencies as Rust spells them.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let mut inside = false;
    let mut names = BTreeSet::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.ends_with("dependencies]");
        } else if inside
            && let Some((name, _)) = line.split_once(" = ")
            && !line.starts_with('#')
        {
            names.insert(name.trim().replace('-', "_"));
        }
    }
    names
}

#[track_caller]
fn none(faults: Vec<String>) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn arrows_between_rooms_point_down() {
    none(sources().iter().filter(|s| !s.is_test()).flat_map(arrows).collect());

    let wrong = |path: &str, text: &str| arrows(&Source::new(path, text));
    assert_eq!(wrong("src/policy.rs", "use crate::source::Payload;").len(), 1);
    assert_eq!(wrong("src/policy/rules.rs", "fn f() { crate::config::x() }").len(), 1);
    assert_eq!(wrong("src/source.rs", "use crate::{policy::Grant, publish::{self, Story}};").len(), 2);
    assert_eq!(wrong("src/source.rs", "use super::publish::Story;").len(), 1);
    assert_eq!(wrong("src/source/vault.rs", "use super::super::publish;").len(), 1);
    assert_eq!(wrong("src/broker/volume.rs", "use crate::broker::client::Broker;").len(), 1);
    assert_eq!(wrong("src/broker/volume.rs", "use super::{client, wire};").len(), 1);
    assert_eq!(wrong("src/broker/client.rs", "use super::mounts::Mount;").len(), 1);
    assert_eq!(wrong("src/broker/serve.rs", "use crate::{config::Config, request::VolumeId};").len(), 1);
    assert_eq!(wrong("src/publish.rs", "use crate::broker::{client::Broker, volume};").len(), 1);
    assert_eq!(wrong("src/newroom.rs", "").len(), 1);
    none(wrong(
        "src/publish.rs",
        "// use crate::csi;\nuse crate::broker::{client::Broker, wire};\nlet s = \"crate::csi::x\";",
    ));
    none(wrong("src/policy.rs", "#[cfg(test)]\nmod tests { use crate::publish::Story; }"));
}

#[test]
fn each_crate_stays_in_its_room() {
    let names = dependencies(&file("Cargo.toml"));
    none(sources().iter().filter(|s| !s.is_test()).flat_map(|s| crates(s, &names)).collect());

    let wrong = |path: &str, text: &str| crates(&Source::new(path, text), &names);
    assert_eq!(wrong("src/publish.rs", "use tonic::Status;").len(), 1);
    assert_eq!(wrong("src/publish.rs", "use ::tonic::Status;").len(), 1);
    assert_eq!(wrong("src/publish.rs", "fn f() -> nix::Result<()> { libc::fork() }").len(), 2);
    assert_eq!(wrong("src/node.rs", "use {kube::Client, std::fs};").len(), 1);
    assert_eq!(wrong("src/source.rs", "use reqwest as client;").len(), 1);
    assert_eq!(wrong("src/broker/serve.rs", "use tokio::net::UnixStream;").len(), 1);
    assert_eq!(wrong("src/policy/rules.rs", "use serde_json::Value;").len(), 1);
    none(wrong("src/broker/client.rs", "use tokio::io::unix::AsyncFd;\nuse nix::sys::socket::recvmsg;"));
    none(wrong("src/publish.rs", "fn f(x: Other) { x.tonic::<u8>(); other::tonic::f() }"));
}

#[test]
fn policy_is_pure_and_sync() {
    none(sources().iter().flat_map(purity).collect());
    assert_eq!(purity(&Source::new("src/policy.rs", "pub async fn judge() {}")).len(), 1);
    assert_eq!(purity(&Source::new("src/policy/rules.rs", "let now = std::time::SystemTime::now();")).len(), 1);
    none(purity(&Source::new("src/policy.rs", "// async\nfn f(awaited: bool) {}")));
}

#[test]
fn unsafe_stays_where_the_design_allows_it() {
    none(sources().iter().flat_map(unsafety).collect());
    assert_eq!(unsafety(&Source::new("src/csi.rs", "// SAFETY: none\nunsafe { f() }")).len(), 1);
    assert_eq!(unsafety(&Source::new("src/harden.rs", "unsafe { f() }")).len(), 1);
    let two =
        "fn fork() {\n    // SAFETY: a\n    unsafe { f() }\n}\n\nfn g() {\n    // SAFETY: b\n    unsafe { f() }\n}";
    assert_eq!(unsafety(&Source::new("src/broker/volume.rs", two)).len(), 1);
    none(unsafety(&Source::new(
        "src/harden.rs",
        "#![allow(unsafe_code)]\n// SAFETY: the kernel copies\nunsafe { f() }",
    )));
}

#[test]
fn what_holds_a_secret_cannot_be_printed() {
    none(printable_secrets(&sources()));
    for proto in ["csi", "pluginregistration"] {
        none(printable_messages(&file(&format!("proto/{proto}.proto")), &file("proto/build.rs")));
    }

    let wrong = |text: &str| printable_secrets(&[Source::new("src/x.rs", text)]);
    assert_eq!(wrong("#[derive(Clone, Debug)]\nstruct Login { token: SecretText }").len(), 1);
    assert_eq!(wrong("struct Login(SecretText);\n#[derive(Debug)]\nenum Kept { One(Login), None }").len(), 1);
    assert_eq!(wrong("#[derive(serde::Serialize)]\nstruct Login { token: SecretText }").len(), 1);
    assert_eq!(wrong("struct Login(SecretText);\n#[derive(Debug)]\nenum A { B { c: Login } }").len(), 1);
    none(wrong("struct Login(SecretText);\n#[derive(Debug)]\nstruct Name(String);"));
    none(wrong("struct Login(SecretText);\n#[derive(Debug)]\nenum Step { Login, Read(u8) }"));
    let proto = "package a.v1;\nmessage M {\n  map<string, string> secrets = 4;\n}";
    assert_eq!(printable_messages(proto, "[\".a.v1.Other\"]").len(), 1);
    none(printable_messages(proto, "[\".a.v1.M\"]"));
}

#[test]
fn each_dependency_says_what_it_is_for() {
    none(dependency_comments(&file("Cargo.toml")));
    assert_eq!(dependency_comments("[dependencies]\nserde = \"1\"").len(), 1);
    assert_eq!(dependency_comments("[dev-dependencies]\n# one\na = \"1\"\nb = \"1\"").len(), 1);
    assert_eq!(dependency_comments("[dependencies]\n# --- a heading\na = \"1\"").len(), 1);
    none(dependency_comments("[package]\nname = \"x\"\n[dependencies]\n# derives\nserde = \"1\""));
}

#[test]
fn the_privileged_half_stays_small() {
    let lines = broker_lines(&sources());
    assert!(lines <= BROKER_LINES, "{lines} lines run as root; at most {BROKER_LINES}");

    let count = |path: &str, text: &str| broker_lines(&[Source::new(path, text)]);
    let text = "//! doc\n\nfn f() {\n    g() // why\n}\n/* a\nb */\n#[cfg(test)]\nmod tests {\n    fn t() {}\n}\n";
    assert_eq!(count("src/broker/serve.rs", text), 3);
    assert_eq!(count("src/broker/client.rs", text), 0);
    assert_eq!(count("src/publish.rs", text), 0);
}

#[test]
fn imports_stand_in_three_blocks() {
    let names = dependencies(&file("Cargo.toml"));
    none(sources().iter().flat_map(|s| import_blocks(s, &names)).collect());
    let wrong = |text: &str| import_blocks(&Source::new("src/x.rs", text), &names);
    assert_eq!(wrong("use serde::Serialize;\n\nuse std::fs;\n").len(), 1);
    assert_eq!(wrong("use std::fs;\nuse serde::Serialize;\n").len(), 1);
    assert_eq!(wrong("//! doc\n\nuse std::fs;\n\nuse serde::Serialize;\nuse crate::request;\n").len(), 1);
    none(wrong("mod a;\n\nuse std::fs;\n\nuse serde::{\n    Serialize,\n};\n\nuse crate::request;\npub use a::B;\n"));
}

/// Each value of the chart with its default, as the table of its README writes it.
fn chart_values(values: &Value, name: &str) -> BTreeSet<(String, String)> {
    match values {
        Value::Object(map) if !map.is_empty() => {
            let below = |(key, value): (&String, &Value)| chart_values(value, &format!("{name}.{key}"));
            map.iter().flat_map(below).collect()
        }
        Value::String(text) if !text.is_empty() => [(name[1..].to_owned(), text.clone())].into(),
        _ => [(name[1..].to_owned(), values.to_string())].into(),
    }
}

/// Each field that a schema knows, named as the tables do: `a.*.b` below a free name, `a[].b` in a list.
fn schema_fields(schema: &Value, name: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    if !schema.is_object() {
        return all;
    }
    for (key, below) in schema["properties"].as_object().into_iter().flatten() {
        let name = format!("{name}.{key}");
        all.extend(schema_fields(below, &name));
        all.insert(name[1..].to_owned());
    }
    all.extend(schema_fields(&schema["additionalProperties"], &format!("{name}.*")));
    all.extend(schema_fields(&schema["items"], &format!("{name}[]")));
    all
}

/// The first cells of the tables' rows below a heading, and the second ones.
fn rows(page: &str, from: &str) -> BTreeSet<(String, String)> {
    let (_, below) = page.split_once(from).unwrap();
    let rows = below.lines().skip_while(|line| !line.starts_with("| `")).take_while(|line| line.starts_with("| `"));
    let cell = |row: &str, n: usize| row.split(" | ").nth(n).unwrap().trim_matches(['|', ' ', '`']).to_owned();
    rows.map(|row| (cell(row, 0), cell(row, 1))).collect()
}

/// Objects of a schema that let pass a name they do not know, and are not meant to.
fn open_objects(schema: &Value, name: &str) -> Vec<String> {
    let mut open = Vec::new();
    if !schema.is_object() {
        return open;
    }
    if schema["type"] == "object" && schema["additionalProperties"].is_null() && !name.ends_with("global") {
        open.push(format!("{name}: any name passes"));
    }
    for (key, below) in schema["properties"].as_object().into_iter().flatten() {
        open.extend(open_objects(below, &format!("{name}.{key}")));
    }
    for below in ["additionalProperties", "items"] {
        open.extend(open_objects(&schema[below], &format!("{name}.{below}")));
    }
    open
}

#[test]
fn the_chart_says_what_its_values_are_and_takes_no_other() {
    let values: Value = serde_saphyr::from_str(&file("deploy/chart/values.yaml")).unwrap();
    let values = chart_values(&values, "");
    assert_eq!(rows(&file("deploy/chart/README.md"), "\n| value |"), values);

    let schema: Value = serde_json::from_str(&file("deploy/chart/values.schema.json")).unwrap();
    none(open_objects(&schema, ""));
    let known = schema_fields(&schema, "");
    for (name, _) in &values {
        assert!(known.contains(name), "the schema refuses {name}");
    }
    // The platform file's own table, which a test holds to the code.
    let fields = rows(&file("docs/configuration.md"), "\n## Fields\n").into_iter().map(|(name, _)| name);
    assert_eq!(schema_fields(&schema["properties"]["config"], ""), fields.filter(|name| name != "version").collect());

    // The image that `make image` names by Cargo.toml's version.
    let version = |text: &str, key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim_matches([' ', '"', '=', ':']).to_owned()
    };
    assert_eq!(version(&file("deploy/chart/Chart.yaml"), "appVersion"), version(&file("Cargo.toml"), "version"));

    let schema = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    assert_eq!(open_objects(&schema(r#"{"type": "object", "properties": {"a": {"type": "object"}}}"#), "").len(), 2);
    none(open_objects(&schema(r#"{"type": "object", "additionalProperties": false}"#), ""));
}

#[test]
fn files_are_named_after_what_they_do() {
    none(tree().iter().flat_map(|(path, _)| file_names(path)).collect());
    assert_eq!(file_names("src/vault/utils.rs").len(), 1);
    assert_eq!(file_names("e2e/helper.rs").len(), 1);
    assert_eq!(file_names("src/csi/mod.rs").len(), 1);
    none(file_names("src/csi/parse.rs"));
}

#[test]
fn the_tree_holds_no_path_of_a_machine_and_no_note() {
    none(
        tree().iter().filter(|(path, _)| path != "Cargo.lock").flat_map(|(path, text)| leftovers(path, text)).collect(),
    );
    assert_eq!(leftovers("a", concat!("cd /wo", "rk/x")).len(), 1);
    assert_eq!(leftovers("a", concat!("let p = \"/ro", "ot/.cache\";")).len(), 1);
    assert_eq!(leftovers("a", concat!("// TO", "DO later")).len(), 1);
    none(leftovers("a", concat!("/proc/7/ro", "ot/s/password; /proc/{pid}/ro", "ot/s")));
}

/// The tables of codes in the documents come from the rules: `make docs` writes them.
#[test]
fn the_tables_of_codes_are_these() {
    for (page, table) in [
        ("docs/codes.md", sealmount::check::report::rules(true)),
        ("README.md", sealmount::check::report::rules(false)),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
        let text = fs::read_to_string(&path).unwrap();
        let (head, rest) = text.split_once("<!-- rules -->\n").unwrap_or_else(|| panic!("{page} lacks the marks"));
        let (old, tail) = rest.split_once("<!-- /rules -->\n").unwrap_or_else(|| panic!("{page} lacks the marks"));
        if std::env::var_os("WRITE_DOCS").is_some() {
            fs::write(&path, format!("{head}<!-- rules -->\n{table}<!-- /rules -->\n{tail}")).unwrap();
        } else {
            assert_eq!(old, table, "{page} is not of these rules: run `make docs`");
        }
    }
}

/// Refusals that the API server does not look at: docs/admission.md says why.
const DRIVER_ONLY: [&str; 3] = ["SM101", "SM124", "SM184"];

/// The texts of a constant list in a source file.
fn texts<'a>(source: &'a str, constant: &str) -> Vec<&'a str> {
    let (_, rest) = source.split_once(&format!("const {constant}:")).unwrap();
    let (_, rest) = rest.split_once("= [").or_else(|| rest.split_once("=\n        [")).unwrap();
    let (list, _) = rest.split_once("];").unwrap();
    list.split('"').skip(1).step_by(2).collect()
}

#[test]
fn admission_has_every_refusal_in_the_words_of_the_rule() {
    use sealmount::policy::{RULES, Severity};
    let cel = file("deploy/chart/files/admission.cel");
    let blocks: Vec<(&str, &str)> = cel
        .trim()
        .split("\n\n")
        .map(|block| block.strip_prefix("# ").and_then(|block| block.split_once('\n')).expect(block))
        .collect();
    // The order of the rules is the order of the validations: the first that fails is what the API server says.
    let has = |code: &str| blocks.iter().any(|(known, _)| *known == code);
    let rules: Vec<_> = RULES.iter().filter(|rule| has(rule.code.0)).collect();
    assert_eq!(
        blocks.iter().map(|(code, _)| *code).collect::<Vec<_>>(),
        rules.iter().map(|r| r.code.0).collect::<Vec<_>>()
    );
    for (rule, (code, block)) in rules.iter().zip(&blocks) {
        assert!(block.contains(&format!("\"{code} ")), "admission says nothing of {code}");
        let change = format!("; {}\"", rule.change.replace('"', "\\\""));
        assert!(block.contains(&change), "admission has other words than {code}'s: {change}");
    }
    let page = file("docs/admission.md");
    for rule in RULES.iter().filter(|rule| rule.severity == Severity::Refuse) {
        let code = rule.code.0;
        assert_ne!(has(code), DRIVER_ONLY.contains(&code), "{code}");
        if DRIVER_ONLY.contains(&code) {
            assert!(page.contains(&format!("| `{code}` |")), "docs/admission.md does not say why {code} stays");
        }
    }
    // The first that fits stands in the message.
    let all = cel + &file("deploy/chart/templates/admission.yaml");
    let plain = all.split_whitespace().collect::<Vec<_>>().join(" ");
    for constant in ["NODE_PATHS", "RUN_AS_ROOT"] {
        let list: Vec<_> =
            texts(&file("src/policy/neighbours.rs"), constant).iter().map(|text| format!("\"{text}\"")).collect();
        assert!(plain.contains(&format!("{}]", list.join(", "))), "admission has not the list {constant}");
    }
    for (path, constant) in [
        ("src/policy/neighbours.rs", "UNCONFINED"),
        ("src/policy/sidecars.rs", "KNOWN"),
        ("src/policy/sidecars.rs", "IMAGES"),
    ] {
        for text in texts(&file(path), constant) {
            assert!(all.contains(&format!("\"{text}\"")), "admission does not know {text} of {constant}");
        }
    }
}

#[test]
fn nothing_that_ships_waives_what_is_never_waived() {
    let with_feature: Vec<String> = file("Makefile")
        .lines()
        .chain(file("deploy/Dockerfile").lines())
        .chain(file(".ci/run").lines())
        .filter(|line| line.contains("waive-anything") || line.contains("--all-features"))
        .map(str::to_owned)
        .collect();
    // The build of the lab's own program, its place, and its name for the cluster: never the release.
    assert_eq!(with_feature.len(), 3, "{with_feature:#?}");
    assert!(with_feature.iter().all(|line| !line.contains("--release")), "{with_feature:#?}");
    assert!(!file("Cargo.toml").contains("default = ["), "a default feature");
}
