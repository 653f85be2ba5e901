import json
import os
import re
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import find_browser, open_browser
from PIL import Image

from data_builders import judge
from data_builders.records import InputError
from data_builders.shards import write_text
from mpo.pages import charts, drawing
from mpo.pages.data import PairCounts, read_pairs
from mpo.pages.gallery import GalleryPicker, card, picture
from mpo.pages.histograms import bin_edges, binned
from mpo.pages.texts import highlight, visible
from mpo.report import ReportConfig, run

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


def verdict(number, value, source="sum", rule="number"):
    return {"id": f"q-{number}", "question": "?", "answer": "8", "source": source, "response": "8", "prompt": "?",
            "sampler": {}, "verdict": value, "rule": rule}  # fmt: skip


def audit(*, text="plain", source="sum"):
    row = {"id": f"q-1 {text}", "index": 2, "source": source, "images": [], "question": f"{text}?"}
    row |= {"answers": ["8", text], "response": f"So {text}.", "prediction": text}
    row |= {"verdict": "wrong", "rule": f"{text} text"}
    disputed = {**row, "other_verdict": "correct", "other_prediction": f"{text} 8"}
    at = {"source": source, "rule": "number"}
    return {
        "version": 1, "seed": 0, "rows_per_source": 1000,
        "verdicts": [{**at, "correct": 5, "wrong": 3, "no_answer": 0}],
        "disagreements": [
            {**at, "other": "anls", "compared": 100, "differ": 0, "examples": []},
            {**at, "other": f"{text} relaxed", "compared": 100, "differ": 3, "examples": [disputed]},
            {**at, "other": "internvl", "compared": 50, "differ": 30, "examples": [disputed] * 2},
        ],
        "sample": [row, {**row, "verdict": "no_answer", "prediction": None, "judge": {"reply": text, "model": "J"}}],
    }  # fmt: skip


def meta(verdict="correct", prediction="8", **sampler):
    told = {"model": "M", "prompt": "boxed@0123abcd", "temperature": 1.0, "seed": 7, "index": 3, **sampler}
    return {"sampler": told, "finish_reason": "stop", "verdict": verdict, "prediction": prediction, "rule": "number"}


def continued(name="q-5#ntp0", **more):
    chosen, rejected = "The boat lies in the harbour.", "The boat lies at sea."
    ended = {"sampler": {"model": "M"}, "ratio": 0.5, "with_image": False, "prefix_characters": 13}
    row = pair(name, kind="dropout_ntp", answer=None, chosen=chosen, rejected=rejected)
    return {**row, "chosen_meta": {"sampler": {"model": "M"}}, "rejected_meta": ended, **more}


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
    rows[0].update(
        chosen_meta=meta(prediction=two, model=one), rejected_meta={four: three, "sampler": {five: {one: 2}}}
    )
    judged = [verdict(1, "correct", one, f"{two} rule"), verdict(2, "wrong", three)]
    write_rows(tmp_path / "verdicts" / "00000.jsonl", judged)
    write_json(tmp_path / "verdicts" / "audit.json", audit(text=four, source=five))
    write_rows(tmp_path / "pairs" / "dropped" / "00000.jsonl", [{"id": "q-4", "reason": f"{five} reason"}])
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


def test_verdicts_are_counted_by_the_rule_that_decided(tmp_path):
    rows = [verdict(n, "correct") for n in range(3)] + [verdict(9, "wrong"), verdict(3, "no_answer", rule="extract")]
    write_rows(tmp_path / "verdicts" / "00000.jsonl", rows)
    text = Reader(report(tmp_path, verdicts=str(tmp_path / "verdicts"))).text
    assert "Share correct number431075.0% extract10010.0%" in text


def test_the_rarest_of_many_rules_are_counted_together(tmp_path):
    rows = [verdict(n, "correct", rule=f"rule {n:02d}") for n in range(25)]
    write_rows(tmp_path / "verdicts" / "00000.jsonl", rows)
    text = Reader(report(tmp_path, verdicts=str(tmp_path / "verdicts"))).text
    assert "rule 19110" in text
    assert "rule 20" not in text
    assert "5 more5500100.0%" in text


def write_verdicts(folder, audit):
    write_rows(folder / "00000.jsonl", [verdict(1, "correct")])
    write_json(folder / "audit.json", audit)
    return str(folder)


