//! Starts the real `sealmount node` on temporary paths, and leaves nothing of it behind.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::kubelet::Kubelet;
use super::scratch::Scratch;

/// How a node is started.
#[derive(Clone)]
pub struct Options {
    /// The platform's file.
    pub config: String,
    /// Files beside it, by name: CAs, client keys.
    pub files: Vec<(String, String)>,
    /// `--node-name`.
    pub node: String,
    /// More flags.
    pub args: Vec<String>,
    /// Variables of its environment, beside those of the test.
    pub env: Vec<(String, String)>,
}

impl Options {
    /// A node named `node-a` with this platform's file.
    pub fn new(config: &str) -> Self {
        let config = config.to_owned();
        Self { config, files: Vec::new(), node: "node-a".into(), args: Vec::new(), env: Vec::new() }
    }

    /// Puts a file beside the platform's.
    pub fn file(mut self, name: &str, text: &str) -> Self {
        self.files.push((name.to_owned(), text.to_owned()));
        self
    }

    /// Adds a flag.
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A running node with directories of its own. Dropping it ends it and removes all of them.
pub struct Node {
    options: Options,
    metrics: u16,
    broker: Option<Child>,
    scratch: Scratch,
}

impl Node {
    /// Starts a node and registers it with a kubelet; panics with the node's log if that does not work.
    pub async fn start(options: Options) -> (Self, Kubelet) {
        let node = Self::spawn(options);
        let kubelet = node.kubelet();
        if let Err(error) = kubelet.register(Duration::from_secs(20)).await {
            panic!("the node did not register: {error}; its log:\n{}", node.log());
        }
        (node, kubelet)
    }

    /// Starts a node without waiting for anything.
    pub fn spawn(options: Options) -> Self {
        let scratch = Scratch::new();
        for (name, mode) in [
            ("config", 0o755),
            ("manifests", 0o755),
            ("kubelet", 0o750),
            ("kubelet/pods", 0o750),
            ("kubelet/plugins", 0o750),
            ("kubelet/plugins/csi.sealmount.io", 0o750),
            ("kubelet/plugins_registry", 0o750),
        ] {
            DirBuilder::new().mode(mode).create(scratch.path().join(name)).unwrap();
        }
        let metrics = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut node = Self { options, metrics, broker: None, scratch };
        node.write_config(&node.options.config.clone());
        for (name, text) in &node.options.files {
            fs::write(node.config_dir().join(name), text).unwrap();
        }
        node.launch();
        node
    }

    /// Starts the program; the last one must have ended.
    pub fn launch(&mut self) {
        assert!(self.broker.is_none(), "the node is still running");
        let log = File::options().create(true).append(true).open(self.log_file()).unwrap();
        let path = |name: &str| self.dir().join(name).into_os_string();
        let broker = Command::new(binary())
            .arg("node")
            .arg("--config")
            .arg(self.config_file())
            .arg("--kubelet-dir")
            .arg(path("kubelet"))
            .arg("--csi-socket")
            .arg(self.csi_socket())
            .arg("--registration-dir")
            .arg(self.registration_dir())
            .args(["--node-name", &self.options.node])
            .args(self.pods_from())
            .args(["--listen", &format!("127.0.0.1:{}", self.metrics)])
            .args(&self.options.args)
            .envs(self.options.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", binary().display()));
        self.scratch.set_process(Some(broker.id()));
        self.broker = Some(broker);
    }

    /// Manifest files, unless the options say otherwise.
    fn pods_from(&self) -> Vec<String> {
        if self.options.args.iter().any(|arg| arg == "--pods-from") {
            return Vec::new();
        }
        vec!["--pods-from".into(), format!("manifest:{}", self.manifests().display())]
    }

    /// The directory of everything below.
    pub fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// A kubelet for this node, which knows of no driver yet.
    pub fn kubelet(&self) -> Kubelet {
        Kubelet::new(&self.kubelet_dir(), &self.registration_dir(), &self.manifests(), &self.options.node)
    }

    /// The directory of the platform's file.
    pub fn config_dir(&self) -> PathBuf {
        self.dir().join("config")
    }

    /// The platform's file.
    pub fn config_file(&self) -> PathBuf {
        self.config_dir().join("sealmount.yaml")
    }

    /// Replaces the platform's file by a rename, so that no reader sees half of it.
    pub fn write_config(&self, text: &str) {
        let new = self.config_dir().join(".new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.config_file()).unwrap();
    }

    /// `--pods-from manifest:`.
    pub fn manifests(&self) -> PathBuf {
        self.dir().join("manifests")
    }

    /// `--kubelet-dir`.
    pub fn kubelet_dir(&self) -> PathBuf {
        self.dir().join("kubelet")
    }

    /// `--csi-socket`.
    pub fn csi_socket(&self) -> PathBuf {
        self.dir().join("kubelet/plugins/csi.sealmount.io/csi.sock")
    }

    /// `--registration-dir`.
    pub fn registration_dir(&self) -> PathBuf {
        self.dir().join("kubelet/plugins_registry")
    }

    /// `--listen`.
    pub fn metrics(&self) -> String {
        format!("127.0.0.1:{}", self.metrics)
    }

    /// Where standard error goes.
    pub fn log_file(&self) -> PathBuf {
        self.dir().join("node.log")
    }

    /// What it wrote to standard error so far, over all its starts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// The broker's process id; panics if the node is not running.
    pub fn broker(&self) -> u32 {
        self.broker.as_ref().unwrap().id()
    }

    /// The worker's process id, once the broker started one.
    pub fn worker(&self) -> Option<u32> {
        children(self.broker()).into_iter().find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).nth(1) == Some(b"worker")
        })
    }

