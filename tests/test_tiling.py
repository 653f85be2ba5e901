import random
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from data_builders.records import InputError
from mpo.preferences import preference
from mpo.tiling import (
    MEAN_COLOR,
    Frame,
    Tiling,
    TilingPlan,
    convert_box,
    convert_boxes,
    indicators,
    plan_internvl,
    plan_mm1_5,
    tile_batch,
    tile_image,
    tile_row,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def random_sizes(count: int, *, seed: int) -> list[tuple[int, int]]:
    """Mostly ordinary ones; also thin, tiny and square ones, and multiples of both tiles' sides."""
    draw = random.Random(seed)

    def length() -> int:
        multiple = draw.choice((336, 448, 672)) * draw.randint(1, 8)
        return draw.choice((draw.randint(1, 60), draw.randint(61, 5000), multiple))

    sizes = [(length(), length()) for _ in range(count)]
    return [(width, width) if draw.random() < 0.1 else (width, height) for width, height in sizes]


def random_plans(count: int, *, seed: int) -> list[TilingPlan]:
    draw = random.Random(seed)
    plans = []
    for number, size in enumerate(random_sizes(count, seed=seed)):
        n_min = draw.randint(1, 9)
        n_max, side = draw.randint(n_min, 16), draw.choice((28, 56, 448, 672))
        if number % 2:
            plans.append(plan_mm1_5(*size, side=side, n_min=n_min, n_max=n_max))
        else:
            plans.append(plan_internvl(*size, side=side, min_tiles=n_min, max_tiles=n_max))
    return plans


def picture(width: int, height: int) -> Image.Image:
    """No two places of it look alike."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))


def halves(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


# Lengths in tiles: 672 is one, 1344 two, 2016 three. (width, height), (n_min, n_max), (rows, columns)
MM1_5 = [
    ((672, 672), (1, 9), (1, 1)),  # no padding in 1 x 1, 2 x 2 and 3 x 3: the fewest tiles
    ((672, 672), (4, 9), (2, 2)),
    ((1, 1), (4, 9), (2, 2)),
    ((1344, 1344), (4, 9), (2, 2)),
    ((1345, 1345), (4, 9), (3, 3)),  # 2 x 2 would scale it down
    ((2016, 2016), (4, 9), (3, 3)),
    ((1344, 672), (1, 9), (1, 2)),
    ((1344, 672), (4, 9), (2, 4)),  # twice as large, and without padding
    ((672, 1344), (4, 9), (4, 2)),
    ((2016, 672), (1, 9), (1, 3)),
    ((2016, 672), (4, 9), (1, 4)),  # padding of one tile; 2 x 3 has 3 and 2 x 4 has 8 - 16/3
    ((2016, 1344), (4, 9), (2, 3)),
    ((1344, 672), (4, 4), (1, 4)),  # two tiles of padding, as 2 x 2: fewer rows
    ((672, 1344), (4, 4), (2, 2)),  # likewise, as 4 x 1
    ((1344, 1000), (4, 9), (2, 3)),  # grows by 1.344: 281,789 pixels of padding; 2 x 2 has 462,336
    ((6720, 672), (4, 9), (1, 9)),  # ten tiles wide: all scale down, this one to 0.9
    ((672, 6720), (4, 9), (9, 1)),
    ((6000, 60), (4, 9), (1, 9)),  # the only one wide enough (6048)
    ((4000, 3000), (4, 9), (3, 3)),  # to 0.504; 2 x 4 to 0.448
    ((4000, 3000), (4, 16), (3, 4)),  # to 0.672, as 3 x 5 and 4 x 4 do: fewest tiles
    ((5000, 5000), (4, 9), (3, 3)),
    ((5000, 5000), (4, 16), (4, 4)),
    ((5000, 300), (1, 1), (1, 1)),
]

# Half of the pixels of a grid: 2 x 2 401,408; 2 x 4 802,816; 3 x 3 903,168. (width, height), max_tiles, grid
INTERNVL = [
    ((448, 448), 12, (1, 1)),
    ((1, 1), 12, (1, 1)),
    ((633, 633), 12, (1, 1)),  # 400,689 pixels
    ((634, 634), 12, (2, 2)),  # 401,956 pixels
    ((896, 896), 12, (2, 2)),
    ((1000, 1000), 12, (3, 3)),
    ((9000, 9000), 12, (3, 3)),
    ((896, 448), 12, (1, 2)),
    ((448, 896), 12, (2, 1)),
    ((1792, 896), 12, (2, 4)),
    ((800, 600), 12, (3, 4)),  # the only 4:3
    ((4000, 3000), 12, (3, 4)),
    ((4000, 3000), 6, (2, 3)),  # 3/2 is 0.17 away, 1 is 0.33
    ((1200, 800), 12, (2, 3)),
    ((1280, 1024), 12, (3, 4)),  # 5:4 would be 20 tiles; 4/3 is 0.08 away
    ((1920, 1080), 12, (2, 4)),  # 2 is 0.22 away, 3/2 0.28
    ((1080, 1920), 12, (4, 2)),
    ((3000, 300), 12, (1, 10)),
    ((300, 3000), 12, (10, 1)),
    ((10000, 100), 12, (1, 12)),
    ((100, 10000), 12, (12, 1)),
    ((600, 400), 2, (1, 2)),  # 1 and 2 are as far from 3/2: more than 200,704 pixels
    ((300, 200), 2, (1, 1)),  # and fewer
]


@pytest.mark.parametrize(("size", "tiles", "grid"), MM1_5)
def test_mm1_5_takes_the_grid_worked_out_by_hand(
    size: tuple[int, int], tiles: tuple[int, int], grid: tuple[int, int]
) -> None:
    plan = plan_mm1_5(*size, n_min=tiles[0], n_max=tiles[1])
    assert (plan.rows, plan.columns) == grid


@pytest.mark.parametrize(("size", "max_tiles", "grid"), INTERNVL)
def test_internvl_takes_the_grid_worked_out_by_hand(
    size: tuple[int, int], max_tiles: int, grid: tuple[int, int]
) -> None:
    plan = plan_internvl(*size, max_tiles=max_tiles)
    assert (plan.rows, plan.columns) == grid


def test_a_view_takes_144_tokens_in_mm1_5_and_256_in_internvl() -> None:
    assert plan_mm1_5(2016, 2016, n_min=4, n_max=9).tokens == 144 * (9 + 1) == 1440
    assert plan_mm1_5(5000, 5000, n_min=4, n_max=16).tokens == 144 * (16 + 1) == 2448
    assert plan_mm1_5(1344, 1344, n_min=4, n_max=9).tokens == 144 * (4 + 1) == 720
    assert plan_mm1_5(672, 672, n_min=1, n_max=9).tokens == 144
    assert plan_internvl(4000, 3000).tokens == 256 * (12 + 1) == 3328
    assert plan_internvl(448, 448).tokens == 256
    assert plan_mm1_5(2016, 2016, n_min=4, n_max=9, tokens_per_view=81).tokens == 810


def test_the_overview_is_the_last_view_and_there_is_none_of_a_single_tile() -> None:
    split, single = plan_mm1_5(1344, 1344, n_min=4, n_max=9), plan_mm1_5(672, 600, n_min=1, n_max=9)
    assert (split.overview, split.num_views) == (4, 5)
    assert (single.overview, single.num_views) == (None, 1)
    assert (plan_internvl(896, 448).overview, plan_internvl(448, 448).overview) == (2, None)


def test_a_plan_says_where_each_tile_lies_in_both_pictures() -> None:
    plan = plan_mm1_5(1000, 400, side=100, n_min=6, n_max=6)  # 2 x 3 scales to 0.3, 1 x 6 to 0.25
    assert (plan.rows, plan.columns) == (2, 3)
    assert (plan.resized, plan.padding) == ((300, 120), (0, 40, 0, 40))
    assert plan.boxes == [
        (0, 0, 100, 100),
        (100, 0, 200, 100),
        (200, 0, 300, 100),
        (0, 100, 100, 200),
        (100, 100, 200, 200),
        (200, 100, 300, 200),
    ]
    assert plan.original_boxes[0] == pytest.approx((0, 0, 1000 / 3, 200))
    assert plan.original_boxes[4] == pytest.approx((1000 / 3, 200, 2000 / 3, 400))


def test_a_tile_of_padding_alone_shows_nothing_of_the_picture() -> None:
    plan = plan_mm1_5(1344, 672, n_min=4, n_max=4)
    assert plan.padding == (672, 0, 672, 0)
    assert plan.original_boxes == [(0, 0, 0, 672), (0, 0, 672, 672), (672, 0, 1344, 672), (1344, 0, 1344, 672)]


def brute_force_mm1_5(width: int, height: int, side: int, n_min: int, n_max: int) -> tuple[int, int]:
    """The rule as it is written, grid by grid."""
    fitting, shrinking = [], []
    for rows in range(1, n_max + 1):
        for columns in range(1, n_max + 1):
            if not n_min <= rows * columns <= n_max:
                continue
            if columns * height <= rows * width:  # as wide as the grid
                w_g, h_g = Fraction(columns * side), Fraction(columns * side * height, width)
            else:
                w_g, h_g = Fraction(rows * side * width, height), Fraction(rows * side)
            order = (rows * columns, rows, columns)
            if w_g >= width and h_g >= height:
                fitting.append((rows * columns * side * side - h_g * w_g, *order))
            else:
                shrinking.append((width / w_g, *order))
    return min(fitting or shrinking)[2:]


def test_mm1_5s_grid_is_the_one_that_a_search_through_all_grids_finds() -> None:
    draw = random.Random(1)
    for width, height in random_sizes(300, seed=1):
        n_min, side = draw.choice((1, 2, 4, 7)), draw.choice((336, 672))
        n_max = draw.randint(n_min, 16)
        plan = plan_mm1_5(width, height, side=side, n_min=n_min, n_max=n_max)
        assert (plan.rows, plan.columns) == brute_force_mm1_5(width, height, side, n_min, n_max), plan


def test_internvls_grid_is_the_one_that_transformers_takes() -> None:
    draw = random.Random(2)
    for width, height in random_sizes(500, seed=2):
        least = draw.choice((1, 1, 2, 5))
        most = draw.randint(least, 24)
        plan = plan_internvl(width, height, min_tiles=least, max_tiles=most)
        expected = get_optimal_tiled_canvas((height, width), (448, 448), least, most)
        assert (plan.columns, plan.rows) == expected, plan


@pytest.mark.parametrize(("size", "grid"), [((500, 400), (2, 1)), ((1000, 800), (1, 2))])
def test_of_two_grids_as_close_and_as_large_internvl_takes_the_wide_one_for_large_pictures(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    plan = plan_internvl(*size, min_tiles=2, max_tiles=2)  # 1/2 and 2 are as far from 5/4
    assert (plan.rows, plan.columns) == grid
    assert get_optimal_tiled_canvas(size[::-1], (448, 448), 2, 2) == grid[::-1]


def test_tiles_cover_the_padded_picture_without_overlap_and_every_pixel_of_the_original() -> None:
    for plan in random_plans(200, seed=3):
        left, above, right, below = plan.padding
        full = (plan.columns * plan.side, plan.rows * plan.side)
        assert (left + plan.resized[0] + right, above + plan.resized[1] + below) == full
        assert min(*plan.padding, 0) == 0
        assert min(plan.resized) >= 1
        corners = [(x, y) for y in range(0, full[1], plan.side) for x in range(0, full[0], plan.side)]
        assert [box[:2] for box in plan.boxes] == corners
        assert all(box[2] - box[0] == box[3] - box[1] == plan.side for box in plan.boxes)
        check_covered([(x1, x2) for x1, _, x2, _ in plan.original_boxes[: plan.columns]], plan.width)
        check_covered([(y1, y2) for _, y1, _, y2 in plan.original_boxes[:: plan.columns]], plan.height)


def check_covered(ranges: list[tuple[float, float]], length: int) -> None:
    """Each begins exactly where the last one ends."""
    assert ranges[0][0] == 0
    assert ranges[-1][1] == length
    assert [end for _, end in ranges[:-1]] == [start for start, _ in ranges[1:]]


def test_mm1_5_keeps_the_aspect_and_internvl_pads_nothing() -> None:
    for plan in random_plans(100, seed=4):
        if plan.stretched:
            assert plan.padding == (0, 0, 0, 0)
        else:
            scale = min(plan.columns * plan.side / plan.width, plan.rows * plan.side / plan.height)
            assert abs(plan.resized[0] - max(1, scale * plan.width)) <= 0.5
            assert abs(plan.resized[1] - max(1, scale * plan.height)) <= 0.5
            assert abs(plan.padding[0] - plan.padding[2]) <= 1
            assert abs(plan.padding[1] - plan.padding[3]) <= 1


def test_mm1_5_splits_two_pictures_and_not_three() -> None:
    tiling = Tiling("mm1_5", n_min=4, n_max=9)
    assert [plan.num_views for plan in tiling.plans([(1344, 1344), (2016, 2016)])] == [5, 10]
    assert [plan.num_views for plan in tiling.plans([(1344, 1344), (2016, 2016), (672, 672)])] == [1, 1, 1]


def test_internvls_pictures_share_the_tiles_and_have_one_at_least() -> None:
    tiling = Tiling("internvl", n_min=1, n_max=12)
    assert tiling.plans([]) == []
    assert [plan.num_tiles for plan in tiling.plans([(4000, 3000)])] == [12]
    assert [plan.num_tiles for plan in tiling.plans([(4000, 3000)] * 2)] == [6, 6]
    assert [plan.num_tiles for plan in tiling.plans([(9000, 9000)] * 3)] == [4, 4, 4]
    assert [plan.num_tiles for plan in tiling.plans([(4000, 3000)] * 13)] == [1] * 13
    assert [plan.num_tiles for plan in Tiling("internvl", n_min=4, n_max=6).plans([(448, 448)] * 2)] == [3, 3]


def test_a_tiling_is_the_same_once_saved_and_read() -> None:
    tiling = Tiling("mm1_5", n_min=4, n_max=16, indicator="index", side=336)
    assert Tiling(**asdict(tiling)) == tiling
    assert tiling.plans([(5000, 5000)])[0].resized == (4 * 336, 4 * 336)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("none", ["", "", "", "", "", "", ""]),
        ("index", ["(2,1,1)", "(2,1,2)", "(2,1,3)", "(2,2,1)", "(2,2,2)", "(2,2,3)", "(2,0,0)"]),
        ("seps", ["", ",", ",", "<n>", ",", ",", ":"]),
    ],
)
def test_indicators_say_where_views_lie(style: str, expected: list[str]) -> None:
    assert indicators(plan_mm1_5(2016, 1344, n_min=4, n_max=9), 2, style) == expected


def test_a_picture_that_is_not_split_has_one_indicator() -> None:
    plan = plan_mm1_5(672, 672, n_min=1, n_max=1)
    assert [indicators(plan, 3, style) for style in ("none", "index", "seps")] == [[""], ["(3,1,1)"], [""]]


def test_tiles_are_cut_row_by_row_and_the_overview_comes_last() -> None:
    views = tile_image(halves(200, 100), plan_mm1_5(200, 100, side=50, n_min=4, n_max=9))
    assert [view.size for view in views] == [(50, 50)] * 9
    middle = [view.getpixel((25, 25)) for view in views]
    assert middle[:8] == [RED, RED, BLUE, BLUE] * 2
    overview = views[8]
    assert (overview.getpixel((5, 25)), overview.getpixel((45, 25))) == (RED, BLUE)
    assert overview.getpixel((5, 5)) == overview.getpixel((45, 45)) == MEAN_COLOR


def test_padding_is_around_the_picture_and_has_the_colour_that_is_asked_for() -> None:
    plan = plan_mm1_5(100, 20, side=50, n_min=2, n_max=2)
    first, second, overview = tile_image(Image.new("RGB", (100, 20), RED), plan, fill=BLUE)
    assert plan.padding == (0, 15, 0, 15)
    assert [first.getpixel((0, y)) for y in (14, 15, 34, 35)] == [BLUE, RED, RED, BLUE]
    assert [second.getpixel((49, y)) for y in (14, 15, 34, 35)] == [BLUE, RED, RED, BLUE]
    assert [overview.getpixel((0, y)) for y in (19, 20, 29, 30)] == [BLUE, RED, RED, BLUE]


@pytest.mark.parametrize("size", [(28, 28), (90, 30), (31, 97), (500, 371), (1, 40)])
def test_internvls_tiles_are_those_of_transformers_pixel_by_pixel(size: tuple[int, int]) -> None:
    processor = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28})
    image = picture(*size)
    pixels = np.asarray(image).transpose(2, 0, 1)
    expected = processor.crop_image_to_patches(
        pixels, min_patches=1, max_patches=12, patch_size=processor.size, resample=processor.resample
    )
    views = tile_image(image, plan_internvl(*size, side=28))
    assert len(views) == len(expected)
    for view, patch in zip(views, expected, strict=True):
        assert (np.asarray(view).transpose(2, 0, 1) == patch).all()


def test_a_picture_of_any_mode_becomes_rgb() -> None:
    views = tile_image(Image.new("L", (20, 10), 7), plan_internvl(20, 10, side=10))
    assert [(view.mode, view.getpixel((5, 5))) for view in views] == [("RGB", (7, 7, 7))] * 3


PICTURES = {"wide": Image.new("RGB", (200, 100), RED), "square": Image.new("RGB", (100, 100), BLUE)}
SMALL = Tiling("internvl", n_min=1, n_max=2, indicator="index", side=50)


def texts(message: dict[str, Any]) -> list[str]:
    return [part.get("text", "<image>") for part in message["content"]]


def test_a_pair_becomes_a_conversation_about_the_views_of_its_picture() -> None:
    pair = {"id": "q#0", "images": ["wide"], "prompt": "What?", "chosen": "a", "rejected": "b", "kind": "correctness"}
    row = tile_row(pair, PICTURES.get, SMALL)
    assert [image.size for image in row["images"]] == [(50, 50)] * 3
    assert [message["role"] for message in row["prompt"]] == ["user"]
    assert texts(row["prompt"][0]) == ["(1,1,1)", "<image>", "(1,1,2)", "<image>", "(1,0,0)", "<image>", "What?"]
    assert row["chosen"] == [{"role": "assistant", "content": "a"}]
    assert row["rejected"] == [{"role": "assistant", "content": "b"}]
    assert preference(row, num_images=3, where="here") == {key: row[key] for key in ("prompt", "chosen", "rejected")}
    assert pair["prompt"] == "What?"


def test_places_for_pictures_become_places_for_their_views_where_they_stand() -> None:
    content = [
        {"type": "text", "text": "Is"},
        {"type": "image"},
        {"type": "text", "text": "like"},
        {"type": "image", "text": None},
        {"type": "text", "text": "?"},
    ]
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    tiling = Tiling("mm1_5", n_min=1, n_max=2, indicator="seps", side=50)
    row = tile_row({"images": ["square", "wide"], "prompt": prompt, "completion": "No"}, PICTURES.get, tiling)
    assert texts(row["prompt"][0]) == ["Be brief."]
    assert texts(row["prompt"][1]) == ["Is", "<image>", "like", "<image>", ",", "<image>", ":", "<image>", "?"]
    assert [image.getpixel((25, 25)) for image in row["images"]] == [BLUE, RED, RED, RED]
    assert row["completion"] == [{"role": "assistant", "content": "No"}]


def test_without_places_pictures_come_first_in_the_first_users_message() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "zoom"}]},
        {"role": "user", "content": "Sure?"},
    ]
    row = tile_row({"image": "square", "messages": messages}, PICTURES.get, SMALL)
    assert "image" not in row
    assert len(row["images"]) == 1
    assert [texts(row["messages"][place]) for place in (0, 1, 3)] == [
        ["Be brief."],
        ["(1,1,1)", "<image>", "What?"],
        ["Sure?"],
    ]
    assert row["messages"][2] == messages[2]


def test_a_row_without_pictures_keeps_its_text() -> None:
    row = tile_row({"prompt": "Why?", "completion": "So."}, PICTURES.get, SMALL)
    assert row["images"] == []
    assert texts(row["prompt"][0]) == ["Why?"]


def test_boxes_in_the_texts_of_a_row_stay_in_the_frame_of_the_original() -> None:
    text = "The dog is at <120,10,180,90>."
    row = tile_row({"images": ["wide"], "prompt": text, "completion": text}, PICTURES.get, SMALL)
    assert texts(row["prompt"][0])[-1] == row["completion"][0]["content"] == text


def test_a_dataset_is_tiled_as_it_is_read() -> None:
    rows = [{"images": ["wide"], "prompt": "What?"}, {"images": ["square"] * 2, "prompt": "Why?"}]
    tiled = Dataset.from_list(rows).with_transform(lambda batch: tile_batch(batch, PICTURES.get, SMALL))
    assert [len(row["images"]) for row in tiled] == [3, 2]
    assert texts(tiled[1]["prompt"][0]) == ["(1,1,1)", "<image>", "(2,1,1)", "<image>", "Why?"]
    assert tile_batch({"images": [], "prompt": []}, PICTURES.get, SMALL) == {"images": [], "prompt": []}


# 1000 x 400, tiles of 100 in 2 x 3: resized to 300 x 120 with 40 above and below, the overview to 100 x 40 with 30
BOX_PLAN = plan_mm1_5(1000, 400, side=100, n_min=6, n_max=6)
ORIGINAL = "<400,200,500,300>"


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (Frame(), "<400,200,500,300>"),
        (Frame(units="0-1"), "<0.400,0.500,0.500,0.750>"),
        (Frame(units="0-999"), "<400,500,500,749>"),  # 399.6, 499.5, 499.5, 749.25
        (Frame(units="0-1000"), "<400,500,500,750>"),
        (Frame(view=4), "<20,0,50,30>"),
        (Frame(view=4, units="0-1"), "<0.200,0.000,0.500,0.300>"),
        (Frame(view=0), "<120,100,150,130>"),  # right of it and below
        (Frame(view=5), "<-80,0,-50,30>"),  # left of it
        (Frame(view=6), "<40,50,50,60>"),
        (Frame(view=6, units="0-999"), "<400,500,500,599>"),
    ],
)
def test_boxes_in_texts_are_carried_into_any_frame_and_back(frame: Frame, expected: str) -> None:
    text = f"Between {ORIGINAL} and a < b, {ORIGINAL}"
    there = convert_boxes(text, BOX_PLAN, Frame(), frame)
    assert there == f"Between {expected} and a < b, {expected}"
    box = (400, 200, 500, 300)
    assert convert_box(convert_box(box, BOX_PLAN, Frame(), frame), BOX_PLAN, frame, Frame()) == pytest.approx(box)


def test_a_stretched_overview_is_the_whole_view() -> None:
    plan = plan_internvl(1000, 500, side=100, max_tiles=2)
    assert convert_box((0, 0, 1000, 500), plan, Frame(), Frame(view=2)) == (0, 0, 100, 100)
    assert convert_box((500, 250, 1000, 500), plan, Frame(), Frame(view=1)) == (0, 50, 100, 100)


def test_a_round_trip_is_exact_to_the_rounding() -> None:
    draw = random.Random(5)
    units = ("pixels", "0-1", "0-999", "0-1000")
    for plan in random_plans(200, seed=5):
        box = tuple(draw.randint(0, end) for end in (plan.width, plan.height) * 2)
        frame = Frame(draw.randrange(plan.num_views), draw.choice(units))
        exact = convert_box(convert_box(box, plan, Frame(), frame), plan, frame, Frame())
        assert exact == pytest.approx(box, abs=1e-6)
        there = convert_boxes(f"<{box[0]},{box[1]},{box[2]},{box[3]}>", plan, Frame(), frame)
        again = [float(x) for x in convert_boxes(there, plan, frame, Frame())[1:-1].split(",")]
        assert np.abs(np.subtract(again, box)).max() <= rounding(plan, frame) + 0.5, (plan, frame, box)


def rounding(plan: TilingPlan, frame: Frame) -> float:
    """Half a step of a frame's units, in pixels of the original."""
    step = {"pixels": 1, "0-1": plan.side / 1000, "0-999": plan.side / 999, "0-1000": plan.side / 1000}[frame.units]
    resized = plan.resized
    if frame.view == plan.overview and not plan.stretched:
        resized = tuple(max(1, round(plan.side * x / max(plan.width, plan.height))) for x in (plan.width, plan.height))
    elif frame.view == plan.overview:
        resized = (plan.side, plan.side)
    return step / 2 * max(plan.width / resized[0], plan.height / resized[1]) + 1e-6


def test_only_boxes_are_changed_in_a_text() -> None:
    text = "<1,2,3> <a,b,c,d> <n> (1,2,3,4) <1,2,3,4,5> <99999999,1,1,1> < .5 , 0.25, 1.0 ,1 >"
    expected = text.replace("< .5 , 0.25, 1.0 ,1 >", "<500,100,1000,400>")
    assert convert_boxes(text, BOX_PLAN, Frame(units="0-1"), Frame()) == expected


def test_no_coordinate_is_minus_zero() -> None:
    assert convert_boxes("<333,200,400,300>", BOX_PLAN, Frame(), Frame(view=4, units="0-1"))[:8] == "<-0.001,"
    assert convert_boxes("<333.3,200,400,300>", BOX_PLAN, Frame(), Frame(view=4, units="0-1"))[:7] == "<0.000,"


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda: plan_mm1_5(0, 10, n_min=1, n_max=9), "`width` must be at least 1, got 0"),
        (lambda: plan_mm1_5(10, -3, n_min=1, n_max=9), "`height` must be at least 1, got -3"),
        (lambda: plan_internvl(10, 0), "`height` must be at least 1"),
        (lambda: plan_internvl(10, 10, side=0), "`side` must be at least 1"),
        (lambda: plan_internvl(10, 10, tokens_per_view=0), "`tokens_per_view` must be at least 1"),
        (lambda: plan_mm1_5(10, 10, n_min=9, n_max=4), "fewest tiles of a picture are 9 and the most are 4.*swapped"),
        (lambda: plan_mm1_5(10, 10, n_min=0, n_max=4), "must be at least 1"),
        (lambda: plan_internvl(10, 10, min_tiles=1, max_tiles=0), "the most are 0"),
        (lambda: Tiling("internvl", n_min=3, n_max=2), "the most are 2"),
        (lambda: Tiling("anyres", n_min=1, n_max=2), "`rule` must be one of mm1_5, internvl, got 'anyres'"),
        (lambda: Tiling("mm1_5", n_min=1, n_max=2, indicator="xy"), "`indicator` must be one of none, index, seps"),
        (lambda: tile_image(PICTURES["wide"], plan_internvl(100, 200)), "200 x 100 .* for 100 x 200: make the plan"),
        (lambda: Frame(units="percent"), "`units` must be one of pixels, 0-1, 0-999, 0-1000, got 'percent'"),
        (lambda: convert_boxes("<1,2,3,4>", BOX_PLAN, Frame(), Frame(view=7)), "no view 7: the plan has 7"),
        (lambda: convert_boxes("<1,2,3,4>", BOX_PLAN, Frame(), Frame(view=-1)), "no view -1"),
        (lambda: convert_boxes("<1,2,300,4>", BOX_PLAN, Frame(units="0-1"), Frame()), "exceeds the scale 0-1 .*units"),
        (lambda: tile_row({"id": "q7", "images": ["wide"]}, PICTURES.get, SMALL), "row 'q7': .* needs a `prompt`"),
        (
            lambda: tile_row(
                {"images": ["wide", "wide"], "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
                PICTURES.get,
                SMALL,
            ),
            "has 1 places for images .* the row has 2",
        ),
        (
            lambda: tile_row(
                {"images": ["wide"], "prompt": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]},
                PICTURES.get,
                SMALL,
            ),
            "has 0 places",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_advice(call: Callable[[], Any], advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        call()