def test_the_audit_says_how_often_rules_disagree_the_worst_first(tmp_path):
    text = Reader(report(tmp_path, verdicts=write_verdicts(tmp_path / "verdicts", audit()))).text
    assert "in 33 of 250 comparisons (13.2%) the verdicts differ" in text
    first, second = (
        "number decided, internvl differs 30 of 50, 60.0%",
        "number decided, plain relaxed differs 3 of 100",
    )
    assert 0 < text.index(first) < text.index(second)
    assert "1 pair of rules never disagreed." in text
    assert "anls" not in text
    assert "No answer sumnumber530" in text


def test_a_disputed_response_stands_with_both_verdicts_and_what_they_are_based_on(tmp_path):
    text = Reader(report(tmp_path, verdicts=write_verdicts(tmp_path / "verdicts", audit()))).text
    assert "plain? Reference answer: 8 | plain So plain. wrong by plain text, from plain correct by internvl, " in text
    assert "by internvl, from plain 8" in text


def test_the_random_sample_is_shown_by_source_with_the_judges_words(tmp_path):
    text = Reader(report(tmp_path, verdicts=write_verdicts(tmp_path / "verdicts", audit(source="")))).text
    sample = text[text.index("A random sample to read") :]
    assert "(no source) 2 responses" in sample
    assert "no answer by plain text judge, reply: plain judge, model: J" in sample


def test_an_audit_of_a_single_rule_says_that_nobody_else_was_asked(tmp_path):
    content = {**audit(), "disagreements": [], "sample": []}
    text = Reader(report(tmp_path, verdicts=write_verdicts(tmp_path / "verdicts", content))).text
    assert "No other rule was asked." in text
    assert "A random sample" not in text


def test_the_report_reads_the_audit_that_judge_writes(tmp_path):
    row = {"id": "q", "question": "?", "answer": "1,000", "source": "count", "prompt": "?", "sampler": {}}
    texts = ("Final answer: 1000", "Final answer: 960", "I cannot see how many there are in such a dark picture.")
    write_rows(tmp_path / "responses.jsonl", [{**row, "response": text} for text in texts])
    judge.run(judge.JudgeConfig(responses=str(tmp_path / "responses.jsonl"), output=str(tmp_path / "verdicts")))
    text = Reader(report(tmp_path, verdicts=str(tmp_path / "verdicts"))).text
    assert "count: number decided, relaxed differs 1 of 2, 50.0%" in text
    assert "wrong by number, from 960 correct by relaxed, from 960" in text
    assert "count 3 responses" in text


def test_pairs_are_counted_and_measured_by_kind(tmp_path):
    rows = [pair("q-1#0"), pair("q-1#1"), pair("q-2#0"), pair("q-9#0", kind="format", rejected="Hm, no.")]
    text = Reader(report(tmp_path, pairs=write_pairs(tmp_path / "pairs", rows))).text
    assert "4 preference pairs of 3 questions from 1 source. The chosen response is the longer one in 25.0%" in text
    assert "correctness321.5 at most 25.0 words 15.0 characters7.0 words 21.0 characters0.0%" in text
    assert "format111.0 at most 15.0 words 15.0 characters2.0 words 7.0 characters100.0%" in text


def test_pairs_alone_make_a_page_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), "red").save("small.png")
    run(ReportConfig(pairs=write_pairs(Path("pairs"), [pair(images=["small.png"]), continued()])))
    page = Reader(Path("report.html").read_text(encoding="utf-8"))
    assert page.sections == ["pairs", "gallery"]
    assert "2 preference pairs of 2 questions" in page.text
    assert page.tags.count("img") == 1
    assert page.tags.count("article") == 2


def test_lengths_are_drawn_for_both_sides_of_each_kind_in_words_and_characters(tmp_path):
    rows = [pair("a#0"), pair("b#0", chosen="one two three", rejected="no"), continued()]
    elements = Reader(report(tmp_path, pairs=write_pairs(tmp_path / "pairs", rows))).elements
    said = [attributes["aria-label"] for tag, attributes in elements if tag == "svg"]
    assert said[:4] == [
        "Histogram. chosen, in words: median 3, 90% between 3 and 5; "
        "rejected, in words: median 1, 90% between 1 and 7.",
        "Histogram. chosen, in characters: median 13, 90% between 13 and 15; "
        "rejected, in characters: median 2, 90% between 2 and 21.",
        "Histogram. chosen, in words: median 6, 90% between 6 and 6; "
        "rejected, in words: median 5, 90% between 5 and 5.",
        "Histogram. chosen, in characters: median 29, 90% between 29 and 29; "
        "rejected, in characters: median 21, 90% between 21 and 21.",
    ]
    assert said[4] == "Histogram. questions, in pairs of a question: median 1, 90% between 1 and 1."
    assert said[5] == "Kinds of pairs by source. sum: 2 correctness, 1 dropout_ntp"


