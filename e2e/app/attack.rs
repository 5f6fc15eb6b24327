//! What an attacker in a container does. Each attempt prints one line: `= ` and what it gained, or the errno's name.

mod files;
mod network;
mod processes;

use std::process::ExitCode;

use nix::errno::Errno;

/// What an attempt gained, or the kernel's answer.
type Attempt = Result<String, Errno>;

/// Runs the attempt of this name; `None` if there is none.
pub(crate) fn run(name: &str, args: &[String]) -> Option<ExitCode> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let attempt = match (name, &args[..]) {
        ("read", [path]) => files::read(path),
        ("list", [path]) => files::list(path),
        ("roots", [path]) => files::through_roots(path),
        ("below", [root, end]) => files::below(root, end),
        ("search", marks) => Ok(files::search(marks)),
        ("environ", [mark]) => processes::environments(mark),
        ("memory", [mark]) => processes::memories(mark),
        ("ptrace", [mark]) => processes::traced(mark),
        ("vm-readv", [mark]) => processes::vm_readv(mark),
        ("getfd", [mark]) => processes::descriptors(mark),
        ("peer", [socket, mark]) => processes::peer(socket, mark),
        ("sockets", []) => Ok(network::listeners()),
        ("capture", [stop, marks @ ..]) => network::capture(stop, marks),
        ("dial", [address]) => network::dial(address),
        ("connect", [path]) => network::connect(path),
        _ => return None,
    };
    match attempt {
        Ok(gain) => println!("= {gain}"),
        Err(errno) => println!("{errno:?}"),
    }
    Some(ExitCode::SUCCESS)
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// A value is a mark and 24 hexadecimal digits: so no command line that names the mark is taken for one.
fn find(bytes: &[u8], mark: &str) -> Option<String> {
    let mark = mark.as_bytes();
    let mut at = 0;
    while let Some(next) = bytes[at..].iter().position(|it| *it == mark[0]) {
        at += next;
        let end = at + mark.len() + 24;
        if let Some(value) = bytes.get(at..end)
            && value.starts_with(mark)
            && value[mark.len()..].iter().all(u8::is_ascii_hexdigit)
        {
            return Some(String::from_utf8_lossy(value).into_owned());
        }
        at += 1;
    }
    None
}

/// Of many refusals the one that tells most: a right that is missing before a thing that is not there.
fn worst(refusals: &[Errno]) -> Errno {
    let order = [Errno::EACCES, Errno::EPERM];
    order.into_iter().find(|it| refusals.contains(it)).or_else(|| refusals.first().copied()).unwrap_or(Errno::ENOENT)
}
