//! An HTTP server that answers what a test tells it, for what no real server can be made to say.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::certificates::Identity;

/// A request as it arrived.
#[derive(Clone)]
pub struct Seen {
    /// `GET`.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Seen {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// What the server does with a request.
pub struct Reply {
    /// Waits before it says anything.
    pub after: Duration,
    /// Status.
    pub status: u16,
    /// More headers.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
    /// Closes the connection after this many bytes of the body instead of sending it whole.
    pub cut: Option<usize>,
}

impl Reply {
    /// An empty reply.
    pub fn status(status: u16) -> Self {
        Self { after: Duration::ZERO, status, headers: Vec::new(), body: Vec::new(), cut: None }
    }

    /// A JSON reply.
    pub fn json(status: u16, body: &Value) -> Self {
        Self::text(status, &body.to_string())
    }

    /// A reply with this body.
    pub fn text(status: u16, body: &str) -> Self {
        let mut reply = Self::status(status).header("content-type", "application/json");
        reply.body = body.as_bytes().to_vec();
        reply
    }

    /// Adds a header.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Waits first.
    pub fn after(mut self, wait: Duration) -> Self {
        self.after = wait;
        self
    }

    /// Breaks off in the middle of the body.
    pub fn cut(mut self, bytes: usize) -> Self {
        self.cut = Some(bytes);
        self
    }
}

/// The server; it ends with this value.
pub struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    over: Arc<AtomicBool>,
    tls: bool,
}

impl Server {
    /// Serves TLS on a free port of the loopback address.
    pub fn start(identity: &Identity, answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::serve(Some(identity.server_config()), answer)
    }

    /// Serves without TLS.
    pub fn plain(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::serve(None, answer)
    }

    fn serve(tls: Option<Arc<rustls::ServerConfig>>, answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let server = Self {
            address: listener.local_addr().expect("an address"),
            seen: Arc::default(),
            over: Arc::default(),
            tls: tls.is_some(),
        };
        let (seen, over, answer) = (Arc::clone(&server.seen), Arc::clone(&server.over), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                let (tls, seen, answer) = (tls.clone(), Arc::clone(&seen), Arc::clone(&answer));
                thread::spawn(move || {
                    let Ok(socket) = stream.try_clone() else { return };
                    let Some(config) = tls else { return converse(stream, &socket, &seen, &*answer) };
                    // A failing handshake shows when the stream is read: the client did not trust us.
                    if let Ok(tls) = rustls::ServerConnection::new(config) {
                        converse(rustls::StreamOwned::new(tls, stream), &socket, &seen, &*answer);
                    }
                });
            }
        });
        server
    }

    /// `https://127.0.0.1:PORT`, or `http` without TLS.
    pub fn address(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.address)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("not poisoned").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address); // wakes the listener
    }
}

fn converse(
    mut stream: impl Read + Write,
    socket: &TcpStream,
    seen: &Mutex<Vec<Seen>>,
    answer: &dyn Fn(&Seen) -> Reply,
) {
    let mut buffer = Vec::new();
    while let Some(request) = receive(&mut stream, &mut buffer) {
        seen.lock().expect("not poisoned").push(request.clone());
        let reply = answer(&request);
        thread::sleep(reply.after);
        let mut head = format!("HTTP/1.1 {} Said\r\ncontent-length: {}\r\n", reply.status, reply.body.len());
        for (name, value) in &reply.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let body = reply.cut.map_or(&reply.body[..], |bytes| &reply.body[..bytes]);
        if stream.write_all(&[head.as_bytes(), body].concat()).and_then(|()| stream.flush()).is_err() {
            return;
        }
        if reply.cut.is_some() {
            let _ = socket.shutdown(Shutdown::Both);
            return;
        }
    }
}

fn receive(stream: &mut impl Read, buffer: &mut Vec<u8>) -> Option<Seen> {
    let mut chunk = [0; 4096];
    loop {
        if let Some(end) = buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
            let mut lines = head.split("\r\n");
            let mut first = lines.next()?.split(' ');
            let headers: Vec<(String, String)> = lines
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
                .collect();
            let length = headers.iter().find(|(name, _)| name == "content-length");
            let length: usize = length.and_then(|(_, value)| value.parse().ok()).unwrap_or(0);
            if buffer.len() >= end + 4 + length {
                let body = buffer[end + 4..end + 4 + length].to_vec();
                buffer.drain(..end + 4 + length);
                return Some(Seen { method: first.next()?.into(), path: first.next()?.into(), headers, body });
            }
        }
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return None,
            Ok(count) => buffer.extend_from_slice(&chunk[..count]),
        }
    }
}
