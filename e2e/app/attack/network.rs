//! Attempts on the pod's network.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketType, recv, socket, sockopt};

use super::{Attempt, errno};

/// `ETH_P_ALL` of linux/if_ether.h: frames of every protocol, sent and received.
const EVERY_PROTOCOL: u16 = 3;
/// How soon it ends when asked to.
const PAUSE: Duration = Duration::from_millis(200);

/// What listens in this network namespace: `tcp:PORT`, `udp:PORT`, `unix:NAME`.
pub(super) fn listeners() -> String {
    let mut found = Vec::new();
    // The states of include/net/tcp_states.h: TCP_LISTEN is 0A, a bound UDP socket is TCP_CLOSE.
    for (table, kind, state) in
        [("tcp", "tcp", "0A"), ("tcp6", "tcp", "0A"), ("udp", "udp", "07"), ("udp6", "udp", "07"), ("raw", "raw", "07")]
    {
        let text = fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if let [_, local, _, seen, ..] = fields[..]
                && seen == state
                && let Some(port) = local.rsplit(':').next().and_then(|it| u16::from_str_radix(it, 16).ok())
            {
                found.push(format!("{kind}:{port}"));
            }
        }
    }
    let text = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    found.extend(text.lines().skip(1).filter_map(|line| Some(format!("unix:{}", line.split_whitespace().nth(7)?))));
    found.sort();
    found.dedup();
    found.join(" ")
}

/// Counts the marks in every frame of every interface, lo too, until the file `stop` is there. It says `/tmp/capture`
/// when it begins.
pub(super) fn capture(stop: &str, marks: &[&str]) -> Attempt {
    let refused = |error: rustix::io::Errno| nix::errno::Errno::from_raw(error.raw_os_error());
    let protocol = rustix::net::RawProtocol::new(u32::from(EVERY_PROTOCOL.to_be())).map(Protocol::from_raw);
    let packets = socket(AddressFamily::PACKET, SocketType::RAW, protocol).map_err(refused)?;
    sockopt::set_socket_timeout(&packets, sockopt::Timeout::Recv, Some(PAUSE)).map_err(refused)?;
    fs::write("/tmp/capture", "").map_err(|error| errno(&error))?;
    let mut counts = vec![0_usize; marks.len()];
    let (mut frames, mut frame) = (0_usize, vec![0; 1 << 17]);
    while !Path::new(stop).exists() {
        let Ok((length, _)) = recv(&packets, &mut frame[..], RecvFlags::empty()) else { continue };
        frames += 1;
        for (count, mark) in counts.iter_mut().zip(marks) {
            *count += usize::from(frame[..length].windows(mark.len()).any(|it| it == mark.as_bytes()));
        }
    }
    let counts: Vec<String> = counts.iter().map(usize::to_string).collect();
    Ok(format!("{frames} {}", counts.join(" ")))
}

pub(super) fn dial(address: &str) -> Attempt {
    let address = address.parse().unwrap_or_else(|_| SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
    match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
        Ok(_) => Ok("connected".to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::TimedOut => Err(nix::errno::Errno::ETIMEDOUT),
        Err(error) => Err(errno(&error)),
    }
}

pub(super) fn connect(path: &str) -> Attempt {
    UnixStream::connect(path).map(|_| "connected".to_owned()).map_err(|error| errno(&error))
}
