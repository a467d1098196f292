"""A pipe gets plain lines, a terminal a live one, and model output gets neither colours nor commands through."""

import io

from grpo_jax.terminal import Terminal, visible


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(terminal: Terminal, steps: int = 25) -> None:
    with terminal:
        terminal.announce(16, 8, steps)
        for step in range(1, steps + 1):
            terminal.step(step, steps, {"reward/total": step / 100, "solve_rate": 0.5, "kl": None})
        scores = {"pass@1": 0.25, "pass@1_ci95": [0.2, 0.3], "format": 0.5, "mean_length": 20.0}
        terminal.before_after_table(scores, scores | {"pass@1": 0.875})


def test_a_pipe_gets_plain_lines():
    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(out, err, every=10)
    run(terminal)
    terminal.warn("pass@1 fell")
    lines = out.getvalue().splitlines()
    assert lines[0] == "16 prompts x 8 = 128 completions a step, 25 steps"
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/25", "10/25", "20/25", "25/25"]
    assert "step 20/25  reward 0.200  solved 50%" in lines
    assert any("25.0% [20.0%, 30.0%]" in line and "87.5%" in line for line in lines)
    assert "\x1b" not in out.getvalue()
    assert err.getvalue() == "warning: pass@1 fell\n"


def test_a_notebook_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as its kernel does
    out = io.StringIO()
    run(Terminal(out, io.StringIO()))
    assert "step 20/25  reward 0.200  solved 50%" in out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_a_live_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Tty()
    terminal = Terminal(out, io.StringIO(), every=10)
    run(terminal)
    assert "25/25" in out.getvalue()
    assert "\x1b[2K" in out.getvalue(), "the line is rewritten in place"
    assert out.getvalue().count("\n") < 20


def test_model_output_is_text_only(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Tty()
    attack = "[red]5[/red] \x1b]0;title\x07\x1b[2J\u202e[/nothing]\r\n6"
    Terminal(out).samples([{"step": 3, "prompt": "2+3=", "completion": attack, "total": 0.0, "answer": "5"}])
    text = out.getvalue()
    assert "[red]5[/red] \\x1b]0;title\\x07\\x1b[2J\\u202e[/nothing]\\r" in text
    assert "\x1b]" not in text and "\x1b[2J" not in text and "\r" not in text
    assert visible("tab\tkeeps é") == "tab\tkeeps é"


def test_an_ascii_pipe_does_not_end_the_run():
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as out:
        terminal = Terminal(out)
        terminal.samples([{"prompt": "é", "completion": "✓", "total": 1.0}])
        terminal.parameter_table([("layers/query", (2, 3), "float32", "- x fsdp"), ("scale", (), "float32", "")])
        out.flush()
        lines = raw.getvalue().decode("ascii").splitlines()
    assert "  completion  \\u2713" in lines
    told = [line.replace("|", " ").split() for line in lines]
    assert ["total", "7"] in told
    assert ["layers/query", "2x3", "float32", "6", "-", "x", "fsdp"] in told
    assert ["scale", "scalar", "float32", "1", "copied"] in told


def test_compiling_says_what_and_how_long():
    out = io.StringIO()
    with Terminal(out).compiling("the step"):
        assert out.getvalue() == "compiling the step ...\n"
    assert out.getvalue().splitlines()[1].startswith("compiled the step in 0.")
