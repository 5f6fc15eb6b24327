//! The images of the pods, built without a registry.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The names that pods write; all are imported before the kubelet starts.
pub(crate) const PAUSE: &str = "localhost/pause:e2e";
/// busybox with the lab's own program `app` beside it.
pub(crate) const APP: &str = "localhost/app:e2e";
/// The image of the README's pods; the same as [`APP`].
pub(crate) const README: &str = "docker.io/library/busybox:1.37";
/// Envoy with the C library it needs, and busybox for a shell of its UID.
pub(crate) const ENVOY: &str = "localhost/envoy:e2e";

/// The driver in the build that waives what is never waived: the chart's repository with this tag.
pub(crate) const WAIVING_TAG: &str = "waive-anything";

/// The C library's parts that Envoy is linked with.
const LIBRARIES: &[&str] =
    &["libm.so.6", "librt.so.1", "libdl.so.2", "libpthread.so.0", "libc.so.6", "ld-linux-x86-64.so.2"];

/// A file of an image: where it is taken from, where it goes.
struct Copy<'a> {
    from: &'a Path,
    to: &'a str,
}

/// Builds the images of the test's pods below `dir` and gives the archives.
pub(crate) fn build(dir: &Path, envoy: &Path) -> Vec<PathBuf> {
    let busybox = which("busybox", "apt-get install busybox-static");
    let app = std::env::current_exe().expect("this program").with_file_name("app");
    assert!(app.exists(), "{} is missing: cargo build --example app", app.display());
    let libraries: Vec<(PathBuf, String)> = LIBRARIES
        .iter()
        .map(|name| {
            let place = if name.starts_with("ld-") { "/lib64" } else { "/lib/x86_64-linux-gnu" };
            (Path::new(place).join(name), format!("{place}/{name}"))
        })
        .collect();
    let app_files = [Copy { from: &app, to: "/bin/app" }, Copy { from: &busybox, to: "/bin/busybox" }];
    let mut envoy_files = vec![Copy { from: envoy, to: "/bin/envoy" }, Copy { from: &app, to: "/bin/app" }];
    envoy_files.push(Copy { from: &busybox, to: "/bin/busybox" });
    envoy_files.extend(libraries.iter().map(|(from, to)| Copy { from, to }));
    let waiving = PathBuf::from(std::env::var_os("SEALMOUNT_WAIVING").expect("SEALMOUNT_WAIVING names that build"));
    let waiving = [Copy { from: &waiving, to: "/sealmount" }];
    vec![
        image(dir, &format!("docker.io/sealmount/sealmount:{WAIVING_TAG}"), &waiving, &["/sealmount"]),
        image(dir, PAUSE, &[Copy { from: &app, to: "/app" }], &["/app", "pause"]),
        image(dir, README, &app_files, &["/bin/sh"]),
        image(dir, APP, &app_files, &["/bin/app", "hold"]),
        image(dir, ENVOY, &envoy_files, &["/bin/envoy"]),
    ]
}

/// The tools of busybox that pods call by name.
const TOOLS: &[&str] = &[
    "sh",
    "cat",
    "ls",
    "sleep",
    "id",
    "stat",
    "env",
    "grep",
    "find",
    "wget",
    "nc",
    "mount",
    "nsenter",
    "head",
    "tail",
    "ps",
    "netstat",
    "mkdir",
    "cp",
    "rm",
    "touch",
    "chmod",
    "readlink",
    "sha256sum",
    "hexdump",
    "ip",
    "nslookup",
    "kill",
    "true",
    "test",
    "echo",
    "dd",
    "tr",
    "sed",
    "awk",
    "sort",
    "wc",
    "seq",
    "date",
    "tcpdump",
];

fn image(dir: &Path, name: &str, files: &[Copy<'_>], entry: &[&str]) -> PathBuf {
    let short = name.rsplit('/').next().and_then(|it| it.split(':').next()).expect("a name");
    let context = dir.join(short);
    let root = context.join("root");
    for file in files {
        let to = root.join(file.to.trim_start_matches('/'));
        fs::create_dir_all(to.parent().expect("a parent")).expect("a directory");
        // A link where the file system allows one: Envoy is 150 MB.
        // Of the file itself: a link to a symbolic link leads nowhere inside.
        let from = fs::canonicalize(file.from).unwrap_or_else(|error| panic!("{}: {error}", file.from.display()));
        if fs::hard_link(&from, &to).is_err() {
            fs::copy(&from, &to).unwrap_or_else(|error| panic!("{}: {error}", file.from.display()));
        }
    }
    let tmp = root.join("tmp");
    fs::create_dir_all(&tmp).expect("a directory");
    fs::set_permissions(&tmp, std::os::unix::fs::PermissionsExt::from_mode(0o1777)).expect("a mode");
    if files.iter().any(|it| it.to == "/bin/busybox") {
        for tool in TOOLS {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(tool)).expect("a link");
        }
    }
    let entry: Vec<String> = entry.iter().map(|it| format!("{it:?}")).collect();
    let text = format!("FROM scratch\nCOPY root/ /\nENV PATH=/bin\nENTRYPOINT [{}]\n", entry.join(", "));
    fs::write(context.join("Dockerfile"), text).expect("write the Dockerfile");
    let archive = dir.join(format!("{short}.tar"));
    let storage = dir.join("storage");
    buildah(&storage, &["bud", "--quiet", "--isolation", "chroot", "--tag", name, &context.display().to_string()]);
    buildah(&storage, &["push", "--quiet", name, &format!("docker-archive:{}:{name}", archive.display())]);
    fs::remove_dir_all(context).expect("remove the image's files");
    archive
}

fn buildah(storage: &Path, args: &[&str]) {
    let at = |name: &str| storage.join(name).display().to_string();
    let output = Command::new("buildah")
        .args(["--storage-driver", "vfs", "--root", &at("root"), "--runroot", &at("run")])
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("buildah: {error}; apt-get install buildah"));
    assert!(output.status.success(), "buildah {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn which(program: &str, install: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|it| it.join(program)).find(|it| it.exists());
    found.unwrap_or_else(|| panic!("missing: {program}. Install it with: {install}"))
}
