"""The documentation: its links lead somewhere, its tables say what the code says, and its first example runs."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import ModuleType

import pytest

from shoal.errors import NotBuiltError
from shoal.job import Job
from shoal.plan import GLOSSARY, Plan
from shoal.plan_grammar import KEYS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text)


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block."""
    return FENCE.findall(text)


def headings(text: str) -> list[tuple[int, str]]:
    """(level, title) of each heading."""
    return [(len(marks), title) for marks, title in re.findall(r"^(#{1,6}) +(.+)$", prose(text), re.MULTILINE)]


def anchors(text: str) -> set[str]:
    """What a link may name after its #, as GitHub makes it of a heading."""
    found = set()
    for _, title in headings(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        kept = [c for c in plain if c in "-_ " or unicodedata.category(c)[0] in "LN"]
        found.add("".join(kept).replace(" ", "-"))
    return found


def links(text: str) -> list[str]:
    """Every target of a Markdown link or picture outside code, web addresses left out."""
    targets = re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def tables(text: str) -> list[dict[str, list[str]]]:
    """The tables of a page: first cell without backticks -> the cells of that row."""
    found: list[dict[str, list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append({})
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found[-1][cells[0].strip("`")] = cells
        inside = line.startswith("|")
    return found


def script(path: Path) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- every page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = text_of(page)
    broken = []
    for target in links(text):
        place, _, anchor = target.partition("#")
        file = page.parent / place if place else page
        if not file.exists() or (anchor and anchor not in anchors(text_of(file))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_a_page_is_python(page: Path) -> None:
    for language, code in code_blocks(text_of(page)):
        if language == "python":
            ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_in_a_page_exist(page: Path) -> None:
    known = set(text_of(ROOT / "tests" / "golden" / "cli_options.txt").splitlines())
    commands = {line.split()[1] for line in known}
    text = text_of(page)
    lines = [line for _, code in code_blocks(text) for line in code.splitlines()] + re.findall(r"`(shoal [^`]+)`", text)
    unknown = []
    for line in lines:
        found = re.match(r"(?:[A-Z_]+=\S+ +)*(?:\S*/)?shoal ([a-z]+)\b(.*)", line.partition(" #")[0])
        if not found:
            continue
        command, rest = found.groups()
        named = set(re.findall(r"(?<!\S)--[a-z-]+", rest)) - {"--help"}
        options = [f"shoal {command} {option}" for option in sorted(named)]
        if command not in commands:
            unknown.append(line)
        unknown += [option for option in options if not any(line.split(" ")[:3] == option.split(" ") for line in known)]
    assert unknown == []


def test_files_named_in_the_architecture_exist() -> None:
    named = re.findall(r"`([\w./-]+\.(?:py|c|toml|md|txt))[:`]", text_of(DOCS / "architecture.md"))
    made_by_runs = {"plan.toml"}
    places = (ROOT, ROOT / "shoal")
    lost = [name for name in named if name not in made_by_runs and not any((p / name).exists() for p in places)]
    assert len(named) > 20 and lost == []


def test_the_helpers_see_what_they_look_for() -> None:
    text = "# A `b`: c\n\n[x](y.md#z) `[no](no.md)`\n\n```bash\n[no](no.md)\n```\n"
    text += "\n| `k` | v |\n|---|---|\n| `m` | w |\n"
    assert links(text) == ["y.md#z"] and anchors(text) == {"a-b-c"} and code_blocks(text) == [("bash", "[no](no.md)\n")]
    assert tables(text) == [{"k": ["`k`", "v"], "---": ["---", "---"], "m": ["`m`", "w"]}]


# -- tables that the code knows better ---------------------------------------------------------------------------------


def test_plan_keys_are_those_of_the_glossary() -> None:
    works, refused = tables(text_of(DOCS / "plan.md"))
    rows = {**works, **refused}
    assert {key: rows[key][1] for key in KEYS if key in rows} == {key: GLOSSARY[key] for key in KEYS}


def test_plan_keys_stand_in_the_right_table() -> None:
    works, refused = tables(text_of(DOCS / "plan.md"))
    # Where the glossary's example is the very value that is accepted, another one.
    others = {"recompute": "full", "compile": "on", "device": "mps", "rewrites": "auto", "codec": "q8", "adapt": "on"}
    server = dict.fromkeys(("mode", "staleness", "push_every", "pull_every", "backup", "replicas"), "ps=1,workers=2,")
    server["replicas"] = "ps=2,workers=2,"
    pipeline = dict.fromkeys(("schedule", "interleave"), "pp=2,")
    needs = {**server, **pipeline, "workers": "ps=1,", "sequence_parallel": "tp=2,", "shares": "dp=2,"}
    for key in KEYS:
        if key in works:
            Plan.parse(f"{needs.get(key, '')}{key}={KEYS[key].example}").require_built()
            continue
        accepted = refused[key][2].strip("`")
        if accepted != "—":
            Plan.parse(f"{needs.get(key, '')}{accepted}").require_built()
        value = KEYS[key].example if accepted != f"{key}={KEYS[key].example}" else others[key]
        with pytest.raises(NotBuiltError):
            Plan.parse(f"{needs.get(key, '')}{key}={value}").require_built()


def test_fields_of_a_job_are_all_described() -> None:
    rows = tables(text_of(DOCS / "training.md"))[0]
    described = {name for first in rows for name in re.findall(r"\w+", first)} - {"field"}
    assert described == {field.name for field in dataclasses.fields(Job)}


def test_environment_variables_are_all_described() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "shoal").rglob("*.py")]
    used = {name for text in sources for name in re.findall(r"\"(SHOAL_[A-Z_]+)\"", text)}
    described = set(re.findall(r"SHOAL_[A-Z_]+", text_of(DOCS / "training.md")))
    assert len(used) >= 8 and used - described == set()


def test_faults_are_those_of_the_vocabulary() -> None:
    from shoal.train.faults import PHASES, parse_faults

    text = text_of(DOCS / "faults.md")
    assert [phase for phase in PHASES if f"`{phase}`" not in text] == []
    given = re.findall(r'SHOAL_FAULTS="([^"]+)"', text)
    assert given and all(parse_faults(faults) for faults in given)


def test_checksums_are_those_that_are_checked() -> None:
    from shoal.data.cifar10 import CIFAR10

    text = text_of(DOCS / "data.md")
    rows = tables(text)[-1]
    assert {name: rows[name][3].strip("`") for name in CIFAR10.arrays} == {
        name: spec.sha256 for name, spec in CIFAR10.arrays.items()
    }
    assert all(word in text for word in (CIFAR10.archive_url, CIFAR10.archive_md5, CIFAR10.npm_package))


# -- the READMEs -------------------------------------------------------------------------------------------------------


def test_both_readmes_have_the_same_shape() -> None:
    english, chinese = text_of(ENGLISH), text_of(CHINESE)
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert [language for language, _ in code_blocks(english)] == [language for language, _ in code_blocks(chinese)]
    assert re.findall(r"<!--.*?-->", english) == re.findall(r"<!--.*?-->", chinese)
    assert [t for t in links(english) if "README" not in t] == [t for t in links(chinese) if "README" not in t]


def test_both_readmes_show_the_same_code() -> None:
    def commands(page: Path) -> list[str]:
        blocks = [code for language, code in code_blocks(text_of(page)) if language in ("bash", "python")]
        return [line.partition("#")[0].rstrip() for code in blocks for line in code.splitlines()]

    assert commands(ENGLISH) == commands(CHINESE)


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=lambda page: page.name)
def test_a_readme_names_what_is_not_built(page: Path) -> None:
    from shoal.cli.commands import COMMANDS

    text = prose(text_of(page))
    assert [c.name for c in COMMANDS if not c.built and f"`shoal {c.name}`" not in text] == []


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    example = next(code for language, code in code_blocks(text_of(ENGLISH)) if language == "python")
    (tmp_path / "train_mine.py").write_text(example)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SHOAL_EXPORT": "0"}
    answer = subprocess.run(
        [sys.executable, "train_mine.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    history, answers, path = answer.stdout.splitlines()
    assert ast.literal_eval(history)["eval_accuracy"] > 0.9 and answers.startswith("tensor([")
    assert (tmp_path / path / "model" / "weights.safetensors").exists()


# -- the scripts that make parts of it ---------------------------------------------------------------------------------


def test_output_goes_between_its_markers() -> None:
    readme = script(ROOT / "scripts" / "readme_output.py")
    page = "a\n<!-- demo-output -->\nold\n<!-- /demo-output -->\nb\n"
    assert readme.put(page, "demo-output", "new") == "a\n<!-- demo-output -->\nnew\n<!-- /demo-output -->\nb\n"
    once = readme.put(page, "demo-output", "new")
    assert readme.put(once, "demo-output", "new") == once
    with pytest.raises(ValueError, match="numbers"):
        readme.put(page, "numbers", "new")
    assert readme.plain("\x1b[1mone\x1b[0m\r\n10 %\r20 %\rdone \n\n") == "one\ndone"


def test_the_schedule_that_is_drawn_has_the_bubble_that_is_promised() -> None:
    from shoal.axes.pipeline_schedule import bubble

    make = script(DOCS / "figures" / "make.py")
    rows = make.timetable("1f1b", make.STAGES, make.MICROBATCHES)
    assert all(a[2] + a[3] <= b[2] for row in rows for a, b in zip(row, row[1:], strict=False))
    end = max(start + length for row in rows for _, _, start, length in row)
    busy = sum(length for row in rows for *_, length in row)
    assert 1 - busy / (end * make.STAGES) == pytest.approx(bubble("1f1b", make.STAGES, make.MICROBATCHES))


@pytest.mark.parametrize("marker", ["demo-output", "test-output", "numbers"])
def test_the_readmes_have_the_markers(marker: str) -> None:
    readme = script(ROOT / "scripts" / "readme_output.py")
    for page in (ENGLISH, CHINESE):
        assert "new content" in readme.put(text_of(page), marker, "new content")


def test_figures_are_drawn(tmp_path: Path) -> None:
    from shoal.observe.events import EventLog

    make = script(DOCS / "figures" / "make.py")
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("run_start", job="cifar-cnn", plan="dp=2")
        log.write("epoch", epoch=1, loss=1.5, accuracy=0.46, eval_loss=1.3, eval_accuracy=0.53, samples_per_s=6000.0)
        log.write("epoch", epoch=2, loss=1.2, accuracy=0.56, eval_loss=1.2, eval_accuracy=0.57, samples_per_s=6000.0)
    assert make.main(["cifar-cnn", str(tmp_path), "--out", str(tmp_path / "curve.png")]) == 0
    assert make.main(["step", "--out", str(tmp_path / "step.png")]) == 0
    assert make.main(["split", "--out", str(tmp_path / "split.png")]) == 0
    for name in ("curve.png", "step.png", "split.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_rewrites_are_all_described() -> None:
    from shoal.rewrites import registry

    rows = tables(text_of(DOCS / "rewrites.md"))[0]
    described = {name: registry.describe(name) for name in registry.all_rewrites()}
    assert {name: rows[name][1] for name in described} == described
    assert len(rows) == len(described) + 2
