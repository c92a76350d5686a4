import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.errors import InputError
from moejax.planning.size import format_size, parse_budget, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("103GB", 103 * 10**9),
        ("96GiB", 96 * 2**30),
        ("1.5MB", 1_500_000),
        ("4096B", 4096),
        ("0B", 0),
        (".5KB", 500),
        ("0.25 MiB", 2**18),
        (" 7 gb ", 7 * 10**9),
        ("7GIB", 7 * 2**30),
        ("1.3TB", 1_300_000_000_000),
        ("2PiB", 2**51),
        ("1EB", 10**18),
        # As floats these would be one byte less.
        ("1.001KB", 1001),
        ("0.001009GB", 1_009_000),
        ("9007199254740993B", 2**53 + 1),
        ("1.9999B", 1),
    ],
)
def test_a_size_in_bytes(text: str, expected: int) -> None:
    assert parse_size(text) == parse_budget(text, elements=1) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "12", "12 XB", "1,5GB", "-1GB", "1e3MB", "6x", "1.GB", "1 GB 2", "nanGB", "٣GB"]
)
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"{text!r} is no size; accepted are sizes such as 103GB, 96GiB")):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "elements", "expected"),
    [("6x", 30, 10), ("1x", 7, 14), ("12.6X", 63, 10), (" 4 x ", 10, 5), (".5x", 3, 12), ("6x", 31, 10), ("3x", 10, 6)],
)
def test_a_ratio_is_two_bytes_for_every_element_divided_by_it(text: str, elements: int, expected: int) -> None:
    assert parse_budget(text, elements) == expected


@given(st.integers(1, 10**13), st.integers(1, 10**4))
def test_a_ratio_is_rounded_down_exactly(elements: int, hundredths: int) -> None:
    text = f"{hundredths // 100}.{hundredths % 100:02}x"
    assert parse_budget(text, elements) == 200 * elements // hundredths


@pytest.mark.parametrize("text", ["", "x", "6", "six", "-6x", "6xx", "1e1x"])
def test_what_is_no_budget_is_named(text: str) -> None:
    message = f"{text!r} is no budget; accepted are sizes such as 103GB and ratios such as 6x"
    with pytest.raises(InputError, match=re.escape(message)):
        parse_budget(text, 100)


@pytest.mark.parametrize("text", ["0x", "0.00x", ".0x"])
def test_a_ratio_of_zero_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"'{text}' is no budget; a ratio must be above 0"):
        parse_budget(text, 100)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (10_123_456, "10.12 MB"),
        (103 * 10**9, "103.00 GB"),
        (1_340_000_000_000, "1.34 TB"),
        (5 * 10**18, "5000.00 PB"),
    ],
)
def test_a_size_for_people(size: int, expected: str) -> None:
    assert format_size(size) == expected


@given(st.integers(0, 10**17))
def test_a_size_for_people_reads_back_to_half_a_unit_in_its_last_place(size: int) -> None:
    text = format_size(size)
    unit = 1 if text.endswith(" B") else parse_size("0.01" + text.split()[1])
    assert abs(parse_size(text) - size) <= (0 if unit == 1 else unit // 2 + 1)
