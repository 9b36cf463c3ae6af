"""Options: precedence, types, errors that help."""

import pytest
import yaml

from spknet import config
from spknet.config import ConfigError
from spknet.options import RECIPES, help_text, parse


def test_command_line_beats_recipe_and_recipe_beats_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {lr: 0.5, lr_decay: 0.25}\nmodel: {n_mels: 64}\n")
    c = parse(["--config", str(recipe), "--optim.lr", "0.125"])
    assert (c.optim.lr, c.optim.lr_decay, c.model.n_mels) == (0.125, 0.25, 64)
    assert c.optim.momentum == config.OptimConfig().momentum


def test_recipes_are_found_by_name_and_all_of_them_parse():
    names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    assert "fast_resnet34_angleproto" in names
    for name in names:
        parse(["--config", name])


def test_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown option --data.train_shard; did you mean data.train_shards?"):
        parse(["--data.train_shard", "x"])
    with pytest.raises(ConfigError, match="unknown option --confg; did you mean config?"):
        parse(["--confg", "resnet34"])
    with pytest.raises(ConfigError, match="unknown option --learning_rate"):
        parse(["--learning_rate", "1"])


def test_unknown_key_in_a_recipe_names_the_nearest(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {weigth_decay: 0.1}\n")
    with pytest.raises(ConfigError, match="unknown option optim.weigth_decay; did you mean optim.weight_decay?"):
        parse(["--config", str(recipe)])


def test_unknown_recipe_names_those_there_are():
    with pytest.raises(ConfigError, match="no such file and no such recipe; did you mean fast_resnet34_angleproto"):
        parse(["--config", "fast_resnet34_angelproto"])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--optim.lr", "fast"], "optim.lr: 'fast' given, expected .*number"),
        (["--optim.lr", "-1"], "optim.lr: -1 given, expected greater than 0"),
        (["--train.precision", "int8"], "train.precision: 'int8' given, expected 'float32', 'tf32'"),
        (["--data.workers", "1.5"], "data.workers: 1.5 given, expected .*integer"),
        (["--data.workers", "-1"], "data.workers: -1 given, expected greater than or equal to 0"),
        (["--data.crop_seconds", "0"], "data.crop_seconds: 0 given, expected greater than 0"),
        (["--data.speakers_per_batch", "1"], "data.speakers_per_batch: 1 given, expected greater than or equal to 2"),
        (["--model.embedding_size", "0"], "model.embedding_size: 0 given"),
        (["--model.n_mels", "0"], "model.n_mels: 0 given"),
        (["--model.width", "-1"], "model.width: -1 given"),
        (["--train.epochs", "0"], "train.epochs: 0 given"),
        (["--train.seed", "-1"], "train.seed: -1 given"),
        (["--train.max_steps", "0"], "train.max_steps: 0 given"),
        (["--train.save_every_minutes", "0"], "train.save_every_minutes: 0 given"),
        (["--log.every_steps", "0"], "log.every_steps: 0 given"),
        (["--optim.lr", ".nan"], "optim.lr: nan given"),
        (["--augment.speed", "[0.9, x]"], "augment.speed: 'x' given"),
        (["--train.compile", "perhaps"], "train.compile: 'perhaps' given, expected .*boolean"),
        (["--optim.lr"], "--optim.lr: a value is missing"),
        (["stray"], "'stray' belongs to no option; options are written"),
        (["small_corpus"], "did you mean --config small_corpus?"),
        (["--optim.lr", "0.1", "0.2"], "'0.2' belongs to no option"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(words, found):
    with pytest.raises(ConfigError, match=found):
        parse(words)


@pytest.mark.parametrize(
    "text, said",
    [
        ("optim:\n  lr: 0.1\noptim:\n  lr: 0.2\n", "optim stands there twice"),
        ("optim: {lr: 0.1, lr: 0.2}\n", "lr stands there twice"),
        ("optim:\n\tlr: 0.1\n", "cannot read this YAML"),
        ("a: &a [*a]\n", "unknown option a"),
        ("data: &a {train_list: *a}\n", "data.train_list"),
        ("data: {dev_speakers: true}\n", "data.dev_speakers: true given, expected INT"),
        ("optim: {lr: true}\n", "optim.lr: true given, expected NUMBER"),
        ("optim: {lr: .nan}\n", "optim.lr: nan given, expected a finite number"),
        ('run_dir: "runs/a\\0b"\n', r"run_dir: 'runs/a.x00b' has a control character"),
        ('run_dir: "runs/a\\nb"\n', "run_dir: 'runs/a.nb' has a control character"),
        ('data: {train_shards: ["a", "\\ud800"]}\n', "data.train_shards: "),
        (f"train: {{max_steps: {10**30}}}\n", "train.max_steps: 1e.30 given, expected at most 1e.15"),
        ("model: {name: " + "x" * 5000 + "}\n", "model.name: .*expected String should have at most 4096"),
        ("[" * 5000, "cannot read this YAML: maximum recursion depth"),
        ("run_dir: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_a_recipe_that_means_something_else_than_it_says_is_refused_with_its_name(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"mine.yaml: .*{said}"):
        parse(["--config", str(path)])


def test_recipes_merge_in_order_and_several_values_stand_side_by_side(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optim: {lr: 0.5, momentum: 0.5}\neval:\n")
    second.write_text("optim: {lr: 0.25}\n")
    c = parse(
        ["--optim.clip_norm", "3", "--config", str(first), str(second), "--eval.root", "a", "b", "--train.compile"]
    )
    assert (c.optim.lr, c.optim.momentum, c.optim.clip_norm) == (0.25, 0.5, 3)
    assert c.eval.root == ["a", "b"] and c.train.compile is True


def test_words_that_look_like_numbers_stay_text_where_text_is_meant():
    c = parse(["--run_dir", "007", "--data.dev_speakers", "dev.txt", "--eval.scores", "null", "--optim.lr", "1e-3"])
    assert (c.run_dir, c.data.dev_speakers, c.eval.scores, c.optim.lr) == ("007", "dev.txt", None, 0.001)


def test_every_option_stands_in_the_help_with_meaning_range_and_default():
    shown = help_text()
    for key in config.option_names():
        assert f"--{key} " in shown, key
    for cls in [config.Config, *config.groups().values()]:
        for name, info in cls.__pydantic_fields__.items():
            assert info.description or name in config.groups(), f"{cls.__name__}.{name} says nothing of its meaning"
    assert "above 0, at most 3600; default 2.0" in shown and "small_corpus" in shown
    for line in ("loss.sharded true|false|auto", "augment.rir aligned|unit_energy", "augment.talkers INT ..."):
        assert f"  --{line}\n" in shown  # every value an option takes


def test_a_config_survives_yaml_and_dict(tmp_path):
    c = parse(["--eval.trials", "[a.txt, b.txt]", "--augment.speed", "[0.9, 1.1]", "--data.dev_speakers", "7"])
    assert c.data.dev_speakers == 7 and c.eval.trials == ["a.txt", "b.txt"]
    assert config.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict(c)))) == c


def test_print_config_shows_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--print_config"])
    assert left.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert set(printed) == {"run_dir", "data", "augment", "model", "features", "loss", "optim", "train", "eval", "log"}
    assert printed["data"]["utterances_per_speaker"] == 2
