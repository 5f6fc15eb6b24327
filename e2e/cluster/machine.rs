//! The namespaces that the cluster lives in, and their end.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind_recursive, mount_change};
use rustix::process::{Pid, Signal, WaitOptions, kill_process};
use tokio::signal::unix::{SignalKind, signal};

use crate::lab;

/// Written to the first process of the namespaces: stay when the caller goes.
const STAY: u8 = b'k';

/// Where the cluster's files are: `E2E_DIR`, or one directory for temporary files.
///
/// Short, because paths of unix sockets end at 107 bytes.
pub(crate) fn directory() -> PathBuf {
    std::env::var_os("E2E_DIR").map_or_else(|| std::env::temp_dir().join("sealmount-e2e"), PathBuf::from)
}

/// The cgroup that the kubelet puts the pods under, so that two clusters do not take each other's pods for leftovers.
pub(crate) fn cgroup(dir: &Path) -> String {
    dir.file_name().expect("E2E_DIR names a directory").to_string_lossy().into_owned()
}

/// Starts the namespaces, runs the checks in them and ends them again, unless `KEEP` is set.
pub(crate) fn up(args: &[String]) -> Result<u8, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("it makes namespaces and mounts: run it as root".to_owned());
    }
    let dir = directory();
    if running(&dir).is_some() {
        return Err(format!("a cluster runs in {}; `make e2e-down` ends it", dir.display()));
    }
    clean(&dir)?;
    fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let status: Result<ExitStatus, u8> = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).expect("a signal");
        let mut terminate = signal(SignalKind::terminate()).expect("a signal");
        let mut inside = tokio::process::Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--fork", "--mount-proc", "--propagation", "private"])
            .arg(std::env::current_exe().expect("this program"))
            .arg("init")
            .args(args)
            .env("E2E_DIR", &dir)
            .stdin(Stdio::piped())
            .spawn()
            .expect("start unshare");
        let mut life = inside.stdin.take().expect("a pipe");
        let unshare = inside.id().expect("it runs");
        let first = loop {
            // Its number out here; inside it is 1.
            match lab::node::children(unshare).first() {
                Some(pid) => break *pid,
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        fs::write(dir.join("pid"), first.to_string()).expect("write the pid");
        if keep() {
            let stay = tokio::io::AsyncWriteExt::write_all(&mut life, &[STAY]).await;
            stay.expect("write to the namespaces' first process");
        }
        let status = tokio::select! {
            status = inside.wait() => return Ok(status.expect("wait for the checks")),
            _ = finished(&dir) => Ok(ExitStatus::default()),
            _ = interrupt.recv() => Err(130),
            _ = terminate.recv() => Err(143),
        };
        if status.is_err() {
            drop(life);
            end(&dir);
            let _ = inside.wait().await;
        }
        status
    });
    match status {
        Ok(status) if keep() && running(&dir).is_some() => {
            say_how_to_use(&dir);
            let failed = fs::read_to_string(dir.join("result")).is_ok_and(|it| it != "0");
            Ok(u8::from(failed || !status.success()))
        }
        Ok(status) => {
            clean(&dir)?;
            Ok(u8::from(!status.success()))
        }
        Err(code) => {
            clean(&dir)?;
            eprintln!("interrupted; everything was taken away again");
            Ok(code)
        }
    }
}

/// Ends the cluster that `KEEP=1` left.
pub(crate) fn down() -> Result<(), String> {
    let dir = directory();
    end(&dir);
    clean(&dir)
}

fn keep() -> bool {
    std::env::var_os("KEEP").is_some_and(|it| !it.is_empty() && it != "0")
}

/// With `KEEP` the namespaces outlive the checks: their end is a file.
async fn finished(dir: &Path) {
    while !(keep() && dir.join("result").exists()) {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn say_how_to_use(dir: &Path) {
    let enter = format!("nsenter --target $(cat {0}/pid) --mount --net --pid", dir.display());
    println!("\nThe cluster stays. A shell in it, with kubectl, helm, ctr and bao:");
    println!("    {enter} sh -c '. {}/env; exec bash'", dir.display());
    println!("`make e2e-down` ends it.");
}

/// The first process of the cluster that runs in `dir`, as this process sees it.
fn running(dir: &Path) -> Option<Pid> {
    let pid: i32 = fs::read_to_string(dir.join("pid")).ok()?.trim().parse().ok()?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    // Another process may have got the number.
    line.split(|byte| *byte == 0).any(|word| word == b"init").then(|| Pid::from_raw(pid)).flatten()
}

/// The kernel ends every process of a process namespace with its first one.
fn end(dir: &Path) {
    let Some(pid) = running(dir) else { return };
    let _ = kill_process(pid, Signal::KILL);
    let limit = Instant::now() + Duration::from_secs(30);
    while running(dir).is_some() && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Removes the files and the cgroups. The mounts went with their namespace.
fn clean(dir: &Path) -> Result<(), String> {
    let name = cgroup(dir);
    for hierarchy in hierarchies() {
        let own = hierarchy.join(&name);
        remove_cgroup(&own);
        if own.exists() {
            return Err(format!("{} could not be removed: a process is in it", own.display()));
        }
    }
    if dir.exists() {
        // Only what the runner itself made: a wrong E2E_DIR must not cost somebody a directory.
        let made = ["pid", "lib"].iter().any(|it| dir.join(it).exists());
        if !made && fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(format!("{} is not empty and not a cluster's: name another E2E_DIR", dir.display()));
        }
        fs::remove_dir_all(dir).map_err(|error| format!("remove {}: {error}", dir.display()))?;
    }
    Ok(())
}

fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    for _ in 0..50 {
        if !path.exists() || fs::remove_dir(path).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20)); // a process just killed is still in it
    }
}

