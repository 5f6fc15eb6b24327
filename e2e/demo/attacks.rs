//! What a compromised Envoy tries, in three pods that differ only in how the secret gets to the application.

use std::path::{Path, PathBuf};

use crate::lab::canary;
use crate::lab::envoy::{ENVOY_UID, Envoy};
use crate::lab::pod::{Container, Outcome, User, outside};
use crate::table::{Cell, Got, Row, Screen};

/// One way to bring the secret to the application.
pub(crate) struct Column {
    /// The directory in the application's container.
    pub(crate) dir: &'static str,
    /// The same on the machine.
    pub(crate) host: PathBuf,
    /// What `password` in it holds.
    pub(crate) canary: String,
}

impl Column {
    fn file(&self) -> String {
        format!("{}/password", self.dir)
    }
}

/// Where everything is.
pub(crate) struct Scene<'a> {
    /// The proxy.
    pub(crate) envoy: &'a Envoy,
    /// The application's container.
    pub(crate) app: &'a Container,
    /// The usual way, the Secret volume, sealmount.
    pub(crate) columns: &'a [Column; 3],
    /// The driver's CSI and registration sockets.
    pub(crate) sockets: [PathBuf; 2],
    /// The driver's worker.
    pub(crate) worker: u32,
    /// The role each column's login names, where there is one, and the audience it wants.
    pub(crate) roles: [Option<&'static str>; 3],
    /// The pods of the last group: what is wrong, what each column gave away, the code of the driver's refusal.
    pub(crate) misbuilt: [(&'static str, [Cell; 3], &'static str); 2],
}

