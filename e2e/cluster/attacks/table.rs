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

/// One row: the usual way, the Secret volume in the application only, sealmount.
#[derive(Debug)]
pub(super) struct Row {
    number: u32,
    tried: String,
    seen: [Got; 3],
    /// What the attack gives against sealmount where the platform team waived the code that refuses the pod.
    waived: Option<Got>,
}

impl Row {
    pub(super) fn new(number: u32, tried: &str, seen: [Got; 3]) -> Self {
        Self { number, tried: tried.to_owned(), seen, waived: None }
    }

    /// The pod is refused; the third of `seen` is what the attack gives where that code is waived.
    pub(super) fn refused(number: u32, tried: &str, seen: [Got; 3], refused: &Got) -> Self {
        let [usual, native, waived] = seen;
        Self { waived: Some(waived), ..Self::new(number, tried, [usual, native, refused.clone()]) }
    }

    /// What is wrong with it.
    fn faults(&self) -> Vec<String> {
        let [usual, _, sealed] = &self.seen;
        let mut faults = Vec::new();
        if !matches!(usual, Got::Gain(_)) {
            faults.push(format!("did not succeed in the usual way ({usual}): it proves nothing"));
        }
        if self.seen.iter().any(|it| matches!(it, Got::Odd(_))) {
            faults.push(format!("was not carried out: {:?}", self.seen));
        }
        if matches!(sealed, Got::Gain(_)) {
            faults.push(format!("gained against sealmount: {sealed}"));
        }
        if matches!(self.waived, Some(Got::Odd(_) | Got::Nothing)) {
            faults.push(format!("was not carried out with the code waived: {:?}", self.waived));
        }
        faults.into_iter().map(|it| format!("row {}, {}: {it}", self.number, self.tried)).collect()
    }

    fn cells(&self) -> [String; 4] {
        let [usual, native, sealed] = &self.seen;
        let waived = self.waived.as_ref().map(|waived| format!("{sealed} (waived: {waived})"));
        [
            format!("{}. {}", self.number, self.tried),
            usual.to_string(),
            native.to_string(),
            waived.unwrap_or_else(|| sealed.to_string()),
        ]
    }
}

static ROWS: Mutex<Vec<Row>> = Mutex::new(Vec::new());

const HEAD: [&str; 4] = ["tried", "the usual way", "Secret volume, app only", "sealmount"];

/// Adds the rows of a check to the table. Panics with every fault of theirs.
pub(super) fn add(rows: Vec<Row>) -> String {
    let faults: Vec<String> = rows.iter().flat_map(Row::faults).collect();
    for row in &rows {
        let [tried, usual, native, sealed] = row.cells();
        println!("    {tried:<96} {usual:<8} {native:<12} {sealed}");
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let waived = rows.iter().filter(|it| matches!(it.waived, Some(Got::Gain(_)))).count();
    let count = rows.len();
    ROWS.lock().expect("one check at a time").extend(rows);
    format!("{count} attacks; {waived} succeed where their code is waived")
}

/// Where the table is written.
fn place(project: &Path) -> PathBuf {
    project.join("e2e/out/attacks.md")
}

/// Writes the table. Every number from 1 to `last` must be there.
pub(super) fn write(project: &Path, version: &str, last: u32) -> String {
    let mut rows = ROWS.lock().expect("one check at a time");
    rows.sort_by_key(|row| row.number);
    for number in 1..=last {
        assert!(rows.iter().any(|row| row.number == number), "no row {number}");
    }
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = format!("Kubernetes {version}, {} attacks, written by `make e2e`.\n\n", rows.len());
    text.push_str(&line(&HEAD.map(str::to_owned)));
    text.push_str("|---|---|---|---|\n");
    for row in rows.iter() {
        let _ = write!(text, "{}", line(&row.cells().map(|it| it.replace('|', "\\|"))));
    }
    let place = place(project);
    fs::create_dir_all(place.parent().expect("a directory")).expect("a directory");
    fs::write(&place, text).expect("write the table");
    format!("{} attacks, in e2e/out/attacks.md", rows.len())
}

/// Puts the table that a run wrote into the README, between its markers.
pub(crate) fn into_readme(project: &Path) -> Result<(), String> {
    const MARKS: [&str; 2] = ["<!-- attacks -->\n", "<!-- /attacks -->"];
    let table = fs::read_to_string(place(project)).map_err(|error| format!("{error}: run `make e2e` first"))?;
    let readme = project.join("README.md");
    let text = fs::read_to_string(&readme).map_err(|error| error.to_string())?;
    let (before, rest) = text.split_once(MARKS[0]).ok_or("the README has no marker")?;
    let (_, after) = rest.split_once(MARKS[1]).ok_or("the README has no end marker")?;
    let text = [before, MARKS[0], &table, MARKS[1], after].concat();
    fs::write(readme, text).map_err(|error| error.to_string())
}