def test_pairs_of_a_question_are_counted_over_kinds_and_folders(tmp_path):
    one = write_pairs(tmp_path / "one", [pair("q-1#0"), pair("q-2#0")])
    two = write_pairs(tmp_path / "two", [pair("q-1#9", kind="format"), pair("q-1#10", kind="format")])
    text = Reader(report(tmp_path, pairs=[*one, *two])).text
    assert "4 preference pairs of 2 questions" in text
    assert "share of questions median 1, 90% between 1 and 3 pairs" in text


def test_verdicts_are_taken_from_the_pairs_where_no_others_are_given(tmp_path):
    judged = {"chosen_meta": meta(), "rejected_meta": meta("no_answer", None)}
    rows = [pair("a#0", **judged), pair("b#0", source="read", **judged), continued()]
    inputs = {"pairs": write_pairs(tmp_path / "pairs", rows)}
    html = report(tmp_path, **inputs)
    assert "Verdicts by source. read: 1 correct, 1 no_answer; sum: 1 correct, 1 no_answer" in html
    assert "correct 2, 50.0%" in Reader(html).text
    write_rows(tmp_path / "verdicts" / "00000.jsonl", [verdict(1, "wrong")])
    html = report(tmp_path, verdicts=str(tmp_path / "verdicts"), **inputs)
    assert "Verdicts by source. sum: 1 wrong" in html
    assert "Verdicts by source. read" not in html


def test_pairs_that_nobody_judged_have_no_verdicts(tmp_path):
    html = report(tmp_path, pairs=write_pairs(tmp_path / "pairs", [pair(), continued()]))
    assert "Verdicts" not in html


def test_what_was_left_out_on_the_way_stands_with_its_reason(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", [pair()])
    reasons = ["only correct responses", "no correct response", "only correct responses"]
    write_rows(tmp_path / "pairs" / "dropped" / "00000.jsonl", [{"id": "q", "reason": reason} for reason in reasons])
    text = Reader(report(tmp_path, pairs=pairs)).text
    assert "Left out on the way: pairs 2 only correct responses, 1 no correct response." in text


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
        "audit",
        "pairs",
        "gallery",
    ]
    assert Reader(report(tmp_path, training=everything["training"])).sections == ["training"]
    assert Reader(report(tmp_path, verdicts=everything["verdicts"])).sections == ["verdicts", "audit"]
    (tmp_path / "verdicts" / "audit.json").unlink()
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
        assert drawing.label(text) in chart.text
        assert set(chart.tags) <= {"svg", "g", "path", "text", "defs", "use", "clippath", "rect"}


def test_control_characters_and_half_characters_do_not_break_the_page(tmp_path):
    odd = "a\x00b\x1bc\u202ed\ne"
    inputs = whole_run(tmp_path, (odd, odd, odd, odd, odd))
    pairs = write_pairs(tmp_path / "half", [pair("q-8", question="half \ud83d of a character")])
    text = Reader(report(tmp_path, **{**inputs, "pairs": [*inputs["pairs"], *pairs]})).text
    assert "a b c d e" in text
    assert "half \ufffd of a character" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("in\u202evisible", "in[U+202E]visible"),
        ("\u2066isolated\u2069", "[U+2066]isolated[U+2069]"),
        ("zero\u200bwidth", "zero[U+200B]width"),
        ("\x00\x1b\x7f\x85", "\u2400\u241b[U+007F][U+0085]"),
        ("\ud83d and \udc00", "\ufffd and \ufffd"),
        ("hidden\U000e0068\U000e0069", "hidden[U+E0068][U+E0069]"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u56fe \U0001f600\u200d\U0001f525", None),
    ],
)
def test_no_character_of_a_text_is_unseen_or_moves_others(text, shown):
    assert visible(text) == (text if shown is None else shown)


def test_marks_that_reorder_text_reach_no_part_of_the_page(tmp_path):
    for odd in ("evil\u202etxt", "\u2067x", "tag\U000e0041"):
        page = report(tmp_path, **whole_run(tmp_path, [odd] * 5))
        assert not re.search("[\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]", page)
        assert visible(odd) in page


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


def test_a_histogram_has_as_many_bars_as_can_be_told_apart():
    assert bin_edges([{5: 3}]) == [4.5 + number for number in range(13)]
    edges = bin_edges([{100: 1, 1000: 1}, {300: 1}])
    assert (edges[0], edges[-1], edges[1] - edges[0], len(edges)) == (99.5, 1049.5, 50, 20)


