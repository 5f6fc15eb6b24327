//! The binary: everything is in the library.

use std::process::ExitCode;

use zeroizing_alloc::ZeroAlloc;

/// Memory is zeroed when it is freed, so the buffers of TLS, HTTP and protobuf leave no secret behind.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<std::alloc::System> = ZeroAlloc(std::alloc::System);

fn main() -> ExitCode {
    sealmount::cli::run(std::env::args_os())
}
