//! A real Envoy as a compromised proxy: its Lua filter does whatever a request asks for, with Envoy's own UID.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};

use super::pod::{Bind, Container, Sandbox, User};
use super::programs::program;

/// The UID of Istio's proxy and of this Envoy.
pub const ENVOY_UID: u32 = 1337;

/// The filter. `io.open` and `io.popen` are plain LuaJIT: nothing of Envoy stands between them and the kernel.
const FILTER: &str = r#"
function envoy_on_request(handle)
  local asked = handle:headers()
  local read, run = asked:get("x-read"), asked:get("x-run")
  local upstream, path, token = asked:get("x-upstream"), asked:get("x-path"), asked:get("x-token-file")
  local status, answer = "400", "nothing asked"
  if read then
    local file, fault = io.open(read, "rb")
    local text = nil
    if file then
      text, fault = file:read("*a")
      file:close()
    end
    status, answer = text and "200" or "403", text or fault or "nothing read"
  elseif run then
    local pipe = io.popen("LC_ALL=C; export LC_ALL; { " .. run .. "; } 2>&1; echo exit $?", "r")
    status, answer = "200", pipe:read("*a")
    pipe:close()
  elseif upstream then
    local body, fault = asked:get("x-body") or "", nil
    if token then
      local file, why = io.open(token, "rb")
      fault = why
      body = file and string.gsub(body, "TOKEN", (string.gsub(file:read("*a"), "%s", ""))) or body
    end
    if fault then
      status, answer = "403", fault
    else
      local headers = {[":method"] = asked:get("x-method") or "POST", [":path"] = path or "/", [":authority"] = upstream}
      headers["x-vault-token"] = asked:get("x-vault-token")
      if asked:get("x-bearer") then
        headers["authorization"] = "Bearer " .. body
        body = nil
      end
      local reply, text = handle:httpCall(upstream, headers, body, 5000)
      status, answer = reply[":status"], text or ""
    end
  end
  handle:respond({[":status"] = status}, answer)
end
"#;

/// What Envoy answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
}

/// Where something listens.
#[derive(Debug, Clone)]
pub enum Place {
    /// A unix socket.
    Socket(PathBuf),
    /// An address and a port.
    Tcp(String, u16),
}

impl Place {
    /// As Envoy's configuration writes it.
    fn address(&self) -> serde_json::Value {
        match self {
            Self::Socket(path) => serde_json::json!({"pipe": {"path": path}}),
            Self::Tcp(host, port) => serde_json::json!({"socket_address": {"address": host, "port_value": port}}),
        }
    }
}

/// An upstream of Envoy's.
pub struct Upstream<'a> {
    /// Its name for [`Proxy::call`].
    pub name: &'a str,
    /// Where it is, as the container sees it.
    pub place: Place,
    /// The CA of its TLS certificate for `localhost`, PEM; without one it is spoken to in the clear.
    pub ca_pem: Option<&'a str>,
}

/// A compromised proxy, as who commands it reaches it.
#[derive(Debug, Clone)]
pub struct Proxy {
    /// Its listener.
    pub http: Place,
    /// Its admin interface.
    pub admin: Place,
}

/// The proxy in its container. It listens on sockets in a directory that it shares with the machine: the pod's network
/// namespace needs no route.
pub struct Envoy {
    proxy: Proxy,
    container: Container,
}

impl std::ops::Deref for Envoy {
    type Target = Proxy;

    fn deref(&self) -> &Proxy {
        &self.proxy
    }
}

