//! The containers of one pod without a container runtime: each has mount and process namespaces and a root of its
//! own, all share the pod's network, IPC and UTS namespaces, and none has a capability.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::node::children;
use super::programs::Daemon;

/// Makes a container's root on a tmpfs from the machine's programs and the given binds, enters it, gives up every
/// right and becomes the program. It runs as PID 1 of new mount and process namespaces.
///
/// `umount -l old` takes the machine's whole tree away: what is not bound here cannot be named by the container.
const ENTER: &str = r#"
set -e
root=$1 uid=$2 gid=$3 groups=$4; shift 4
mount -t tmpfs -o mode=0755,size=1m container "$root"
cd "$root"
mkdir -p usr proc dev etc tmp old
chmod 1777 tmp
printf 'root:x:0:0::/:/bin/sh\napp:x:1000:1000::/:/bin/sh\nenvoy:x:1337:1337::/:/bin/sh\n' > etc/passwd
for top in usr bin sbin lib lib64; do
    if [ -L "/$top" ]; then cp -P "/$top" "$top"
    elif [ -d "/$top" ]; then
        mkdir -p "$top"; mount --bind "/$top" "$top"; mount -o remount,bind,ro "$top"
    fi
done
for device in null zero full random urandom; do : > "dev/$device"; mount --bind "/dev/$device" "dev/$device"; done
mount -t proc -o nosuid,nodev,noexec proc proc
while [ "$1" != -- ]; do
    source=$1 target=$2 mode=$3; shift 3
    if [ -d "$source" ]; then mkdir -p "./$target"; else mkdir -p "./${target%/*}"; : > "./$target"; fi
    mount --bind "$source" "./$target"
    if [ "$mode" = ro ]; then mount -o remount,bind,ro "./$target"; fi
done
shift
pivot_root . old
cd /
umount -l old
rmdir old
mount -o remount,ro /
exec setpriv --reuid "$uid" --regid "$gid" $groups --no-new-privs --inh-caps=-all --bounding-set=-all \
    --pdeathsig KILL -- "$@"
"#;

/// Who a process in a container is.
#[derive(Clone, Copy)]
pub struct User<'a> {
    /// UID.
    pub uid: u32,
    /// GID.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: &'a [u32],
}

impl User<'static> {
    /// A user with a group of the same number and no other.
    pub fn new(id: u32) -> Self {
        Self { uid: id, gid: id, groups: &[] }
    }
}

impl User<'_> {
    fn groups_flag(&self) -> String {
        if self.groups.is_empty() {
            return "--clear-groups".into();
        }
        let list: Vec<String> = self.groups.iter().map(u32::to_string).collect();
        format!("--groups={}", list.join(","))
    }

    fn setpriv(&self) -> Vec<String> {
        let mut args: Vec<String> = ["setpriv", "--reuid"].map(String::from).into();
        args.extend([self.uid.to_string(), "--regid".into(), self.gid.to_string(), self.groups_flag()]);
        args.extend(["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--"].map(String::from));
        args
    }
}

/// One bind into a container.
#[derive(Clone)]
pub struct Bind {
    /// On the machine: a directory or a file.
    pub source: PathBuf,
    /// In the container.
    pub target: String,
    /// Whether the container may write there.
    pub writable: bool,
}

impl Bind {
    /// A read-only bind.
    pub fn ro(source: &Path, target: &str) -> Self {
        Self { source: source.to_owned(), target: target.to_owned(), writable: false }
    }

    /// A writable bind.
    pub fn rw(source: &Path, target: &str) -> Self {
        Self { writable: true, ..Self::ro(source, target) }
    }
}

/// A pod's shared namespaces.
pub struct Sandbox {
    dir: TempDir,
    pid: u32,
    pause: Daemon,
}