def test_a_few_outliers_do_not_squeeze_a_histogram_and_are_counted_in_its_last_bar():
    lengths = {10: 500, 12: 499, 100_000: 1}
    edges = bin_edges([lengths])
    assert edges[-1] == 21.5
    assert binned(lengths, edges)[:3] == [0.5, 0.0, 0.499]
    assert binned(lengths, edges)[-1] == 0.001


def test_a_chart_tells_its_numbers_to_those_who_do_not_see_it():
    chart = charts.accuracy_chart(evaluation(), "direct")
    attributes = Reader(chart).elements[0][1]
    assert attributes["role"] == "img"
    assert attributes["aria-label"] == (
        "Accuracy by kind of question. All questions: SFT 50.4%, MPO 56.2%; read: SFT 50.4%, MPO 56.2%; "
        "sum: SFT 50.4%, MPO 56.2%"
    )


def test_every_model_has_its_own_colour_and_the_first_stays_grey():
    assert charts.model_colors(["a", "b", "c"]) == {"a": drawing.BASELINE, "b": drawing.BLUE, "c": drawing.ORANGE}


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


def test_the_gallery_picks_the_same_of_more_sources_than_it_shows_in_any_order():
    rows = [pair(f"q-{number}#0", source=f"source {number:04d}") for number in range(2000)]
    picked = []
    for stream in (rows, rows[::-1], rows[::2] + rows[1::2]):
        picker = GalleryPicker(3)
        for row in stream:
            picker.add(row)
        picked.append([pick["source"] for pick in picker.picks()])
    assert picked == [["source 0000", "source 0001", "source 0002"]] * 3


def texts_in_memory(take, num_sources):
    """The most bytes that are held at any time while 3,000 pairs of 3,000 characters are taken in."""
    tracemalloc.start()
    for number in range(3000):
        text = f"{number:04d} " * 300
        source = f"source {number % num_sources:04d}"
        take(pair(f"q-{number}#0", source=source, chosen=text, rejected=text[::-1]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("num_sources", [1, 50, 3000])
def test_the_gallery_keeps_few_pairs_however_many_there_are(num_sources):
    picker = GalleryPicker(2)
    assert texts_in_memory(picker.add, num_sources) < 300_000  # of 9,000,000
    assert len(picker.picks()) == 2


def test_pairs_are_counted_and_not_kept():
    counts = PairCounts()
    assert texts_in_memory(counts.add, 1) < 300_000  # of 9,000,000
    assert counts.section()["num"] == 3000


def test_a_card_says_where_both_responses_come_from(tmp_path):
    row = pair(chosen_meta=meta(), rejected_meta=meta("wrong", "9", index=4) | {"judge": {"model": "J"}})
    assert card(row, {}, [], tmp_path)["provenance"] == [
        ("model", "M", "M"),
        ("prompt", "boxed@0123abcd", "boxed@0123abcd"),
        ("temperature", "1.0", "1.0"),
        ("seed", "7", "7"),
        ("index", "3", "4"),
        ("finish reason", "stop", "stop"),
        ("verdict", "correct", "wrong"),
        ("prediction", "8", "9"),
        ("rule", "number", "number"),
        ("judge: model", "–", "J"),
    ]
    html = report(tmp_path, pairs=write_pairs(tmp_path / "pairs", [row]))
    assert "Asked asWhat is the sum? Think." in Reader(html).text
    assert ("details", {}) in Reader(html).elements
    assert '<td colspan="2" dir="auto">boxed@0123abcd</td>' in html


def test_a_pair_of_which_nothing_is_known_has_nothing_to_open(tmp_path):
    row = pair(prompt="What is the sum?")
    assert "details" not in Reader(report(tmp_path, pairs=write_pairs(tmp_path / "pairs", [row]))).tags


def test_at_most_six_pictures_of_a_pair_are_shown(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "small.png")
    html = report(tmp_path, pairs=write_pairs(tmp_path / "pairs", [pair(images=["small.png"] * 9)]))
    assert html.count("<img") == 6
    assert "and 3 more" in html


def test_what_a_continuation_was_given_is_set_off_from_what_it_says(tmp_path):
    html = report(tmp_path, pairs=write_pairs(tmp_path / "pairs", [continued()]))
    assert '<span class="kept">The boat lies</span> <mark>in the harbour.</mark>' in html
    assert '<span class="kept">The boat lies</span> <mark>at sea.</mark>' in html
    assert "the first 13 characters of the chosen response" in html


def test_a_continuation_that_starts_alike_is_compared_after_the_cut():
    chosen, rejected = highlight("图中有三只猫在睡", "图中有三只狗在跑", kept=3)
    assert chosen == '<span class="kept">图中有</span>三只<mark>猫</mark>在<mark>睡</mark>'
    assert rejected == '<span class="kept">图中有</span>三只<mark>狗</mark>在<mark>跑</mark>'


@pytest.mark.parametrize("kept", [29, 1000, -3, "13", None])
def test_a_wrong_count_of_kept_characters_does_not_break_a_card(tmp_path, kept):
    row = continued(rejected_meta={"prefix_characters": kept})
    assert "<mark>" in card(row, {}, [], tmp_path)["chosen"]


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


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("x " * 900, "x y " * 450),
        ("哈" * 2000, "哈呵" * 1000),
        ("一二二" * 600, "一一二" * 600),
        ("a" * 5_000_000, "b" * 5_000_000),
        ("word " * 1_000_000 + "cat", "word " * 1_000_000 + "dog"),
        ("<" * 100_000, "&" * 100_000),
        (" " * 1_000_000 + "a", "\n" * 1_000_000 + "b"),
        ("\u202e" * 100_000, "\ud800" * 100_000),
    ],
    ids=lambda text: text[:3].encode(errors="replace").decode(),
)
def test_a_hostile_response_costs_next_to_nothing_and_fills_no_page(chosen, rejected):
    start = time.perf_counter()
    shown = highlight(chosen, rejected)
    assert time.perf_counter() - start < 1.5
    assert max(map(len, shown)) < 30_000


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


