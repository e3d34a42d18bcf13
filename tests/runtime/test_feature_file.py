import numpy as np
import pytest

from data import DataError
from runtime import feature_file


def write(path, **arrays):
    n = 6
    content = {"features": np.ones((n, 3), np.float32), "split": ["train"] * 4 + ["val"] * 2,
               "labels": np.arange(n) % 2, "classes": ["a", "b"], **arrays}
    np.savez(path, **{name: values for name, values in content.items() if values is not None})
    return path


def test_a_file_has_features_labels_splits_and_groups(tmp_path):
    file = feature_file.read(write(tmp_path / "a.npz", groups=list("xyzxyz"), num_heads=4,
                                   tokens=np.zeros((6, 5, 3), np.float16)))
    assert file.tokens.shape == (6, 1, 5, 3) and file.mean.shape == (6, 1, 3)
    assert file.labels["class"].tolist() == [0, 1, 0, 1, 0, 1] and file.num_heads == 4
    assert file.class_names == {"class": ["a", "b"]} and file.groups == list("xyzxyz")
    tasks = write(tmp_path / "b.npz", labels=None, classes=None, labels_x=np.arange(6),
                  classes_x=list("abcdef"))
    assert feature_file.read(tasks).class_names == {"x": list("abcdef")}
    assert feature_file.read(tasks).tokens.shape == (6, 1, 0, 3)  # none


def test_clips_are_split_as_open_splits_does(tmp_path, capsys):
    def folds(wanted, **arrays):
        file = feature_file.read(write(tmp_path / "a.npz", **arrays))
        return feature_file.split_folds(file, wanted, "a.npz")

    assert folds("val") == [([0, 1, 2, 3], [4, 5])]
    assert folds("test") == folds("val") and "'val' is used" in capsys.readouterr().out
    [(train, test)] = folds("test", split=[""] * 6)
    assert sorted(train + test) == list(range(6)) and len(test) == 2
    [(train, test)] = folds("test", split=["train"] * 6, groups=list("xxyyzz"))
    assert (train, test) == ([2, 3, 4, 5], [0, 1])
    each = folds("leave-one-group-out", groups=list("xyzxyz"))
    assert each == [([1, 2, 4, 5], [0, 3]), ([0, 2, 3, 5], [1, 4]), ([0, 1, 3, 4], [2, 5])]
    with pytest.raises(DataError, match="a.npz: leave-one-group-out needs a list with a group"):
        folds("leave-one-group-out")
    with pytest.raises(DataError, match="--split abc is not one of .* splits of a.npz"):
        folds("abc")
    with pytest.raises(DataError, match="a.npz: too few clips, 1 to train on and 5 to"):
        folds("val", split=["train"] + ["val"] * 5)


@pytest.mark.parametrize("content, says", [
    (None, "No such file"), (b"", "not a zip file"), (b"PK damaged", "not a zip file"),
    ({"features": None}, "features"), ({"split": None}, "split"), ({"classes": None}, "classes"),
    ({"labels": None}, "no labels"), ({"labels": np.arange(5)}, "labels"),
    ({"labels": np.array([{}])}, "allow_pickle")])
def test_a_file_that_is_something_else_is_one_line(content, says, tmp_path):
    path = tmp_path / "a.npz"
    if isinstance(content, dict):
        write(path, **content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"a.npz: .*{says}") as error:
        feature_file.read(path)
    assert "\n" not in str(error.value)


def test_a_file_larger_than_memory_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_file, "free_memory", lambda: 100)
    with pytest.raises(DataError, match="a.npz: its .* GB do not fit into half of the free memory"):
        feature_file.read(write(tmp_path / "a.npz"))
