//! What a volume will look like, worked out before anything is touched: pure, from a [`Commit`] alone.
//!
//! Inside a volume, as the kubelet's own atomic writer does it: `..<generation>/` holds the files,
//! `..data -> ..<generation>` says which one is meant, and each top-level name is a link `name -> ..data/name`.

use std::collections::BTreeSet;

use super::WORKER_UID;
use super::wire::{Commit, Denied, MAX_NOTE};

/// The most files of a volume (surface 4).
pub(crate) const MAX_FILES: usize = 256;
/// The most bytes of all names of a volume (surface 4).
pub(crate) const MAX_NAMES: usize = 64 * 1024;
/// The largest UID a pod can have (kubernetes, validation of `runAsUser`); the worker's own lies above it.
const MAX_UID: u32 = i32::MAX as u32;

/// The name that says which generation is meant.
pub(crate) const DATA: &str = "..data";
/// Its successor, until it is renamed.
pub(crate) const DATA_NEXT: &str = "..data_tmp";

/// The directory of a generation.
pub(crate) fn generation_name(generation: u64) -> String {
    format!("..{generation}")
}

/// The generation `..data` points to, if it is one of ours.
pub(crate) fn parse_generation(link: &[u8]) -> Option<u64> {
    std::str::from_utf8(link).ok()?.strip_prefix("..")?.parse().ok()
}

/// A content's shape and what it needs of a tmpfs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Directories below the generation, each after its parent.
    pub(crate) dirs: Vec<String>,
    /// Names in the volume's root, each a link into `..data`.
    pub(crate) links: BTreeSet<String>,
    /// Content bytes.
    pub(crate) bytes: u64,
    /// Bytes one generation takes at the most.
    pub(crate) pages: u64,
    /// Inodes one generation and its links take at the most.
    pub(crate) inodes: u64,
    /// Half of a volume's first size: what one generation may take at the limit.
    pub(crate) half: u64,
}

impl Layout {
    /// Checks a commit as a whole and lays it out on pages of `page` bytes.
    pub(crate) fn of(commit: &Commit, page: u64) -> Result<Self, Denied> {
        let invalid = |why: &str| Denied::Invalid(why.to_owned());
        if commit.owner.uid > MAX_UID || commit.owner.uid == WORKER_UID || commit.owner.gid != 0 {
            return Err(invalid("the owner is a UID up to 2147483647 and group 0"));
        }
        if commit.note.len() > MAX_NOTE {
            return Err(invalid("the note is longer than 1024 bytes"));
        }
        let names: usize = commit.files.iter().map(|(name, _)| name.as_str().len()).sum();
        if commit.files.len() > MAX_FILES || names > MAX_NAMES {
            return Err(invalid("a volume has at most 256 names of 64 KiB in all"));
        }

        let too_large = || invalid("a length is too large to add up");
        let (mut files, mut dirs, mut links) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let (mut bytes, mut pages) = (0_u64, 0_u64);
        for (name, length) in &commit.files {
            if !files.insert(name.as_str()) {
                return Err(invalid("a name is there twice"));
            }
            let parents = name.as_str().match_indices('/').filter_map(|(at, _)| name.as_str().get(..at));
            dirs.extend(parents.map(str::to_owned));
            links.extend(name.segments().next().map(str::to_owned));
            bytes = bytes.checked_add(*length).ok_or_else(too_large)?;
            // A page more for each file: its link's text takes one when it is long.
            let whole = length.checked_next_multiple_of(page).and_then(|whole| whole.checked_add(page));
            pages = whole.and_then(|whole| pages.checked_add(whole)).ok_or_else(too_large)?;
        }
        if dirs.iter().any(|dir| files.contains(dir.as_str())) {
            return Err(invalid("a name is a file and a directory"));
        }
        if bytes > commit.volume_bytes {
            return Err(Denied::TooLarge { need: bytes, limit: commit.volume_bytes });
        }
        let limit = commit.volume_bytes.checked_next_multiple_of(page).ok_or_else(too_large)?;
        let half = pages.max(limit).max(page);
        if half > u64::MAX / 8 {
            return Err(too_large()); // four times it must still be a number
        }
        let inodes = [files.len(), dirs.len(), links.len(), 1].iter().sum::<usize>();
        let inodes = u64::try_from(inodes).map_err(|_| too_large())?;
        Ok(Self { dirs: dirs.into_iter().collect(), links, bytes, pages, inodes, half })
    }

