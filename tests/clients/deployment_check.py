"""Whether deploy/ is valid and fits the program: deployment_check.py VITQ

VITQ is the program. Uses helm and kubectl of this Python's folder; no cluster and no network. The
working directory is the repository's root."""

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import kubernetes_validate
import promql_parser
import yaml

vitq = sys.argv[1]
BIN = Path(sys.executable).parent
CHART = Path("deploy/helm/vitq")
KUBERNETES = "1.37"
PROFILES = sorted(path.stem for path in (CHART / "profiles").glob("*.yaml"))
OVERLAYS = sorted(path.name for path in Path("deploy/kustomize/overlays").iterdir())
# Kinds of operators, for which no schemas are installed.
OTHERS = {
    "ScaledObject",
    "ServiceMonitor",
    "PodMonitor",
    "PrometheusRule",
    "ServingRuntime",
    "InferenceService",
}
# Where these say which pods they mean.
SELECTORS = {
    "Service": ["selector"],
    "Deployment": ["selector", "matchLabels"],
    "PodDisruptionBudget": ["selector", "matchLabels"],
    "NetworkPolicy": ["podSelector", "matchLabels"],
    "PodMonitor": ["selector", "matchLabels"],
}
# Endings of files that may name flags and variables.
TEXTS = {".json", ".md", ".py", ".toml", ".tpl", ".txt", ".yaml"}
# Labels that Prometheus adds.
ADDED = {"namespace", "pod", "le"}


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def output(*command):
    done = run(*command)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def helm(*values, name="vitq"):
    text = output(BIN / "helm", "template", name, CHART, "--namespace", "production", *values)
    return [document for document in yaml.safe_load_all(text) if document]


def profile(name):
    return helm("--values", CHART / "profiles" / f"{name}.yaml")


def overlay(name):
    text = output(BIN / "kubectl", "kustomize", f"deploy/kustomize/overlays/{name}")
    return list(yaml.safe_load_all(text))


# Everything that a chart can render at once.
ALL = [
    "--values",
    CHART / "profiles/gpu.yaml",
    *(
        f"--set={value}"
        for value in [
            "checkpoints.existingClaim=checkpoints",
            "datasets.existingClaim=datasets",
            "tls.clientCaSecretName=clients",
            "jwt.issuer=https://issuer.example.org",
            "jwt.audience=vitq",
            "jwt.secretName=jwt",
            "insecure=true",
            "gpu.runtimeClassName=nvidia",
            "priorityClassName=high",
            "image.pullSecrets[0].name=pull",
            "server.preload={digits,digits-4bit}",
            "server.extraArgs={--log-format=json}",
            "extraEnv[0].name=AWS_REGION",
            "extraEnv[0].value=eu-central-1",
            "extraEnvFrom[0].configMapRef.name=more",
            "config.device={cuda:0,cpu}",
            "config.executor=simulated",
            "config.batch-delay=0.002",
        ]
    ),
]


@functools.cache
def rendered():
    """Everything that is rendered anywhere, each with its origin."""
    found = {f"profile {name}": profile(name) for name in PROFILES}
    found["all values"] = helm(*ALL, name="rel")
    found.update({f"overlay {name}": overlay(name) for name in OVERLAYS})
    return found


def pods(documents):
    """Pod specifications with the names of their owners; KServe's runtimes are nearly such."""
    for document in documents:
        if document["kind"] == "Deployment":
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]
        elif document["kind"] == "ServingRuntime":
            yield document["metadata"]["name"], document["spec"]


