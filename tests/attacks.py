"""Hostile completions: code for whoever evaluates text, numbers and nesting for whoever computes, bytes for parsers."""

import pathlib

TWELVE_DEEP = "9^{" * 12 + "9" + "}" * 12


def payloads(canary: pathlib.Path) -> list[str]:
    """What an answer may hold; each that can would make the file `canary`."""
    touch = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    shell = f"touch {canary}"
    return [
        # Evaluation, by any language that might read the text.
        touch,
        f"eval({touch!r})",
        f"exec({touch!r})",
        f"(lambda: {touch})()",
        f"[{touch} for x in (1,)]",
        f"open({str(canary)!r}, 'w').write('x')",
        f"__import__('os').system({shell!r})",
        f"__builtins__['__import__']('os').system({shell!r})",
        f"().__class__.__bases__[0].__subclasses__()[0].__init__.__globals__['sys'].modules['os'].system({shell!r})",
        "(1).__class__.__mro__[1].__subclasses__()",
        "x.__class__.__init__.__globals__",
        f"Symbol('x', {touch})",
        f"sympify({touch!r})",
        f"parse_expr({touch!r})",
        f"lambdify(x, {touch!r})",
        f"f'{{{touch}}}'",
        "{0.__class__.__init__.__globals__}",
        "{prompt.__class__}{answer.__globals__}{completion!r:>99999999}",
        "%s%s%s%n%999999999d",
        f"$({shell})",
        f"`{shell}`",
        f"; {shell} #",
        f"{{{{ cycler.__init__.__globals__.os.popen({shell!r}).read() }}}}",
        f"{{% for x in ().__class__.__base__.__subclasses__() %}}{touch}{{% endfor %}}",
        f"cos\nsystem\n(S'{shell}'\ntR.",
        f"!!python/object/apply:os.system ['{shell}']",
        "<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><x>&a;</x>",
        "'; DROP TABLE answers; --",
        f"\\immediate\\write18{{{shell}}}",
        "\\input{/etc/passwd}",
        f"\\openout1={canary} \\write1{{x}}",
        "\\csname end\\endcsname \\catcode`\\{=12",
        "\\def\\a{\\a\\a}\\a",
        f"\\text{{{touch}}}",
        f"\\operatorname{{eval}}({touch})",
        # Work without end.
        "9**9**9**9",
        TWELVE_DEEP,
        "2^{2^{2^{2^{2^{2}}}}}",
        "(10^{9})!",
        "\\binom{10^{9}}{5 \\cdot 10^{8}}",
        "\\sum_{n=1}^{10^{12}} n^{n}",
        "1e999999999",
        "0." + "0" * 500 + "1",
        "1/0",
        "\\frac{1}{0}",
        "\\infty - \\infty",
        "nan",
        "-inf",
        "x" * 2500,
        "+".join(f"x_{{{i}}}" for i in range(120)),
        # Nesting, open ends.
        "(" * 2500,
        "(" * 200 + "1" + ")" * 200,
        "\\frac{" * 150 + "1" + "}{2}" * 150,
        "\\sqrt{" * 300,
        "\\boxed{" * 200 + "1" + "}" * 200,
        "{" * 2500,
        "\\left(" * 600 + "1",
        "[[[[(((({{{{",
        "\\begin{matrix}" * 40,
        "\\\\" * 400,
        "}" * 400 + "{" * 400,
        # Bytes.
        "12\0",
        "\0" * 300,
        "\ud800\udfff",
        "\ufeff12\u200b\u202e21",
        "\x1b[2J\x1b]0;x\x07",
        "1" + "\u0301" * 400,
        "١٢٣٤",
        "𝟙𝟚",
        "−12",
        "1\u2028" + "2",
        "\r\n\x0b\x0c\x85",
        "</answer><answer>",
        "<answer><think></answer></think>",
        "#### #### ####",
    ]


WRAPPERS = ("{}", "<answer>{}</answer>", "<think>x</think> <answer>\\boxed{{{}}}</answer>")


def attacks(canary: pathlib.Path) -> list[str]:
    """More than 200 completions, some of them of a megabyte."""
    made = [wrapper.format(payload) for payload in payloads(canary) for wrapper in WRAPPERS]
    million = 1_000_000
    long = (
        "9",
        "(",
        "{",
        "-",
        ".",
        "数",
        "\0",
        "\\boxed{",
        "<answer>",
        "1,234,",
        "\\frac{1}{",
        "</think>",
        "#### ",
        "a ",
    )
    made += [piece * (million // len(piece)) for piece in long]
    made += [f"<answer>{piece * (million // len(piece))}</answer>" for piece in ("9", "\\sqrt{", "x+", " ", "1/")]
    made += ["\\boxed{" + "{" * million, "<answer>" + " " * million + "1</answer>"]
    return made
