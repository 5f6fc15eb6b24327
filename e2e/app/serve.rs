//! Processes that hold secrets: the application, and an agent that hands them out as agents do.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
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

fn hold(path: &str) -> (File, Vec<u8>) {
    let mut file = File::open(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut value = Vec::new();
    file.read_to_end(&mut value).unwrap();
    (file, value)
}

fn listen(name: &str) -> UnixListener {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap()
}
