//! Compiles the wire formats with protox (no protoc needed).

use std::error::Error;

/// Messages whose fields hold secret values, tokens or what a pod author wrote: a derived `Debug` would print them.
const NO_DEBUG: [&str; 2] = [".csi.v1.NodePublishVolumeRequest", ".v1alpha1"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["csi.proto", "pluginregistration.proto", "pods.proto", "admin.proto"], ["proto"])?;
    tonic_prost_build::configure().skip_debug(NO_DEBUG).compile_fds(files)?;
    Ok(())
}
