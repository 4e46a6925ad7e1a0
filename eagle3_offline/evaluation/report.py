"""One self-contained page about a run: curves, three decoded answers, and where seconds and bytes went."""

# ruff: noqa: E501 - lines of HTML read better whole

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import Any

from ..runs import read_json, read_jsonl, write_text

SHOWN_ANSWERS = 3

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #e3e8ee; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.tau { font-size: 2.2rem; font-weight: 600; } .note { color: #55616e; } .warn { background: #fff4d6; padding: .5rem .8rem; border-radius: 6px; }
.answer { background: #f6f8fa; padding: .8rem; border-radius: 6px; white-space: pre-wrap; font: 14px/1.6 ui-monospace, monospace; overflow-wrap: anywhere; }
.hit { background: #b9ecc6; } .miss { background: #ffd3cf; text-decoration: line-through; color: #8a2f27; } .bonus { background: #d8e6ff; }
.ok { color: #14733a; } .bad { color: #b3261e; font-weight: 600; } svg { max-width: 100%; height: auto; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; } .curves > div { flex: 1 1 24rem; }
"""


def write_report(path: Path, report: dict[str, Any], draft_folder: Path) -> None:
    """Write the page of a report.json. draft_folder holds metrics.csv, held_out.jsonl, decoded.json and export/."""
    sections = [_head(report), _checks(report), _tau_table(report), _curves(draft_folder, report), _answers(draft_folder), _stages(report)]
    body = "\n".join(sections)
    title = f"eagle3_offline: {html.escape(report['recipe'])}"
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>\n<body>\n{body}\n</body></html>\n',
    )


def _head(report: dict[str, Any]) -> str:
    decoded = report["decoded"]
    tiny = (
        '<p class="warn">The target is a toy that was trained here in two minutes and memorises its data: '
        "these figures prove the plumbing only, not how good a draft can be.</p>"
        if report["target"] == "tiny"
        else ""
    )
    return f"""<h1>A draft for {html.escape(report["target"])}</h1>{tiny}
<p><span class="tau">{decoded["tau"]:.2f}</span> tokens per verification step, decoded on {decoded["answers"]} held-out prompts
({decoded["answer_tokens"]:,} tokens, chain of {report["held_out"]["chain"]}, greedy, fp32). Wall clock against plain decoding in the same run:
<b>{decoded["speedup"]:.2f}x</b> ({decoded["plain_seconds"]:.0f} s plain, {decoded["speculative_seconds"]:.0f} s speculative).</p>"""


def _checks(report: dict[str, Any]) -> str:
    rows = [
        (
            html.escape(c["check"]),
            f"{c['value']:.4g}",
            html.escape(c["demanded"]),
            '<span class="ok">holds</span>' if c["holds"] else '<span class="bad">FAILS</span>',
        )
        for c in report["checks"]
    ]
    return "<h2>Checks</h2>" + _table(("check", "value", "demanded", ""), rows, numbers={1})


def _tau_table(report: dict[str, Any]) -> str:
    held, decoded = report["held_out"], report["decoded"]
    rows = [
        ("draft, walk", held["answers"], held["tau"]),
        ("draft, mean over all rows (biased upwards)", held["answers"], held["tau_all_rows"]),
        ("draft, untrained", "", report["untrained_tau"]),
        ("n-gram lookup", held["answers"], held["ngram_tau"]),
        ("draft, decoded in fp32", decoded["answers"], decoded["tau"]),
        ("draft, walk over the same fp32 answers", decoded["answers"], decoded["walk_tau"]),
        ("n-gram lookup on the same answers", decoded["answers"], decoded["ngram_tau"]),
    ]
    table = _table(("accept length", "answers", "tau"), [(name, str(n), _number(tau)) for name, n, tau in rows], numbers={1, 2})
    depth = [
        (str(k + 1), *(_number(held[name][k]) for name in ("conditional_acceptance", "alpha", "kl"))) for k in range(len(held["alpha"]))
    ]
    per_step = _table(("drafted token", "accepted if reached", "alpha", "KL"), depth, numbers={0, 1, 2, 3})
    note = f'<p class="note">First-root hit {_number(held["first_root_hit"])}; the draft vocabulary covers {held["coverage"]:.1%} of the train answers.</p>'
    return f"<h2>Accept length on held-out questions</h2>{table}{_over_lookup(held)}{per_step}{note}"


def _over_lookup(held: dict[str, Any]) -> str:
    if not held.get("over_ngram"):
        return ""
    difference, low, high = held["over_ngram"]
    verdict = "better than the lookup" if low > 0 else "worse than the lookup: this target repeats itself" if high < 0 else "not told apart"
    text = f"The draft's accept length less the lookup's is {difference:+.3f}, {low:+.3f} to {high:+.3f} at 95 % (conversations drawn again): {verdict}."
    return f'<p class="note">{text}</p>'


def _curves(draft_folder: Path, report: dict[str, Any]) -> str:
    import csv

    with open(draft_folder / "metrics.csv", newline="", encoding="utf-8") as handle:
        steps = [(int(line["step"]), float(line["loss"])) for line in csv.DictReader(handle)]
    held_out = read_jsonl(draft_folder / "held_out.jsonl")
    loss = _plot("loss", [step for step, _ in steps], _smooth([value for _, value in steps]))
    tau = _plot(
        "accept length (walk)", [line["step"] for line in held_out], [line["tau"] for line in held_out], report["held_out"]["ngram_tau"]
    )
    return f'<h2>Training</h2><div class="curves"><div>{loss}</div><div>{tau}</div></div>'


def _smooth(values: list[float], decay: float = 0.95) -> list[float]:
    """Exponential mean: single small batches are noisy."""
    smooth, mean = [], values[0] if values else 0.0
    for value in values:
        mean = decay * mean + (1 - decay) * value
        smooth.append(mean)
    return smooth


def _plot(title: str, x: list[float], y: list[float], baseline: float | None = None) -> str:
    """An inline SVG line chart."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y, color="#1f6feb", marker="o" if len(x) < 20 else None)
    if baseline is not None:
        axes.axhline(baseline, color="#8a8f98", linestyle="--", linewidth=1)
        axes.annotate("n-gram lookup", (x[0], baseline), textcoords="offset points", xytext=(4, 4), color="#55616e")
    axes.set(title=title, xlabel="step")
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": title}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _answers(draft_folder: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(draft_folder / "export")
    blocks = [_answer(answer, tokenizer) for answer in read_json(draft_folder / "decoded.json")["answers"][:SHOWN_ANSWERS]]
    legend = '<p><span class="hit">drafted, accepted</span> <span class="miss">drafted, rejected</span> <span class="bonus">from the target</span></p>'
    return f"<h2>Decoded answers</h2>{legend}{''.join(blocks)}"


def _answer(answer: dict[str, Any], tokenizer: Any) -> str:
    """One answer, token by token: the prefill's token, then each step's accepted drafts, its first rejected draft, its bonus token."""
    pieces, place = [("bonus", answer["speculative"][:1])], 1
    for step in answer["steps"]:
        product = answer["speculative"][place : place + step["product"]]
        accepted = min(step["accepted"], step["product"])
        pieces += [("hit", product[:accepted]), ("miss", step["drafted"][accepted : accepted + 1] if accepted < step["product"] else [])]
        pieces.append(("bonus", product[accepted:]))
        place += step["product"]
    spans = "".join(f'<span class="{kind}">{html.escape(tokenizer.decode([token]))}</span>' for kind, tokens in pieces for token in tokens)
    tau = _number((len(answer["speculative"]) - 1) / len(answer["steps"]) if answer["steps"] else None)
    question = html.escape(tokenizer.decode(answer["prompt"]))
    return f'<p class="note">{html.escape(answer["id"])}: {tau} tokens a step</p><details><summary>prompt</summary><div class="answer">{question}</div></details><div class="answer">{spans}</div>'


def _stages(report: dict[str, Any]) -> str:
    rows = [(stage["stage"], f"{stage['seconds']:,.1f}", _size(stage["bytes"])) for stage in report["stages"]]
    rows.append(
        (
            "together",
            f"{sum(stage['seconds'] for stage in report['stages']):,.1f}",
            _size(sum(stage["bytes"] for stage in report["stages"])),
        )
    )
    counts = [(name, str(c["done"]), str(c["rejected"])) for name, c in report["rows"].items()]
    store = (
        f"<p>{report['tokens']:,} tokens in the dump, {report['supervised_tokens']:,} of them answers: {report['bytes_per_token']:,.0f} bytes a token, "
        f"{report['bytes_per_token'] / report['raw_bytes_per_token']:.2f} of the {report['raw_bytes_per_token']:,.0f} that raw states take.</p>"
    )
    where = report["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        "<h2>Seconds, bytes, rows</h2>" + _table(("stage", "seconds", "bytes"), rows, numbers={1, 2}) + store
        + _table(("stage", "rows done", "rejected"), counts, numbers={1, 2})
        + f'<p class="note">{html.escape(where["time"])}, Python {html.escape(where["python"])}, {html.escape(versions)}</p>'
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]], numbers: set[int]) -> str:
    """An HTML table; the columns in `numbers` are right-aligned."""

    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(cells)) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"
