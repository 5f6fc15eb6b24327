//! kill -9 at chosen system calls of a first publish, of a swap and of an unpublish, of the broker (and the child it
//! forks) and of the worker. What the pod sees afterwards is all or nothing, the retry works, and nothing is left.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab::kubelet::{Kubelet, PodSpec, is_mounted};
use crate::lab::node::{Node, Options, is_alive};
use crate::secret::{pod, read};

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// The root half, or the child it forked for the call.
    Broker,
    Worker,
}

/// What is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    First,
    Swap,
    Unpublish,
}

/// strace attached to a process, which kills whoever makes the n-th call of a kind.
struct Trap(Child);

impl Trap {
    #[allow(clippy::zombie_processes)] // waited for when dropped
    fn set(victim: u32, call: &str, nth: u32) -> Self {
        let trap = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={call}:signal=KILL:when={nth}"), "-p", &victim.to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("strace: {error}; install it with: apt-get install strace"));
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let status = fs::read_to_string(format!("/proc/{victim}/status")).unwrap_or_default();
            let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:")).unwrap_or("0");
            // A worker that waits may make the call, and die, before this is seen.
            if tracer.trim() != "0" || !is_alive(victim) {
                return Self(trap);
            }
            assert!(Instant::now() < end, "strace did not attach to {victim} for {call} {nth}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the driver answers again: after a dead broker it is started anew, as the container runtime does; a
/// dead worker comes back by itself.
async fn recover(node: &mut Node, kubelet: &Kubelet) {
    if node.ended(Duration::from_millis(100)).is_some() {
        node.launch();
    }
    kubelet.register(Duration::from_secs(20)).await.unwrap_or_else(|error| panic!("{error}:\n{}", node.log()));
}

/// What stands is complete, with one of the two passwords; or nothing is there.
fn whole_or_absent(kubelet: &Kubelet, pod: &PodSpec, passwords: &[&str], what: &str) -> bool {
    let target = kubelet.target(pod, "creds");
    if !is_mounted(&target) {
        let names = fs::read_dir(&target).map(Iterator::count).unwrap_or_default();
        assert_eq!(names, 0, "{what}: files where nothing is mounted");
        return false;
    }
    let password = read(kubelet, pod, "password");
    assert!(passwords.contains(&password.as_str()), "{what}: half a password");
    assert_eq!(read(kubelet, pod, "username"), "app", "{what}");
    true
}

async fn strike(
    node: &mut Node,
    kubelet: &Kubelet,
    victim: Victim,
    operation: Operation,
    call: &str,
    nth: u32,
) -> bool {
    let what = format!("{victim:?} {operation:?} {call} {nth}");
    let mut pod = pod(&what.to_lowercase().replace([' ', '_'], "-"));
    let old = pod.secrets["db"]["password"].clone();
    kubelet.admit(&pod);
    if operation != Operation::First {
        kubelet.publish(&pod, "creds").await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    }
    if operation == Operation::Swap {
        pod.secrets.get_mut("db").unwrap().insert("password".into(), "next".into());
    }
    let broker = node.broker();
    let worker = node.worker().unwrap();
    let target = if victim == Victim::Broker { broker } else { worker };
    let trap = Trap::set(target, call, nth);
    let forked = |node: &Node| node.log().matches("did not end as it should").count();
    let before = forked(node);
    if operation == Operation::Unpublish {
        let _ = kubelet.unpublish(&pod, "creds").await;
    } else {
        let _ = kubelet.publish(&pod, "creds").await;
    }
    // The call ends when the socket closes, a moment before the dead process is gone.
    let end = Instant::now() + Duration::from_millis(500);
    let struck = |node: &Node| !is_alive(target) || forked(node) > before;
    while !struck(node) && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(trap);
    let hit = struck(node);
    let stood = whole_or_absent(kubelet, &pod, &[&old, "next"], &what);
    assert!(stood || operation != Operation::Swap, "{what}: a swap took the volume away");
    recover(node, kubelet).await;
    whole_or_absent(kubelet, &pod, &[&old, "next"], &what);
    if operation == Operation::Unpublish {
        kubelet.unpublish(&pod, "creds").await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    } else {
        kubelet.publish(&pod, "creds").await.unwrap_or_else(|error| panic!("{what}: {error:?}\n{}", node.log()));
        assert!(whole_or_absent(kubelet, &pod, &[&pod.secrets["db"]["password"]], &what), "{what}: not published");
        let names = fs::read_dir(kubelet.target(&pod, "creds")).unwrap();
        let names: Vec<String> = names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect();
        let generations = names.iter().filter(|name| name.starts_with("..") && *name != "..data").count();
        assert_eq!((generations, names.len()), (1, 4), "{what}: something is left: {names:?}");
        kubelet.unpublish(&pod, "creds").await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    }
    assert!(kubelet.is_gone(&pod, "creds"), "{what}");
    assert_eq!(node.mounts(), Vec::<PathBuf>::new(), "{what}: a mount is left");
    kubelet.forget(&pod);
    hit
}

/// Runs all points and says which of them no call reached: those prove nothing. A few points share a node: a worker
/// that dies often is started again with growing pauses.
async fn strike_all(victim: Victim, operation: Operation, points: &[(&str, u32)]) {
    let mut missed = Vec::new();
    for points in points.chunks(4) {
        let (mut node, kubelet) = Node::start(Options::new("version: 1\n")).await;
        for (call, nth) in points {
            if !strike(&mut node, &kubelet, victim, operation, call, *nth).await {
                missed.push(format!("{call} {nth}"));
            }
        }
    }
    assert!(missed.is_empty(), "{victim:?} {operation:?}: no call reached {missed:?}");
}

#[tokio::test]
async fn the_broker_dies_in_a_first_publish() {
    let points = [
        ("recvfrom", 1),
        ("openat2", 1),
        ("openat2", 2),
        ("mkdirat", 1),
        ("fsopen", 1),
        ("fsconfig", 1),
        ("fsconfig", 5),
        ("fsmount", 1),
        ("mkdirat", 2),
        ("sendfile", 1),
        ("sendfile", 2),
        ("sendfile", 4),
        ("fchown", 1),
        ("fchmod", 2),
        ("fchown", 3),
        ("symlinkat", 1),
        ("symlinkat", 3),
        ("fsetxattr", 1),
        ("mount_setattr", 1),
        ("move_mount", 1),
        ("sendmsg", 1),
    ];
    strike_all(Victim::Broker, Operation::First, &points).await;
}

#[tokio::test]
async fn the_broker_or_its_child_dies_in_a_swap() {
    let points = [
        ("recvfrom", 1),
        ("openat2", 1),
        ("clone", 1),
        ("open_tree", 1),
        ("mount_setattr", 1),
        ("mkdirat", 1),
        ("sendfile", 1),
        ("sendfile", 2),
        ("sendfile", 4),
        ("fchown", 1),
        ("fchmod", 1),
        ("fchown", 3),
        ("symlinkat", 1),
        ("symlinkat", 3),
        ("renameat", 1),
        ("fsetxattr", 1),
        ("unlinkat", 1),
        ("unlinkat", 3),
        ("mount_setattr", 2),
        ("sendmsg", 1),
    ];
    strike_all(Victim::Broker, Operation::Swap, &points).await;
}

#[tokio::test]
async fn the_broker_dies_in_an_unpublish() {
    let points = [
        ("recvfrom", 1),
        ("openat2", 1),
        ("openat2", 2),
        ("openat", 1),
        ("statx", 1),
        ("fstatfs", 1),
        ("fgetxattr", 1),
        ("readlinkat", 1),
        ("open_tree", 1),
        ("mount_setattr", 1),
        ("getdents64", 1),
        ("openat", 3),
        ("openat2", 3),
        ("umount2", 1),
        ("unlinkat", 1),
        ("write", 1),
        ("write", 2),
        ("ftruncate", 1),
        ("ftruncate", 2),
        ("sendmsg", 1),
    ];
    strike_all(Victim::Broker, Operation::Unpublish, &points).await;
}

/// Calls of the worker from the kubelet's connection to its answer. Two connections come: the kubelet asks for the
/// driver's capabilities first.
const WORKER: [(&str, u32); 20] = [
    ("accept4", 1),
    ("accept4", 2),
    ("epoll_ctl", 1),
    ("epoll_wait", 1),
    ("epoll_wait", 2),
    ("epoll_wait", 3),
    ("epoll_wait", 4),
    ("recvfrom", 1),
    ("recvfrom", 2),
    ("recvfrom", 4),
    ("writev", 1),
    ("writev", 2),
    ("openat", 1),
    ("mkdirat", 1),
    ("openat", 2),
    ("openat", 3),
    ("write", 1),
    ("sendto", 1),
    ("recvmsg", 1),
    ("unlinkat", 1),
];

#[tokio::test]
async fn the_worker_dies_in_a_first_publish() {
    strike_all(Victim::Worker, Operation::First, &WORKER).await;
}

#[tokio::test]
async fn the_worker_dies_in_a_swap() {
    // A manifest that did not change is not read again.
    let swap: Vec<_> = WORKER.into_iter().filter(|point| *point != ("openat", 3)).collect();
    strike_all(Victim::Worker, Operation::Swap, &swap).await;
}

#[tokio::test]
async fn the_worker_dies_in_an_unpublish() {
    // It hands nothing over: only the calls of connections and of waiting.
    let here = ["accept4", "recvfrom", "writev", "epoll_wait", "sendto", "recvmsg", "setsockopt", "epoll_ctl", "fcntl"];
    let last: Vec<_> = WORKER.into_iter().filter(|(call, _)| here.contains(call)).collect();
    strike_all(Victim::Worker, Operation::Unpublish, &last).await;
}
