"""The report shows what the files hold, needs nothing from outside, and gives hostile completions no chance."""

import base64
import html.parser
import json
import pathlib
import re

import pytest

from grpo_jax.errors import InputError
from grpo_jax.report import CHARTS, write_report

ATTACK = (
    "</td><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)> \x1b[2J\u202e & 'quoted' \"q\""
)


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside them."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "col", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags must nest"

    def handle_data(self, data: str) -> None:
        self.text += data

    def charts(self) -> dict[str, str]:
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                kind, content = str(attributes["src"]).split(",", 1)
                assert kind == "data:image/svg+xml;base64"
                found[str(attributes["alt"]).removesuffix(" by step")] = base64.b64decode(content).decode()
        return found


def write_run(folder: pathlib.Path, metrics: list[dict], samples: list[dict] = [], **files: dict) -> Page:  # noqa: B006
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Page(write_report(folder))


def sample(step: int, completion: str = "5", **fields: object) -> dict:
    rewards = {"answer": 1.0, "format": 0.0}
    row = {"step": step, "draw": 0, "prompt": "2+3=", "completion": completion, "answer": "5", "rewards": rewards}
    return row | {"total": 1.0, "advantage": 0.5, "length": 7, "ended": True} | fields


def test_hostile_text_stays_text(tmp_path):
    rewards = {"<script>r": 1.0}
    row = sample(1, ATTACK, prompt=ATTACK, answer=ATTACK, rewards=rewards)
    page = write_run(
        tmp_path, [{"step": 1, "solve_rate": 0.5}], [row], config={"x": ATTACK}, summary={"device": ATTACK}
    )
    assert page.open == []
    assert not {"script", "iframe", "link", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert {"src", "href", "srcset", "action"} & set(attributes) <= {"src"} if tag == "img" else True
    shown = ATTACK.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert page.text.count(shown) == 4
    assert "<script>r" in page.text


def test_nothing_is_requested_from_outside(tmp_path):
    page = write_run(tmp_path, [{"step": s, "reward/total": s / 9} for s in range(40)], [sample(1)])
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)[^"'\s>]+""", text) == []
    assert "url(" not in text and "@import" not in text
    policies = [attributes for tag, attributes in page.tags if "http-equiv" in attributes]
    assert policies[0]["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_chart_for_each_series_that_exists(tmp_path):
    metrics = [{"step": 1, "solve_rate": None, "reward/total": 0.5, "reward/a$b_c$": 0.25, "length/right": None}]
    metrics += [{"step": 2, "solve_rate": 0.75, "kl": 0.0, "length/right": None, "eval/pass@1": 0.5}]
    charts = write_run(tmp_path, metrics).charts()
    assert set(charts) == {"Reward", "Solve rate", "KL", "Held-out problems"}
    assert all(chart.lstrip().startswith("<?xml") and "</svg>" in chart for chart in charts.values())


def test_every_metric_of_the_trainer_has_its_chart(tmp_path):
    names = (
        "reward/total reward/answer solve_rate groups/all_right groups/all_wrong advantage/mean_abs grad_norm kl "
        "entropy clip/low clip/high length/mean length/right length/wrong truncated sampler_gap/max sampler_gap/mean "
        "loss sft/loss lr skipped seconds/step seconds/rewards tokens_per_second eval/pass@1 eval/lenient eval/format "
        "eval/length eval/greedy eval/majority eval/reflective_words eval/language distill/kl set_reward/a "
        "eval_reward/a set_solve_rate/a set_length/a set_share/a"
    ).split()
    drawn = [pattern for _, _, patterns, _ in CHARTS for pattern, _ in patterns]
    patterns = [re.sub("^reward/answer$", "reward/*", re.sub("/a$", "/*", name)) for name in names]
    assert sorted(patterns) == sorted(drawn)
    metrics = [{"step": step} | {name: step / 10 for name in names} for step in (1, 2)]
    assert list(write_run(tmp_path, metrics).charts()) == [title for title, _, _, _ in CHARTS]


def test_points_are_drawn_where_the_numbers_are(tmp_path):
    values = [0.0, 1.0, 0.5]
    metrics = [{"step": step, "solve_rate": value} for step, value in zip((10, 20, 40), values, strict=True)]
    svg = write_run(tmp_path, metrics).charts()["Solve rate"]
    markers = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: #0b5fa5', svg)
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in markers]
    assert (x2 - x1) / (x1 - x0) == pytest.approx(2, abs=1e-3)
    assert (y2 - y0) / (y1 - y0) == pytest.approx(0.5, abs=1e-3)
    assert y1 < y0, "up is more"


def test_scores_before_and_after(tmp_path):
    before = {"pass@1": 0.423, "pass@1_ci95": [0.39, 0.45], "format": 0.61, "mean_length": 22.25, "majority": 0.7}
    after = {"pass@1": 0.971, "pass@1_ci95": [0.955, 0.983], "format": 1.0, "mean_length": 19.7}
    summary = {"before": before, "after": after, "seconds_total": 263.2, "seed": 3}
    text = write_run(tmp_path, [{"step": 12}], summary=summary).text
    for shown in ("42.3% 39.0% to 45.0%", "97.1% 95.5% to 98.3%", "61.0%", "22.2", "19.7", "4 min 23 s", "seed 3"):
        assert shown in text
    assert "greedy" not in text, "what neither side has is left out"
    assert "not finished" not in text


def test_rewards_are_coloured_by_what_they_earned(tmp_path):
    rows = [sample(1, "good", total=1.2), sample(1, "some", total=0.2), sample(1, "bad", total=-1.0)]
    rows += [sample(1, "unknown", total=None, rewards={"answer": None})]
    page = write_run(tmp_path, [{"step": 1}], rows)
    classes = [str(a["class"]).split() for t, a in page.tags if t == "div" and "total" in str(a.get("class"))]
    assert [c[1] for c in classes] == ["good", "some", "bad", "none"]


def test_a_running_or_torn_run_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    page = Page(write_report(tmp_path))
    assert "1 steps" in page.text
    assert "not finished" in page.text
    assert set(page.charts()) == {"Loss"}


def test_long_runs_make_small_reports(tmp_path):
    write_run(tmp_path, [{"step": step, "loss": (step * 7919 % 1000) / 1000} for step in range(20_000)])
    assert (tmp_path / "report.html").stat().st_size < 150_000


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json: is not JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
