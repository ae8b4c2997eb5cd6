"""launch/kubernetes.yaml and launch/skypilot.yaml: what can be held without a cluster. They start `megadpo train` with
options and keys that it takes, their numbers of nodes agree, and their exit codes are ours. (Both were checked by hand
against the schemas that JobSet v1alpha2 and SkyPilot publish; the keys allowed here are from there.)"""

from __future__ import annotations

import shlex

import yaml

from megadpo.commands.train import parse
from megadpo.config import load_config
from megadpo.config.problems import EXIT_REFUSED
from megadpo.config.shipped import shipped_configs
from megadpo.launcher import split_rank_options
from megadpo.train.stop import EXIT_INTERRUPTED, EXIT_OUT_OF_TIME
from tests.helpers.distributed import REPOSITORY

JOBSET = yaml.safe_load((REPOSITORY / "launch/kubernetes.yaml").read_text())
TASK = yaml.safe_load((REPOSITORY / "launch/skypilot.yaml").read_text())


def launched(words: list[str]) -> dict[str, str]:
    """torchrun's options of a `megadpo train` command, which must be right as a whole."""
    assert words[:2] == ["megadpo", "train"]
    options = parse(words[2:])
    assert options.config in shipped_configs()
    load_config(options.config, options.overrides)
    ranks, own = split_rank_options(words[2:])
    assert not [word for word in own if word.startswith("--")]
    return dict(zip(ranks[::2], ranks[1::2], strict=True))


def test_a_jobset_starts_one_launcher_a_node():
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert JOBSET["spec"].keys() <= {"failurePolicy", "replicatedJobs", "network", "successPolicy", "startupPolicy"}
    (nodes,) = JOBSET["spec"]["replicatedJobs"]
    job = nodes["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    options = launched(container["command"])
    assert options["--nnodes"] == str(job["completions"]) == str(job["parallelism"])
    assert options["--nproc-per-node"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    name = JOBSET["metadata"]["name"]
    assert options["--master-addr"] == f"{name}-{nodes['name']}-0-0.{name}"  # JobSet's name of the first pod
    assert options["--master-port"] == str(container["ports"][0]["containerPort"])
    assert options["--node-rank"] == "$(NODE_RANK)" and "NODE_RANK" in [one["name"] for one in container["env"]]
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def test_a_jobset_fails_for_good_only_where_we_refuse():
    (nodes,) = JOBSET["spec"]["replicatedJobs"]
    (rule,) = nodes["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [EXIT_REFUSED]
    assert (
        rule["onExitCodes"]["containerName"] == nodes["template"]["spec"]["template"]["spec"]["containers"][0]["name"]
    )
    (final,) = JOBSET["spec"]["failurePolicy"]["rules"]
    assert final["action"] == "FailJobSet" and final["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_a_task_of_skypilot_starts_one_launcher_a_node():
    assert TASK.keys() == {"name", "num_nodes", "resources", "volumes", "workdir", "envs", "setup", "run"}
    assert TASK["resources"].keys() == {"infra", "accelerators", "job_recovery"}
    assert sorted(TASK["resources"]["job_recovery"]["recover_on_exit_codes"]) == [EXIT_OUT_OF_TIME, EXIT_INTERRUPTED]
    run = TASK["run"].replace("\\\n", " ").replace("$CONFIG", TASK["envs"]["CONFIG"])
    options = launched(shlex.split(run))
    assert options["--nnodes"] == "$SKYPILOT_NUM_NODES" and options["--node-rank"] == "$SKYPILOT_NODE_RANK"
    assert options["--nproc-per-node"] == "$SKYPILOT_NUM_GPUS_PER_NODE"
    assert "constraints.txt" in TASK["setup"]
