//! `sealmount check`.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::ValueEnum;
use rustix::termios::tcgetwinsize;
use serde_json::Value as Json;

use crate::check::report::{self, Style};
use crate::check::{self, Options, Proxy, Report, Unreadable, explain};
use crate::config::{self, Config};
use crate::pods::api::{self, Scope};
use crate::pods::manifest;

/// The longest manifest that is read, in bytes.
const MAX_FILE: u64 = 64 * 1024 * 1024;
/// A pod is refused.
const REFUSED: u8 = 1;
/// Something could not be read.
const UNREADABLE: u8 = 2;

/// The flags of `sealmount check`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit code: 0 nothing is refused, 1 a pod is refused, 2 something could not be read.\n\
    Without --config the driver's defaults hold: no connection, no RuntimeClass, no waiver.")]
pub(super) struct Flags {
    /// Manifests: files, directories (all *.yaml, *.yml and *.json below them), or - for the standard input
    #[arg(value_name = "FILE", required_unless_present_any = ["cluster", "explain", "rules"])]
    files: Vec<PathBuf>,
    /// Check the pods of the cluster, as admitted; needs the right to list pods
    #[arg(long, conflicts_with_all = ["files", "istio"])]
    cluster: bool,
    /// The namespace: of the cluster's pods (else the kubeconfig's), and of objects that name none (else default)
    #[arg(long, short, value_name = "NAME")]
    namespace: Option<String>,
    /// The pods of all namespaces of the cluster
    #[arg(long, short = 'A', requires = "cluster", conflicts_with = "namespace")]
    all_namespaces: bool,
    /// Only whether pods of the cluster use the driver; exit code 1, with their names, if one does
    #[arg(long, requires = "cluster")]
    fail_if_used: bool,
    /// How to reach the cluster, instead of $KUBECONFIG, ~/.kube/config or the pod's own ServiceAccount
    #[arg(long, value_name = "FILE", requires = "cluster")]
    kubeconfig: Option<PathBuf>,
    /// The platform team's file, for its rules, RuntimeClasses, connections and waivers
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The kubelet's directory on the nodes
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    kubelet_dir: String,
    /// Add the proxy that Istio will inject: native, plain, or as a version of Istio such as 1.27 does by default
    #[arg(long, value_name = "HOW", num_args = 0..=1, default_missing_value = "native", require_equals = true)]
    istio: Option<Proxy>,
    /// What is printed
    #[arg(long, short, value_enum, default_value = "text")]
    output: Output,
    /// Print a patch (kubectl patch --type strategic) where just one change is right
    #[arg(long)]
    fix_hint: bool,
    /// Explain a code, such as SM130
    #[arg(long, value_name = "CODE", exclusive = true)]
    explain: Option<String>,
    /// Print the table of rules, in Markdown
    #[arg(long, exclusive = true)]
    rules: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
    Sarif,
    Github,
}

pub(super) fn run(flags: &Flags) -> ExitCode {
    if flags.rules {
        return print(&report::rules(true), 0);
    }
    if let Some(code) = &flags.explain {
        let Some(text) = explain(code) else {
            return failed(&format!("there is no code {code}; sealmount check --rules lists those about pods"));
        };
        return print(&text, 0);
    }
    if flags.fail_if_used {
        return used(flags);
    }
    let options = match options(flags) {
        Ok(options) => options,
        Err(faults) => return failed(&faults),
    };
    let mut report = Report::default();
    if flags.cluster {
        if let Err(error) = cluster(flags, |pod| report.pod(pod, &options)) {
            return failed(&error);
        }
    } else {
        for path in &flags.files {
            read(path, &options, &mut report);
        }
    }
    let text = match flags.output {
        Output::Text => report::text(&report, style(flags)),
        Output::Json => report::json(&report),
        Output::Sarif => report::sarif(&report),
        Output::Github => report::github(&report),
    };
    let code = match (report.unreadable.is_empty(), report.counts()) {
        (false, _) => UNREADABLE,
        (true, (0, _)) => 0,
        (true, _) => REFUSED,
    };
    print(&text, code)
}

