"""What is asked of SLURM: profile, setup, containers; GPUs of this machine; SLURM's variables read back."""

import argparse
import sys
from pathlib import Path

import pytest
import yaml

from launch import cluster, submit
from launch.jobs import run_dirs
from launch.several import gpus_of


def parsed(*words) -> argparse.Namespace:
    return submit.parser().parse_args([*cluster.profile_words(), *map(str, words)])


def write_profile(monkeypatch, tmp_path, content) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    monkeypatch.setenv("SPKNET_CLUSTER", str(path))
    return path


def test_profile_gives_defaults_and_the_command_line_beats_it(monkeypatch, tmp_path):
    profile = {"partition": "gpu", "account": "lab", "setup": ["module load cuda"], "env": {"NCCL_DEBUG": "INFO"}}
    write_profile(monkeypatch, tmp_path, profile)
    options = parsed("--partition", "long", "--setup", "ulimit -n 65536")
    assert (options.partition, options.account) == ("long", "lab")
    assert cluster.setup_lines(options) == ["module load cuda", "ulimit -n 65536"]
    assert cluster.environment(options) == {"NCCL_DEBUG": "INFO"}


def test_profile_lies_in_the_users_config_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert parsed().partition is None
    (tmp_path / "spknet").mkdir()
    (tmp_path / "spknet" / "cluster.yaml").write_text("partition: gpu\n")
    assert parsed().partition == "gpu"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"partiton": "gpu"}, "unknown option 'partiton'; expected executor, nodes, gpus-per-node"),
        ("[a, b]", "expected `option: value` lines, found list"),
        ("a: [", "no YAML"),
    ],
)
def test_mistakes_in_the_profile_are_named(monkeypatch, tmp_path, capsys, content, said):
    path = write_profile(monkeypatch, tmp_path, content)
    assert submit.main(["--", "--run_dir", "a"]) == 2
    told = capsys.readouterr().err
    assert said in told and str(path) in told
    path.unlink()
    assert submit.main(["--", "--run_dir", "a"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_setup_is_lines_or_a_file_of_them(tmp_path):
    (tmp_path / "setup.sh").write_text("module load cuda\n\nexport A=1\n")
    options = parsed("--setup", tmp_path / "setup.sh", "--setup", "cd /work")
    assert cluster.setup_lines(options) == ["module load cuda", "export A=1", "cd /work"]
    assert cluster.slurm_parameters(options, "a", 0, 1)["setup"] == ["module load cuda", "export A=1", "cd /work"]


def test_any_other_option_of_sbatch_is_handed_on():
    words = [
        "mail-type=END,FAIL",
        "mail-user=me@site.org",
        "constraint=a100|h100",
        "dependency=afterok:12",
        "exclusive",
    ]
    asked = cluster.slurm_parameters(parsed(*[w for word in words for w in ("--slurm", word)]), "a", 0, 1)
    assert asked["additional_parameters"] == {
        **{"requeue": True, "mail-type": "END,FAIL", "mail-user": "me@site.org", "constraint": "a100|h100"},
        **{"dependency": "afterok:12", "exclusive": True},
    }


def test_image_of_pyxis_is_an_option_of_srun(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = parsed("--container", "/images/spknet.sqsh", "--mount", "/data", "--mount", "/scratch:/tmp/scratch")
    assert cluster.container_arguments(options) == [
        "--container-image=/images/spknet.sqsh",
        f"--container-mounts={tmp_path}:{tmp_path},/data:/data,/scratch:/tmp/scratch",
        f"--container-workdir={tmp_path}",
    ]
    assert cluster.python(options) == "python"


def test_sif_file_is_run_by_apptainer(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = parsed("--container", "spknet.sif", "--mount", "/data", "--gpus-per-node", 8)
    assert cluster.container_arguments(options) == []
    expected = f"apptainer exec --nv --bind {tmp_path} --bind /data --pwd {tmp_path} spknet.sif python"
    assert cluster.python(options) == expected
    assert cluster.python(parsed()) == sys.executable


def test_runs_on_this_machine_take_gpus_in_turn_and_share_them_beyond(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    options = parsed("--executor", "local", "--gpus-per-node", 2)
    assert [cluster.local_parameters(options, slot)["visible_gpus"] for slot in range(3)] == [[4, 5], [6, 4], [5, 6]]
    assert [gpus_of(i, ranks=1)["CUDA_VISIBLE_DEVICES"] for i in range(4)] == ["4", "5", "6", "4"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus_of(0, ranks=1) == {}


def test_words_of_a_submission_can_be_given_again():
    words = ["--nodes", "2", "--hours", "0.5", "--env", "A=b c", "--setup", "x", "--skip-data-check"]
    again = submit.parser().parse_args(submit.words_again(parsed(*words)))
    assert vars(again) == vars(parsed(*words))


def test_run_folder_is_found_in_a_command_line():
    assert run_dirs("/x/train.sbatch --config a --run_dir runs/a --optim.lr 1") == ["runs/a"]
    assert run_dirs("/x/train.sbatch --run_dir=runs/b '") == ["runs/b"]
    assert run_dirs("/x/submission.sh") == []