    /// Size and inodes of a superblock for this content when `used` of both is taken already: room for the old and
    /// the new content, and for what old readers still hold, up to four times the limit. Never less than is used: the
    /// kernel refuses that.
    pub(crate) fn room(&self, used: (u64, u64)) -> (u64, u64) {
        let size = used.0.saturating_add(self.pages).clamp(self.half * 2, self.half * 4).max(used.0);
        // 16 more: root, `..data`, its successor, and the attribute that names the volume (counted since Linux 6.6).
        let own = self.inodes.saturating_mul(2).saturating_add(16);
        let inodes = used.1.saturating_add(self.inodes).saturating_add(16).clamp(own, own.saturating_mul(2));
        (size, inodes.max(used.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{FileName, Owner, PodUid, VolumeId, VolumeName};

    fn commit(files: &[(&str, u64)]) -> Commit {
        Commit {
            volume: VolumeId { pod: PodUid::parse("0a").unwrap(), name: VolumeName::parse("db").unwrap() },
            owner: Owner { uid: 1000, gid: 0 },
            volume_bytes: 1 << 20,
            work: 1,
            files: files.iter().map(|(name, length)| (FileName::parse(name).unwrap(), *length)).collect(),
            key: [0; 32],
            tag: [0; 32],
            note: Vec::new(),
        }
    }

    #[test]
    fn a_tree_has_its_directories_and_one_link_a_top_name() {
        let layout = Layout::of(&commit(&[("user", 1), ("tls/a/key", 4096), ("tls/crt", 4097)]), 4096).unwrap();
        assert_eq!(layout.dirs, ["tls", "tls/a"]);
        assert_eq!(layout.links.iter().collect::<Vec<_>>(), ["tls", "user"]);
        assert_eq!(layout.bytes, 1 + 4096 + 4097);
        assert_eq!(layout.pages, 4096 * (2 + 2 + 3));
        assert_eq!(layout.room((0, 0)).0, 2 << 20);
        assert_eq!(layout.room((3 << 20, 0)).0, (3 << 20) + 7 * 4096);
        assert_eq!(layout.room(((4 << 20) - 1, 0)).0, 4 << 20);
        assert_eq!(layout.room((5 << 20, 0)).0, 5 << 20);
    }

    #[test]
    fn what_is_wrong_as_a_whole_is_refused() {
        let page = 4096;
        let refused = |commit: &Commit| Layout::of(commit, page).unwrap_err();
        assert!(matches!(refused(&commit(&[("a", 1), ("a", 1)])), Denied::Invalid(_)));
        assert!(matches!(refused(&commit(&[("a", 1), ("a/b", 1)])), Denied::Invalid(_)));
        assert!(matches!(refused(&commit(&[("a/b/c", 1), ("a/b", 1)])), Denied::Invalid(_)));
        assert!(matches!(refused(&commit(&[("a", u64::MAX), ("b", 1)])), Denied::Invalid(_)));
        let (limit, need) = (1 << 20, (1 << 20) + 1);
        assert_eq!(refused(&commit(&[("a", limit), ("b", 1)])), Denied::TooLarge { need, limit });
        for uid in [WORKER_UID, u32::MAX, 1 << 31] {
            let mut worker = commit(&[("a", 1)]);
            worker.owner.uid = uid;
            assert!(matches!(refused(&worker), Denied::Invalid(_)), "{uid}");
        }
        let mut vast = commit(&[("a", 1)]);
        vast.volume_bytes = u64::MAX / 4;
        assert!(matches!(refused(&vast), Denied::Invalid(_)));
        let many: Vec<_> = (0..257).map(|i| (format!("f{i}"), 1)).collect();
        let many: Vec<_> = many.iter().map(|(name, length)| (name.as_str(), *length)).collect();
        assert!(matches!(refused(&commit(&many)), Denied::Invalid(_)));
        let long: Vec<_> = (0..255).map(|i| (format!("{i:0250}/{i:0250}"), 1)).collect();
        let long: Vec<_> = long.iter().map(|(name, length)| (name.as_str(), *length)).collect();
        assert!(matches!(refused(&commit(&long)), Denied::Invalid(_)));
    }

    #[test]
    fn only_our_generations_are_generations() {
        assert_eq!(parse_generation(generation_name(7).as_bytes()), Some(7));
        for other in ["..data", "7", "..", "..7/x", "/..7", "..-7", "..2026_01_01"] {
            assert_eq!(parse_generation(other.as_bytes()), None, "{other}");
        }
    }
}
