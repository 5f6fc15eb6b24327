//! The cluster's programs, built once from pinned Go modules and kept outside the tree.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::lab;

/// One of `e2e/programs`: a module of its own, so that no program gets a library version that another asked for.
struct Module {
    name: &'static str,
    go_mod: &'static str,
    go_sum: &'static str,
    /// Program and package.
    commands: &'static [(&'static str, &'static str)],
    /// Build tags; with any, cgo is on.
    tags: &'static str,
    /// A line of a module that is changed in a copy before it is built.
    patch: Option<Patch>,
}

/// One line of a module that does not fit the machines this runs on.
struct Patch {
    module: &'static str,
    file: &'static str,
    line: &'static str,
    instead: &'static str,
}

macro_rules! module {
    ($name:literal, $tags:literal, [$(($program:literal, $package:literal)),* $(,)?]) => {
        Module {
            name: $name,
            go_mod: include_str!(concat!("../programs/", $name, "/go.mod")),
            go_sum: include_str!(concat!("../programs/", $name, "/go.sum")),
            commands: &[$(($program, $package)),*],
            tags: $tags,
            patch: None,
        }
    };
}

macro_rules! kubernetes {
    ($version:literal) => {
        module!(
            $version,
            "",
            [
                ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
                ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
                ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
                ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
                ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
            ]
        )
    };
}

/// The newest version supported, and the oldest.
static KUBERNETES: &[Module] = &[kubernetes!("kubernetes-1.37.2"), kubernetes!("kubernetes-1.34.4")];

