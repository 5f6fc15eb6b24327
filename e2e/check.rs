//! `sealmount check` as people and pipelines call it: the binary, its output and its exit codes.
// A test stops at what is not as it should be.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// What a run gave.
#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn check(args: &[&str], input: &str) -> Ran {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sealmount"))
        .arg("check")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that does not read its input closes it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

/// A pod template as people write it, indented for where it stands.
fn template(indent: usize, change: impl Fn(&str) -> String) -> String {
    let text = "\
metadata:
  labels: {app: api}
spec:
  automountServiceAccountToken: false
  containers:
  - name: app
    image: app:1
    securityContext: {runAsUser: 1000}
    volumeMounts:
    - {name: db, mountPath: /run/db}
  - name: exporter
    image: exporter:1
    securityContext: {runAsUser: 1001, allowPrivilegeEscalation: false}
    volumeMounts: []
  volumes:
  - name: db
    csi:
      driver: csi.sealmount.io
      readOnly: true
      nodePublishSecretRef: {name: db}
";
    let blank = " ".repeat(indent);
    change(text).lines().map(|line| format!("{blank}{line}\n")).collect()
}

fn valid(text: &str) -> String {
    text.to_owned()
}

/// The sidecar mounts it too.
fn shared(text: &str) -> String {
    text.replace("volumeMounts: []", "volumeMounts: [{name: db, mountPath: /db}]")
        .replace("      readOnly: true\n", "      readOnly: true\n      volumeAttributes: {for: app}\n")
}

fn deployment(change: impl Fn(&str) -> String) -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: api, namespace: payments}}\nspec:\n  template:\n{}",
        template(4, change)
    )
}

fn json_of(ran: &Ran) -> Value {
    serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
}

/// Code, line and column of each finding.
fn findings(report: &Value) -> Vec<(String, u64, u64)> {
    let pods = report["pods"].as_array().unwrap();
    let all = pods.iter().flat_map(|pod| pod["findings"].as_array().unwrap());
    all.map(|it| {
        (it["code"].as_str().unwrap().to_owned(), it["line"].as_u64().unwrap(), it["column"].as_u64().unwrap())
    })
    .collect()
}

#[test]
fn every_kind_that_holds_a_pod() {
    let at = |path: &str, indent: usize| {
        let head: String =
            path.split('.').enumerate().map(|(n, step)| format!("{}{step}:\n", "  ".repeat(n))).collect();
        head + &template(indent, shared)
    };
    for (kind, body) in [
        ("Deployment", at("spec.template", 4)),
        ("StatefulSet", at("spec.template", 4)),
        ("DaemonSet", at("spec.template", 4)),
        ("ReplicaSet", at("spec.template", 4)),
        ("ReplicationController", at("spec.template", 4)),
        ("Job", at("spec.template", 4)),
        ("CronJob", at("spec.jobTemplate.spec.template", 8)),
        ("PodTemplate", at("template", 2)),
    ] {
        let ran = check(&["-o", "json", "-"], &format!("kind: {kind}\nmetadata: {{name: x}}\n{body}"));
        assert_eq!(ran.code, 1, "{kind}: {ran:?}");
        let report = json_of(&ran);
        assert_eq!(report["pods"][0]["kind"], kind);
        let [(code, line, _)] = &findings(&report)[..] else { panic!("{kind}: {report:#}") };
        assert_eq!(code, "SM130", "{kind}");
        let text = body.lines().nth(usize::try_from(*line).unwrap() - 3).unwrap();
        assert!(text.contains("mountPath: /db"), "{kind}, line {line}: {text}");
    }
    let pod = format!("kind: Pod\n{}", template(0, shared).replace("  labels: {app: api}", "  name: api"));
    let list = json!({"kind": "List", "items": [{"kind": "Service"}, {"kind": "PodList", "items": [
        {"metadata": {"name": "in"}, "spec": {"containers": [{"name": "a"}]}},
    ]}]});
    for (text, pods, code) in [
        (pod.clone(), 1, 1),
        (format!("---\n# nothing\n---\nkind: ConfigMap\ndata: {{a: 'kind: Pod'}}\n---\n{pod}---\n{pod}"), 2, 1),
        (list.to_string(), 1, 0),
    ] {
        let ran = check(&["-o", "json", "-"], &text);
        assert_eq!((ran.code, json_of(&ran)["pods"].as_array().unwrap().len()), (code, pods), "{ran:?}");
    }
}

