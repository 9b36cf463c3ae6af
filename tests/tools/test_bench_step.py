"""The benchmark of a training step prints speed and memory of each network, and names what it does not know."""

from tools.bench.step import chosen_names, main


def test_speed_and_memory_of_a_network_are_ratios_to_the_baseline(capsys):
    assert main(["--models", "ResNet18", "--batch", "2", "--seconds", "0.3", "--steps", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[:2] for row in rows] == [[n, p] for n in ("ResNetSE34L", "ResNet18") for p in ("float32", "bf16")]
    assert [row[5] for row in rows[:2]] == ["1.00", "1.00"]  # the baseline's memory over its own
    assert all(float(cell) >= 0 for row in rows for cell in row[2:])
    assert all(float(row[5]) > 1 for row in rows[2:])  # more and larger maps


def test_unknown_networks_are_named(capsys):
    assert main(["--models", "ResNet18,ResNet35"]) == 2
    assert "--models ResNet35: no such network; networks: " in capsys.readouterr().err
    assert "VGGVox40" not in chosen_names("all") and "CAM++" in chosen_names("all")
