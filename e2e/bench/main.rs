//! Written in its slice.
#[path = "../lab/mod.rs"]
mod lab;
fn main() {}
