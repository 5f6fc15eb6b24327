//! Attempts on files.

use std::fs;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nix::errno::Errno;

use super::{Attempt, errno, worst};

pub(super) fn read(path: &str) -> Attempt {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).trim().to_owned()),
        Err(error) => Err(errno(&error)),
    }
}

pub(super) fn list(path: &str) -> Attempt {
    let entries = fs::read_dir(path).map_err(|error| errno(&error))?;
    let names: Vec<String> = entries.flatten().map(|it| it.file_name().to_string_lossy().into_owned()).collect();
    Ok(names.join(" "))
}

/// The path through the root directory of every process in sight.
pub(super) fn through_roots(path: &str) -> Attempt {
    let mut refusals = Vec::new();
    for pid in super::processes::others() {
        match read(&format!("/proc/{pid}/root{path}")) {
            Ok(gain) => return Ok(gain),
            Err(refusal) => refusals.push(refusal),
        }
    }
    Err(worst(&refusals))
}

/// The first file below `root` whose path ends so; symbolic links are not followed.
pub(super) fn below(root: &str, end: &str) -> Attempt {
    let mut refusals = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(place) = open.pop() {
        let here = format!("{place}/{end}");
        match read(&here) {
            Ok(gain) => return Ok(gain),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(refusal) => refusals.push(refusal),
        }
        match fs::read_dir(&place) {
            Ok(entries) => open.extend(
                entries
                    .flatten()
                    .filter(|it| it.file_type().is_ok_and(|kind| kind.is_dir()))
                    .map(|it| it.path().to_string_lossy().into_owned()),
            ),
            Err(error) => refusals.push(errno(&error)),
        }
    }
    Err(worst(&refusals))
}

/// Every file of the container, but for the kernel's: `MARK@PATH` for each that contains a mark, and `aud:A@PATH` for
/// each token with the audience A.
pub(super) fn search(marks: &[&str]) -> String {
    let mut found = Vec::new();
    let kernel = ["/proc", "/sys", "/dev", "/bin", "/lib", "/lib64"].map(Path::new);
    let mut open = vec![Path::new("/").to_owned()];
    while let Some(place) = open.pop() {
        for entry in fs::read_dir(&place).into_iter().flatten().flatten() {
            let (path, kind) = (entry.path(), entry.file_type());
            if kernel.contains(&path.as_path()) {
                continue;
            }
            if kind.is_ok_and(|it| it.is_dir()) {
                open.push(path);
                continue;
            }
            let Ok(bytes) = fs::read(&path) else { continue };
            let text = String::from_utf8_lossy(&bytes);
            let shown = path.display();
            found.extend(marks.iter().filter(|it| text.contains(**it)).map(|it| format!("{it}@{shown}")));
            found.extend(audiences(&text).map(|it| format!("aud:{it}@{shown}")));
        }
    }
    found.join(" ")
}

/// The audience of each token (JWT) in the text.
fn audiences(text: &str) -> impl Iterator<Item = String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || "-_.".contains(c)));
    words.filter(|word| word.starts_with("eyJ")).filter_map(|word| {
        let payload = URL_SAFE_NO_PAD.decode(word.split('.').nth(1)?).ok()?;
        let claims: serde_json::Value = serde_json::from_slice(&payload).ok()?;
        Some(claims["aud"].to_string())
    })
}
