//! Shows on a fresh machine what the driver promises, tried by a real Envoy.
// A lab may stop at the first thing that is wrong; the driver may not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)]
#![allow(clippy::string_slice, clippy::disallowed_methods)]

#[path = "../lab/mod.rs"]
mod lab;

fn main() {}
