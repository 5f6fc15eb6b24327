//! The cluster as its users see it: through kubectl.

use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// kubectl with the rights of the cluster's administrator; program and kubeconfig come from the environment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kube;

/// How a command in a container ended.
#[derive(Debug, Clone)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// An event on an object.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) reason: String,
    pub(crate) message: String,
}

impl Kube {
    /// Runs kubectl with `input` and gives its output; an error is what it wrote on stderr.
    pub(crate) async fn try_with(self, args: &[&str], input: &str) -> Result<String, String> {
        let output = run("kubectl", args, input).await;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
        }
    }

    /// The same without input: `try_run("get pods -A")`; arguments are divided at blanks.
    pub(crate) async fn try_run(self, args: &str) -> Result<String, String> {
        self.try_with(&args.split_whitespace().collect::<Vec<_>>(), "").await
    }

    /// The same, and it must succeed.
    pub(crate) async fn run(self, args: &str) -> String {
        self.try_run(args).await.unwrap_or_else(|error| panic!("kubectl {args}: {error}"))
    }

    /// What `kubectl ... -o json` prints.
    pub(crate) async fn json(self, args: &str) -> Value {
        let text = self.run(&format!("{args} -o json")).await;
        serde_json::from_str(&text).expect("kubectl prints JSON")
    }

    /// Applies manifests to a namespace.
    pub(crate) async fn apply(self, namespace: &str, yaml: &str) {
        self.try_apply(namespace, yaml).await.unwrap_or_else(|error| panic!("kubectl apply: {error}\n{yaml}"));
    }

    /// The same; an error is the API server's answer.
    pub(crate) async fn try_apply(self, namespace: &str, yaml: &str) -> Result<String, String> {
        self.try_with(&["apply", "-n", namespace, "-f", "-"], yaml).await
    }

    /// A pod as the API server has it; `None` if there is none.
    pub(crate) async fn pod(self, namespace: &str, name: &str) -> Option<Value> {
        let text = self.try_run(&format!("get pod -n {namespace} {name} -o json")).await.ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Waits until a pod is ready and gives it. Panics with its events if that takes longer.
    pub(crate) async fn ready(self, namespace: &str, name: &str, limit: Duration) -> Value {
        let wait = format!("wait -n {namespace} pod/{name} --for=condition=Ready --timeout={}s", limit.as_secs());
        if let Err(error) = self.try_run(&wait).await {
            let pod = self.pod(namespace, name).await.unwrap_or_default();
            let events = self.events(namespace, name).await;
            panic!("pod {name} is not ready: {error}\nstatus: {}\nevents: {events:#?}", pod["status"]);
        }
        self.pod(namespace, name).await.expect("a ready pod")
    }

    /// The events on an object of this name, oldest first.
    pub(crate) async fn events(self, namespace: &str, name: &str) -> Vec<Event> {
        let list = self
            .json(&format!(
                "get events -n {namespace} --field-selector=involvedObject.name={name} --sort-by=.lastTimestamp"
            ))
            .await;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let items = list["items"].as_array().cloned().unwrap_or_default();
        items.iter().map(|it| Event { reason: text(&it["reason"]), message: text(&it["message"]) }).collect()
    }

    /// Waits for an event whose reason or message contains `needle`.
    pub(crate) async fn event(self, namespace: &str, name: &str, needle: &str, limit: Duration) -> Event {
        let end = Instant::now() + limit;
        loop {
            let events = self.events(namespace, name).await;
            if let Some(event) = events.iter().find(|it| it.reason.contains(needle) || it.message.contains(needle)) {
                return event.clone();
            }
            assert!(Instant::now() < end, "no event on {name} says {needle:?}: {events:#?}");
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    /// Runs a command in a container of a running pod.
    pub(crate) async fn exec(self, namespace: &str, pod: &str, container: &str, command: &[&str]) -> Ran {
        self.exec_with(namespace, pod, container, command, "").await
    }

    /// The same, with `input` on its standard input.
    pub(crate) async fn exec_with(
        self,
        namespace: &str,
        pod: &str,
        container: &str,
        command: &[&str],
        input: &str,
    ) -> Ran {
        let mut args = vec!["exec", "-n", namespace, pod, "-c", container];
        if !input.is_empty() {
            args.push("-i");
        }
        args.push("--");
        args.extend(command);
        let output = run("kubectl", &args, input).await;
        Ran {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Deletes a pod and waits until it is gone.
    pub(crate) async fn delete_pod(self, namespace: &str, name: &str) {
        self.run(&format!("delete pod -n {namespace} {name} --wait --timeout=60s")).await;
    }
}

/// Runs a program of the cluster (`kubectl`, `helm`, `ctr`, `sh`) with `input`.
pub(crate) async fn run(program: &str, args: &[&str], input: &str) -> Output {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("start {program}: {error}"));
    let mut stdin = child.stdin.take().expect("a pipe");
    let feed = async move {
        // A program that does not read its input closes it.
        let _ = stdin.write_all(input.as_bytes()).await;
    };
    let (output, ()) = tokio::join!(child.wait_with_output(), feed);
    output.unwrap_or_else(|error| panic!("wait for {program}: {error}"))
}
