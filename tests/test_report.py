import json
import os
import re
from html.parser import HTMLParser

import pytest
from browser import find_browser, open_browser
from PIL import Image

from data_builders.records import InputError
from data_builders.shards import write_text
from mpo import report_charts as charts
from mpo.report import ReportConfig, run
from mpo.report_gallery import GalleryPicker, highlight, picture

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    r"$\frac{1}{0}$",
    "</svg></style><b onclick='alert(3)'>",
    "{{ 7 * 7 }}{% raw %}",
]


def evaluation(models=("SFT", "MPO"), styles=("final_answer", "direct"), sources=("all", "sum", "read")):
    """Accuracy 0.554 and 0.612 for all questions, the same for every kind; a second style that is 5 points lower."""
    accuracy, differences = [], []
    for style_number, style in enumerate(styles):
        for source in sources:
            num = 2000 if source == "all" else 1000
            at = {"style": style, "source": source, "num": num}
            for number, model in enumerate(models):
                value = 0.554 + 0.058 * number - 0.05 * style_number
                accuracy.append({"model": model, **at, "accuracy": value, "low": value - 0.021, "high": value + 0.022})
            for number, model in enumerate(models[1:], 1):
                gain = 0.058 * number
                spread = {"difference": gain, "low": gain - 0.019, "high": gain + 0.019}
                differences.append({"model": model, "baseline": models[0], **at, **spread})
    return {
        "models": list(models), "styles": list(styles), "num_questions": 2000,
        "accuracy": accuracy, "differences": differences,
    }  # fmt: skip


def answer(model, question, verdict, prediction, **more):
    row = {"model": model, "style": "final_answer", "id": question, "images": [], "question": "?", "answer": "8"}
    return {**row, "source": "sum", "response": f"So {prediction}.", "verdict": verdict, "prediction": prediction,
            "rule": "number", **more}  # fmt: skip


def pair(name="q-1#0", **more):
    row = {"id": name, "images": [], "prompt": "What is the sum? Think.", "question": "What is the sum?"}
    sides = {"chosen": "5 and 3 give 8.", "rejected": "5 and 3 give 9 or so."}
    return {**row, **sides, "kind": "correctness", "source": "sum", "answer": "8", **more}


def verdict(number, value, source="sum"):
    return {"id": f"q-{number}", "question": "?", "answer": "8", "source": source, "response": "8", "prompt": "?",
            "sampler": {}, "verdict": value, "rule": "number"}  # fmt: skip


def log_entry(step, **more):
    terms = {"loss": 1.5 - 0.1 * step, "loss/preference": 0.7, "loss/quality": 1.4, "loss/generation": 0.5}
    rewards = {"rewards/chosen": 0.1 * step, "rewards/rejected": -0.2 * step, "rewards/margins": 0.3 * step}
    return {"step": step, **terms, **rewards, "rewards/accuracies": 0.5, "reward_shift": -0.05 * step, **more}


def write_json(path, content):
    write_text(path, json.dumps(content))


