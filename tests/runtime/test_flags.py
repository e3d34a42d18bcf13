import dataclasses
import math

import pytest

import probe
import train
from tests.runs import FAST

FIELDS = [(script, field) for script in (train, probe)
          for field in dataclasses.fields(script.Config)
          if field.type in (int, float, list[int], list[float])]
SPECIAL = {0: "0:", -1: "-1:"}  # as help texts say what such a value means
# Numbers that are nothing special at 0.
ZERO = {"noise", "warmup", "lr_start", "lr_end", "weight_decay", "weight_decay_end", "max_bad",
        "momentum_start", "momentum_end", "seed", "workers"}


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("script, field", FIELDS, ids=[f"{s.__name__}-{f.name}" for s, f in FIELDS])
def test_a_number_has_a_meaning_or_is_an_error_in_one_line(script, field, value, capsys):
    name = "--" + field.name.replace("_", "-")
    arguments = FAST if script is train else []
    try:
        config = script.parse_args([*arguments, name, str(value)])
    except SystemExit as error:
        lines = capsys.readouterr().err.strip().splitlines()
        assert error.code == 2 and name in lines[-1] and len(lines) == 2
        return
    assert math.isfinite(value)
    assert value == 0 and field.name in ZERO or SPECIAL[value] in field.metadata["help"]
    if script is train:
        assert train.build(config[0])


@pytest.mark.parametrize("value", ["9" * 23, "9" * 400])
@pytest.mark.parametrize("script, field", FIELDS, ids=[f"{s.__name__}-{f.name}" for s, f in FIELDS])
def test_a_number_that_nothing_could_hold_is_an_error_in_one_line(script, field, value, capsys):
    name = "--" + field.name.replace("_", "-")
    with pytest.raises(SystemExit, match="2"):
        script.parse_args([name, value])
    assert name in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("values", [[], ["1"], ["1.5", "0.75"], ["0.5", "1", "2"]])
def test_an_interval_is_two_numbers_in_order(values, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(["--aspect-ratio", *values])
    assert "--aspect-ratio needs two numbers, the smaller one first" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"steps": 0}, {"lr": math.nan}, {"aspect_ratio": [2.0, 1.0]},
                                     {"momentum_schedule": "none"}])
def test_ranges_are_checked_from_python_too(changes, tmp_path):
    config = dataclasses.replace(train.parse_args(FAST)[0], **changes)
    with pytest.raises(ValueError, match="--" + next(iter(changes)).replace("_", "-")):
        train.main(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())
