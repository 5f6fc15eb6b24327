//! The one binary. What it does stands in the library.

fn main() {}