impl Envoy {
    /// Starts it in a container of `sandbox` with these binds besides its own.
    pub async fn start(sandbox: &Sandbox, binds: &[Bind], upstreams: &[Upstream<'_>]) -> Self {
        let dir = sandbox.dir().join("envoy-sockets");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        chown(&dir, Some(ENVOY_UID), Some(ENVOY_UID)).unwrap();
        let config = sandbox.dir().join("envoy.json");
        let at = |dir: &Path| Proxy { http: Place::Socket(dir.join("http")), admin: Place::Socket(dir.join("admin")) };
        let inside = at(Path::new("/sockets"));
        fs::write(&config, bootstrap(&inside, upstreams).to_string()).unwrap();
        let mut all =
            vec![Bind::ro(&program("envoy"), "/envoy"), Bind::ro(&config, "/envoy.json"), Bind::rw(&dir, "/sockets")];
        all.extend_from_slice(binds);
        let start = ["/envoy", "-c", "/envoy.json", "--concurrency", "1", "-l", "warning", "--disable-hot-restart"];
        let container = sandbox.run("envoy", User::new(ENVOY_UID), &all, &start);
        let envoy = Self { proxy: at(&dir), container };
        let end = Instant::now() + Duration::from_secs(20);
        while envoy.admin("/ready").await.is_none_or(|answer| answer.status != 200) {
            assert!(Instant::now() < end, "Envoy is not ready; its log:\n{}", envoy.container.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        envoy
    }

    /// Its container.
    pub fn container(&self) -> &Container {
        &self.container
    }
}

impl Proxy {
    /// Asks Envoy to read a file: the content, or the text of its error.
    pub async fn read(&self, path: &str) -> Result<Vec<u8>, String> {
        let answer = self.ask(&[("x-read", path)]).await;
        if answer.status == 200 { Ok(answer.body) } else { Err(text(&answer.body)) }
    }

    /// Asks Envoy to run a shell command: its output with errors, and how it ended.
    pub async fn run(&self, command: &str) -> (String, i32) {
        let answer = text(&self.ask(&[("x-run", command)]).await.body);
        let (out, code) = answer.trim_end().rsplit_once("exit ").unwrap_or((&answer, "-1"));
        (out.to_owned(), code.parse().unwrap_or(-1))
    }

    /// Asks Envoy to post `body` to one of its upstreams, with the content of `token_file` in place of `TOKEN`.
    pub async fn call(&self, upstream: &str, path: &str, body: &str, token_file: Option<&str>) -> Answer {
        let mut headers = vec![("x-upstream", upstream), ("x-path", path), ("x-body", body)];
        headers.extend(token_file.map(|file| ("x-token-file", file)));
        self.ask(&headers).await
    }

    /// A request to the filter, with these headers.
    pub async fn ask(&self, headers: &[(&str, &str)]) -> Answer {
        get(&self.http, "/", headers).await.unwrap_or_else(|error| panic!("Envoy: {error}"))
    }

    /// A page of the admin interface; `None` if it does not answer.
    pub async fn admin(&self, path: &str) -> Option<Answer> {
        get(&self.admin, path, &[]).await.ok()
    }
}

/// Envoy's configuration.
pub fn bootstrap(own: &Proxy, upstreams: &[Upstream<'_>]) -> serde_json::Value {
    let extension = |kind: &str| format!("type.googleapis.com/envoy.extensions.{kind}");
    let clusters: Vec<serde_json::Value> = upstreams
        .iter()
        .map(|upstream| {
            let endpoint = serde_json::json!({"endpoint": {"address": upstream.place.address()}});
            let mut cluster = serde_json::json!({
                "name": upstream.name,
                "type": "STATIC",
                "connect_timeout": "2s",
                "load_assignment": {
                    "cluster_name": upstream.name,
                    "endpoints": [{"lb_endpoints": [endpoint]}],
                },
            });
            if let Some(ca) = upstream.ca_pem {
                cluster["transport_socket"] = serde_json::json!({
                    "name": "tls",
                    "typed_config": {
                        "@type": extension("transport_sockets.tls.v3.UpstreamTlsContext"),
                        "sni": "localhost",
                        "common_tls_context": {"validation_context": {"trusted_ca": {"inline_string": ca}}},
                    },
                });
            }
            cluster
        })
        .collect();
    let filters = serde_json::json!([
        {
            "name": "lua",
            "typed_config": {
                "@type": extension("filters.http.lua.v3.Lua"),
                "default_source_code": {"inline_string": FILTER},
            },
        },
        {"name": "router", "typed_config": {"@type": extension("filters.http.router.v3.Router")}},
    ]);
    let connections = serde_json::json!({
        "@type": extension("filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "http",
        // Otherwise every connection stays open for a second after its answer.
        "delayed_close_timeout": "0s",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
            {"match": {"prefix": "/"}, "direct_response": {"status": 204}},
        ]}]},
        "http_filters": filters,
    });
    serde_json::json!({
        "admin": {"address": own.admin.address()},
        "static_resources": {
            "listeners": [{
                "name": "http",
                "address": own.http.address(),
                "filter_chains": [{"filters": [{"name": "http", "typed_config": connections}]}],
            }],
            "clusters": clusters,
        },
    })
}

/// The name of the error that a program's message ends with, from the C library's text for it.
pub fn errno(text: &str) -> Option<&'static str> {
    let known = [
        ("No such file or directory", "ENOENT"),
        ("Permission denied", "EACCES"),
        ("Operation not permitted", "EPERM"),
        ("No such device or address", "ENXIO"),
        ("Not a directory", "ENOTDIR"),
        ("Is a directory", "EISDIR"),
        ("No such process", "ESRCH"),
        ("Input/output error", "EIO"),
    ];
    known.into_iter().find(|(said, _)| text.contains(said)).map(|(_, name)| name)
}

/// One HTTP/1.1 request.
pub async fn get(place: &Place, path: &str, headers: &[(&str, &str)]) -> io::Result<Answer> {
    match place {
        Place::Socket(socket) => exchange(UnixStream::connect(socket).await?, path, headers).await,
        Place::Tcp(host, port) => exchange(TcpStream::connect((host.as_str(), *port)).await?, path, headers).await,
    }
}

async fn exchange(
    mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin,
    path: &str,
    headers: &[(&str, &str)],
) -> io::Result<Answer> {
    let mut request = format!("GET {path} HTTP/1.1\r\nhost: envoy\r\nconnection: close\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await?;
    let fault = || io::Error::other("not an HTTP reply");
    let border = reply.windows(4).position(|it| it == b"\r\n\r\n").ok_or_else(fault)?;
    let head = text(&reply[..border]).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|it| it.parse().ok()).ok_or_else(fault)?;
    let mut body = reply.split_off(border + 4);
    if head.contains("transfer-encoding: chunked") {
        body = unchunk(&body).ok_or_else(fault)?;
    }
    Ok(Answer { status, body })
}

fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|it| it == b"\r\n")?;
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..line]).ok()?, 16).ok()?;
        if length == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(line + 2..line + 2 + length)?);
        rest = rest.get(line + 4 + length..)?;
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Carries connections of a unix socket to a TCP port of this machine: the pod's way to OpenBao. Runs until it is
/// dropped by its runtime.
pub fn carry(socket: &Path, port: u16) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    fs::set_permissions(socket, fs::Permissions::from_mode(0o666)).unwrap();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            tokio::spawn(async move {
                if let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await {
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                }
            });
        }
    })
}