/// The roots of cgroup v1's hierarchies, or the one of v2.
fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.join("cgroup.procs").exists()).collect()
}

/// The first process inside: makes the machine, starts the checks and takes in orphans, as an init does.
pub(crate) fn init(args: &[String]) -> u8 {
    let dir = directory();
    end_with_caller();
    make_machine(&dir);
    #[allow(clippy::zombie_processes)] // the loop below waits for every process there is
    let checks = Command::new(std::env::current_exe().expect("this program"))
        .arg("inside")
        .args(args)
        .stdin(Stdio::null())
        .spawn()
        .expect("start the checks");
    let checks = Pid::from_child(&checks);
    let mut code = 1;
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == checks => {
                code = status.exit_status().unwrap_or(1);
                fs::write(dir.join("result"), code.to_string()).expect("write the result");
                if !keep() {
                    return u8::try_from(code).unwrap_or(1);
                }
                let_go_of_output();
            }
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => {}
            Err(_) if keep() => std::thread::sleep(Duration::from_secs(1)),
            Err(_) => return u8::try_from(code).unwrap_or(1),
        }
    }
}

/// Who reads this output waits for its last writer.
fn let_go_of_output() {
    let null = fs::File::options().write(true).open("/dev/null").expect("/dev/null");
    rustix::stdio::dup2_stdout(&null).expect("close the output");
    rustix::stdio::dup2_stderr(&null).expect("close the output");
}

/// Ends this process, and so all of them, when the caller is gone, unless it said to stay.
fn end_with_caller() {
    std::thread::spawn(|| {
        let mut byte = [0];
        let mut stdin = std::io::stdin();
        match stdin.read(&mut byte) {
            Ok(1) if byte[0] == STAY => {}
            _ => std::process::exit(1),
        }
    });
}

/// Directories, mounts, cgroups and interfaces of the one node.
fn make_machine(dir: &Path) {
    // What containers mount with Bidirectional propagation must come back to the kubelet: one peer group, not the
    // caller's.
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    mount_change("/", shared).expect("make / shared");
    for (own, place) in [("lib", "/var/lib"), ("log", "/var/log")] {
        let own = dir.join(own);
        fs::create_dir_all(&own).expect("a directory");
        mount_bind_recursive(&own, place).expect("bind a directory");
        mount_change(place, shared).expect("share it");
    }
    // The caller's own /etc stays as it is: containerd keeps a lock in /etc/cni.
    let layers = ["upper", "work"].map(|name| dir.join("etc").join(name));
    layers.iter().for_each(|layer| fs::create_dir_all(layer).expect("a directory"));
    let options = format!("lowerdir=/etc,upperdir={},workdir={}", layers[0].display(), layers[1].display());
    let options = std::ffi::CString::new(options).expect("no NUL");
    mount("overlay", "/etc", "overlay", MountFlags::empty(), options.as_c_str()).expect("an overlay on /etc");
    mount("tmpfs", "/run", "tmpfs", MountFlags::NOSUID, None).expect("mount /run");
    mount_change("/run", shared).expect("share /run");
    for name in ["cni", "etcd", "pki"] {
        fs::create_dir_all(dir.join("lib").join(name)).expect("a directory");
    }
    for hierarchy in hierarchies() {
        let own = hierarchy.join(cgroup(dir));
        fs::create_dir_all(&own).expect("a cgroup");
        // Of v1 only: a new cpuset takes no process until it has both.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(value) = fs::read(hierarchy.join(file)) {
                let _ = fs::write(own.join(file), value);
            }
        }
    }
    let ip = |args: &str| {
        let output = Command::new("ip").args(args.split(' ')).output().expect("ip: apt-get install iproute2");
        assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    };
    ip("link set lo up");
    // A bridge is the node's interface: the kubelet takes no loopback address, and pods reach the node by it.
    // Its own address: otherwise it takes the lowest of its ports', and with each pod that comes or goes the others lose
    // the node for as long as they remember the old one.
    ip("link add node address 02:00:0a:f4:4d:01 type bridge");
    ip(&format!("addr add {NODE_ADDRESS}/24 dev node"));
    ip(&format!("addr add {SERVICE_ADDRESS}/32 dev node"));
    ip("link set node up");
    ip(&format!("route add default via {NODE_ADDRESS}"));
}

/// The node, and everything that listens on it.
pub(crate) const NODE_ADDRESS: &str = "10.244.77.1";
/// The API server as pods know it. No kube-proxy runs: the address is the node's own.
pub(crate) const SERVICE_ADDRESS: &str = "10.96.0.1";