/// Runs all attempts and prints the table.
pub(crate) async fn run(scene: &Scene<'_>, screen: &mut Screen) {
    screen.head([["usual way, Vault:", "0644, both mount"], ["Secret volume,", "only app mounts"], ["sealmount", ""]]);
    screen.group("in Envoy's own container");
    let enoent = || Got::Errno("ENOENT");
    let eacces = || Got::Errno("EACCES");
    let safe = || both(enoent());

    let seen = scene.each(async |column| scene.read(&column.file(), &column.canary).await).await;
    screen.row(&row("read the file at its mount path", seen, [both(Got::Read), safe(), safe()]));
    let seen = scene.each(async |column| scene.list(column.dir).await).await;
    screen.row(&row("list the directory", seen, [both(Got::Listed), safe(), safe()]));
    let root = format!("/proc/{}/root", scene.app.pid());
    let seen = scene.each(async |column| scene.read(&format!("{root}{}", column.file()), &column.canary).await).await;
    screen.row(&row("/proc/PID/root of the app", seen, [safe(), safe(), safe()]));
    let seen = scene
        .each(async |column| {
            let path = column.host.join("password");
            scene.read(path.to_str().unwrap(), &column.canary).await
        })
        .await;
    screen.row(&row("the kubelet's path on the host", seen, [safe(), safe(), safe()]));

    screen.group("UID 1337 with the host's processes and files in view (hostPID, hostPath)");
    let user = User::new(ENVOY_UID);
    let refused = || [shell(eacces()), shell(eacces()), shell(eacces())];
    let seen =
        scene.each(async |column| shell(seen_on_host(user, &format!("{root}{}", column.file()), &column.canary))).await;
    screen.row(&row("/proc/PID/root of the app", seen, refused()));
    let seen = scene
        .each(async |column| {
            let path = column.host.join("password");
            shell(seen_on_host(user, path.to_str().unwrap(), &column.canary))
        })
        .await;
    screen.row(&row("the kubelet's path on the host", seen, refused()));
    let environment = format!("/proc/{}/environ", scene.app.pid());
    let seen = scene.each(async |column| shell(seen_on_host(user, &environment, &column.canary))).await;
    screen.row(&row("environment of the app", seen, refused()));
    for (label, socket) in ["the driver's CSI socket", "its registration socket"].into_iter().zip(&scene.sockets) {
        let seen = [Cell::default(), Cell::default(), scene.socket(socket).await];
        let promised = Cell { envoy: Some(enoent()), shell: Some(eacces()) };
        screen.row(&row(label, seen, [Cell::default(), Cell::default(), promised]));
    }
    let memory = format!("/proc/{}/mem", scene.worker);
    let seen = Cell {
        envoy: Some(from_result(scene.envoy.read(&memory).await, &scene.columns[2].canary)),
        shell: Some(seen_on_host(user, &memory, &scene.columns[2].canary)),
    };
    let promised = Cell { envoy: Some(enoent()), shell: Some(eacces()) };
    screen.row(&row(
        "the driver's memory",
        [Cell::default(), Cell::default(), seen],
        [Cell::default(), Cell::default(), promised],
    ));

    screen.group("UID 1337 among the app's own files (a mount by mistake)");
    let (read, listed) = (|| shell(Got::Read), || shell(Got::Listed));
    let seen = scene.each(async |column| scene.among(user, column)).await;
    screen.row(&row("read the file", seen, [read(), read(), shell(eacces())]));
    // Group 0 and the application's own: what an fsGroup or a careless image gives it.
    let member = User { groups: &[0, 1000], ..user };
    let seen = scene.each(async |column| scene.among(member, column)).await;
    screen.row(&row("read it as a member of its groups", seen, [read(), read(), shell(eacces())]));
    let seen = scene
        .each(async |column| {
            let out = scene.app.exec_in_files(member, &["ls", column.dir]).unwrap();
            shell(listing(&String::from_utf8_lossy(&out.out), &out.err))
        })
        .await;
    screen.row(&row("list the directory", seen, [listed(), listed(), shell(eacces())]));

    screen.group("what Envoy holds and knows");
    let pages = scene.admin_pages().await;
    let seen = scene.each(async |column| envoy(Got::Found(count(&pages, &column.canary)))).await;
    let none = || envoy(Got::Found(0));
    screen.row(&row("secret in its admin pages and dumps", seen, [none(), none(), none()]));
    let needles: Vec<&[u8]> = scene.columns.iter().map(|column| column.canary.as_bytes()).collect();
    let counts = canary::in_memory(scene.envoy.container().pid(), &needles).unwrap();
    let seen = [counts[0], counts[1], counts[2]].map(|count| envoy(Got::Found(count)));
    screen.row(&row("secret in its memory after all this", seen, [envoy(Got::Found(1)), none(), none()]));
    let mut seen = [Cell::default(), Cell::default(), Cell::default()];
    for (cell, role) in seen.iter_mut().zip(scene.roles) {
        if let Some(role) = role {
            *cell = envoy(scene.login(role).await);
        }
    }
    let promised = [envoy(Got::Login(200)), Cell::default(), envoy(Got::Login(400))];
    screen.row(&row("OpenBao login, the pod's default token", seen, promised));

    screen.group("pods built so that it could (the shell has the pod's rights)");
    for (label, seen, code) in scene.misbuilt.clone() {
        screen.row(&row(label, seen, [read(), read(), shell(Got::Refused(code.into()))]));
    }
}

