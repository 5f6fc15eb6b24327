//! The table of the attacks: what was tried, and what it gained in three columns.

use std::fmt::{self, Write};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// What an attempt gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Got {
    /// The secret, or what the row says.
    Gain(&'static str),
    /// A refusal or nothing: an errno, an HTTP status, "not found".
    Denied(String),
    /// The driver refused the pod: code and field.
    Refused(String),
    /// There is no such thing to attack in this column.
    Nothing,
    /// Neither: the attempt itself failed, and proves nothing.
    Odd(String),
}

impl Got {
    pub(super) fn read() -> Self {
        Self::Gain("READ")
    }

    pub(super) fn denied(text: &str) -> Self {
        Self::Denied(text.to_owned())
    }

    /// Whether something was found.
    pub(super) fn found(found: bool) -> Self {
        if found { Self::Gain("FOUND") } else { Self::denied("not found") }
    }
}

impl fmt::Display for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gain(what) => f.write_str(what),
            Self::Denied(text) => f.write_str(text),
            Self::Refused(text) => write!(f, "refused: {text}"),
            Self::Nothing => f.write_str("-"),
            Self::Odd(text) => write!(f, "?? {text}"),
        }
    }
}

/// Why a pod that is refused runs all the same, so that the attack can be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    /// The platform team waived the code.
    Waiver,
    /// Admission leaves the namespace out, and the pod ran before: an event tells of it.
    Admission,
}

/// One row: the usual way, the Secret volume in the application only, sealmount.
#[derive(Debug)]
pub(super) struct Row {
    number: u32,
    tried: String,
    seen: [Got; 3],
    /// What the attack gives against sealmount where nothing refuses the pod.
    unrefused: Option<(Without, Got)>,
}

impl Row {
    pub(super) fn new(number: u32, tried: &str, seen: [Got; 3]) -> Self {
        Self { number, tried: tried.to_owned(), seen, unrefused: None }
    }

    /// The pod is refused; the third of `seen` is what the attack gives where that code is waived.
    pub(super) fn refused(number: u32, tried: &str, seen: [Got; 3], refused: &Got) -> Self {
        Self::but(Without::Waiver, number, tried, seen, refused)
    }

    /// Admission refuses it; the third of `seen` is what the attack gives where admission is off.
    pub(super) fn not_admitted(number: u32, tried: &str, seen: [Got; 3], refused: &Got) -> Self {
        Self::but(Without::Admission, number, tried, seen, refused)
    }

    fn but(without: Without, number: u32, tried: &str, seen: [Got; 3], refused: &Got) -> Self {
        let [usual, native, sealed] = seen;
        Self { unrefused: Some((without, sealed)), ..Self::new(number, tried, [usual, native, refused.clone()]) }
    }

    /// How such an attack can fail. Any other way says that it was not carried out: `peer` without a socket to look at
    /// is ECONNREFUSED.
    fn denials(&self) -> &'static [&'static str] {
        match self.number {
            7 => &["real Vault asked"],
            12 => &["ENOENT", "EACCES", "ECONNREFUSED", "HTTP 403", "counters only"],
            13 => &["HTTP 403"],
            _ => &["ENOENT", "EACCES", "EPERM", "not found"],
        }
    }

    /// What is wrong with it.
    fn faults(&self) -> Vec<String> {
        let [usual, native, sealed] = &self.seen;
        let mut faults = Vec::new();
        if !matches!(usual, Got::Gain(_)) {
            faults.push(format!("did not succeed in the usual way ({usual}): it proves nothing"));
        }
        let unrefused = self.unrefused.as_ref().map(|(_, got)| got);
        for got in [native, sealed].into_iter().chain(unrefused) {
            if matches!(got, Got::Odd(_)) || matches!(got, Got::Denied(how) if !self.denials().contains(&how.as_str()))
            {
                faults.push(format!("was not carried out: {got}"));
            }
        }
        if matches!(sealed, Got::Gain(_) | Got::Nothing) {
            faults.push(format!("was not denied by sealmount: {sealed}"));
        }
        if matches!(unrefused, Some(Got::Nothing)) {
            faults.push("was not tried where nothing refuses it".to_owned());
        }
        faults.into_iter().map(|it| format!("row {}, {}: {it}", self.number, self.tried)).collect()
    }

    fn cells(&self) -> [String; 4] {
        let [usual, native, sealed] = &self.seen;
        let sealed = match &self.unrefused {
            None => sealed.to_string(),
            Some((Without::Waiver, got)) => format!("{sealed} (waived: {got})"),
            Some((Without::Admission, got)) => format!("{sealed} (admission off: {got}, and an event)"),
        };
        [format!("{}. {}", self.number, self.tried), usual.to_string(), native.to_string(), sealed]
    }
}

