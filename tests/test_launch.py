"""The launch scripts, run with stand-ins for what they call: `effreason` understands them."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from effreason.runtime import config as configuration
from effreason.runtime import distributed
from effreason.runtime.config import Config
from effreason.runtime.config_fields import all_settings, sections

ROOT = Path(__file__).parents[1]
SCRIPTS = [ROOT / "launch" / name for name in ("single_node.sh", "slurm.sbatch", "tpu_pod.sh")]
JOB = ROOT / "launch" / "gke.yaml"
FILES = [*SCRIPTS, JOB, *sorted((ROOT / "docs" / "launch").glob("*.md")),
         *(ROOT / "docs" / name for name in ("out-of-memory.md", "runs.md"))]
IMAGES = sorted((ROOT / "containers").glob("*.Dockerfile"))
PRINT = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from effreason.cli import main
sys.exit(main.main([*sys.argv[1:], "--print_config"]))
"""
MEET = f"""#!{sys.executable}
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from effreason.runtime import config, config_parser, distributed, processes
parsed, _ = config.parse(config_parser.parser(config.Config, "meet"), sys.argv[2:])

with distributed.joined(parsed.distributed):
    import jax
    devices = {{"process": processes.index(), "devices": jax.device_count(),
               "local": jax.local_device_count()}}
    print(json.dumps(processes.all_gather("devices", lambda: devices)), flush=True)
"""
# What srun does on one machine: every task with its number, after the options of srun.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((task = 0; task < SLURM_NNODES; task++)); do SLURM_PROCID=$task "$@" & pids+=($!); done
worst=0
for pid in "${pids[@]}"; do wait "$pid" || { code=$?; ((code > worst)) && worst=$code; }; done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; echo node2; else echo "$@" >> "$REQUEUED"; fi
"""
GCLOUD = """#!/usr/bin/env bash
echo "$@" >> "$HOME/gcloud.log"
while [[ $# -gt 0 && $1 != --command ]]; do shift; done
if [[ $# -gt 0 ]]; then exec bash -c "$2"; fi
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Puts commands on the PATH; returns what runs a script with a given environment."""
    binaries = tmp_path / "bin"
    binaries.mkdir()

    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(command, commands, **environment):
        for name, text in commands.items():
            write(binaries / name, text)
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("JAX_", "SLURM_", "XLA_"))}
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120,
                              check=False, env=kept | {
            "PATH": f"{binaries}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"} | environment)

    run.write = write
    return run


def parsed(output, tmp_path):
    """The configuration that a command has printed."""
    path = tmp_path / "printed.yaml"
    path.write_text(output)
    return configuration.load(path)


def begun(config, run):
    """Writes what a run does at its start, with the commit of its model and an unusual seed."""
    run.mkdir(parents=True, exist_ok=True)
    configuration.save(dataclasses.replace(
        config, model=dataclasses.replace(config.model, revision="5eed" * 10),
        run=dataclasses.replace(config.run, seed=77, resume=False)), run / "config.yaml")


def goes_on(config, run):
    """Whether a configuration resumes that run, and not the recipe as it may be by now."""
    return (config.run.resume, config.run.directory, config.run.seed, config.model.revision) == (
        True, str(run), 77, "5eed" * 10)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_setting_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8").replace("[--section.field VALUE ...]", "")
    known = {setting.field for setting in all_settings(Config)}
    named = set(re.findall(r"--([a-z]+\.[a-z0-9_]+)", text))
    names = "|".join(sections(Config))
    named |= set(re.findall(rf"`((?:{names})\.[a-z0-9_]+)`", text))
    assert named and named <= known
    for linked in re.findall(r"\]\((?!https:)([^)#]+)", text):
        assert (path.parent / linked).exists(), linked


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_an_image_is_pinned_and_runs_effreason_as_nobody_in_particular(path):
    text = path.read_text(encoding="utf-8")
    lines = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines()
             if line and not line.startswith("#")]
    rows = {name: value for name, value in lines}       # the last of each
    assert re.fullmatch(r"python:3\.1\d\.\d+-slim-\w+", rows["FROM"])
    assert rows["USER"] == "1000" and json.loads(rows["ENTRYPOINT"]) == ["effreason"]
    assert text.count("pip install") == text.count("pip install --constraint constraints.txt") == 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash(path):
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, path], check=True)


@pytest.mark.parametrize(("gpus", "recipe"), [(1, "r1_distill_1p5b_h100"),
                                              (8, "r1_distill_1p5b_8xh100")])
def test_one_node_begins_a_run_and_goes_on_with_it(stand_ins, tmp_path, gpus, recipe):
    run = tmp_path / "run"
    commands = {"effreason": PRINT, "nvidia-smi": f"#!/bin/sh\nseq {gpus}\n"}

    def launch():
        done = stand_ins([SCRIPTS[0], "--reward.alpha", "0.3"], commands, RUN=str(run))
        assert done.returncode == 0, done.stderr
        return parsed(done.stdout, tmp_path)

    config = launch()
    expected = configuration.load(ROOT / "configs" / f"{recipe}.yaml")
    assert (config.distributed.mode, config.reward.alpha) == ("none", 0.3)
    assert (config.mesh, config.update) == (expected.mesh, expected.update)
    assert config.mesh.data * config.mesh.fsdp * config.mesh.tensor == gpus
    assert config.run.directory == str(run) and not config.run.resume
    assert config.model.path == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    begun(config, run)
    assert goes_on(launch(), run)


def test_a_rented_machine_does_what_one_node_does(stand_ins, tmp_path):
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text(encoding="utf-8"))
    commands = {"effreason": PRINT, "nvidia-smi": "#!/bin/sh\nseq 1\n"}
    done = stand_ins(["bash", "-c", task["run"]], commands, **task["envs"],
                     EFFREASON="effreason")
    assert done.returncode == 0, done.stderr

    config = parsed(done.stdout, tmp_path)
    assert config.run.directory == "runs/r1"
    assert config.mesh == configuration.load(ROOT / task["envs"]["CONFIG"]).mesh
    assert task["resources"]["accelerators"] == "H100:1"
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)


def slurm(tmp_path, port=29999):
    return {"RUN": str(tmp_path / "run"), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8", "PORT": str(port), "REQUEUED": str(tmp_path / "requeued")}


def test_the_tasks_of_a_slurm_job_meet(stand_ins, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = {"effreason": MEET, "srun": SRUN, "scontrol": SCONTROL}
    done = stand_ins([SCRIPTS[1], "--distributed.initialization_timeout_seconds", "60"], commands,
                     **slurm(tmp_path, port), XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.returncode == 0, done.stderr
    expected = [{"process": process, "devices": 4, "local": 2} for process in range(2)]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected, expected]
    assert not (tmp_path / "requeued").exists()


def test_a_slurm_job_goes_on_with_its_run(stand_ins, tmp_path):
    environment, commands = slurm(tmp_path), {"effreason": PRINT, "srun": SRUN,
                                              "scontrol": SCONTROL}
    config = configuration.load(ROOT / "configs" / "tiny.yaml")
    run = Path(environment["RUN"])
    begun(config, run)
    done = stand_ins([SCRIPTS[1]], commands, **environment | {"SLURM_NNODES": "1"})
    assert done.returncode == 0, done.stderr
    found = parsed(done.stdout, tmp_path)
    assert goes_on(found, run) and found.model.path == config.model.path


@pytest.mark.parametrize(("code", "requeued"), [(143, "requeue 77\n"), (2, None)])
def test_a_slurm_job_is_queued_again_only_when_it_was_saved(stand_ins, tmp_path, code, requeued):
    commands = {"effreason": f"#!/bin/sh\nexit {code}\n", "srun": SRUN, "scontrol": SCONTROL}
    done = stand_ins([SCRIPTS[1]], commands, **slurm(tmp_path))
    assert done.returncode == code, done.stderr
    path = tmp_path / "requeued"
    assert (path.read_text() if path.exists() else None) == requeued


def job(tmp_path):
    """Returns the documents of the Kubernetes file, variables filled in as its comment says."""
    text = JOB.read_text(encoding="utf-8")
    given = dict(re.findall(r"([A-Z]+)=(\S+)", "".join(re.findall(r"# +export .*", text))))
    (listed,) = re.findall(r"envsubst '([^']*)'", text)
    assert set(listed.replace("$", "").split()) == set(given) == set(re.findall(r"\$\{([A-Z]+)\}",
                                                                                text))
    return list(yaml.safe_load_all(re.sub(r"\$\{([A-Z]+)\}", lambda match: given[match[1]], text)))


def test_the_kubernetes_job_is_one_pod_a_process_that_meet_at_pod_0(tmp_path):
    service, made = job(tmp_path)
    assert (service["kind"], made["kind"], made["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec, pod = made["spec"], made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert environment["JAX_NUM_PROCESSES"] == str(spec["completions"])
    # A pod is called JOB-INDEX.SERVICE if its subdomain is a headless service that selects it.
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["template"]["metadata"]["labels"].items() >= service["spec"]["selector"].items()
    name = f"{made['metadata']['name']}-0.{service['metadata']['name']}"
    port = container["ports"][0]["containerPort"]
    assert environment["JAX_COORDINATOR_ADDRESS"] == f"{name}:{port}"
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"]
                                                                    for each in pod["volumes"]}
    # Only with Never a Job may look at exit codes.
    assert pod["restartPolicy"] == "Never"
    assert all(rule["onExitCodes"]["containerName"] == container["name"]
               for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule)


def test_a_pod_knows_which_process_it_is(stand_ins, tmp_path, monkeypatch):
    (container,) = job(tmp_path)[1]["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]} | {
        "RUN": str(tmp_path / "run"), "JOB_COMPLETION_INDEX": "1"}
    done = stand_ins(container["command"], {"effreason": PRINT}, **environment)
    assert done.returncode == 0, done.stderr
    config = parsed(done.stdout, tmp_path)
    run = Path(environment["RUN"])
    begun(config, run)
    assert goes_on(parsed(stand_ins(container["command"], {}, **environment).stdout, tmp_path), run)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert config.mesh == configuration.MeshConfig(data=-1, fsdp=gpus // 2, tensor=2)
    assert not config.run.resume
    assert config.update.rows_per_micro_batch == 2 * gpus
    for name, value in environment.items():
        if name.startswith("JAX_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert distributed.resolve(config.distributed) == {
        "coordinator_address": environment["JAX_COORDINATOR_ADDRESS"], "processes": 2,
        "process_id": 1}


SLICE = {"TPU": "slice", "ZONE": "zone", "PROJECT": "project", "EXPORT": "disk:/runs", "HOSTS": "4"}


def test_a_tpu_slice_runs_the_same_command_on_every_host(stand_ins, tmp_path):
    home = tmp_path / "home"
    stand_ins.write(home / "effreason" / ".venv" / "bin" / "effreason", PRINT)
    (home / "effreason" / "configs").symlink_to(ROOT / "configs")
    nothing = "#!/bin/sh\n"
    commands = {"gcloud": GCLOUD, "sudo": nothing, "mount.nfs": nothing, "mountpoint": nothing}
    environment = SLICE | {"HOME": str(home)}

    def launch(resume, *arguments):
        (home / "effreason.pid").unlink(missing_ok=True)
        done = stand_ins([SCRIPTS[2], "train", *arguments], commands, **environment)
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + 60
        while not (text := (home / "effreason.log").read_text()).endswith(f"resume: {resume}\n"):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        return parsed(text, tmp_path)

    config = launch("false", "--data.user_prompt", "So: {problem}, isn't it?")
    assert config.data.user_prompt == "So: {problem}, isn't it?"
    assert (config.distributed.mode, config.distributed.processes) == ("auto", 4)
    assert config.mesh == configuration.load(ROOT / "configs" / "r1_distill_1p5b.yaml").mesh
    run = home / "shared" / "runs" / "r1_distill_1p5b"
    assert config.run.directory == str(run) and not config.run.resume
    begun(config, run)
    assert goes_on(launch("true"), run)
    calls = [line.split(" --command")[0] for line in (home / "gcloud.log").read_text().splitlines()
             if "ssh" in line]
    assert {call.partition("ssh ")[2] for call in calls} == {
        f"slice --zone zone --project project --worker {hosts}" for hosts in ("0", "all")}


def test_a_run_on_a_tpu_slice_is_stopped_when_it_has_saved(stand_ins, tmp_path):
    run = subprocess.Popen(["sleep", "60"])
    waiting = threading.Thread(target=run.wait)         # or it would stay in the table of processes
    waiting.start()
    (tmp_path / "effreason.pid").write_text(str(run.pid))
    (tmp_path / "effreason.log").write_text("step 1\nsaved\n")
    done = stand_ins([SCRIPTS[2], "stop"], {"gcloud": GCLOUD}, **SLICE, HOME=str(tmp_path))
    waiting.join()
    assert (done.returncode, done.stdout, run.returncode) == (0, "saved\n", -signal.SIGTERM)