impl Scene<'_> {
    /// One cell a column.
    async fn each(&self, attempt: impl AsyncFn(&Column) -> Cell) -> [Cell; 3] {
        let [usual, secret, sealed] = self.columns;
        [attempt(usual).await, attempt(secret).await, attempt(sealed).await]
    }

    /// A read in Envoy's container, by both.
    async fn read(&self, path: &str, canary: &str) -> Cell {
        let out = self.envoy.container().exec(User::new(ENVOY_UID), &["cat", path]).unwrap();
        Cell { envoy: Some(from_result(self.envoy.read(path).await, canary)), shell: Some(from_outcome(&out, canary)) }
    }

    /// A directory listing in Envoy's container, by both.
    async fn list(&self, dir: &str) -> Cell {
        let out = self.envoy.container().exec(User::new(ENVOY_UID), &["ls", dir]).unwrap();
        let (text, _) = self.envoy.run(&format!("ls {dir}")).await;
        Cell { envoy: Some(listing(&text, &text)), shell: Some(listing(&String::from_utf8_lossy(&out.out), &out.err)) }
    }

    /// A read among the application's files.
    fn among(&self, user: User<'_>, column: &Column) -> Cell {
        let out = self.app.exec_in_files(user, &["cat", &column.file()]).unwrap();
        shell(from_outcome(&out, &column.canary))
    }

    /// Envoy opens the socket and connects to it; the shell opens it from the host's side.
    async fn socket(&self, path: &Path) -> Cell {
        let path = path.to_str().unwrap();
        let reply = self.envoy.call("driver", "/csi.v1.Identity/Probe", "", None).await;
        let opened = from_result(self.envoy.read(path).await, "");
        // Envoy's own words for a connect(2) that failed; a connection that was made fails otherwise.
        let failed = String::from_utf8_lossy(&reply.body).contains("remote connection failure");
        let envoy = if failed { opened } else { Got::Odd("connected".into()) };
        // A socket cannot be opened, but the right to connect is checked first: EACCES without it, ENXIO with it.
        Cell { envoy: Some(envoy), shell: Some(seen_on_host(User::new(ENVOY_UID), path, "")) }
    }

    /// Every page of the admin interface that shows state, and the heap.
    async fn admin_pages(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for page in ["config_dump?include_eds", "certs", "clusters", "stats", "memory", "server_info", "heap_dump"] {
            let answer = self.envoy.admin(&format!("/{page}")).await.unwrap_or_else(|| panic!("no admin page {page}"));
            all.extend(answer.body);
        }
        all
    }

    /// Envoy reads the token that every container of the pod holds, and logs in with it.
    async fn login(&self, role: &str) -> Got {
        let body = format!(r#"{{"role":"{role}","jwt":"TOKEN"}}"#);
        let token = "/var/run/secrets/kubernetes.io/serviceaccount/token";
        Got::Login(self.envoy.call("openbao", "/v1/auth/jwt/login", &body, Some(token)).await.status)
    }
}

fn row(label: &str, seen: [Cell; 3], promised: [Cell; 3]) -> Row {
    Row { label: label.to_owned(), seen, promised }
}

fn both(got: Got) -> Cell {
    Cell { envoy: Some(got.clone()), shell: Some(got) }
}

fn envoy(got: Got) -> Cell {
    Cell { envoy: Some(got), shell: None }
}

/// A cell that only the shell could try.
pub(crate) fn shell(got: Got) -> Cell {
    Cell { envoy: None, shell: Some(got) }
}

/// A read by a shell outside every container.
pub(crate) fn seen_on_host(user: User<'_>, path: &str, canary: &str) -> Got {
    from_outcome(&outside(user, &["cat", path]).unwrap(), canary)
}

/// What a `cat` brought.
pub(crate) fn from_outcome(out: &Outcome, canary: &str) -> Got {
    from_result(if out.status.success() { Ok(out.out.clone()) } else { Err(out.err.clone()) }, canary)
}

fn from_result(read: Result<Vec<u8>, String>, canary: &str) -> Got {
    match read {
        Ok(bytes) if !canary.is_empty() && count(&bytes, canary) > 0 => Got::Read,
        Ok(bytes) => Got::Odd(format!("{} other bytes", bytes.len())),
        Err(text) => errno(&text),
    }
}

fn listing(out: &str, err: &str) -> Got {
    if out.lines().any(|line| line == "password") { Got::Listed } else { errno(err) }
}

/// The error's name, or the start of what was said instead.
fn errno(text: &str) -> Got {
    let odd = || Got::Odd(text.trim().chars().take(17).collect());
    crate::lab::envoy::errno(text).map_or_else(odd, Got::Errno)
}

fn count(bytes: &[u8], canary: &str) -> usize {
    canary::in_bytes(bytes, &[canary.as_bytes()])[0]
}