def schemas():
    for origin, documents in rendered().items():
        names = [(d["kind"], d["metadata"]["name"]) for d in documents]
        assert len(names) == len(set(names)), (origin, names)
        for document in documents:
            if document["kind"] in OTHERS:
                continue
            try:
                kubernetes_validate.validate(document, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                raise AssertionError(f"{origin}: {document['kind']}: {error}") from error


def selectors():
    """Selectors and names that refer to something meet it."""
    for origin, documents in rendered().items():
        labels = [
            d["spec"]["template"]["metadata"]["labels"]
            for d in documents
            if d["kind"] == "Deployment"
        ]
        configs = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"}
        for document in documents:
            spec = document.get("spec", {})
            want = spec
            for key in SELECTORS.get(document["kind"], []):
                want = want[key]
            if want is not spec:
                assert sum(want.items() <= have.items() for have in labels) == 1, (origin, document)
            if document["kind"] == "ScaledObject":
                target = spec["scaleTargetRef"]["name"]
                (scaled,) = [
                    d
                    for d in documents
                    if d["kind"] == "Deployment" and d["metadata"]["name"] == target
                ]
                assert "replicas" not in scaled["spec"], (origin, target)
        for name, pod in pods(documents):
            for volume in pod["volumes"]:
                if volume["name"] == "config":
                    assert volume["configMap"]["name"] in configs, (origin, name)
            mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
            assert mounts == {volume["name"] for volume in pod["volumes"]}, (origin, name)


def flags(container, name):
    found = [arg.partition("=")[2] for arg in container["args"] if arg.split("=")[0] == name]
    return found[0] if found else None


def programs():
    """The program takes every container's arguments, variables and configuration file."""
    done = set()
    for origin, documents in rendered().items():
        toml = {
            d["metadata"]["name"]: d["data"]["vitq.toml"]
            for d in documents
            if d["kind"] == "ConfigMap" and "vitq.toml" in d["data"]
        }
        predictors = [
            document["spec"]["predictor"]
            for document in documents
            if document["kind"] == "InferenceService"
        ]
        for name, pod in pods(documents):
            container = pod["containers"][0]
            (config,) = [v["configMap"]["name"] for v in pod["volumes"] if v["name"] == "config"]
            kserve = "supportedModelFormats" in pod
            # With `auto`, a pod that sees no GPU would serve on the CPU.
            has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            names_gpu = re.search(r"^device = .*cuda:0", toml[config], re.M) is not None
            assert has_gpu == names_gpu, (origin, name)
            case = (*container["args"], toml[config])
            if case in done:
                continue
            done.add(case)
            with tempfile.TemporaryDirectory() as root:
                # Stands for the container's file system: what is mounted is there.
                if kserve:
                    Path(root, "mnt/models").mkdir(parents=True)
                for mount in container["volumeMounts"]:
                    path = Path(root + mount["mountPath"])
                    if path.suffix == ".toml":
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(toml[config])
                    else:
                        path.mkdir(parents=True, exist_ok=True)
                command, *args = container["args"] + (
                    predictors[0]["model"]["args"] if kserve else []
                )
                given = []
                for arg in args:
                    flag, _, value = arg.partition("=")
                    if value.startswith("/"):
                        value = root + value
                        if Path(value).parent.exists() and not Path(value).exists():
                            is_folder = flag in ("--checkpoints", "--datasets", "--data-dir")
                            Path(value).mkdir() if is_folder else Path(value).touch()
                    given.append(f"{flag}={value}" if value else flag)
                given_by_cluster = {
                    "OMP_NUM_THREADS": "1",
                    "VITQ_DATABASE": "postgres://vitq@db/vitq",
                }
                env = {
                    variable["name"]: variable.get("value") or given_by_cluster[variable["name"]]
                    for variable in container["env"]
                }
                check = ["check-config"] + (["worker"] if command == "worker" else [])
                device = [] if "device" in toml[config] else ["--device=cpu"]
                checked = subprocess.run(
                    [vitq, *check, *given, *device], capture_output=True, text=True, env=env
                )
                # Empty files stand for certificates and keys; this machine need not have a GPU.
                known = r"error: (tls-\w+: |jwt-key: |device: cuda).*\n"
                problem = re.sub(known, "", checked.stderr)
                assert not problem.strip(), (origin, name, problem)
                assert checked.returncode in (0, 2), (origin, name, checked.stdout)
            grace = (predictors[0] if kserve else pod)["terminationGracePeriodSeconds"]
            delay = float(flags(container, "--drain-delay") or 0)
            timeout = float(flags(container, "--drain-timeout"))
            assert grace >= delay + timeout + 5, (origin, name)


def versions():
    """One version everywhere: a release changes all of them."""
    (version,) = re.findall(r'^version = "(.*)"', Path("Cargo.toml").read_text(), re.M)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version
    assert f'\nversion = "{version}"\n' in Path("clients/python/pyproject.toml").read_text()
    assert f"ARG VERSION={version}\n" in Path("deploy/Dockerfile").read_text()
    for origin, documents in rendered().items():
        for _, pod in pods(documents):
            image = pod["containers"][0]["image"]
            assert image in (f"vitq:{version}", f"vitq:{version}-cuda"), (origin, image)


def dockerfile():
    """The image is built with what the repository is built with."""
    text = Path("deploy/Dockerfile").read_text()
    (rust,) = re.findall(r'^channel = "(\d+\.\d+)', Path("rust-toolchain.toml").read_text(), re.M)
    setup = Path("scripts/setup.sh").read_text()
    (torch,) = re.findall(r"^torch=(\S+)", setup, re.M)
    assert f"ARG RUST={rust}\n" in text and f"ARG TORCH={torch}\n" in text
    (packages,) = re.findall(r"^cpu_packages=\((.*)\)$", setup, re.M)
    for package in re.findall(r"nvidia-[a-z-]+==[0-9.]+", packages):
        assert package in text, package
    stages = re.findall(r"^FROM (\S+) AS (\S+)", text, re.M)
    names = [name for _, name in stages]
    for copied in re.findall(r"--from=(\S+)", text):
        assert copied in names, copied
    assert names[-1] == "cpu" and "USER 10001:10001" in text and "HEALTHCHECK" in text
    # What is left out of the build's context is not needed: all that Cargo.toml names is there.
    ignored = Path(".dockerignore").read_text()
    wanted = {"src", "build.rs", "proto", "migrations", "benches", "Cargo.toml", "Cargo.lock"}
    assert {f"!{name}" for name in wanted} <= set(ignored.splitlines())


def safety():
    for origin, documents in rendered().items():
        for name, pod in pods(documents):
            (container,) = pod["containers"]
            context = {**pod.get("securityContext", {}), **container["securityContext"]}
            assert context["runAsNonRoot"] and context["runAsUser"] == 10001, (origin, name)
            assert context["readOnlyRootFilesystem"], (origin, name)
            assert context["allowPrivilegeEscalation"] is False, (origin, name)
            assert context["capabilities"] == {"drop": ["ALL"]}, (origin, name)
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}, (origin, name)
            # What has no volume cannot be written.
            written = {"/tmp", flags(container, "--data-dir"), flags(container, "--cache-dir")}
            mounts = container["volumeMounts"]
            assert written <= {m["mountPath"] for m in mounts if not m.get("readOnly")}
            limits = container["resources"]["limits"]
            assert "memory" in limits, (origin, name)
            sizes = {v["name"]: v.get("emptyDir", {}).get("sizeLimit") for v in pod["volumes"]}
            size = int(sizes["cache"].removesuffix("Gi")) << 30
            assert int(flags(container, "--cache-bytes")) < size, (origin, name)
            requests = container["resources"]["requests"]
            assert requests["ephemeral-storage"] == sizes["cache"], (origin, name)
            if "supportedModelFormats" in pod:  # the rest is KServe's to say
                continue
            assert pod["automountServiceAccountToken"] is False, (origin, name)
            if "nvidia.com/gpu" in limits:
                assert pod["nodeSelector"] and pod["tolerations"], (origin, name)
                assert container["image"].endswith("-cuda"), (origin, name)


