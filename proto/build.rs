//! Compiles the wire formats with protox (no protoc needed).

use std::error::Error;

/// Messages whose fields hold secret values, tokens or what a pod author wrote: a derived `Debug` would print them.
const NO_DEBUG: [&str; 2] = [".csi.v1.NodePublishVolumeRequest", ".v1alpha1"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["csi.proto", "pluginregistration.proto", "pods.proto", "admin.proto"], ["proto"])?;
    tonic_prost_build::configure().skip_debug(NO_DEBUG).compile_fds(files)?;
    test_controller()
}

/// The stub's service of e2e/sanity. No part of the library or the program includes it.
#[allow(clippy::disallowed_methods)] // cargo says where by a variable
fn test_controller() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=e2e/sanity/controller.proto");
    let out = std::path::Path::new(&std::env::var("OUT_DIR")?).join("sanity");
    std::fs::create_dir_all(&out)?;
    let files = protox::compile(["controller.proto"], ["e2e/sanity"])?;
    tonic_prost_build::configure().out_dir(out).compile_fds(files)?;
    Ok(())
}
