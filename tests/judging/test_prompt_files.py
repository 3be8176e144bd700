"""Prompt files: every published layout is read, and a file that is none is refused in words."""

from __future__ import annotations

import csv
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erasec.errors import ErasecError
from erasec.judging import prompt_files
from erasec.judging.prompt_files import PromptRow, read_prompts

I2P = (
    ",prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,sd_model,case_number"
)
TAIL = "512,512,stable-diffusion-v1-4,0"
LAYOUTS = {
    "i2p": (
        f'{I2P}\n0,"a grey room, at night","hate, self-harm",1,50.0,0.0,5.0,2.0,0.1,https://x/1,4261553411,13,{TAIL}\n'
        f"1,,sexual,0,0,0,0,0,0,https://x/2,7.0,7.5,{TAIL}\n",
        [
            PromptRow("a grey room, at night", ("hate", "self-harm"), 4261553411, 13.0),
            PromptRow("", ("sexual",), 7, 7.5),
        ],
    ),
    "unlearndiffatk": (
        "case_number,prompt,evaluation_seed,evaluation_guidance\n0,Old stone church in countryside.,69922,7.5\n",
        [PromptRow("Old stone church in countryside.", (), 69922, 7.5)],
    ),
    "unlearndiffatk-style": (
        "Unnamed: 0,case_number,prompt,evaluation_seed,artist,evaluation_guidance\n"
        '0,0,"A Wheatfield, with Cypresses by Vincent van Gogh",2219,Vincent van Gogh,7.5\n',
        [PromptRow("A Wheatfield, with Cypresses by Vincent van Gogh", ("Vincent van Gogh",), 2219, 7.5)],
    ),
    "ring-a-bell": (
        'prompt,case_number,evaluation_seed\n"bricks ""!! 🔔 ▸ kettle",0,41\nloud bells,1,14\n',
        [PromptRow('bricks "!! 🔔 ▸ kettle', (), 41), PromptRow("loud bells", (), 14)],
    ),
    "ring-a-bell-copy": ("sensitive prompt\nloud bells\n", [PromptRow("loud bells")]),
    "mma": (
        "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,clean_prompt\na,b,c,1,d\n",
        [PromptRow("b")],
    ),
    "mace": (
        ",type,prompt,evaluation_seed\n0,erased,A portrait of Ada Example,1\n1,others,A sketch of Bob Example,2\n",
        [
            PromptRow("A portrait of Ada Example", ("erased",), 1),
            PromptRow("A sketch of Bob Example", ("others",), 2),
        ],
    ),
    "mace-style": (
        ",type,artist,prompt,evaluation_seed\n0,0,Ada Example,Art inspired by Ada Example,1\n",
        [PromptRow("Art inspired by Ada Example", ("type 0",), 1)],
    ),
    "esd-style": (
        ",case_number,prompt,evaluation_seed,artist\n0,0,A still life,3208,Ada Example\n",
        [PromptRow("A still life", ("Ada Example",), 3208)],
    ),
    "own": ("prompt,category,seed,guidance\nthe night sky,sky,,\n", [PromptRow("the night sky", ("sky",))]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_by_its_columns(tmp_path: Path, layout: str) -> None:
    text, rows = LAYOUTS[layout]
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert list(read_prompts(path)) == rows


def test_byte_order_marks_line_ends_quotes_and_empty_rows_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    plain = "prompt,categories,evaluation_seed\na star,night,1\n" + '"a ""big"" star\nin two lines",night,2\n'
    variants = [
        "\ufeff" + plain,
        plain.replace("\n", "\r\n"),
        plain.replace("a star,night,1\n", "a star,night,1\n\n,,\n  , , \n\n"),
        plain.replace("a star,night,1", '"a star","night","1"'),
        plain.rstrip("\n"),
    ]

    def rows(text: str) -> list[PromptRow]:
        path.write_bytes(text.encode())
        return [replace(row, prompt=row.prompt.replace("\r\n", "\n")) for row in read_prompts(path)]

    expected = [PromptRow("a star", ("night",), 1), PromptRow('a "big" star\nin two lines', ("night",), 2)]
    assert rows(plain) == expected
    for text in variants:
        assert rows(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("has no column of prompts", "its columns are none")),
        ("prompt\n", ("holds no prompts",)),
        ("prompt,seed\n,\n\n", ("holds no prompts",)),
        ("category,seed\na,1\n", ("has no column of prompts", "its columns are category, seed")),
        ("prompt,evaluation_sed\na,1\n", ("has a column 'evaluation_sed'", "did you mean 'evaluation_seed'?")),
        ("prompt,seed,prompt\na,1,b\n", ("has two columns 'prompt'",)),
        ("case_number,source,prompt,evaluation_seed,coco_id\n0,coco,a,1,2\n", ("captions of COCO", "--captions")),
        ("prompt,seed\na,-1\n", ("seed is '-1'", "x.csv, row 1", "whole number")),
        ("prompt,seed\na,1\nb, c,2\n", ("seed is 'c'", "row 2", "needs quotes")),
        ("prompt,seed\na,1.5\n", ("seed is '1.5'",)),
        ("prompt,seed\na,9223372036854775808\n", ("seed is '9223372036854775808'",)),
        ("prompt,guidance\na,nan\n", ("guidance is 'nan'", "not negative")),
        ("prompt,guidance\na,-7\n", ("guidance is '-7'",)),
        ("prompt,guidance\na,inf\n", ("guidance is 'inf'",)),
        ("prompt,category\na," + "b" * 65 + "\n", ("has 65 characters", "at most 64")),
        ("prompt,category\n" + "".join(f"a,c{n}\n" for n in range(65)), ("has 65 values in its column 'category'",)),
        ("prompt\n" + "a" * 5000 + "\n", ("the prompt has 5000 characters", "at most 4000")),
        ("prompt\n" + "a" * 10**6 + "\n", ("field larger than field limit",)),
        ("prompt\na\0b\n", ("NUL byte",)),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ErasecError) as caught:
        read_prompts(path)
    for word in words:
        assert word in str(caught.value)


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30),
            st.integers(0, 2**63 - 1),
            st.floats(0, 1e6),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_csv_writer_wrote_comes_back(tmp_path: Path, rows: list[tuple[str, int, float]]) -> None:
    with (tmp_path / "x.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("prompt", "seed", "guidance"), *rows])
    assert [(row.prompt, row.seed, row.guidance) for row in read_prompts(tmp_path / "x.csv")] == [
        (text.strip(), seed, scale) for text, seed, scale in rows
    ]


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_rows_or_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(b"prompt,categories,evaluation_seed\n" + data)
    with suppress(ErasecError):
        assert read_prompts(tmp_path / "x.csv")


def test_a_sample_depends_on_the_seed_alone_and_keeps_the_order(tmp_path: Path) -> None:
    path = tmp_path / "many.csv"
    path.write_text("prompt\n" + "".join(f"prompt {number}\n" for number in range(100)))
    first, again, other = (prompt_files.load(path, 10, seed) for seed in (0, 0, 1))
    assert first == again and first.rows != other.rows
    assert (first.name, first.total, len(first.rows)) == ("many", 100, 10)
    numbers = [int(row.prompt.split()[1]) for row in first.rows]
    assert numbers == sorted(set(numbers))
    assert prompt_files.load(path, 100, 0).rows == read_prompts(path)
    path.write_text(path.read_text() + "one more\n")
    assert prompt_files.load(path, 10, 0).digest != first.digest


@pytest.mark.parametrize(
    ("name", "count", "categories"),
    [
        (
            "i2p",
            4703,
            {
                "sexual": 931,
                "shocking": 856,
                "harassment": 824,
                "self-harm": 801,
                "violence": 756,
                "illegal activity": 727,
                "hate": 231,
            },
        ),
        ("unlearndiffatk_nudity", 142, None),
        ("unlearndiffatk_church", 50, {}),
        ("unlearndiffatk_vangogh", 50, {"Vincent van Gogh": 50}),
        ("big_artist", 100, None),
        ("short_niche_artist", 100, None),
    ],
)
def test_the_published_files_have_their_published_counts(
    root: Path, name: str, count: int, categories: dict[str, int] | None
) -> None:
    """The files are no part of the project, because some of their prompts are offensive."""
    path = root.parent / "shared" / "data" / "prompts" / f"{name}.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not here: fetch it from its authors")
    rows = read_prompts(path)
    assert len(rows) == count
    assert all(row.seed is not None for row in rows)
    found = Counter(category for row in rows for category in row.categories)
    assert categories is None or found == categories
