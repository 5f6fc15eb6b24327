//! How the demo prints: at most 100 columns, colour only on a terminal, and every broken promise remembered.

use std::fmt;
use std::io::{IsTerminal, Write};
use std::time::Instant;

/// The widest line.
pub(crate) const WIDTH: usize = 100;
const LABEL: usize = 41;
const CELL: usize = 19;

/// What an attempt gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Got {
    /// The secret itself.
    Read,
    /// The names of the files.
    Listed,
    /// An error of the kernel's, by its name.
    Errno(&'static str),
    /// How often the secret was found.
    Found(usize),
    /// OpenBao let it in, or did not with this HTTP status.
    Login(u16),
    /// The driver refused the pod, with this code.
    Refused(String),
    /// Anything else: never what was promised.
    Odd(String),
}

impl Got {
    /// Whether the attacker gained something.
    pub(crate) fn is_gain(&self) -> bool {
        matches!(self, Self::Read | Self::Listed | Self::Login(200) | Self::Odd(_)) || matches!(self, Self::Found(1..))
    }

    /// Whether this is what was promised; how often something was found does not matter, but none is none.
    fn keeps(&self, promise: &Self) -> bool {
        match (self, promise) {
            (Self::Found(seen), Self::Found(said)) => (*seen == 0) == (*said == 0),
            _ => self == promise,
        }
    }
}

impl fmt::Display for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read => f.write_str("READ"),
            Self::Listed => f.write_str("LISTED"),
            Self::Errno(name) => f.write_str(name),
            Self::Found(0) => f.write_str("not found"),
            Self::Found(count) => write!(f, "FOUND {count}x"),
            Self::Login(200) => f.write_str("LOGGED IN"),
            Self::Login(status) => write!(f, "HTTP {status}"),
            Self::Refused(code) => write!(f, "refused {code}"),
            Self::Odd(text) => f.write_str(text),
        }
    }
}

/// One column of one row: what Envoy got, and what a shell of its UID got, where each could try.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    /// Envoy itself.
    pub(crate) envoy: Option<Got>,
    /// A shell.
    pub(crate) shell: Option<Got>,
}

impl Cell {
    fn all(&self) -> impl Iterator<Item = &Got> {
        self.envoy.iter().chain(&self.shell)
    }

    fn keeps(&self, promise: &Self) -> bool {
        let same = |seen: &Option<Got>, said: &Option<Got>| match (seen, said) {
            (Some(seen), Some(said)) => seen.keeps(said),
            (None, None) => true,
            _ => false,
        };
        same(&self.envoy, &promise.envoy) && same(&self.shell, &promise.shell)
    }

    fn text(&self) -> String {
        let mut shown: Vec<String> = self.all().map(Got::to_string).collect();
        shown.dedup();
        if shown.is_empty() { "-".into() } else { shown.join("/") }
    }
}

/// One row: what was tried, what came of it in the three columns, and what was promised.
pub(crate) struct Row {
    /// What was tried.
    pub(crate) label: String,
    /// The usual way, the Secret volume, sealmount.
    pub(crate) seen: [Cell; 3],
    /// The same as it should be.
    pub(crate) promised: [Cell; 3],
}

#[derive(Clone, Copy)]
enum Colour {
    Plain = 0,
    Bold = 1,
    Dim = 2,
    Red = 31,
    Green = 32,
}

/// The demo's output.
pub(crate) struct Screen {
    colour: bool,
    started: Instant,
    checks: usize,
    broken: Vec<String>,
}