    /// Sends a signal to the broker.
    pub fn signal(&self, signal: Signal) {
        signal_process(self.broker(), signal).unwrap();
    }

    /// Waits for the broker to end; `None` if it runs on.
    pub fn ended(&mut self, within: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + within;
        loop {
            match self.broker.as_mut()?.try_wait().unwrap() {
                Some(status) => {
                    self.broker = None;
                    self.scratch.set_process(None);
                    return Some(status);
                }
                None if Instant::now() > end => return None,
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Ends the broker with a signal and waits until it is gone, and the worker with it.
    pub fn stop(&mut self, signal: Signal) {
        let worker = self.worker();
        self.signal(signal);
        self.ended(Duration::from_secs(10)).unwrap_or_else(|| panic!("the broker did not end on {signal:?}"));
        let end = Instant::now() + Duration::from_secs(10);
        while worker.is_some_and(is_alive) {
            assert!(Instant::now() < end, "the worker outlived its broker");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the node with a signal and starts it again on the same paths.
    pub fn restart(&mut self, signal: Signal) {
        self.stop(signal);
        self.launch();
    }

    /// The mounts below the node's directory, in the order they were made.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(self.dir())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(broker) = &self.broker {
            // A polite end first: it takes its sockets away by itself.
            let _ = signal_process(broker.id(), Signal::TERM);
            let _ = self.ended(Duration::from_secs(3));
        }
        if std::thread::panicking() {
            eprintln!("--- log of the node:\n{}", self.log());
        }
        // What did not end politely is killed here, so that it is waited for.
        if let Some(mut broker) = self.broker.take() {
            let _ = broker.kill();
            let _ = broker.wait();
            self.scratch.set_process(None);
        }
    }
}

/// The mounts strictly below `dir`, in the order of mountinfo.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let info = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let paths = info.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    paths.filter(|path| path != dir && path.starts_with(dir)).collect()
}

/// The direct children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|it| it.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| parent_of(*pid) == Some(parent)).collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; state and parent follow its last one.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// Whether a process runs; one that is dead but not yet waited for does not.
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Sends a signal to one process.
pub fn signal_process(pid: u32, signal: Signal) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(kill_process(pid, signal)?)
}

/// The binary under test: `$SEALMOUNT_BIN`, else the one cargo built for this test, else the one beside the example.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("SEALMOUNT_BIN") {
        return path.into();
    }
    if let Some(path) = option_env!("CARGO_BIN_EXE_sealmount") {
        return path.into();
    }
    let example = std::env::current_exe().unwrap();
    example.parent().and_then(Path::parent).unwrap().join("sealmount")
}
