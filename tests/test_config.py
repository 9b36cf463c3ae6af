"""Options: precedence, types, errors that help."""

import pytest
import yaml

from spknet import config
from spknet.config import ConfigError


def test_command_line_beats_recipe_and_recipe_beats_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {lr: 0.5, lr_decay: 0.25}\nmodel: {n_mels: 64}\n")
    c = config.parse(["--config", str(recipe), "--optim.lr", "0.125"])
    assert (c.optim.lr, c.optim.lr_decay, c.model.n_mels) == (0.125, 0.25, 64)
    assert c.optim.momentum == config.OptimConfig().momentum


def test_recipes_are_found_by_name_and_all_of_them_parse():
    names = sorted(p.stem for p in config.RECIPES.glob("*.yaml"))
    assert "fast_resnet34_angleproto" in names
    for name in names:
        config.parse(["--config", name])


def test_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown option --data.train_shard; did you mean data.train_shards?"):
        config.parse(["--data.train_shard", "x"])
    with pytest.raises(ConfigError, match="unknown option --learning_rate"):
        config.parse(["--learning_rate", "1"])


def test_unknown_key_in_a_recipe_names_the_nearest(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {weigth_decay: 0.1}\n")
    with pytest.raises(ConfigError, match="unknown option optim.weigth_decay; did you mean optim.weight_decay?"):
        config.parse(["--config", str(recipe)])


def test_unknown_recipe_names_those_there_are():
    with pytest.raises(ConfigError, match="no such file and no such recipe; did you mean fast_resnet34_angleproto"):
        config.parse(["--config", "fast_resnet34_angelproto"])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--optim.lr", "fast"], "optim.lr"),
        (["--train.precision", "int8"], "train.precision"),
        (["--data.workers", "1.5"], "data.workers"),
        (["stray"], "stray"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(words, found):
    with pytest.raises(ConfigError, match=found):
        config.parse(words)


def test_a_config_survives_yaml_and_dict(tmp_path):
    c = config.parse(["--eval.trials", "[a.txt, b.txt]", "--augment.speed", "[0.9, 1.1]", "--data.dev_speakers", "7"])
    assert c.data.dev_speakers == 7 and c.eval.trials == ["a.txt", "b.txt"]
    assert config.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict(c)))) == c


def test_print_config_shows_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        config.parse(["--print_config"])
    assert left.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert set(printed) == {"run_dir", "data", "augment", "model", "features", "loss", "optim", "train", "eval", "log"}
    assert printed["data"]["utterances_per_speaker"] == 2
