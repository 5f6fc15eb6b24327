//! The Container Storage Interface: the edge where the kubelet speaks to the worker.

pub mod identity;
pub mod layers;
pub mod node;
pub mod parse;
pub mod status;

pub mod proto {
    //! Messages and services generated from `proto/`.

    /// `csi.v1`: Identity and Node.
    #[allow(missing_docs, clippy::all, clippy::pedantic, missing_debug_implementations, unreachable_pub)]
    #[allow(unused_qualifications)]
    pub mod csi {
        tonic::include_proto!("csi.v1");
    }

    /// `pluginregistration`: how the kubelet learns of a plugin.
    #[allow(missing_docs, clippy::all, clippy::pedantic, missing_debug_implementations, unreachable_pub)]
    #[allow(unused_qualifications)]
    pub mod registration {
        tonic::include_proto!("pluginregistration");
    }
}
