"""Summaries and what is shown of them."""

import io

import pytest
from rich.console import Console

from bench.report import PictureResult, result_table, show_time, summarize, write_json


def test_summary_by_hand():
    taken = [PictureResult(f"p{n}", "", 64, 64, [float(n)], 100.0 * n, 10.0 * n) for n in range(1, 12)]
    summary = summarize(taken + [PictureResult("bad", "", 64, 64, [12.01])])
    assert summary["failed"] == 1 and summary["pd"]["max"] == 12.01
    assert summary["candidate_ms"] == {"median": 60.0, "p90": 100.0} and summary["speed_up"] == 10.0
    assert [show_time(ms) for ms in (8.412, 99.94, 99.96, 532.4, 999.9, 4200)] == [
        "8.41 ms", "99.9 ms", "100 ms", "532 ms", "1.00 s", "4.20 s",
    ]  # fmt: skip


@pytest.mark.parametrize("samples", [1, 4])
def test_the_table_keeps_every_number_in_80_columns(samples):
    results = [PictureResult("a long name " * 9, "", 64, 64, [88.88] * samples, 123456.0, 99.94) for _ in range(3)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result_table(results, summarize(results)))
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.count("123.46 s") == 5 and text.count("99.9 ms") == 5 and text.count("88.88 failed") == 3


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"pd": 1.5})
    with pytest.raises(ValueError):
        write_json(path, {"pd": float("nan")})
    assert path.read_text() == '{\n  "pd": 1.5\n}\n' and list(tmp_path.iterdir()) == [path]
