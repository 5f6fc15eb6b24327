//! Looks for known secret values where none may be: in the memory of a process, in files.

use std::fs::{self, File};
use std::io::{self, BufRead, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes read at once.
const CHUNK: usize = 1 << 20;

/// How often each needle stands in the readable memory of a process, in the order of `needles`.
///
/// Gives an error if the process is gone or may not be read; a range the kernel itself does not read (`[vvar]`) is
/// left out.
pub fn in_memory(pid: u32, needles: &[&[u8]]) -> io::Result<Vec<usize>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut counts = vec![0; needles.len()];
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(rights)) = (fields.next(), fields.next()) else { continue };
        if !rights.starts_with('r') {
            continue;
        }
        let (start, end) = range.split_once('-').ok_or(io::ErrorKind::InvalidData)?;
        let hex = |text| u64::from_str_radix(text, 16).map_err(io::Error::other);
        let (mut at, end) = (hex(start)?, hex(end)?);
        let mut scan = Scan::new(needles);
        let mut chunk = vec![0; CHUNK];
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            match memory.read_at(&mut chunk[..want], at) {
                Ok(0) | Err(_) => break,
                Ok(read) => {
                    scan.feed(&chunk[..read], &mut counts);
                    at += read as u64;
                }
            }
        }
    }
    Ok(counts)
}

/// How often each needle stands in the files below `root`, or in `root` itself if it is a file. Symlinks are not
/// followed.
pub fn in_files(root: &Path, needles: &[&[u8]]) -> io::Result<Vec<usize>> {
    let mut counts = vec![0; needles.len()];
    let kind = fs::symlink_metadata(root)?.file_type();
    if kind.is_dir() {
        for entry in fs::read_dir(root)? {
            let below = in_files(&entry?.path(), needles)?;
            counts.iter_mut().zip(below).for_each(|(sum, count)| *sum += count);
        }
    } else if kind.is_file() {
        let mut file = File::open(root)?;
        let mut scan = Scan::new(needles);
        let mut chunk = vec![0; CHUNK];
        loop {
            match file.read(&mut chunk)? {
                0 => break,
                read => scan.feed(&chunk[..read], &mut counts),
            }
        }
    }
    Ok(counts)
}

/// How often each needle stands in `bytes`.
pub fn in_bytes(bytes: &[u8], needles: &[&[u8]]) -> Vec<usize> {
    let mut counts = vec![0; needles.len()];
    Scan::new(needles).feed(bytes, &mut counts);
    counts
}

/// A search that goes on over the borders of chunks.
struct Scan<'a> {
    needles: &'a [&'a [u8]],
    /// The last bytes of the chunk before: one less than the longest needle.
    tail: Vec<u8>,
}

impl<'a> Scan<'a> {
    fn new(needles: &'a [&'a [u8]]) -> Self {
        Self { needles, tail: Vec::new() }
    }

    fn feed(&mut self, chunk: &[u8], counts: &mut [usize]) {
        let longest = self.needles.iter().map(|it| it.len()).max().unwrap_or(0);
        let border = self.tail.len();
        let mut joined = std::mem::take(&mut self.tail);
        joined.extend_from_slice(&chunk[..chunk.len().min(longest)]);
        for (needle, count) in self.needles.iter().zip(counts) {
            // A hit that begins before the border is one the chunk alone does not hold.
            *count += hits(&joined, needle).filter(|at| *at < border && at + needle.len() > border).count();
            *count += hits(chunk, needle).count();
        }
        let mut tail = joined;
        tail.truncate(border);
        tail.extend_from_slice(&chunk[chunk.len().saturating_sub(longest)..]);
        let keep = longest.saturating_sub(1);
        self.tail = tail.split_off(tail.len().saturating_sub(keep));
    }
}

fn hits<'h>(bytes: &'h [u8], needle: &'h [u8]) -> impl Iterator<Item = usize> + 'h {
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = *needle.first()?;
        loop {
            // The C library's memchr, which is fast in an unoptimised build too.
            let skipped = bytes.get(at..)?.skip_until(first).ok()?;
            at += skipped;
            let hit = at.checked_sub(1).filter(|_| skipped > 0)?;
            if bytes[hit..].starts_with(needle) {
                return Some(hit);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needle_is_counted_once_wherever_a_chunk_ends() {
        let bytes = b"..canary-1..canary-2canary-1..";
        for first in 0..bytes.len() {
            for second in first..bytes.len() {
                let mut counts = vec![0; 3];
                let needles: [&[u8]; 3] = [b"canary-1", b"canary", b"canary-3"];
                let mut scan = Scan::new(&needles);
                for chunk in [&bytes[..first], &bytes[first..second], &bytes[second..]] {
                    scan.feed(chunk, &mut counts);
                }
                assert_eq!(counts, [2, 3, 0], "chunks end at {first} and {second}");
            }
        }
    }

    #[test]
    fn memory_and_files_are_searched() {
        // Put together at run time, so that this program's own text does not hold it.
        let needle: Vec<u8> = (0..32_u8).map(|byte| byte.wrapping_mul(37) ^ 0x5a).collect();
        let mut child = std::process::Command::new("cat")
            .env("NEEDLE", needle.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let hex: String = needle.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut counts = Vec::new();
        for _ in 0..200 {
            counts = in_memory(child.id(), &[hex.as_bytes(), b"\0no such bytes\0"]).unwrap();
            if counts[0] > 0 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10)); // before its exec it is a copy of this process
        }
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(counts[0] > 0 && counts[1] == 0, "{counts:?}");
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("below")).unwrap();
        fs::write(dir.path().join("below/file"), &needle).unwrap();
        assert_eq!(in_files(dir.path(), &[&needle, b"absent"]).unwrap(), [1, 0]);
    }
}
