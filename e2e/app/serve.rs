//! Processes that hold secrets: the application, and an agent that hands them out as agents do.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::ExitCode;

use crate::end_at_sigterm;

/// `own NAME FILE...`: reads the files into memory, keeps them open, and listens on the abstract socket NAME, as
/// applications do for their health or their workers. It gives nothing away of its own will.
pub(crate) fn own(args: &[String]) -> ExitCode {
    end_at_sigterm();
    let [name, files @ ..] = args else { return ExitCode::FAILURE };
    let held: Vec<(File, Vec<u8>)> = files.iter().map(|path| hold(path)).collect();
    let listener = listen(name);
    println!("holding {} files", held.len());
    loop {
        if let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(b"alive");
        }
    }
}

/// `agent NAME PORT FILE`: an agent beside the application that answers every request on 127.0.0.1:PORT with the
/// secret, and holds it in memory and open, beside an abstract socket NAME.
pub(crate) fn agent(args: &[String]) -> ExitCode {
    end_at_sigterm();
    let [name, port, path] = args else { return ExitCode::FAILURE };
    let (_file, value) = hold(path);
    let _unix = listen(name);
    let listener = TcpListener::bind(("127.0.0.1", port.parse().unwrap())).unwrap();
    println!("serving");
    loop {
        let Ok((mut stream, _)) = listener.accept() else { continue };
        let mut request = [0; 4096];
        let _ = stream.read(&mut request);
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", value.len());
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&value));
    }
}

/// `trap PORT FILE`: takes what anyone sends to the port into FILE, and answers like a Vault that gives its own value.
pub(crate) fn trap(args: &[String]) -> ExitCode {
    end_at_sigterm();
    let [port, path] = args else { return ExitCode::FAILURE };
    let listener = TcpListener::bind(("0.0.0.0", port.parse().unwrap())).unwrap();
    let mut taken = File::create(path).unwrap();
    println!("waiting");
    loop {
        let Ok((mut stream, peer)) = listener.accept() else { continue };
        let _ = stream.set_read_timeout(Some(std::time::Duration::from_millis(500)));
        let mut request = vec![0; 16384];
        let length = stream.read(&mut request).unwrap_or(0);
        let _ = writeln!(taken, "from {peer}: {}", String::from_utf8_lossy(&request[..length]));
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}");
    }
}

/// `names ADDRESS`: the name server that an attacker would like: this IPv4 address, whatever the name. To any other
/// question it knows no answer.
pub(crate) fn names(args: &[String]) -> ExitCode {
    end_at_sigterm();
    let [address] = args else { return ExitCode::FAILURE };
    let address: Ipv4Addr = address.parse().unwrap();
    let socket = UdpSocket::bind(("0.0.0.0", 53)).unwrap();
    println!("answering");
    let mut query = [0; 512];
    loop {
        let Ok((length, asker)) = socket.recv_from(&mut query) else { continue };
        let _ = answer(&query[..length], address).map(|reply| socket.send_to(&reply, asker));
    }
}

/// RFC 1035, 4.1: the header and the question back, and for an A record an answer that points to the question's name.
fn answer(query: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    const HEADER: u8 = 12;
    let name = query.get(usize::from(HEADER)..)?;
    let question = name.get(..name.iter().position(|byte| *byte == 0)? + 5)?;
    let is_address = question.ends_with(&[0, 1, 0, 1]);
    let mut reply = query.get(..2)?.to_vec();
    // A response, recursion as wanted; one question; one answer or none.
    reply.extend([0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
    reply.extend(question);
    if is_address {
        reply.extend([0xc0, HEADER, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        reply.extend(address.octets());
    }
    Some(reply)
}

fn hold(path: &str) -> (File, Vec<u8>) {
    let mut file = File::open(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut value = Vec::new();
    file.read_to_end(&mut value).unwrap();
    (file, value)
}

fn listen(name: &str) -> UnixListener {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap()
}