def broken_audit(tmp_path):
    return {"verdicts": write_verdicts(tmp_path / "verdicts", {**audit(), "verdicts": [{"source": "sum"}]})}


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
        (broken_audit, "audit.json: `verdicts.0.rule` is missing"),
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
    widths = browser.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBBox().width)")
    assert len(widths) == 5 + 2 * 3 + 2  # of the run, lengths of three kinds of pairs, pairs per question and source
    assert min(widths) > 100
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
    browser.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
    assert browser.evaluate("document.documentElement.scrollWidth") == width


def test_a_click_shows_where_a_pair_comes_from(tmp_path, browser):
    row = pair(chosen_meta=meta(), rejected_meta=meta("wrong", "9"))
    report(tmp_path, pairs=write_pairs(tmp_path / "pairs", [row]))
    browser.open(tmp_path / "out" / "report.html")
    shown = "document.querySelector('.origin').checkVisibility()"
    assert browser.evaluate(shown) is False
    x, y = browser.evaluate(
        "(() => { const s = document.querySelector('summary'); s.scrollIntoView();"
        " const box = s.getBoundingClientRect(); return [box.x + 20, box.y + box.height / 2] })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert browser.evaluate(shown) is True
    assert "boxed@0123abcd" in browser.evaluate("document.querySelector('.origin').innerText")


def test_a_text_written_backwards_is_shown_forwards(tmp_path, browser):
    report(tmp_path, pairs=write_pairs(tmp_path / "pairs", [pair(chosen="It is \u202e8 no 9\u202c, surely.")]))
    browser.open(tmp_path / "out" / "report.html")
    text = browser.evaluate("document.querySelector('.chosen .text').innerText")
    assert text == "It is [U+202E]8 no 9[U+202C], surely."


def test_the_browser_would_have_noticed_a_request_and_an_error(tmp_path, browser):
    html = '<img src="http://127.0.0.1:9/picture.png"><script>missing()</script>'
    write_text(tmp_path / "bad.html", html)
    browser.open(tmp_path / "bad.html")
    assert "http://127.0.0.1:9/picture.png" in browser.requests()
    assert any("Uncaught" in error for error in browser.errors())


def test_a_folder_without_pairs_beside_one_with_pairs_is_no_fault(tmp_path: Path) -> None:
    write_rows(tmp_path / "empty" / "00000.jsonl", [])
    with pytest.raises(InputError, match="holds no row"):
        list(read_pairs([str(tmp_path / "empty")]))
    pair = {"id": "q#0", "prompt": "?", "chosen": "a", "rejected": "b", "kind": "format"}
    write_rows(tmp_path / "pairs" / "00000.jsonl", [pair])
    assert [row["id"] for row in read_pairs([str(tmp_path / "empty"), str(tmp_path / "pairs")])] == ["q#0"]