#[test]
fn the_text_names_place_code_field_and_change() {
    let ran = check(&["-"], &deployment(shared));
    assert_eq!(ran.code, 1);
    assert!(ran.out.starts_with("stdin:1: Deployment payments/api\n"), "{}", ran.out);
    let line = "stdin:19:24: refused SM130 spec.containers[1].volumeMounts[0]: exporter mounts the volume too; \
                take this mount out; if it reads the files too and has the same UID, name it in for:\n";
    assert!(ran.out.contains(line), "{}", ran.out);
    assert!(ran.out.ends_with("1 pod: 1 refused, 0 with warnings, 0 clean\n"), "{}", ran.out);
    assert!(!ran.out.contains('\u{1b}'), "a pipe has no colours");
    let clean = check(&["-"], &deployment(valid));
    assert_eq!(clean.code, 0, "{clean:?}");
    assert!(
        clean.out.contains("app        yes    Secret db  sealmount  the reader: 0400, its own UID"),
        "{}",
        clean.out
    );
    assert!(clean.out.contains("exporter   no     Secret db  sealmount  not mounted"), "{}", clean.out);
}

#[test]
fn a_warning_is_no_refusal() {
    let same = |text: &str| text.replace("runAsUser: 1001", "runAsUser: 1000");
    let ran = check(&["-"], &deployment(same));
    assert_eq!(ran.code, 0);
    assert!(ran.out.contains(": warning SM150 spec.containers[1].securityContext.runAsUser: exporter runs"), "{ran:?}");
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("platform.yaml");
    fs::write(&config, "version: 1\npolicy: {distinct_uids: true}\n").unwrap();
    let ran = check(&["--config", config.to_str().unwrap(), "-"], &deployment(same));
    assert_eq!(ran.code, 1, "{ran:?}");
    fs::write(&config, "version: 1\npolicy: {distinct_uid: true}\n").unwrap();
    let ran = check(&["--config", config.to_str().unwrap(), "-"], &deployment(same));
    assert!(ran.code == 2 && ran.err.contains("distinct_uid"), "{ran:?}");
}

#[test]
fn attributes_are_read_as_the_driver_reads_them() {
    let misspelt = |text: &str| shared(text).replace("{for: app}", "{fro: app}");
    let ran = check(&["-o", "json", "-"], &deployment(misspelt));
    let report = json_of(&ran);
    assert_eq!(findings(&report)[0].0, "SM010");
    let message = report["pods"][0]["findings"][0]["message"].as_str().unwrap();
    assert!(message.contains("did you mean \"for\"?"), "{message}");
}

#[test]
fn what_cannot_be_read_has_its_place() {
    for (text, place, said) in [
        ("a: [", "stdin:1:", "this is not YAML"),
        ("metadata: {}", "stdin:1:1", "no Kubernetes object: it has no kind"),
        ("kind: Deployment\nspec: {}\n", "stdin:2:7", "there is no template here"),
        ("kind: Pod\nmetadata: {name: a}\n", "stdin:1:1", "a pod has a spec"),
        ("kind: Pod\nspec:\n  containers:\n  - {name: a, image: 5}\n", "stdin:4:22", "spec.containers[0].image"),
        ("kind: Pod\nspec: {containers: [{name: a, securityContext: {runAsUser: x}}]}\n", "stdin:2:", "runAsUser"),
        ("kind: Pod\nspec: {containers: [{name: a, securityContext: {runAsUser: -1}}]}\n", "stdin:2:", "is no UID"),
    ] {
        let ran = check(&["-"], text);
        assert_eq!(ran.code, 2, "{text}: {ran:?}");
        let line = ran.out.lines().find(|line| line.contains("unreadable")).unwrap_or_default();
        assert!(line.starts_with(place) && line.contains(said), "{text}: {line}");
    }
    // What can be read is still judged.
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    file("a.yaml", &deployment(shared));
    file("b.yml", "a: [");
    file("c.txt", "not looked at: [");
    let ran = check(&[directory.path().to_str().unwrap(), "/nonexistent/x.yaml"], "");
    assert_eq!(ran.code, 2);
    assert!(ran.out.contains("SM130") && ran.out.contains("b.yml:1:") && ran.out.contains("/nonexistent/x.yaml: "));
    assert!(!ran.out.contains("c.txt"));
}

