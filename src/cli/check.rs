//! `sealmount check`.

use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::ValueEnum;
use serde_json::Value as Json;

use crate::check::report::{self, Style};
use crate::check::{self, Options, Proxy, Report, Unreadable, explain};
use crate::config::{self, Config};
use crate::pods::api;
use crate::policy::rules;

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
    /// Manifests: files, directories (their *.yaml, *.yml and *.json), or - for the standard input
    #[arg(value_name = "FILE", required_unless_present_any = ["cluster", "explain", "rules"])]
    files: Vec<PathBuf>,
    /// Check the pods of the cluster, as admitted; needs the right to list pods
    #[arg(long, conflicts_with_all = ["files", "istio"])]
    cluster: bool,
    /// The namespace: of the cluster's pods, and of objects that name none
    #[arg(long, short, value_name = "NAME", default_value = "default")]
    namespace: String,
    /// The pods of all namespaces of the cluster
    #[arg(long, short = 'A', requires = "cluster")]
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
    /// Add the proxy that Istio will inject
    #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, default_missing_value = "native", require_equals = true)]
    istio: Option<How>,
    /// What is printed
    #[arg(long, short, value_enum, default_value = "text")]
    output: Output,
    /// Print a patch where just one change is right
    #[arg(long)]
    fix_hint: bool,
    /// Explain a code, such as SM130
    #[arg(long, value_name = "CODE", exclusive = true)]
    explain: Option<String>,
    /// Print the table of rules, in Markdown
    #[arg(long, exclusive = true)]
    rules: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum How {
    Native,
    Plain,
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
        print(&rules::table(true));
        return ExitCode::SUCCESS;
    }
    if let Some(code) = &flags.explain {
        let Some(text) = explain(code) else {
            return failed(&format!("there is no code {code}; sealmount check --rules lists those about pods"));
        };
        print(&text);
        return ExitCode::SUCCESS;
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
    print(&match flags.output {
        Output::Text => report::text(&report, style(flags)),
        Output::Json => report::json(&report),
        Output::Sarif => report::sarif(&report),
        Output::Github => report::github(&report),
    });
    match (report.unreadable.is_empty(), report.counts()) {
        (false, _) => ExitCode::from(UNREADABLE),
        (true, (0, _)) => ExitCode::SUCCESS,
        (true, _) => ExitCode::from(REFUSED),
    }
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
        namespace: flags.namespace.clone(),
        istio: flags.istio.map(|how| match how {
            How::Native => Proxy::Native,
            How::Plain => Proxy::Plain,
        }),
        now: SystemTime::now(),
    })
}

/// A file, the standard input, or the manifests of a directory.
fn read(path: &Path, options: &Options, report: &mut Report) {
    let mut unreadable = |path: &Path, error: &io::Error| {
        let text = format!("cannot be read: {error}");
        report.unreadable.push(Unreadable { file: path.display().to_string(), place: None, text });
    };
    if path.is_dir() {
        match manifests(path) {
            Ok(paths) => paths.iter().for_each(|path| read(path, options, report)),
            Err(error) => unreadable(path, &error),
        }
        return;
    }
    let mut text = String::new();
    let input = match path.as_os_str() == "-" {
        true => io::stdin().take(MAX_FILE).read_to_string(&mut text),
        false => fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text)),
    };
    match input {
        Ok(_) => report.manifest(&path.display().to_string(), &text, options),
        Err(error) => unreadable(path, &error),
    }
}

/// The manifests of a directory, by name.
fn manifests(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| ["yaml", "yml", "json"].iter().any(|known| end == *known)) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Each pod of the cluster, or of the namespace.
fn cluster(flags: &Flags, take: impl FnMut(Json)) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let namespace = (!flags.all_namespaces).then_some(flags.namespace.as_str());
    runtime.block_on(api::each(flags.kubeconfig.as_deref(), namespace, take)).map_err(|error| error.to_string())
}

/// What an uninstallation asks: such a pod could not end without the driver.
fn used(flags: &Flags) -> ExitCode {
    let mut users = Vec::new();
    let asked = cluster(flags, |pod| users.extend(check::uses(&pod).then(|| check::called(&pod))));
    if let Err(error) = asked {
        return failed(&error);
    }
    if users.is_empty() {
        print("no pod uses the driver\n");
        return ExitCode::SUCCESS;
    }
    let lines: String = users.iter().map(|name| format!("  {name}\n")).collect();
    let count = users.len();
    print(&format!("pods with a volume of the driver, which could not end without it: {count}\n{lines}"));
    ExitCode::from(REFUSED)
}

/// Colour and width are a terminal's alone (<https://no-color.org>).
// The driver takes no setting from its environment; this is a person's terminal.
#[allow(clippy::disallowed_methods)]
fn style(flags: &Flags) -> Style {
    let terminal = io::stdout().is_terminal();
    let said = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    Style {
        colour: terminal && said("NO_COLOR").is_none() && said("TERM").is_none_or(|term| term != "dumb"),
        width: terminal.then(|| said("COLUMNS").and_then(|columns| columns.parse().ok()).unwrap_or(120)),
        hints: flags.fix_hint,
    }
}

/// A reader that went away is nobody's fault.
fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

fn failed(text: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "sealmount check: {text}");
    ExitCode::from(UNREADABLE)
}