def write_rows(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(folder, content=None, answers=()):
    write_json(folder / "evaluation.json", content or evaluation())
    write_rows(folder / "answers.jsonl", answers)
    return str(folder)


def write_training(folder, history):
    write_json(folder / "trainer_state.json", {"log_history": history})
    return str(folder)


def write_pairs(folder, rows):
    write_rows(folder / "00000.jsonl", rows)
    return [str(folder)]


def report(tmp_path, **inputs):
    run(ReportConfig(output=str(tmp_path / "out"), image_root=str(tmp_path), **inputs))
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def whole_run(tmp_path, texts=("plain", "plain", "plain", "plain", "plain")):
    """A run with every section, in which all that data and models may choose is one of five texts."""
    one, two, three, four, five = texts
    Image.new("RGB", (16, 16), "red").save(tmp_path / "small.png")
    Image.new("RGB", (1200, 600), "blue").save(tmp_path / "large.png")
    models = (f"{one} SFT", f"{two} MPO")
    content = evaluation(models, styles=(f"{three} a", f"{four} b"), sources=("all", f"{three} x", f"{five} y"))
    answers = [
        answer(model, "q-1", "wrong", two, style=f"{three} a", response=text)
        for model, text in zip(models, (four, one), strict=True)
    ]
    folder = write_evaluation(tmp_path / "eval", content, answers)
    rows = [
        pair(
            f"q-1#{one}", question_id="q-1", images=["small.png", "large.png"], question=one, answer=two, source=three
        ),
        pair(
            f"q-2#{two}", kind="format", question=five, answer=four, source=one, chosen=two, rejected=f"{three} {four}"
        ),
        pair("q-3", kind="dropout_ntp", question=three, answer=None, chosen="It is 3.", rejected="It is a lake."),
    ]
    rows[0].update(answer=two, chosen=f"Yes, {four} and {five}", rejected=f"Yes, {five} but {one}")
    write_rows(tmp_path / "verdicts" / "00000.jsonl", [verdict(1, "correct", one), verdict(2, "wrong", three)])
    return {
        "title": f"{five} title", "evaluation": folder, "gallery_answers": folder,
        "pairs": write_pairs(tmp_path / "pairs", rows), "verdicts": str(tmp_path / "verdicts"),
        "training": write_training(tmp_path / "train", [log_entry(step) for step in range(1, 5)]),
    }  # fmt: skip


class Reader(HTMLParser):
    """What a browser would make of the page: its elements with their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.pieces = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.pieces.append(data)

    @property
    def tags(self):
        return [tag for tag, _ in self.elements]

    @property
    def text(self):
        return " ".join("".join(self.pieces).split())

    @property
    def sections(self):
        return [attributes["id"] for tag, attributes in self.elements if tag == "section"]


# What the page says


def test_the_headline_says_how_much_better_and_how_certain(tmp_path):
    text = Reader(report(tmp_path, evaluation=write_evaluation(tmp_path / "eval"))).text
    assert "MPO 61.2% vs SFT 55.4%: +5.8 points (95% interval +3.9 to +7.7), 2,000 questions" in text
    assert "The whole interval lies above zero" in text


@pytest.mark.parametrize(
    ("difference", "low", "high", "number", "said"),
    [
        (-0.058, -0.077, -0.039, "−5.8 points (95% interval −7.7 to −3.9)", "the model got worse"),
        (0.01, -0.009, 0.029, "+1.0 points (95% interval −0.9 to +2.9)", "does not show that the models differ"),
    ],
)
def test_the_headline_does_not_sell_a_loss_or_a_draw_as_a_gain(tmp_path, difference, low, high, number, said):
    content = evaluation()
    content["differences"][0].update(difference=difference, low=low, high=high)
    text = Reader(report(tmp_path, evaluation=write_evaluation(tmp_path / "eval", content))).text
    assert number in text
    assert said in text
    assert "larger than chance" not in text


def test_the_headline_compares_the_last_model_with_the_first(tmp_path):
    content = evaluation(models=("base", "SFT", "MPO"))
    text = Reader(report(tmp_path, evaluation=write_evaluation(tmp_path / "eval", content))).text
    assert "MPO 67.0% vs base 55.4%: +11.6 points" in text


def test_one_model_alone_is_reported_without_a_comparison(tmp_path):
    content = evaluation(models=("MPO",))
    text = Reader(report(tmp_path, evaluation=write_evaluation(tmp_path / "eval", content))).text
    assert "MPO 55.4% (95% interval 53.3% to 57.6%), 2,000 questions" in text
    assert " vs " not in text


def test_the_table_has_every_number_of_both_styles(tmp_path):
    text = Reader(report(tmp_path, evaluation=write_evaluation(tmp_path / "eval"))).text
    main = "2,000 55.4% 53.3% to 57.6% 61.2% 59.1% to 63.4% +5.8 +3.9 to +7.7"
    other = "1,000 50.4% 48.3% to 52.6% 56.2% 54.1% to 58.4% +5.8 +3.9 to +7.7"
    without_spaces = text.replace(" ", "")
    assert f"Allquestions{main.replace(' ', '')}" in without_spaces
    assert f"read{other.replace(' ', '')}" in without_spaces


def test_a_score_that_was_not_measured_is_a_dash(tmp_path):
    content = evaluation()
    del content["accuracy"][-1]
    html = report(tmp_path, evaluation=write_evaluation(tmp_path / "eval", content))
    assert html.count("<td>–</td>") == 1


def test_training_is_told_by_first_and_last_logged_values(tmp_path):
    history = [log_entry(1), {"eval_loss": 9.0, "step": 2}, log_entry(10), log_entry(10, loss=float("nan"))]
    history.append({"step": 10, "train_loss": 1.0, "train_runtime": 5.0})
    text = Reader(report(tmp_path, training=write_training(tmp_path / "train", history))).text
    assert "10 steps" in text
    assert "Loss1.400 → 0.500" in text
    assert "Chosen above rejected50.0% → 50.0%" in text
    assert "Reward margin0.300 → 3.000" in text
    assert "Reward shift δ−0.050 → −0.500" in text
    for end in ("total 0.50", "quality 1.40", "chosen 1.00", "rejected −2.00", "margin 3.00", "shift δ −0.50"):
        assert end in text


def test_the_log_of_another_trainer_may_hold_nothing_but_the_loss(tmp_path):
    html = report(tmp_path, training=write_training(tmp_path / "train", [{"step": 1, "loss": 2.0}]))
    assert "Loss by term" in html
    assert "<h3>Rewards</h3>" not in html


def test_a_log_without_any_loss_says_so_in_place_of_charts(tmp_path):
    html = report(tmp_path, training=write_training(tmp_path / "train", [{"step": 3, "train_runtime": 1.0}]))
    assert "was <code>logging_steps</code> larger than the run?" in html
    assert "<svg" not in html


def test_verdicts_are_counted_by_source(tmp_path):
    rows = [verdict(n, "correct") for n in range(6)] + [verdict(n, "wrong", "read") for n in range(3)]
    write_rows(tmp_path / "verdicts" / "00000.jsonl", [*rows, verdict(9, "no_answer")])
    html = report(tmp_path, verdicts=str(tmp_path / "verdicts"))
    assert "sum: 6 correct, 1 no_answer; read: 3 wrong" in html
    text = Reader(html).text
    assert "correct 6, 60.0%" in text
    assert "wrong 3, 30.0%" in text
    assert "no answer 1, 10.0%" in text
    assert "7 responses" in text


def test_pairs_are_counted_and_measured_by_kind(tmp_path):
    rows = [pair("q-1#0"), pair("q-1#1"), pair("q-2#0"), pair("q-9#0", kind="format", rejected="Hm, no.")]
    text = Reader(report(tmp_path, pairs=write_pairs(tmp_path / "pairs", rows))).text
    assert "4 preference pairs" in text
    assert "correctness321.5 at most 25.0 words 15.0 characters7.0 words 21.0 characters" in text
    assert "format111.0 at most 15.0 words 15.0 characters2.0 words 7.0 characters" in text


def test_a_card_shows_what_each_model_answers_to_the_question_of_its_pair(tmp_path):
    answers = [
        answer("SFT", "q-1", "wrong", "9"),
        answer("MPO", "q-1", "correct", "8"),
        answer("MPO", "q-1", "no_answer", None, style="direct"),
    ]
    folder = write_evaluation(tmp_path / "eval", answers=answers)
    rows = [pair("row-7", question_id="q-1")]
    text = Reader(report(tmp_path, pairs=write_pairs(tmp_path / "pairs", rows), gallery_answers=folder)).text
    assert "✗SFT: 9 (wrong)So 9." in text
    assert "✓MPO: 8 (correct)So 8." in text
    assert "no answer" not in text


def test_sections_without_input_are_left_out(tmp_path):
    everything = whole_run(tmp_path)
    assert Reader(report(tmp_path, **everything)).sections == [
        "evaluation",
        "training",
        "verdicts",
        "pairs",
        "gallery",
    ]
    assert Reader(report(tmp_path, training=everything["training"])).sections == ["training"]
    assert Reader(report(tmp_path, verdicts=everything["verdicts"])).sections == ["verdicts"]
    assert Reader(report(tmp_path, pairs=everything["pairs"], gallery=0)).sections == ["pairs"]


def test_the_summary_names_the_sections_and_the_file(tmp_path):
    summary = run(ReportConfig(output=str(tmp_path / "a.html"), training=whole_run(tmp_path)["training"]))
    assert (tmp_path / "a.html").is_file()
    assert summary.rows == [["training", "4 steps"]]
    assert summary.notes == [f"{tmp_path / 'a.html'}: open it in any browser; it needs no network."]
    assert summary.next_command is None


# What the page must not do


def test_hostile_texts_change_no_element_of_the_page(tmp_path):
    for name in ("plain", "hostile"):
        (tmp_path / name).mkdir()
    plain = Reader(report(tmp_path / "plain", **whole_run(tmp_path / "plain")))
    hostile = Reader(report(tmp_path / "hostile", **whole_run(tmp_path / "hostile", HOSTILE)))
    assert "script" not in hostile.tags
    assert {tag for tag in hostile.tags if tag not in plain.tags} == set()
    assert hostile.tags.count("img") == plain.tags.count("img") == 2
    names = {name for _, attributes in hostile.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert names <= {name for _, attributes in plain.elements for name in attributes}
    for text in HOSTILE:
        assert text in hostile.text


def test_names_in_charts_are_neither_markup_nor_tex():
    for text in HOSTILE:
        chart = Reader(charts.verdict_chart({text: {"correct": 1}, "b": {"wrong": 2}}))
        assert charts.label(text) in chart.text
        assert set(chart.tags) <= {"svg", "g", "path", "text", "defs", "use", "clippath", "rect"}


def test_control_characters_and_half_characters_do_not_break_the_page(tmp_path):
    odd = "a\x00b\x1bc\u202ed\ne"
    inputs = whole_run(tmp_path, (odd, odd, odd, odd, odd))
    pairs = write_pairs(tmp_path / "half", [pair("q-8", question="half \ud83d of a character")])
    text = Reader(report(tmp_path, **{**inputs, "pairs": [*inputs["pairs"], *pairs]})).text
    assert "a b c d e" in text
    assert "half ? of a character" in text


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    """No address at all: an inline SVG needs no XML namespace, since the HTML parser knows `<svg>` itself."""
    html = report(tmp_path, **whole_run(tmp_path))
    assert not re.search(r"https?:|//\w|@import|xmlns", re.sub(r"base64,[\w+/=]+", "", html))
    for tag, attributes in Reader(html).elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "form", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))


def test_the_security_policy_allows_inline_styles_and_pictures_and_nothing_else(tmp_path):
    elements = Reader(report(tmp_path, **whole_run(tmp_path))).elements
    policies = [one["content"] for tag, one in elements if one.get("http-equiv") == "Content-Security-Policy"]
    rules = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert policies == [rules]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    everything = whole_run(tmp_path)
    assert report(tmp_path, **everything) == report(tmp_path, **everything)


def test_charts_of_one_page_share_no_id(tmp_path):
    elements = Reader(report(tmp_path, **whole_run(tmp_path))).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {attributes["href"][1:] for tag, attributes in elements if tag == "use"}
    assert used
    assert used <= set(ids)


def test_every_colour_of_a_chart_follows_the_theme(tmp_path):
    html = report(tmp_path, **whole_run(tmp_path))
    for chart in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}", re.sub(r'(href="|url\()#\w+', "", chart))
        for variable in re.findall(r"var\((--[\w-]+)\)", chart):
            assert html.count(f"{variable}: #") == 2  # once for light, once for dark


# Charts


def test_many_sources_are_drawn_as_the_largest_and_the_rest():
    counts = {f"source {n:02d}": {"correct": 100 - n} for n in range(20)}
    text = Reader(charts.verdict_chart(counts)).text
    assert "source 14" in text
    assert "source 15" not in text
    assert "5 more sources" in text
    assert "415 responses" in text  # 85 + 84 + 83 + 82 + 81


def test_a_chart_tells_its_numbers_to_those_who_do_not_see_it():
    chart = charts.accuracy_chart(evaluation(), "direct")
    attributes = Reader(chart).elements[0][1]
    assert attributes["role"] == "img"
    assert attributes["aria-label"] == (
        "Accuracy by kind of question. All questions: SFT 50.4%, MPO 56.2%; read: SFT 50.4%, MPO 56.2%; "
        "sum: SFT 50.4%, MPO 56.2%"
    )


def test_every_model_has_its_own_colour_and_the_first_stays_grey():
    assert charts.model_colors(["a", "b", "c"]) == {"a": charts.BASELINE, "b": charts.BLUE, "c": charts.ORANGE}


# The gallery


def test_the_gallery_takes_kinds_and_sources_in_turn_and_each_question_once():
    picker = GalleryPicker(4)
    for number in range(30):
        picker.add(pair(f"a-{number // 3}#{number}", source="many"))
    picker.add(pair("b-1#0", source="rare"))
    picker.add(pair("c-1#0", kind="format", source="many"))
    picks = picker.picks()
    assert [(pick["kind"], pick["source"]) for pick in picks] == [
        ("correctness", "many"),
        ("format", "many"),
        ("correctness", "rare"),
        ("correctness", "many"),
    ]
    assert len({pick["id"].partition("#")[0] for pick in picks}) == 4


def test_the_gallery_prefers_answered_questions_and_does_not_depend_on_the_order_of_rows():
    rows = [pair(f"q-{number // 4}#{number % 4}") for number in range(400)]
    picked = []
    for stream in (rows, rows[::-1]):
        picker = GalleryPicker(3, answered=["q-50", "q-77"])
        for row in stream:
            picker.add(row)
        picked.append([pick["id"] for pick in picker.picks()])
    assert picked[0] == picked[1]
    assert {name.partition("#")[0] for name in picked[0][:2]} == {"q-50", "q-77"}
    assert len(picked[0]) == 3


def test_what_differs_is_marked_and_a_shared_beginning_is_not():
    chosen, rejected = highlight("5 and 3\ngive 8, so 8 it is", "5 and 3 give 9, so 9 it is")
    assert chosen == '<span class="shared">5 and 3\ngive </span><mark>8,</mark> so <mark>8</mark> it is'
    assert rejected == '<span class="shared">5 and 3\ngive </span><mark>9,</mark> so <mark>9</mark> it is'


def test_chinese_is_compared_by_character():
    assert highlight("图中有三只猫", "图中有两只猫")[1] == '<span class="shared">图中有</span><mark>两</mark>只猫'


def test_responses_with_nothing_in_common_are_left_unmarked():
    assert highlight("It is 8.", "Who <knows>?") == ("It is 8.", "Who &lt;knows&gt;?")


def test_a_difference_after_a_long_shared_beginning_is_still_seen():
    chosen, rejected = highlight("word " * 2000 + "cat", "word " * 2000 + "dog" + " end" * 1000)
    assert chosen.endswith("</span><mark>cat</mark>")
    assert len(chosen) < 700
    assert "<mark>dog end" in rejected
    assert rejected.endswith("… (2,403 more characters)</span>")


def test_pictures_are_scaled_down_to_512_pixels_and_small_ones_marked_as_small(tmp_path):
    whole_run(tmp_path)
    large, small = picture(tmp_path, "large.png"), picture(tmp_path, "small.png")
    assert (large["width"], large["height"], large["small"]) == (512, 256, False)
    assert (small["width"], small["height"], small["small"]) == (16, 16, True)


# What the user is told


def broken_evaluation(tmp_path):
    content = evaluation()
    del content["models"]
    return {"evaluation": write_evaluation(tmp_path / "eval", content)}


def no_percentages(tmp_path):
    content = evaluation()
    content["accuracy"][0]["accuracy"] = 61.2
    return {"evaluation": write_evaluation(tmp_path / "eval", content)}


def style_without_numbers(tmp_path):
    return {"evaluation": write_evaluation(tmp_path / "eval", {**evaluation(), "styles": ["other"]})}


def cut_off_training(tmp_path):
    write_text(tmp_path / "train" / "trainer_state.json", '{"log_history": [')
    return {"training": str(tmp_path / "train")}


def picture_outside(tmp_path):
    return {"pairs": write_pairs(tmp_path / "pairs", [pair(images=["../secret.png"])])}


def empty_stage(tmp_path):
    (tmp_path / "pairs").mkdir()
    return {"pairs": [str(tmp_path / "pairs")]}


@pytest.mark.parametrize(
    ("inputs", "advice"),
    [
        (lambda _: {}, "give at least one of"),
        (lambda path: {"evaluation": str(path / "none")}, "`mpo eval` writes it"),
        (lambda path: {"training": str(path / "none")}, "`mpo train` writes it"),
        (lambda path: {"verdicts": str(path / "none")}, "does not exist"),
        (lambda path: {"pairs": [str(path)], "gallery": -1}, "0 shows none"),
        (lambda path: {"training": str(path), "gallery_answers": str(path)}, "give `pairs` too"),
        (broken_evaluation, "`models` is missing"),
        (no_percentages, r"accuracy.0.accuracy` is 61.2: input should be less than or equal to 1"),
        (style_without_numbers, "no accuracy is given for any of the styles other"),
        (cut_off_training, "was the file cut off"),
        (picture_outside, "outside the image root"),
        (empty_stage, "holds no JSONL shard"),
    ],
)
def test_an_input_that_cannot_be_shown_is_named_with_advice(tmp_path, inputs, advice):
    with pytest.raises(InputError, match=advice):
        report(tmp_path, **inputs(tmp_path))
    assert not (tmp_path / "out").exists()


# In a real browser


@pytest.fixture(scope="module")
def running_browser():
    program = find_browser()
    if program is None:
        reason = "no chromium, chromium-browser or google-chrome on PATH"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}: the report must be looked at in a browser before it ships")
        pytest.skip(reason)
    with open_browser(program) as page:
        yield page


@pytest.fixture
def browser(running_browser):
    running_browser.new_tab()
    return running_browser


def luminance(color):
    red, green, blue = (int(part) for part in re.findall(r"\d+", color)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def test_a_browser_shows_the_page_without_an_error_or_a_request_to_anywhere(tmp_path, browser):
    report(tmp_path, **whole_run(tmp_path, HOSTILE))
    browser.open(tmp_path / "out" / "report.html")
    assert browser.evaluate("[...document.images].map(image => image.naturalWidth)") == [16, 512]
    assert (
        browser.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBBox().width > 100)") == [True] * 4
    )
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.errors() == []
    page, *rest = browser.requests()
    assert page == (tmp_path / "out" / "report.html").as_uri()
    assert len(rest) == 2
    assert all(address.startswith("data:image/png;base64,") for address in rest)


@pytest.mark.parametrize(
    ("media", "scheme", "is_light"), [("screen", "light", True), ("screen", "dark", False), ("print", "dark", True)]
)
def test_page_and_charts_follow_the_theme_of_the_screen_and_print_is_always_light(
    tmp_path, browser, media, scheme, is_light
):
    report(tmp_path, **whole_run(tmp_path))
    browser.open(tmp_path / "out" / "report.html")
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", media=media, features=features)
    ink = browser.evaluate("getComputedStyle(document.body).color")
    names = "[...document.querySelectorAll('svg text')].filter(text => text.style.fill == 'var(--ink)')"
    drawn = browser.evaluate(f"getComputedStyle({names}[0]).fill")
    assert drawn == ink
    assert (luminance(ink) < 0.5) is is_light


@pytest.mark.parametrize(("media", "width"), [("screen", 400), ("screen", 1200), ("print", 700)])
def test_no_word_is_too_long_for_the_page(tmp_path, browser, media, width):
    report(tmp_path, **whole_run(tmp_path, ["w" * 300] * 5))
    browser.call("Emulation.setEmulatedMedia", media=media)
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
    browser.open(tmp_path / "out" / "report.html")
    assert browser.evaluate("document.documentElement.scrollWidth") == width


def test_the_browser_would_have_noticed_a_request_and_an_error(tmp_path, browser):
    html = '<img src="http://127.0.0.1:9/picture.png"><script>missing()</script>'
    write_text(tmp_path / "bad.html", html)
    browser.open(tmp_path / "bad.html")
    assert "http://127.0.0.1:9/picture.png" in browser.requests()
    assert any("Uncaught" in error for error in browser.errors())