fn options(flags: &Flags) -> Result<Options, String> {
    let mut config = match &flags.config {
        None => Config::default(),
        Some(path) => config::load(path).map_err(|faults| {
            let lines: Vec<String> = faults.iter().map(|fault| format!("{}: {fault}", path.display())).collect();
            lines.join("\n")
        })?,
    };
    config.policy.kubelet_dir.clone_from(&flags.kubelet_dir);
    Ok(Options {
        config,
        platform: flags.config.is_some(),
        namespace: flags.namespace.clone().unwrap_or_else(|| "default".to_owned()),
        istio: flags.istio,
        now: SystemTime::now(),
    })
}

/// A file, the standard input, or the manifests of a directory.
fn read(path: &Path, options: &Options, report: &mut Report) {
    if !path.is_dir() {
        return file(path, false, options, report);
    }
    let mut paths = Vec::new();
    let found = manifests(path, &mut paths).and_then(|()| match paths.is_empty() {
        true => Err(io::Error::new(io::ErrorKind::NotFound, "no *.yaml, *.yml or *.json below it")),
        false => Ok(()),
    });
    if let Err(error) = found {
        report.unreadable.push(unreadable(path, &error));
    }
    for path in &paths {
        file(path, true, options, report);
    }
}

/// `searched`: it was found in a directory, and nobody named it.
fn file(path: &Path, searched: bool, options: &Options, report: &mut Report) {
    let text = match path.as_os_str() == "-" {
        true => manifest::read_text(io::stdin(), MAX_FILE),
        false => fs::File::open(path).and_then(|file| manifest::read_text(file, MAX_FILE)),
    };
    match text {
        Ok(text) => report.manifest(&path.display().to_string(), &text, searched, options),
        Err(error) => report.unreadable.push(unreadable(path, &error)),
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Unreadable {
    Unreadable { file: path.display().to_string(), place: None, text: format!("cannot be read: {error}") }
}

/// The manifests below a directory, by name. Links to directories are not followed: they may lead back.
fn manifests(directory: &Path, paths: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut entries = fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::path);
    for entry in entries {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            manifests(&path, paths)?;
        } else if manifest::is_named_so(&path) && !path.is_dir() {
            paths.push(path);
        }
    }
    Ok(())
}

/// Each pod of the cluster, or of the namespace.
fn cluster(flags: &Flags, take: impl FnMut(Json)) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let scope = match &flags.namespace {
        _ if flags.all_namespaces => Scope::All,
        Some(namespace) => Scope::Namespace(namespace),
        None => Scope::Own,
    };
    runtime.block_on(api::each(flags.kubeconfig.as_deref(), scope, take)).map_err(|error| error.to_string())
}

/// What an uninstallation asks: such a pod could not end without the driver.
fn used(flags: &Flags) -> ExitCode {
    let mut users = Vec::new();
    let asked = cluster(flags, |pod| users.extend(check::uses(&pod).then(|| check::full_name(&pod))));
    if let Err(error) = asked {
        return failed(&error);
    }
    if users.is_empty() {
        return print("no pod uses the driver\n", 0);
    }
    let lines: String = users.iter().map(|name| format!("  {name}\n")).collect();
    let count = users.len();
    print(&format!("pods with a volume of the driver, which could not end without it: {count}\n{lines}"), REFUSED)
}

/// Colour and width are a terminal's alone (<https://no-color.org>).
// The driver takes no setting from its environment; this is a person's terminal.
#[allow(clippy::disallowed_methods)]
fn style(flags: &Flags) -> Style {
    let terminal = io::stdout().is_terminal();
    let said = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let columns = || said("COLUMNS").and_then(|columns| columns.parse().ok());
    let window = || tcgetwinsize(io::stdout()).ok().map(|window| usize::from(window.ws_col));
    Style {
        colour: terminal && said("NO_COLOR").is_none() && said("TERM").is_none_or(|term| term != "dumb"),
        // A serial line says 0.
        width: terminal.then(|| columns().or_else(window)).flatten().filter(|columns| *columns > 0),
        hints: flags.fix_hint,
    }
}

/// A reader that went away is nobody's fault; a report that is lost otherwise was not made.
fn print(text: &str, code: u8) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => failed(&format!("cannot write: {error}")),
        _ => ExitCode::from(code),
    }
}

fn failed(text: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "sealmount check: {text}");
    ExitCode::from(UNREADABLE)
}