static OTHERS: &[Module] = &[
    module!("etcd", "", [("etcd", "go.etcd.io/etcd/server/v3")]),
    module!(
        "containerd",
        "",
        [
            ("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
            ("containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"),
            ("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
        ]
    ),
    // Without the tag every pod fails with "seccomp not supported".
    module!("runc", "seccomp", [("runc", "github.com/opencontainers/runc")]),
    module!(
        "cni",
        "",
        [
            ("bridge", "github.com/containernetworking/plugins/plugins/main/bridge"),
            ("loopback", "github.com/containernetworking/plugins/plugins/main/loopback"),
            ("host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"),
        ]
    ),
    module!("csi-test", "", [("csi-sanity", "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity")]),
    module!("helm", "", [("helm", "helm.sh/helm/v3/cmd/helm")]),
    Module {
        // A machine without CAP_SYS_RESOURCE lowers no OOM score; the shim needs not give up for that.
        patch: Some(Patch {
            module: "gvisor.dev/gvisor",
            file: "pkg/shim/v1/manager.go",
            line: "return shim.BootstrapParams{}, fmt.Errorf(\"failed to set OOM Score on shim: %w\", err)",
            instead: "_ = err",
        }),
        ..module!(
            "gvisor",
            "",
            [("runsc", "gvisor.dev/gvisor/runsc"), ("containerd-shim-runsc-v1", "gvisor.dev/gvisor/shim")]
        )
    },
];

/// Where the programs are.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    directories: Vec<PathBuf>,
}

impl Programs {
    /// Those of this version of Kubernetes (`1.37.2`), built where the cache does not hold them yet.
    pub(crate) fn get(kubernetes: &str) -> Result<Self, String> {
        let name = format!("kubernetes-{kubernetes}");
        let known = || KUBERNETES.iter().map(|it| it.name.trim_start_matches("kubernetes-")).collect::<Vec<_>>();
        let module = KUBERNETES
            .iter()
            .find(|it| it.name == name)
            .ok_or_else(|| format!("K8S={kubernetes}: the versions are {}", known().join(" and ")))?;
        let directories = std::iter::once(module).chain(OTHERS).map(Module::directory).collect::<Result<_, _>>()?;
        Ok(Self { directories })
    }

    /// The path of one program.
    pub(crate) fn path(&self, program: &str) -> PathBuf {
        let found = self.directories.iter().map(|it| it.join(program)).find(|it| it.exists());
        found.unwrap_or_else(|| panic!("{program} is none of the programs of the cluster"))
    }

    /// For `PATH`.
    pub(crate) fn search_path(&self) -> String {
        let own = self.directories.iter().map(|it| it.display().to_string());
        let rest = std::env::var("PATH").unwrap_or_default();
        own.chain([rest]).collect::<Vec<_>>().join(":")
    }
}

impl Module {
    fn version(&self) -> Option<&str> {
        self.name.strip_prefix("kubernetes-")
    }

    /// The server tells its version from these; without them it calls itself v0.0.0.
    fn linker_flags(&self) -> String {
        let Some(version) = self.version() else { return "-s -w".to_owned() };
        let minor = version.split('.').nth(1).unwrap_or_default();
        let set = |name: &str, value: &str| format!("-X k8s.io/component-base/version.{name}={value}");
        let all = [set("gitVersion", &format!("v{version}")), set("gitMajor", "1"), set("gitMinor", minor)];
        format!("-s -w {}", all.join(" "))
    }

    fn directory(&self) -> Result<PathBuf, String> {
        let mut pins = Sha256::new();
        let patch = self.patch.as_ref().map(|patch| patch.instead).unwrap_or_default();
        for part in [self.go_mod, self.go_sum, self.tags, &self.linker_flags(), &format!("{:?}", self.commands), patch]
        {
            pins.update(part);
        }
        let pins: String = pins.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        let directory = lab::programs::cache().join("programs").join(format!("{}-{pins}", self.name));
        if !directory.exists() {
            self.build(&directory).map_err(|error| format!("build {}: {error}", self.name))?;
        }
        Ok(directory)
    }

    fn build(&self, directory: &Path) -> Result<(), String> {
        let parent = directory.parent().ok_or("no cache")?;
        fs::create_dir_all(parent).map_err(|error| error.to_string())?;
        let work = tempfile::tempdir_in(parent).map_err(|error| error.to_string())?;
        for (name, text) in [("go.mod", self.go_mod), ("go.sum", self.go_sum)] {
            fs::write(work.path().join(name), text).map_err(|error| error.to_string())?;
        }
        if let Some(patch) = &self.patch {
            patch.apply(work.path())?;
        }
        let out = work.path().join("bin");
        for (program, package) in self.commands {
            let start = Instant::now();
            let output = Command::new("go")
                .current_dir(work.path())
                .env("CGO_ENABLED", if self.tags.is_empty() { "0" } else { "1" })
                .args(["build", "-mod=readonly", "-trimpath", "-tags", self.tags, "-ldflags", &self.linker_flags()])
                .arg("-o")
                .arg(out.join(program))
                .arg(package)
                .output()
                .map_err(|error| format!("go: {error}"))?;
            if !output.status.success() {
                return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr)));
            }
            println!("built {program} of {} in {:.0} s", self.name, start.elapsed().as_secs_f32());
        }
        fs::rename(&out, directory).map_err(|error| error.to_string())
    }
}

impl Patch {
    /// Puts a changed copy of the module in the place of the one that `go.sum` holds.
    fn apply(&self, work: &Path) -> Result<(), String> {
        let go = |args: &[&str]| {
            let output =
                Command::new("go").current_dir(work).args(args).output().map_err(|error| format!("go: {error}"))?;
            match output.status.success() {
                true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
                false => Err(format!("go {args:?}: {}", String::from_utf8_lossy(&output.stderr))),
            }
        };
        go(&["mod", "download", self.module])?;
        let original = go(&["list", "-m", "-f", "{{.Dir}}", self.module])?;
        let copied =
            Command::new("cp").args(["-r", "--no-preserve=mode", &original, "patched"]).current_dir(work).status();
        if !copied.is_ok_and(|status| status.success()) {
            return Err(format!("cp -r {original} failed"));
        }
        let file = work.join("patched").join(self.file);
        let text = fs::read_to_string(&file).map_err(|error| format!("{}: {error}", self.file))?;
        if text.matches(self.line).count() != 1 {
            return Err(format!("{} does not hold the line to change once", self.file));
        }
        fs::write(&file, text.replace(self.line, self.instead)).map_err(|error| error.to_string())?;
        go(&["mod", "edit", "-replace", &format!("{}=./patched", self.module)]).map(drop)
    }
}
