"""What a table shows, and what it never lets through."""

import json

from sae import table


def test_columns_align_and_numbers_stand_right():
    shown = table.text([{"name": "fvu", "n": 12345}, {"name": "l0 median", "n": 7}])
    assert shown.splitlines() == [
        "name            n",
        "─────────  ──────",
        "fvu        12,345",
        "l0 median       7",
    ]


def test_an_interval_is_value_and_ends():
    assert table.cell({"value": 0.1613, "low": 0.155, "high": 0.168, "n": 20000}) == "0.161 [0.155, 0.168]"
    assert table.cell({"value": 0.5, "low": None, "high": None}) == "0.500"
    assert table.cell({"value": None, "low": None, "high": None}) == "–"


def test_numbers_have_sensible_precision():
    shown = [table.number(x) for x in (0.16134, 31.94, 12345.6, 2.13e-5, 0.0, float("nan"), -0.5, 999.9)]
    assert shown == ["0.161", "31.9", "12,346", "2.1e-05", "0", "–", "-0.500", "1,000"]


def test_escapes_and_control_characters_never_reach_the_screen():
    nasty = "a\x1b[31mred\x1b[0m\x1b]0;title\x07b\x9b2Jc\x00\x08\u202ed\r\nnext\tend"
    assert table.clean(nasty) == "aredbcd⏎next end"
    shown = table.text([{"text\x1b[2J": nasty}])
    assert "\x1b" not in shown and len(shown.splitlines()) == 3


def test_rows_may_lack_columns_and_wide_characters_keep_the_columns_straight():
    lines = table.text([{"a": "日本", "b": 1}, {"a": "x"}]).splitlines()
    assert lines[2] == "日本  1" and lines[3] == "x     –"
    assert table.text([]) == ""


def test_emit_prints_and_writes_json(tmp_path, capsys):
    rows = [{"name": "fvu", "value": float("nan")}]
    table.emit(rows, tmp_path / "rows.json")
    assert "fvu" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"name": "fvu", "value": None}]
    table.emit({"fvu": {"value": 0.16, "low": 0.15, "high": 0.17}}, tmp_path / "one.json")
    assert "0.160 [0.150, 0.170]" in capsys.readouterr().out
    assert json.loads((tmp_path / "one.json").read_text())["fvu"]["high"] == 0.17


def test_blocks_stand_side_by_side():
    assert table.beside(["a\nbcd", "x", "1\n2\n3"], gap=2).splitlines() == ["a    x  1", "bcd     2", "        3"]