#[test]
fn programs_get_json_sarif_and_workflow_commands() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a,b.yaml");
    fs::write(&file, deployment(shared)).unwrap();
    let path = file.to_str().unwrap();
    let report = json_of(&check(&["-o", "json", path], ""));
    assert_eq!((&report["version"], &report["summary"]["refused"]), (&json!(1), &json!(1)));
    let access = report["pods"][0]["access"].as_array().unwrap();
    assert!(access.iter().any(|it| it["container"] == "exporter" && it["reads"] == false), "{access:?}");

    let sarif = json_of(&check(&["-o", "sarif", path], ""));
    let run = &sarif["runs"][0];
    let result = &run["results"][0];
    assert_eq!((&sarif["version"], &result["ruleId"]), (&json!("2.1.0"), &json!("SM130")));
    let region = &result["locations"][0]["physicalLocation"]["region"];
    assert_eq!((&region["startLine"], &region["startColumn"]), (&json!(19), &json!(24)));
    let rules: BTreeSet<_> =
        run["tool"]["driver"]["rules"].as_array().unwrap().iter().map(|rule| rule["id"].as_str().unwrap()).collect();
    assert!(rules.contains("SM130") && rules.len() > 40);

    let ran = check(&["-o", "github", path], "");
    let line = ran.out.lines().next().unwrap();
    assert!(line.starts_with("::error file=") && line.contains("a%2Cb.yaml,line=19,col=24,title=SM130::SM130 spec."));
}

#[test]
fn the_proxy_of_a_mesh_is_judged_before_it_is_there() {
    let told = |text: &str| {
        text.replace(
            "  labels: {app: api}\n",
            "  labels: {app: api}\n  annotations:\n    sidecar.istio.io/userVolumeMount: '[{\"name\": \"db\", \"mountPath\": \"/db\"}]'\n",
        )
        .replace("      readOnly: true\n", "      readOnly: true\n      volumeAttributes: {for: app}\n")
    };
    let codes = |args: &[&str], text: &str| -> BTreeSet<String> {
        findings(&json_of(&check(args, text))).into_iter().map(|(code, ..)| code).collect()
    };
    let text = deployment(told);
    assert_eq!(codes(&["-o", "json", "-"], &text), BTreeSet::from(["SM190".to_owned()]));
    for how in ["--istio", "--istio=native", "--istio=plain"] {
        let seen = codes(&["-o", "json", how, "-"], &text);
        assert!(seen.is_superset(&BTreeSet::from(["SM130".to_owned(), "SM190".to_owned()])), "{how}: {seen:?}");
    }
    let ran = check(&["--istio", "-"], &deployment(valid));
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.contains("istio-proxy (Istio)  no     Secret db"), "{}", ran.out);
}

#[test]
fn pods_without_this_driver_show_who_reads_what() {
    let text = "\
kind: Pod
metadata: {name: old, annotations: {vault.hashicorp.com/agent-inject: 'true'}}
spec:
  containers:
  - {name: app, image: a, volumeMounts: [{name: s, mountPath: /s}, {name: agent, mountPath: /vault/secrets}]}
  - name: istio-proxy
    image: p
    env: [{name: P, valueFrom: {secretKeyRef: {name: db, key: p}}}]
    volumeMounts: [{name: agent, mountPath: /vault/secrets}, {name: data, mountPath: /data}]
  - {name: vault-agent, image: v, volumeMounts: [{name: agent, mountPath: /vault/secrets}, {name: data, mountPath: /d}]}
  volumes:
  - {name: s, secret: {secretName: tls}}
  - {name: agent, emptyDir: {medium: Memory}}
  - {name: data, persistentVolumeClaim: {claimName: pgdata}}
";
    let ran = check(&["-o", "json", "-"], text);
    assert_eq!(ran.code, 0, "{ran:?}");
    let report = json_of(&ran);
    let access = report["pods"][0]["access"].as_array().unwrap();
    let has = |container: &str, what: &str, how: &str| {
        access.iter().any(|it| it["container"] == container && it["what"] == what && it["how"] == how)
    };
    assert!(has("app", "Secret tls", "Secret volume"), "{access:#?}");
    assert!(!has("istio-proxy", "Secret tls", "Secret volume"));
    assert!(has("istio-proxy", "Secret db", "env"));
    assert!(has("istio-proxy", "volume agent", "emptyDir of an agent"));
    assert!(has("istio-proxy", "claim pgdata", "shared claim"));
    assert!(has("app", "token of default", "automount"));
}

