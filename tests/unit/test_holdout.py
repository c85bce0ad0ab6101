"""Held-out pictures are chosen by content: deterministic, twins together, nothing twice."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import examine, holdout, pictures
from data_tools.holdout import Look, Looks
from tests import runs


def look(seed: int, *, flip_bits: int = 0) -> Look:
    """Of a made-up picture; `flip_bits` of its hash differ."""
    draw = random.Random(seed)
    phash = draw.getrandbits(64) ^ ((1 << flip_bits) - 1)
    return Look(phash, bytes([seed * 37 % 256]) * 192)


def digest(seed: int) -> str:
    return f"{seed:064x}"


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, 0), (12, 0), (19, 0), (20, 4), (40, 4), (60, 6), (80, 8), (1000, 8)],
)
def test_a_tenth_but_four_at_least_and_a_fifth_at_most(size, expected):
    assert holdout.count(size, fraction=0.1, most=8) == expected


def test_more_than_a_fifth_is_never_held_out():
    assert holdout.count(40, fraction=0.5, most=100) == 0
    assert holdout.count(40, fraction=0.2, most=100) == 8


def chosen(rows: Sequence[int], *, wanted: int = 5) -> list[list[int]]:
    """Of made-up pictures, by their numbers; those from 1000 on look like those of 1000 less."""
    digests = [digest(i) for i in rows]
    looks = [look(i % 1000, flip_bits=3 if i >= 1000 else 0) for i in rows]
    groups = holdout.choose(digests, looks, own=len(rows), wanted=wanted)
    return [[rows[place] for place in group] for group in groups]


def test_neither_order_nor_seed_nor_names_matter():
    order = list(range(30))
    first = chosen(order)
    assert [len(group) for group in first] == [1] * 5
    for seed in range(3):
        random.Random(seed).shuffle(order)
        assert chosen(order) == first


def test_a_new_picture_moves_one_at_most():
    before = {i for group in chosen(list(range(30))) for i in group}
    for new in range(30, 60):
        after = {i for group in chosen([*range(30), new]) for i in group}
        assert len(after - before) <= 1


def test_near_duplicates_are_on_one_side():
    """Thirty pictures, each with a twin whose file is another one."""
    groups = chosen([*range(30), *range(1000, 1030)])
    assert len(groups) == 5
    assert all(sorted(group) == [min(group), min(group) + 1000] for group in groups)


def test_twins_leave_room_for_the_others_in_a_fifth():
    """Four of 21 pictures; a twin more would be the fifth."""
    groups = chosen([*range(20), 1000], wanted=4)
    assert [len(group) for group in groups] == [1] * 4
    groups = chosen([*range(20), *(1000 + i for i in range(20) if i != 7)], wanted=4)
    assert sum(map(len, groups)) <= 7


def test_a_picture_whose_twin_is_in_another_set_is_trained():
    digests, looks = [digest(i) for i in range(120)], [look(i % 60) for i in range(120)]
    assert holdout.choose(digests, looks, own=60, wanted=4) == []
    assert len(holdout.choose(digests, looks, own=120, wanted=4)) == 4


def test_twins_of_trained_pictures_are_found():
    looks = [look(0), look(1), look(2), look(1, flip_bits=2)]
    assert holdout.twins(looks, own=3) == [1]
    assert holdout.twins(looks[:3], own=3) == []


def test_looks_are_those_of_examine_and_made_once(tmp_path):
    path = runs.draw_picture(tmp_path / "a.png", size=(300, 200))
    memo = tmp_path / "cache" / "looks.txt"
    first = Looks(memo).of([("aa", path)], progress=False)["aa"]
    measures = examine.measure(pictures.look(path, side=examine.SIDE)[1])
    assert first == Look(measures.phash, measures.colours)
    path.unlink()  # so that to look again would fail
    assert Looks(memo).of([("aa", path)], progress=False) == {"aa": first}


def test_a_line_cut_off_by_a_kill_is_made_anew(tmp_path):
    path = runs.draw_picture(tmp_path / "a.png")
    memo = tmp_path / "looks.txt"
    found = Looks(memo).of([("aa", path)], progress=False)
    memo.write_text(memo.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert Looks(memo).of([("aa", path)], progress=False) == found
    path.unlink()
    assert Looks(memo).of([("aa", path)], progress=False) == found


def test_a_smaller_copy_of_a_picture_is_its_twin(tmp_path):
    """By real pixels: saved again at another size and quality."""
    blots = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    original = Image.fromarray(blots).resize((256, 256), Image.Resampling.BICUBIC)
    original.save(tmp_path / "a.png")
    original.resize((180, 180)).save(tmp_path / "b.jpg", quality=70)
    shutil.copy(runs.draw_picture(tmp_path / "c" / "x.png", size=(256, 256)), tmp_path / "c.png")
    files = [(name, Path(tmp_path / name)) for name in ("a.png", "b.jpg", "c.png")]
    looks = Looks(tmp_path / "looks.txt").of(files, progress=False)
    assert holdout.twins([looks[name] for name, _ in files], own=1) == [0]
