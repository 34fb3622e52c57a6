from selfalign.core.formatting import about, age, amount, duration, plural, printable, table


def test_columns_are_aligned() -> None:
    lines = table(["a", "wide heading"], [["1", "2"], ["a long cell", "3"]])
    assert lines == ["a            wide heading", "───────────  ────────────", "1            2", "a long cell  3"]


def test_numbers_as_text() -> None:
    assert [plural(n, "day") for n in (0, 1, 2)] == ["0 days", "1 day", "2 days"]
    assert [duration(s) for s in (0.04, 59.94, 59.96, 3600, 5025)] == [
        "0.0\u00a0s",
        "59.9\u00a0s",
        "1\u00a0min 0\u00a0s",
        "1\u00a0h 0\u00a0min",
        "1\u00a0h 23\u00a0min",
    ]
    assert [age(s) for s in (-5, 59, 60, 7199, 86399, 86400 * 40)] == [
        "now", "now", "1 minute", "1 hour", "23 hours", "40 days",
    ]  # fmt: skip
    sizes = [0, 999, 1000, 1234, 999_499, 999_500, 12_345_678, 2 * 10**12, 5 * 10**17]
    assert [amount(n) for n in sizes] == [
        "0 B", "999 B", "1 kB", "1.23 kB", "999 kB", "1 MB", "12.3 MB", "2 TB", "500 PB",
    ]  # fmt: skip


def test_estimated_time_is_coarse() -> None:
    assert [about(seconds) for seconds in (0, 29, 40, 720, 3540, 3600, 5025, 7380)] == [
        *("less than a minute", "less than a minute", "about 1 min", "about 12 min", "about 59 min"),
        *("about 1 h", "about 1 h 25 min", "about 2 h 5 min"),
    ]


def test_names_that_could_fool_a_terminal_are_spelled_out() -> None:
    assert printable("λ=0.1 run") == "λ=0.1 run"
    assert printable("a\nb") == r"'a\nb'"
    assert printable("\x1b[2J") == r"'\x1b[2J'"
    assert printable("\udcff").isascii()