def kustomize_is_as_the_chart():
    """The base's pods are those of the chart's profile `cpu`, the gpu overlay's those of `gpu`."""

    def comparable(pod):
        text = json.dumps(pod)
        text = re.sub(r'"vitq-[a-z0-9]{10}"', '"vitq"', text)
        pod = json.loads(text)
        pod["containers"][0]["args"] = sorted(
            arg for arg in pod["containers"][0]["args"] if not arg.startswith("--store=")
        )
        for constraint in pod["topologySpreadConstraints"]:
            constraint.pop("labelSelector")
        pod["containers"][0].pop("resources")
        return pod

    for name in ["cpu", "gpu"]:
        ours, theirs = dict(pods(overlay(name))), dict(pods(profile(name)))
        assert ours.keys() == theirs.keys()
        for deployment in ours:
            one, other = comparable(ours[deployment]), comparable(theirs[deployment])
            differing = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            assert not differing, [(key, one.get(key), other.get(key)) for key in differing]


def lint():
    for name in PROFILES:
        output(BIN / "helm", "lint", "--strict", CHART, "--values", CHART / f"profiles/{name}.yaml")
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(values, schema, path):
        known = schema.get("properties", {})
        assert set(values) - {"global"} <= set(known), path
        if schema.get("additionalProperties") is False:
            assert set(known) - {"global"} <= set(values), (path, set(known) - set(values))
        for key, value in values.items():
            if isinstance(value, dict) and "properties" in known[key]:
                compare(value, known[key], f"{path}.{key}")

    compare(defaults, schema, "values")


def refusals():
    """Values that make no sense are refused with a sentence."""
    shared = "database.secretName=db,store.url=s3://b/p,insecure=true"
    for values, sentence in [
        ("", "set tls.secretName"),
        ("insecure=true,server.replicas=2", "several pods need"),
        ("insecure=true,store.url=s3://b/p", "without database.secretName"),
        ("database.secretName=db,insecure=true", "need a store.url"),
        (shared, "nobody would run jobs"),
        ("insecure=true,tls.clientCaSecretName=ca", "needs tls.secretName"),
        ("insecure=true,config.listen=x", "the chart sets it"),
        ("insecure=true,config.Max=1", "Max"),
        ("insecure=true,serve.replicas=1", "serve"),
        ("insecure=true,server.replicas=many", "replicas"),
        ("insecure=true,jwt.secretName=keys", "issuer"),
        ("insecure=true,image.digest=latest", "digest"),
    ]:
        done = run(BIN / "helm", "template", "vitq", CHART, "--set", values)
        assert done.returncode != 0 and sentence in done.stderr, (values, done.stderr)


