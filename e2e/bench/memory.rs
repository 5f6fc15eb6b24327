//! Memory of a process and all its descendants, as the kernel counts it.

use std::fs;

use crate::lab::node::children;

/// Sums over processes, in kB.
#[derive(Debug, Default, Clone, Copy)]
pub struct Memory {
    /// How many processes.
    pub processes: usize,
    /// Each page divided by how many processes map it: the sum counts every page once.
    pub pss: u64,
    /// Each page counted in every process that maps it.
    pub rss: u64,
}

/// The memory of `root` and its descendants.
pub fn of_tree(root: u32) -> Memory {
    let mut sum = Memory::default();
    let mut waiting = vec![root];
    while let Some(pid) = waiting.pop() {
        waiting.extend(children(pid));
        // A short-lived process may have ended meanwhile.
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { continue };
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        sum.processes += 1;
        sum.pss += field("Pss:");
        sum.rss += field("Rss:");
    }
    sum
}