impl Sandbox {
    /// New namespaces, held by a process that sleeps.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("sealmount-pod-").tempdir().unwrap();
        let args = ["--net", "--ipc", "--uts", "--", "sleep", "infinity"];
        let pause = Daemon::spawn(Path::new("unshare"), &args, &dir.path().join("pause.log"));
        let ours = fs::metadata("/proc/self/ns/net").unwrap().ino();
        let pid = wait("the pod's namespaces", || {
            let apart = |pid: &u32| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|it| it.ino() != ours);
            children(pause.id()).into_iter().find(apart)
        });
        Self { dir, pid, pause }
    }

    /// Where the containers' logs lie.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts a container and waits until its program runs as `user`.
    pub fn run(&self, name: &str, user: User<'_>, binds: &[Bind], program: &[&str]) -> Container {
        let root = self.dir.path().join(name);
        fs::create_dir(&root).unwrap();
        let log = self.dir.path().join(format!("{name}.log"));
        let namespace = |kind: &str| format!("--{kind}=/proc/{}/ns/{kind}", self.pid);
        let mut args: Vec<String> = vec![namespace("net"), namespace("ipc"), namespace("uts"), "--".into()];
        let unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--propagation", "private", "--"];
        args.extend(unshare.map(String::from));
        args.extend(["sh", "-c", ENTER, "sh", root.to_str().unwrap()].map(String::from));
        args.extend([user.uid.to_string(), user.gid.to_string(), user.groups_flag()]);
        for bind in binds {
            let mode = if bind.writable { "rw" } else { "ro" };
            args.extend([bind.source.to_str().unwrap(), &bind.target, mode].map(String::from));
        }
        args.push("--".into());
        args.extend(program.iter().map(|it| (*it).to_owned()));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let daemon = Daemon::spawn(Path::new("nsenter"), &args, &log);
        let pid = wait(&format!("container {name} ({})", log.display()), || {
            let inits = children(daemon.id()).into_iter().flat_map(children);
            inits.into_iter().find(|pid| runs_as(*pid, user.uid))
        });
        Container { pid, log, daemon }
    }
}

/// Whether the program runs: it has its UID, and `setpriv` is behind it.
fn runs_as(pid: u32, uid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = |key: &str| status.lines().find_map(|it| it.strip_prefix(key)).unwrap_or_default().trim().to_owned();
    line("Name:") != "setpriv" && line("Uid:").split_whitespace().all(|it| it == uid.to_string()) && !status.is_empty()
}

fn wait<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = ready() {
            return found;
        }
        assert!(Instant::now() < end, "not there after 10 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A running container. Dropping it kills everything in it.
pub struct Container {
    /// Its first process, as the machine numbers it.
    pid: u32,
    log: PathBuf,
    daemon: Daemon,
}

/// What came of a command.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub out: Vec<u8>,
    /// What it wrote to standard error.
    pub err: String,
}

impl Container {
    /// Its first process, as the machine numbers it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What its program wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Runs a program in the container's namespaces, as `kubectl exec` does.
    pub fn exec(&self, user: User<'_>, program: &[&str]) -> io::Result<Outcome> {
        let target = self.pid.to_string();
        let mut args = vec!["--target", &target, "--mount", "--pid", "--net", "--ipc", "--uts", "--"];
        let setpriv = user.setpriv();
        args.extend(setpriv.iter().map(String::as_str));
        args.extend(program);
        output("nsenter", &args)
    }

    /// Runs a program that has the container's files but the machine's processes.
    pub fn exec_in_files(&self, user: User<'_>, program: &[&str]) -> io::Result<Outcome> {
        let target = self.pid.to_string();
        let mut args = vec!["--target", &target, "--mount", "--"];
        let setpriv = user.setpriv();
        args.extend(setpriv.iter().map(String::as_str));
        args.extend(program);
        output("nsenter", &args)
    }

    /// Kills everything in the container.
    pub fn stop(&mut self) {
        self.daemon.stop();
    }
}

/// Runs a program as `user` on the machine itself, outside every container.
pub fn outside(user: User<'_>, program: &[&str]) -> io::Result<Outcome> {
    let setpriv = user.setpriv();
    let args: Vec<&str> = setpriv.iter().map(String::as_str).skip(1).chain(program.iter().copied()).collect();
    output("setpriv", &args)
}

fn output(program: &str, args: &[&str]) -> io::Result<Outcome> {
    let output = Command::new(program).args(args).env("LC_ALL", "C").stdin(Stdio::null()).output()?;
    if output.status.signal().is_some() {
        return Err(io::Error::other(format!("{program} {args:?}: {}", output.status)));
    }
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(Outcome { status: output.status, out: output.stdout, err })
}
