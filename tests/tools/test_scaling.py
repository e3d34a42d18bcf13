import pytest

from tests.runs import ROOT
from tools import scaling


def test_the_page_in_docs_shows_what_is_computed(monkeypatch):
    page = (ROOT / "docs/scaling.md").read_text()
    monkeypatch.setattr(scaling, "PRESETS", ("vitl16",))
    for line in scaling.tables(989, 0.5, 50):
        assert line in page


def test_decoding_is_as_fast_as_the_page_about_data_says():
    page = (ROOT / "docs/data.md").read_text()
    for size, speed in scaling.DECODING.items():
        assert f"| h264, {size} | **{speed}** |" in page


def test_twice_the_bandwidth_halves_the_exchange_and_nothing_else(monkeypatch):
    monkeypatch.setattr(scaling, "PRESETS", ("vitb16",))
    monkeypatch.setattr(scaling, "count", lambda config: (10 ** 12, 10 ** 9, 2 * 10 ** 9))
    slow, fast = (list(scaling.tables(1000, 0.5, bandwidth))[-3]  # on 8 GPUs
                  for bandwidth in (40, 80))
    assert slow.split(" | ")[1:5] == ["8", "384 = 16 x 24", "0.77 s", "0.17 s"]
    assert fast == slow.replace("0.17 s", "0.09 s")


def test_a_peak_of_zero_is_refused():
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--peak", "0"])