/// The rows of each check that passed.
static ROWS: Mutex<Vec<Vec<Row>>> = Mutex::new(Vec::new());

const HEAD: [&str; 4] = ["tried", "the usual way", "Secret volume, app only", "sealmount"];

/// Adds the rows of a check to the table. Panics with every fault of theirs.
pub(super) fn add(rows: Vec<Row>) -> String {
    let faults: Vec<String> = rows.iter().flat_map(Row::faults).collect();
    for row in &rows {
        let [tried, usual, native, sealed] = row.cells();
        println!("    {tried:<96} {usual:<8} {native:<12} {sealed}");
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let waived = rows.iter().filter(|it| matches!(it.unrefused, Some((Without::Waiver, Got::Gain(_))))).count();
    let count = rows.len();
    ROWS.lock().expect("one check at a time").push(rows);
    format!("{count} attacks; {waived} succeed where their code is waived")
}

/// Where the table of a version of Kubernetes is written.
fn place(project: &Path, version: &str) -> PathBuf {
    project.join(format!("e2e/out/attacks-{version}.md"))
}

/// Writes the table, if all `checks` passed and every number from 1 to `last` is there. The README's must be the same on
/// its version.
pub(super) fn write(project: &Path, version: &str, checks: usize, last: u32) -> String {
    let all = ROWS.lock().expect("one check at a time");
    assert_eq!(all.len(), checks, "checks of the attacks that passed: the table would lack the others' rows");
    let mut rows: Vec<&Row> = all.iter().flatten().collect();
    rows.sort_by_key(|row| row.number);
    for number in 1..=last {
        assert!(rows.iter().any(|row| row.number == number), "no row {number}");
    }
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = format!("Kubernetes {version}, {} attacks, written by `make e2e`.\n\n", rows.len());
    text.push_str(&line(&HEAD.map(str::to_owned)));
    text.push_str("|---|---|---|---|\n");
    for row in &rows {
        let _ = write!(text, "{}", line(&row.cells().map(|it| it.replace('|', "\\|"))));
    }
    let place = place(project, version);
    fs::create_dir_all(place.parent().expect("a directory")).expect("a directory");
    fs::write(&place, &text).expect("write the table");
    if version == crate::NEWEST {
        let readme = fs::read_to_string(project.join("README.md")).expect("the README");
        let [_, table, _] = around_table(&readme).expect("the README's table");
        assert!(table == text, "the README's table is not this run's: make readme-attacks");
    }
    format!("{} attacks, in {}", rows.len(), place.strip_prefix(project).expect("below it").display())
}

/// Puts the table that a run on the newest version wrote into the README.
pub(crate) fn into_readme(project: &Path) -> Result<(), String> {
    let place = place(project, crate::NEWEST);
    let table =
        fs::read_to_string(&place).map_err(|error| format!("{}: {error}: run `make e2e` first", place.display()))?;
    let readme = project.join("README.md");
    let text = fs::read_to_string(&readme).map_err(|error| error.to_string())?;
    let [before, _, after] = around_table(&text)?;
    fs::write(readme, [before, &table, after].concat()).map_err(|error| error.to_string())
}

/// The README up to its table, the table, and the rest; the marks stand outside of the table.
fn around_table(readme: &str) -> Result<[&str; 3], String> {
    let start = "<!-- attacks -->\n";
    let start = readme.find(start).ok_or("the README has no marker")? + start.len();
    let length = readme[start..].find("<!-- /attacks -->").ok_or("the README has no end marker")?;
    Ok([&readme[..start], &readme[start..start + length], &readme[start + length..]])
}