def metrics():
    """The program's metrics: names, and labels by name."""
    text = Path("src/telemetry/metrics/table.rs").read_text()
    _, text = text.split("\nmetrics! {")
    text, _ = text.split("#[cfg(test)]")
    rows = re.findall(r'= (\w+)[^"]*"([a-z_]+)",\s*\[([^\]]*)\]', text)
    table = {}
    for kind, name, labels in rows:
        labels = set(re.findall(r'"(\w+)"', labels))
        names = [f"{name}_{end}" for end in ("bucket", "sum", "count")]
        for each in names if kind == "Histogram" else [name]:
            table[each] = labels
    assert len(rows) > 30
    return table


def selected(query, table, where):
    """Checks a query: its syntax, and the metrics and labels that it names."""
    for word, value in [("$__rate_interval", "5m"), ("$namespace", "a"), ("$model", "b")]:
        query = query.replace(word, value)
    promql_parser.parse(query)
    names = re.findall(r"\b((?:vitq|grpc_server|process)_\w+)", query)
    assert names, (where, query)
    known = ADDED.copy()
    for name in names:
        assert name in table, f"{where}: there is no metric {name}"
        known |= table[name]
    labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
    for group in re.findall(r"(?:by|on|without|group_left)\s*\(([^)]*)\)", query):
        labels += [label.strip() for label in group.split(",") if label.strip()]
    assert set(labels) <= known, f"{where}: {set(labels) - known} in {query}"


def monitoring():
    table = metrics()
    documented = Path("docs/deployment.md").read_text()
    (group,) = yaml.safe_load((CHART / "files/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        selected(rule["expr"], table, rule["alert"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert f"`{rule['alert']}`" in documented, f"{rule['alert']} is not documented"
    dashboard = json.loads((CHART / "files/dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        for target in panel.get("targets", []):
            selected(target["expr"], table, panel["title"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for variable in dashboard["templating"]["list"]:
        for name in re.findall(r"label_values\((\w+)", variable["query"]):
            assert name in table, name
    documents = profile("gpu")
    for document in documents:
        if document["kind"] == "ScaledObject":
            for trigger in document["spec"]["triggers"]:
                query = trigger["metadata"]["query"]
                selected(query, table, "ScaledObject")
                (pods,) = set(re.findall(r'pod=~"([^"]*)"', query))
                assert re.fullmatch(pods, "vitq-6d4f9c7b8-x2x7k"), pods
                assert not re.fullmatch(pods, "vitq-canary-6d4f9c7b8-x2x7k"), pods
        if document["kind"] == "PrometheusRule":
            assert document["spec"]["groups"] == [group]
        if document["metadata"]["name"].endswith("-dashboard"):
            assert json.loads(document["data"]["vitq.json"]) == dashboard


@functools.cache
def flags_of(*command):
    return set(re.findall(r"--[a-z][a-z-]+", output(vitq, *command, "--help")))


def words():
    """Every flag and variable of ours that deploy/, clients/ and their documents name exists."""
    variables = {"VITQ_CUDA"}  # of setup.sh
    for command in ["serve", "worker", "quantize"]:
        variables |= set(re.findall(r"VITQ_[A-Z_]+", output(vitq, command, "--help")))
    either = flags_of("serve") | flags_of("worker")
    folders = [Path("deploy"), Path("clients")]
    texts = [path for folder in folders for path in folder.rglob("*") if path.suffix in TEXTS]
    texts += [Path("deploy/Dockerfile"), Path("docs/deployment.md"), Path("docs/clients.md")]
    seen = set()
    for path in texts:
        text = path.read_text().replace("\\\n", " ")
        unknown = set(re.findall(r"VITQ_[A-Z_]+[A-Z]", text)) - variables
        assert not unknown, f"{path}: {unknown}"
        lines = re.findall(r"(?:^ *|`|/)vitq ([a-z][^`#\n]*)", text, re.M)
        lines += [
            " ".join(json.loads(f"[{line}]")[1:])
            for line in re.findall(r'CMD \[("/usr[^]]*)\]', text)
        ]
        for line in lines:
            command, *others = line.split()
            nested = command in ("models", "jobs", "checkpoints", "datasets")
            command = [command, others[0]] if nested else [command]
            seen.add(command[0])
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", line)) - flags_of(*command)
            assert not unknown, f"{path}: {unknown} in {line}"
        if path.suffix in (".yaml", ".tpl"):
            unknown = set(re.findall(r"^\s*- (--[a-z-]+)", text, re.M)) - either
            assert not unknown, f"{path}: {unknown}"
    assert {"serve", "healthcheck", "quantize", "token"} <= seen


for check in [
    lint,
    refusals,
    versions,
    dockerfile,
    schemas,
    selectors,
    safety,
    kustomize_is_as_the_chart,
    programs,
    monitoring,
    words,
]:
    print(check.__name__, flush=True)
    check()
