"""Results for people: tables, pages, and two results files compared, from hand-made records."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from cure_plugin.certification import Record, Verdict, summarize
from cure_plugin.certification.compare import compare_files, compare_records, mcnemar_p_value
from cure_plugin.certification.record import read_results
from cure_plugin.certification.verdict import Status
from cure_plugin.cli import main
from cure_plugin.errors import DataError, MissingDependencyError, SpecError
from cure_plugin.json_files import plain
from cure_plugin.report import Page, image_table, summary_markdown, text_table, write_report
from cure_plugin.report.plots import load_pyplot, margin_plot
from cure_plugin.report.table import Table

STAGES: dict[Status, tuple[str, float]] = {
    "proved": ("IBP", 1.5),
    "falsified": ("pgd", -0.25),
    "undecided": ("CROWN", -math.inf),
}


def records(**statuses: str) -> list[Record]:
    """One record per letter of ``statuses``: p(roved), f(alsified), u(ndecided), for each set."""
    words = {word[0]: word for word in STAGES}
    made = []
    for index, letters in enumerate(zip(*statuses.values(), strict=True)):
        sets = {
            name: Verdict(words[letter], STAGES[words[letter]][1], STAGES[words[letter]][0], 0.5)
            for name, letter in zip(statuses, letters, strict=True)
        }
        union = words["f" if "f" in letters else "u" if "u" in letters else "p"]
        groups = {"universal": union} if len(statuses) > 1 else {}
        made.append(Record(index, 3, 3, sets, union, groups))
    return made


def write(path: Path, made: list[Record], settings: dict[str, Any] | None = None) -> Path:
    path.write_text("".join(json.dumps(plain(record)) + "\n" for record in made))
    if settings is not None:
        path.with_name(f"{path.name}.settings.json").write_text(json.dumps(settings))
    return path


A = records(linf="pppu", l2="pfpu")
B = records(linf="ppup", l2="uuup")


def test_every_net_is_compared_per_set_union_and_group() -> None:
    rows = {one.name: one for one in compare_records(A, B)}
    assert list(rows) == ["linf", "l2", "union", "universal"]
    linf, l2 = rows["linf"], rows["l2"]
    assert (linf.images, linf.certified_a, linf.certified_b, linf.only_a, linf.only_b) == (4, 3, 3, 1, 1)
    assert (l2.certified_a, l2.certified_b, l2.only_a, l2.only_b, l2.p_value) == (2, 1, 2, 1, 1.0)
    assert all(one.certified_a - one.certified_b == one.only_a - one.only_b for one in rows.values())
    swapped = compare_records(B, A)
    assert [(one.only_b, one.only_a) for one in swapped] == [(one.only_a, one.only_b) for one in rows.values()]


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 5), (5, 0), (3, 3), (2, 9), (40, 61), (0, 1), (700, 900)])
def test_p_values_are_those_of_the_binomial_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert mcnemar_p_value(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_p_value(only_a, only_b) == mcnemar_p_value(only_b, only_a)


def test_huge_counts_do_not_overflow() -> None:
    assert mcnemar_p_value(0, 10_000) == 0.0


def test_other_images_or_sets_are_refused() -> None:
    with pytest.raises(SpecError, match="A holds 4 images, B 3; certify both"):
        compare_records(A, B[:3])
    with pytest.raises(SpecError, match="A holds 0 images"):
        compare_records([], [])
    with pytest.raises(SpecError, match="image 2 has label 3 in A, 7 in B"):
        compare_records(A, [*B[:2], replace(B[2], label=7), B[3]])
    with pytest.raises(SpecError, match=r"A has the sets \['linf', 'l2'\], B \['linf', 'l1'\]"):
        compare_records(A, records(linf="pppp", l1="pppp"))
    with pytest.raises(SpecError, match="A has the groups"):
        compare_records(A, [replace(record, groups={}) for record in B])


def test_the_order_of_sets_does_not_matter() -> None:
    assert compare_records(A, records(l2="uuup", linf="ppup")) == compare_records(A, B)


def test_settings_beside_the_files_must_agree(tmp_path: Path) -> None:
    settings = {"net": "def", "images": "abc", "sets": ["linf=0.1", "l2=0.5"]}
    a, b = write(tmp_path / "a.jsonl", A, settings), write(tmp_path / "b.jsonl", B)
    assert compare_files(a, b) == compare_records(A, B)
    write(b, B, {**settings, "sets": settings["sets"][::-1]})
    assert compare_files(a, b) == compare_records(A, B)
    write(b, B, {**settings, "images": "xyz"})
    with pytest.raises(SpecError, match="different pixels"):
        compare_files(a, b)
    write(b, B, {**settings, "sets": ["linf=0.2", "l2=0.5"]})
    with pytest.raises(SpecError, match=r"linf=0\.1.*linf=0\.2.*same sets"):
        compare_files(a, b)
    (tmp_path / "b.jsonl.settings.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*b\.jsonl\.settings\.json"):
        compare_files(a, b)


FIRST, SECOND = plain(A[0]), plain(A[1])

BROKEN = [
    '{"index": 1, "label"',
    "17",
    "null",
    "{}",
    json.dumps(FIRST),
    json.dumps({**SECOND, "sets": {"linf": {}}}),
    json.dumps({**SECOND, "sets": {}}),
    json.dumps({**SECOND, "sets": []}),
    json.dumps({**SECOND, "union": "maybe"}),
    json.dumps({**SECOND, "union": ["proved"]}),
    json.dumps({**SECOND, "label": None}),
    json.dumps({**SECOND, "groups": {"patch": "proved"}}),
    json.dumps({**SECOND, "prediction": "3"}),
    json.dumps({**SECOND, "version": 2}),
    "",
]


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_corrupt_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f"{json.dumps(FIRST)}\n{line}\n{json.dumps(plain(A[2]))}\n")
    with pytest.raises(DataError, match=r"r\.jsonl, line 2, is no record .*; run cure certify again") as caught:
        read_results(path)
    assert "\n" not in str(caught.value)


def test_unreadable_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read results"):
        read_results(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read results"):
        read_results(tmp_path / "binary")
    (tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match="holds no results"):
        read_results(tmp_path / "empty")


def test_compare_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(write(tmp_path / "a.jsonl", A)), str(write(tmp_path / "b.jsonl", B))
    assert main(["compare", a, b]) == 0
    printed = capsys.readouterr().out
    assert (
        f"A: {a}" in printed
        and "McNemar" in printed
        and sorted(p.name for p in tmp_path.iterdir())
        == [
            "a.jsonl",
            "b.jsonl",
        ]
    )
    assert main(["compare", a, b, "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = {row["set"]: row for row in csv.DictReader(file)}
    assert rows["l2"] == {
        "set": "l2",
        "A certified": "50.0",
        "B certified": "25.0",
        "B - A": "-25.0",
        "only A": "2",
        "only B": "1",
        "p": "1",
    }
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "| l2 | 50.0 | 25.0 | -25.0 | 2 | 1 | 1 |" in page and "4 images" in page
    assert main(["compare", a, str(tmp_path / "none.jsonl")]) == 2
    assert "cannot read results" in capsys.readouterr().err
    assert main(["compare", a, b, "--out", a]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_stages_count_every_image_once() -> None:
    summary = summarize(A)
    assert summary.stages["l2"] == {"proved": {"IBP": 2}, "falsified": {"pgd": 1}, "undecided": {"CROWN": 1}}
    for name, by_status in summary.stages.items():
        assert sum(sum(counts.values()) for counts in by_status.values()) == summary.images == 4
        assert sum(by_status["proved"].values()) == summary.certified[name] * 4
    mixed = [*A, replace(A[0], sets={**A[0].sets, "l2": replace(A[0].sets["l2"], stage="CROWN")})]
    page = summary_markdown("t", {"net": summarize(mixed)}, "")
    assert "| net | l2 | 3: IBP 2, CROWN 1 | 1: pgd 1 | 1: CROWN 1 | 2.5 |" in page


def test_shares_carry_their_intervals() -> None:
    page = summary_markdown("Title", {"net": summarize(A)}, "Settings.")
    assert page.startswith("# Title\n") and page.endswith("Settings.\n")
    heads = [f"{name} cert. / attack leaves" for name in ("linf", "l2", "union", "universal")]
    assert f"| method | clean | {' | '.join(heads)} |" in page
    assert "| 75.0 (30.1 to 95.4) / 100.0 | 50.0 (15.0 to 85.0) / 75.0 |" in page
    assert "75.0 (30.1 to 95.4) / 100.0" in text_table({"net": summarize(A)})


def test_image_rows_read_back() -> None:
    rows = list(csv.DictReader(io.StringIO(image_table(records(**{"union(l2,l1)": "pfu"})).as_csv())))
    assert [(row["set"], row["status"], row["margin"], row["stage"]) for row in rows] == [
        ("union(l2,l1)", "proved", "1.5", "IBP"),
        ("union(l2,l1)", "falsified", "-0.25", "pgd"),
        ("union(l2,l1)", "undecided", "", "CROWN"),
    ]
    assert list(rows[0]) == ["index", "label", "prediction", "set", "status", "margin", "stage", "pieces", "seconds"]


def test_cells_cannot_break_a_table() -> None:
    table = Table(["a|b", "<i>"], [["1,2", 'x"y']])
    assert table.as_markdown().splitlines()[0] == r"| a\|b | <i> |"
    assert "&lt;i&gt;" in table.as_html() and "<i>" not in table.as_html()
    assert list(csv.reader(io.StringIO(table.as_csv()))) == [["a|b", "<i>"], ["1,2", 'x"y']]
    assert table.as_text().splitlines() == ["a|b  <i>", "---  ---", '1,2  x"y']


def test_the_page_shows_what_it_is_given(tmp_path: Path) -> None:
    path, summaries = tmp_path / "r.html", {"a": summarize(A), "b": summarize(B)}
    write_report(path, Page("T", summaries))
    assert "<img" not in path.read_text() and path.read_text().count("<table>") == 2
    many = records(**{f"set{number}": "pfu" for number in range(6)})
    curves = {"a": {f"set{number}": [1.0, 0.5] for number in range(6)} | {"union": [1.0, 0.0]}}
    write_report(path, Page("T", {"a": summarize(many)}, "50 < 60", {"a": many}, (0, 1), curves))
    page = path.read_text()
    assert page.count('<img class="plot"') == 2 and "50 &lt; 60" in page and "IBP 1" in page


def with_margin(record: Record, margin: float) -> Record:
    return replace(record, sets={"linf": replace(record.sets["linf"], margin=margin)})


@pytest.mark.parametrize("margins", [[], [0.5, 0.5], [-1e30, 0.1, 1.0]])
def test_any_margins_can_be_drawn(margins: list[float], tmp_path: Path) -> None:
    made = records(linf="uuu")
    made = [with_margin(record, margin) for record, margin in zip(made, [*margins, *[-math.inf] * 3], strict=False)]
    write_report(tmp_path / "r.html", Page("T", {"a": summarize(made)}, records={"a": made}))
    assert "data:image/png" in (tmp_path / "r.html").read_text()


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cure-plugin\[plot\]'"):
        load_pyplot()


@pytest.mark.parametrize("margin", [0.0, 1e300, -1e308, 2.5])
def test_margins_of_any_size_are_drawn(margin: float) -> None:
    (one,) = records(linf="p")
    assert margin_plot([with_margin(one, margin)]).startswith("data:image/png")
