//! The two sides of the privilege boundary.

pub mod wire;