#[test]
fn a_patch_where_one_change_is_right() {
    let ran = check(&["--fix-hint", "-"], &deployment(|text| shared(text).replace("      readOnly: true\n", "")));
    assert!(
        ran.out.contains(r#"  patch: {"spec":{"volumes":[{"csi":{"readOnly":true},"name":"db"}]}}"#),
        "{}",
        ran.out
    );
    let delete =
        r#"{"spec":{"containers":[{"name":"exporter","volumeMounts":[{"$patch":"delete","mountPath":"/db"}]}]}}"#;
    assert!(ran.out.contains(delete), "{}", ran.out);
}

#[test]
fn codes_are_explained() {
    for (code, said) in [("SM162", "never waived"), ("SM010", "no such attribute"), ("SM204", "allow")] {
        let ran = check(&["--explain", code], "");
        assert!(ran.code == 0 && ran.out.contains(said), "{ran:?}");
    }
    let ran = check(&["--explain", "SM999"], "");
    assert!(ran.code == 2 && ran.err.contains("there is no code SM999"), "{ran:?}");
    let ran = check(&["--rules"], "");
    assert!(ran.out.contains("| `SM130` | another container mounts the volume |"), "{}", ran.out);
    assert_eq!(check(&[], "").code, 2, "nothing to check is wrong usage");
}

#[test]
fn shells_and_man_are_served() {
    let sealmount = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_sealmount")).args(args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for shell in ["bash", "zsh", "fish"] {
        let text = sealmount(&["completions", shell]);
        assert!(text.contains("fix-hint"), "{shell}");
        assert!(!text.contains("kubelet-dir=/"), "{shell}");
    }
    let page = sealmount(&["man"]);
    assert!(page.starts_with(".ie") && page.contains("sealmount\\-check") && page.contains("Exit code"), "{page}");
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let many: String = std::iter::repeat_n(deployment(shared), 2_000).collect::<Vec<_>>().join("---\n");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("many.yaml");
    fs::write(&file, many).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_sealmount"))
        .args(["check", file.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

/// The manifests in the shape of public charts: each says in its head which codes refuse it.
#[test]
fn real_world_manifests_get_their_recorded_verdict() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/manifests");
    let mut files: Vec<PathBuf> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 40, "{} manifests", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let line = |mark: &str| text.lines().find_map(|line| line.strip_prefix(mark)).map(str::trim);
        let expected = line("# expect:").unwrap_or_else(|| panic!("{} records no verdict", file.display()));
        assert!(line("# because:").is_some(), "{} gives no reason", file.display());
        let expected: BTreeSet<String> =
            expected.split_whitespace().filter(|code| *code != "none").map(str::to_owned).collect();
        let ran = check(&["-o", "json", file.to_str().unwrap()], "");
        let report = json_of(&ran);
        let pods = report["pods"].as_array().unwrap();
        let refusals = pods.iter().flat_map(|pod| pod["findings"].as_array().unwrap());
        let refusals = refusals.filter(|it| it["severity"] == "refuse");
        let seen: BTreeSet<String> = refusals.map(|it| it["code"].as_str().unwrap().to_owned()).collect();
        if seen != expected || pods.is_empty() || ran.code != i32::from(!expected.is_empty()) {
            wrong.push(format!("{}: expected {expected:?}, saw {seen:?}, exit {}", file.display(), ran.code));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
