import pytest
import torch

from runtime import resume

MADE_WITH = {"configuration": {"seeds": 2}, "encoder": "abc"}


def test_progress_comes_back_and_that_of_other_settings_is_not_used(tmp_path, capsys):
    file = tmp_path / "results/progress.pt"
    assert resume.load(file, MADE_WITH) is None and not capsys.readouterr().err
    resume.save(file, {"made_with": MADE_WITH, "epoch": 3, "weights": torch.arange(4)})
    saved = resume.load(file, MADE_WITH)
    assert saved["epoch"] == 3 and torch.equal(saved["weights"], torch.arange(4))
    assert [path.name for path in file.parent.iterdir()] == ["progress.pt"]
    assert resume.load(file, MADE_WITH | {"encoder": "xyz"}) is None
    assert "was made with another encoder: starting over" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK nothing", b"\x80\x02c__builtin__\nprint\n."])
def test_a_damaged_file_is_not_used_and_a_note_says_so(content, tmp_path, capsys):
    (tmp_path / "progress.pt").write_bytes(content)
    assert resume.load(tmp_path / "progress.pt", MADE_WITH) is None
    err = capsys.readouterr().err
    assert "progress.pt is not used, not readable: " in err and err.count("\n") == 1


def test_what_cannot_be_written_is_one_line_and_the_old_file_stays(tmp_path):
    file = tmp_path / "progress.pt"
    resume.save(file, {"epoch": 1})
    with pytest.raises(OSError, match="progress.pt: not written .No space left"), \
            resume.complete_file(file) as stream:
        stream.write(b"half")
        raise OSError(28, "No space left on device")
    assert torch.load(file) == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["progress.pt"]


def test_a_digest_tells_weights_and_clips_apart():
    weights = torch.randn(3, 4)
    digests = {resume.digest([weights]), resume.digest([weights.T]), resume.digest([weights], "ab"),
               resume.digest([weights], ["ab"])}
    assert len(digests) == 4 and resume.digest([weights.clone()]) in digests