impl Screen {
    /// Colour only on a terminal, and not if `NO_COLOR` is set to anything (no-color.org).
    pub(crate) fn new() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|it| !it.is_empty());
        let colour = !unwanted && std::io::stdout().is_terminal();
        Self { colour, started: Instant::now(), checks: 0, broken: Vec::new() }
    }

    fn paint(&self, colour: Colour, text: &str) -> String {
        if self.colour { format!("\x1b[{}m{text}\x1b[0m", colour as u8) } else { text.to_owned() }
    }

    /// The start of a part of the story.
    pub(crate) fn title(&self, text: &str) {
        let second = self.started.elapsed().as_secs();
        let text = format!("[{second:>2} s] {text}");
        self.print(&format!("\n{}", self.paint(Colour::Bold, &text)));
    }

    /// A line of explanation, wrapped.
    pub(crate) fn say(&self, text: &str) {
        for line in wrap(text, WIDTH - 2) {
            self.print(&format!("  {line}"));
        }
    }

    /// Lines as some program wrote them; what does not fit goes on below, further in.
    pub(crate) fn show(&self, text: &str) {
        for line in text.lines() {
            let mut rest = line;
            let mut margin = "    ";
            while !rest.is_empty() {
                let room = WIDTH - margin.len();
                let fits = rest.char_indices().nth(room).map_or(rest.len(), |(end, _)| end);
                // At a blank, or at a comma of a list without any.
                let blank = rest[..fits].rfind([' ', ',']).filter(|at| *at > room / 2).map_or(fits, |at| at + 1);
                let (head, tail) = rest.split_at(if fits == rest.len() { fits } else { blank });
                self.print(&format!("{margin}{}", self.paint(Colour::Dim, head)));
                (rest, margin) = (tail, "        ");
            }
        }
    }

    /// A promise and whether it holds.
    pub(crate) fn check(&mut self, holds: bool, text: &str) {
        self.checks += 1;
        let mark = if holds { self.paint(Colour::Green, "ok  ") } else { self.paint(Colour::Red, "FAIL") };
        for (index, line) in wrap(text, WIDTH - 7).iter().enumerate() {
            let mark = if index == 0 { mark.as_str() } else { "    " };
            self.print(&format!("  {mark} {line}"));
        }
        if !holds {
            self.broken.push(text.to_owned());
        }
    }

    /// The head of the attack table.
    pub(crate) fn head(&self, columns: [[&str; 2]; 3]) {
        for line in 0..2 {
            let mut text = format!("  {:LABEL$}", ["tried by Envoy / by a shell of its UID", ""][line]);
            for column in columns {
                text.push_str(&format!("{:CELL$}", column[line]));
            }
            self.print(&self.paint(Colour::Bold, text.trim_end()));
        }
    }

    /// A line between groups of rows.
    pub(crate) fn group(&self, text: &str) {
        self.print(&format!("  {}", self.paint(Colour::Dim, &format!("-- {text} "))));
    }

    /// One row of the attack table.
    pub(crate) fn row(&mut self, row: &Row) {
        self.checks += 1;
        let mut line = format!("  {:LABEL$}", row.label);
        let mut kept = true;
        for (index, (seen, promised)) in row.seen.iter().zip(&row.promised).enumerate() {
            let gain = seen.all().any(Got::is_gain);
            let mut text = seen.text();
            // The column to compare with: say where it is already as safe.
            if index == 1 && !gain && seen.all().next().is_some() {
                text.push_str(" safe");
            }
            let holds = seen.keeps(promised);
            kept &= holds;
            if !holds {
                text = format!("!{text}");
            }
            let colour = match (holds, gain) {
                (false, _) | (_, true) => Colour::Red,
                (true, false) if text == "-" => Colour::Plain,
                (true, false) => Colour::Green,
            };
            line.push_str(&self.paint(colour, &text));
            line.push_str(&" ".repeat(CELL.saturating_sub(text.chars().count()).max(1)));
        }
        self.print(line.trim_end());
        if !kept {
            let texts = |cells: &[Cell; 3]| cells.each_ref().map(Cell::text).join(" | ");
            self.broken.push(format!("{}: {}; promised: {}", row.label, texts(&row.seen), texts(&row.promised)));
        }
    }

    /// The last lines, and whether every promise held.
    pub(crate) fn end(&self) -> bool {
        let (checks, seconds) = (self.checks, self.started.elapsed().as_secs_f32());
        let held = checks - self.broken.len();
        let colour = if self.broken.is_empty() { Colour::Green } else { Colour::Red };
        self.print("");
        self.print(&self.paint(colour, &format!("{held} of {checks} as promised, in {seconds:.1} s")));
        for broken in &self.broken {
            for (index, line) in wrap(broken, WIDTH - 7).iter().enumerate() {
                self.print(&format!("  {} {line}", if index == 0 { "FAIL" } else { "    " }));
            }
        }
        self.broken.is_empty()
    }

    fn print(&self, line: &str) {
        // A reader that goes away (`demo | head`) must not keep the demo from cleaning up.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().unwrap();
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}
