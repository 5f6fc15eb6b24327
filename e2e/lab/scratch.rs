//! A directory that leaves nothing behind: no file, no mount below it, no process it was told of.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

/// Kills the process named in the directory, unmounts what stands below it (the last mounted first) and removes it.
/// It runs when the pipe on its input closes, so also when this process is killed. A mount that does not go away
/// would make `rm` cross into it; `--one-file-system` does not let it.
const CLEANER: &str = r#"
cat > /dev/null
for pid in $(cat "$1/pid" 2> /dev/null); do kill -KILL "$pid" 2> /dev/null; done
cut -d' ' -f5 /proc/self/mountinfo | tac | while read -r path; do
    case "$path" in "$1"/*) umount -l "$path" ;; esac
done
rm -rf --one-file-system "$1"
"#;

/// The directory; its end is this value's.
pub struct Scratch {
    path: PathBuf,
    cleaner: Child,
    life: Option<ChildStdin>,
}

impl Scratch {
    /// A new directory that every UID may enter: workers and containers read below it.
    pub fn new() -> Self {
        let path = tempfile::Builder::new().prefix("sealmount-").tempdir().unwrap().keep();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        let mut cleaner = Command::new("sh")
            .args(["-c", CLEANER, "sh"])
            .arg(&path)
            .stdin(Stdio::piped())
            .process_group(0) // Ctrl-C is for us; the pipe tells the cleaner
            .spawn()
            .unwrap();
        let life = cleaner.stdin.take();
        Self { path, cleaner, life }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The process to kill first, if any; name it no longer once it was waited for.
    pub fn set_process(&self, pid: Option<u32>) {
        fs::write(self.path.join("pid"), pid.map_or_else(String::new, |pid| pid.to_string())).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.life.take());
        let _ = self.cleaner.wait();
    }
}
