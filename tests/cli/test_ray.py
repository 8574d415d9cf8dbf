"""--ray on the command line: what is wrong is said in one line."""

from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="ray is not installed")


@pytest.mark.parametrize(
    ("command", "more"),
    [("compress", ("-m", "rtn", "--probe", "none")), ("compare", ("-m", "rtn")), ("allocate", ("--budget", "4bpw", "-m", "rtn"))],
)
def test_a_cluster_that_does_not_answer_is_named_and_nothing_is_written(run, tmp_path, command, more):
    status, output, error = run(command, "builtin:tiny-lm", *more, "-o", tmp_path / "out", "--ray", "127.0.0.1:1")
    assert status == 2 and not output and not list(tmp_path.iterdir())
    assert "no Ray cluster answers at '127.0.0.1:1'" in error and len(error.splitlines()) == 1


def test_a_method_that_trains_block_after_block_has_nothing_to_spread(run, tmp_path):
    status, _, error = run("compress", "builtin:tiny-lm", "-m", "cbq", "-o", tmp_path / "out", "--ray", "local")
    assert status == 2 and error.startswith("fewbits: cbq trains one block after the other") and not list(tmp_path.iterdir())


def test_the_example_for_kubernetes_types_a_command_that_there_is(run):
    """One container's environment, mounts and volumes are the other's, and the command's options are known."""
    job = yaml.safe_load((Path(__file__).parents[2] / "examples" / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    head, worker = (group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))
    assert head["volumes"] == worker["volumes"]
    assert [head["containers"][0][key] == worker["containers"][0][key] for key in ("image", "env", "volumeMounts")] == [True] * 3
    program, command, *arguments = job["spec"]["entrypoint"].split()
    assert program == "fewbits" and arguments[-2:] == ["--ray", "auto"]
    known = run(command, "--help")[1]
    assert all(argument in known for argument in arguments if argument.startswith("-"))
