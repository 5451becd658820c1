"""The plan string: its whole grammar there and back, and a sentence for whatever makes no sense."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import NotBuiltError, PlanError
from shoal.plan import GLOSSARY, Plan
from shoal.plan_grammar import KEYS

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=200)
COUNT = st.integers(1, 999_999_999)
FROM_ZERO = st.integers(0, 999_999_999)
NAME = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
REWRITE = NAME.filter(lambda name: name not in ("auto", "none"))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "dp": COUNT,
    "tp": COUNT,
    "pp": COUNT,
    "zero": st.integers(0, 3),
    "cp": COUNT,
    "ep": COUNT,
    "ps": COUNT,
    "workers": COUNT,
    "mode": st.sampled_from(["sync", "async", "bounded"]),
    "staleness": FROM_ZERO,
    "push_every": COUNT,
    "pull_every": COUNT,
    "backup": FROM_ZERO,
    "replicas": FROM_ZERO,
    "microbatches": COUNT,
    "schedule": st.sampled_from(["gpipe", "1f1b", "interleaved", "zbv"]),
    "interleave": COUNT,
    "sequence_parallel": st.booleans(),
    "recompute": st.sampled_from(["full", "selective", "none"]),
    "accumulate": COUNT,
    "threads": COUNT,
    "device": st.sampled_from(["cpu", "cuda", "mps"]),
    "precision": st.sampled_from(["fp32", "bf16"]),
    "layout": st.sampled_from(["contiguous", "channels_last"]),
    "compile": st.booleans(),
    "rewrites": st.sampled_from(["auto", "none"]) | st.lists(REWRITE, min_size=1, max_size=3, unique=True).map(tuple),
    "shares": st.lists(COUNT, min_size=1, max_size=4).map(tuple),
    "sub_batch": FROM_ZERO,
    "local_steps": FROM_ZERO,
    "codec": NAME,
    "batchnorm": st.sampled_from(["global", "local", "micro"]),
    "adapt": st.booleans(),
}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan: each key may be there or not, and what would contradict the rest is taken out or made to fit."""
    named = draw(st.sets(st.sampled_from(list(VALUES))))
    values = {key: draw(VALUES[key]) for key in VALUES if key in named}
    server_keys = {"ps", "workers", "mode", "staleness", "push_every", "pull_every", "backup", "replicas"}
    dropped: set[str] = set()
    if "ps" in values:
        dropped |= {"dp"} | {key for key in ("zero", "local_steps") if values.get(key)}
        if "staleness" in values:
            dropped |= {"mode"}
        if "staleness" in values or values.get("mode", "sync") != "sync" or values.get("workers", 1) < 2:
            dropped |= {"backup"}
        elif "backup" in values:
            dropped |= {"push_every", "pull_every"}
            dropped |= {"batchnorm"} if values.get("batchnorm") == "global" and values["backup"] else set()
            values["backup"] = min(values["backup"], values["workers"] - 1)
        waits_for_nobody = "staleness" in values or values.get("mode", "sync") != "sync"
        if values.get("mode") == "sync" and "mode" not in dropped:
            dropped |= {"push_every", "pull_every"}
        if waits_for_nobody or {"push_every", "pull_every"} & values.keys():
            dropped |= {"batchnorm"} if values.get("batchnorm") == "global" else set()
    else:
        dropped |= server_keys
        if values.get("zero"):
            dropped |= {"local_steps"}
    if "pp" not in values:
        dropped |= {"schedule", "interleave"}
    if values.get("schedule") in ("gpipe", "1f1b"):
        dropped |= {"interleave"}
    if "tp" not in values:
        dropped |= {"sequence_parallel"}
    if values.get("pp", 1) > 1:
        dropped |= {"sub_batch"}
    elif values.get("sub_batch"):
        dropped |= {"batchnorm"} if values.get("batchnorm") == "global" else set()
    if values.get("accumulate", 1) > 1 or values.get("microbatches", 1) > 1:
        dropped |= {"batchnorm"} if values.get("batchnorm") == "global" else set()
    if "shares" in values:
        values["workers" if "ps" in values else "dp"] = len(values["shares"])
        if "ps" in values:
            dropped |= {"backup"}
    return Plan(**{key: value for key, value in values.items() if key not in dropped})


def test_the_strategy_covers_the_whole_grammar() -> None:
    assert list(VALUES) == list(KEYS)


@EXAMPLES
@given(plans())
def test_a_plan_survives_its_own_string(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan
    assert str(Plan.parse(str(plan))) == str(plan)


@EXAMPLES
@given(plans(), st.lists(st.text()))
def test_a_plan_survives_toml_with_its_explanation(plan: Plan, why: list[str]) -> None:
    explained = plan.replace(explanation=tuple(why))
    read = Plan.from_toml(explained.to_toml())
    assert read == plan
    assert read.explanation == tuple(why)


@EXAMPLES
@given(plans())
def test_filling_keeps_what_was_given_and_leaves_only_what_has_no_default(plan: Plan) -> None:
    filled = plan.filled()
    given_values = {key: value for key, value in plan.values().items() if (key, value) != ("rewrites", "auto")}
    assert given_values.items() <= filled.values().items()
    allowed = {"threads", "microbatches", "schedule", "interleave", "staleness"}
    if not plan.names_axes:
        allowed |= {"dp", "tp", "pp", "zero", "local_steps"}
    assert set(filled.missing) <= allowed
    assert filled.names_axes == plan.names_axes
    assert Plan.parse(str(filled)) == filled


@EXAMPLES
@given(st.text() | st.lists(st.sampled_from([*KEYS, "=", ",", "auto", "sync", "2", "0", "+", " ", "on"])).map("".join))
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except PlanError as error:
        assert str(error)
    else:
        assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    "text",
    ["dp=2", "dp=2,zero=3", "tp=2", "pp=2,microbatches=4,schedule=1f1b", "dp=2,tp=2,pp=2", "ps=2,workers=4,sync",
     "ps=2,workers=4,staleness=3", "ps=2,workers=4,async", "tp=2,ps=1,sync", "auto"],
)  # fmt: skip
def test_the_plans_of_the_contract_are_canonical(text: str) -> None:
    assert str(Plan.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", "auto"),
        (" dp = 2 , threads = 01 ", "dp=2,threads=1"),
        ("threads=1,dp=2", "dp=2,threads=1"),
        ("auto,threads=1", "threads=1"),
        ("mode=sync,ps=1", "ps=1,sync"),
        ("ps=1,mode=bounded,staleness=2", "ps=1,staleness=2"),
        ("ps=1,mode=bounded", "ps=1,mode=bounded"),
        ("rewrites=b+a", "rewrites=b+a"),
    ],
)
def test_other_spellings_become_the_canonical_one(text: str, canonical: str) -> None:
    assert str(Plan.parse(text)) == canonical


def test_values_have_the_types_a_plan_promises() -> None:
    plan = Plan.parse("dp=2,compile=off,adapt=on,shares=3+1,rewrites=one+two")
    assert (plan.compile, plan.adapt, plan.shares, plan.rewrites) == (False, True, (3, 1), ("one", "two"))
    assert Plan(compile="on", rewrites=["x"], dp=1, shares=[1]) == Plan.parse("dp=1,compile=on,rewrites=x,shares=1")  # type: ignore[arg-type]
    assert Plan(ps=1, staleness=3).mode == "bounded"


def test_auto_is_the_empty_plan_and_a_part_leaves_the_rest_open() -> None:
    assert Plan.parse("auto") == Plan() == Plan.parse("")
    assert Plan().is_auto and not Plan.parse("dp=2").is_auto
    assert Plan.parse("dp=2").values() == {"dp": 2}
    assert not Plan.parse("dp=2").complete
    assert "threads" in Plan.parse("dp=2").missing and "dp" not in Plan.parse("dp=2").missing


def test_complete_needs_every_choice_that_matters() -> None:
    full = Plan.parse("dp=2,threads=1").filled()
    assert full.complete
    for key in full.values():
        assert not full.replace(**{key: None}).complete, key
    assert not full.replace(rewrites="auto").complete
    assert full.replace(shares=(2, 1)).complete
    assert not full.replace(pp=2).complete
    assert Plan.parse("dp=2,accumulate=2").filled().batchnorm == "micro"


@pytest.mark.parametrize(
    ("text", "data_ways", "world_size", "servers"),
    [
        ("dp=3", 3, 3, 0),
        ("tp=2", 1, 2, 0),
        ("dp=2,tp=2,pp=3,zero=1", 2, 12, 0),
        ("ps=2,workers=4,async", 4, 4, 2),
        ("ps=2,workers=4,replicas=1", 4, 4, 2),
        ("tp=2,ps=1,sync", 1, 2, 1),
        ("dp=2,cp=2", 2, 4, 0),
    ],
)
def test_processes_are_counted_by_role(text: str, data_ways: int, world_size: int, servers: int) -> None:
    plan = Plan.parse(text)
    assert (plan.data_ways, plan.world_size, plan.servers) == (data_ways, world_size, servers)


@pytest.mark.parametrize("text", ["auto", "threads=2", "zero=3"])
def test_a_plan_without_axes_has_no_world_size(text: str) -> None:
    with pytest.raises(PlanError, match="how many workers"):
        _ = Plan.parse(text).world_size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dp=0", "dp=0 makes no sense; give a whole number of at least 1."),
        ("dp=x", "dp=x makes no sense"),
        ("dp=²", "makes no sense"),
        ("dp=1_0", "makes no sense"),
        ("dp==2", "makes no sense"),
        ("dp=2.0", "makes no sense"),
        ("dp=9999999999", "makes no sense"),
        ("threads=-1", "threads=-1 makes no sense"),
        ("zero=4", "give a whole number from 0 to 3"),
        ("precision=fp16", "give fp32 or bf16"),
        ("compile=yes", "give on or off"),
        ("rewrites=a+none", "names joined by"),
        ("rewrites=a+a", "names joined by"),
        ("rewrites=", "rewrites needs a value"),
        ("codec=Top", "codec=Top makes no sense"),
        ("dp=2,shares=3+", "such as 3+1"),
        ("dp=2,shares=0+1", "such as 3+1"),
        ("dp", "dp needs a value; write dp=2, say."),
        ("dp=", "dp needs a value"),
        ("dp=2,", "empty part"),
        (",", "empty part"),
        ("sync=1", '"sync" takes no value'),
        ("auto=1", '"auto" takes no value'),
        ("dp=2,dp=3", "gives dp twice (dp=2 and dp=3)"),
        ("dp=2,dp=2", "gives dp twice"),
        ("ps=1,sync,sync", "gives mode twice"),
        ("ps=1,sync,mode=sync", "gives mode twice"),
        ("ps=1,sync,async", "sync and async contradict each other"),
        ("ps=1,sync,staleness=2", "staleness=2 and sync contradict each other"),
        ("staleness=3", "add ps=1"),
        ("workers=3", "add ps=1"),
        ("dp=2,async", "async belongs to a parameter server"),
        ("dp=2,ps=1", "write workers=2 instead"),
        ("ps=1,zero=1", "zero=1"),
        ("ps=1,local_steps=2", "local_steps=2"),
        ("dp=2,zero=1,local_steps=2", "keep one"),
        ("ps=1,workers=2,backup=2", "no worker to wait for"),
        ("ps=1,workers=2,async,backup=1", "only makes sense with sync"),
        ("dp=2,shares=1+2+3", "has 3 parts and the plan says dp=2"),
        ("ps=1,workers=2,shares=1+2+3", "the plan says workers=2"),
        ("shares=1+2+3", "add dp=3"),
        ("interleave=2", "belongs to a pipeline"),
        ("schedule=1f1b", "belongs to a pipeline"),
        ("pp=2,schedule=1f1b,interleave=2", "schedule=interleaved"),
        ("sequence_parallel=on", "add tp=2"),
        ("accumulate=2,batchnorm=global", "batchnorm=micro"),
    ],
)
def test_what_makes_no_sense_gets_one_line_that_says_why(text: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert caught.value.exit_code == 2


def test_an_unknown_key_names_the_nearest_and_all() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse("dp=2,thread=1")
    assert 'no key "thread"' in str(caught.value)
    assert 'Did you mean "threads"' in str(caught.value)
    assert all(key in str(caught.value) for key in KEYS)


def test_microbatches_without_a_pipeline_are_its_oracle() -> None:
    assert Plan.parse("dp=1,microbatches=4").filled().batchnorm == "micro"


def test_values_given_in_python_are_checked_like_text() -> None:
    for values in ({"dp": "2"}, {"dp": True}, {"dp": 2.0}, {"compile": 1}, {"shares": (0,), "dp": 1}, {"rewrites": 3}):
        with pytest.raises(PlanError, match="makes no sense"):
            Plan(**values)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="not int"):
        Plan.parse(2)  # type: ignore[arg-type]


def test_replace_changes_checks_and_forgets() -> None:
    plan = Plan.parse("dp=2,threads=1").replace(dp=3, explanation=("because",))
    assert str(plan) == "dp=3,threads=1"
    assert str(plan.replace(threads=None)) == "dp=3"
    assert plan.replace(dp=1).explanation == ("because",)
    with pytest.raises(PlanError, match='Did you mean "threads"'):
        plan.replace(thread=2)
    with pytest.raises(PlanError, match="dp=0"):
        plan.replace(dp=0)


def test_the_explanation_is_no_part_of_the_plan() -> None:
    plain, explained = Plan.parse("dp=2"), Plan.parse("dp=2").replace(explanation=("Two cores.", "One each."))
    assert plain == explained and hash(plain) == hash(explained) and str(plain) == str(explained)
    assert explained.why() == "Two cores.\nOne each."
    assert "dp=2" in plain.why() and "planner" in Plan().why()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dp = ", "not valid TOML"),
        ("dp = 0", "dp=0"),
        ("dp = '2'", "dp='2'"),
        ("dqp = 2", 'Did you mean "dp"'),
        ("why = 'x'", "list of sentences"),
        ("explanation = ['x']", 'no key "explanation"'),
        ("staleness = 3", "add ps=1"),
    ],
)
def test_a_plan_file_that_makes_no_sense_says_so(text: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_toml(text)
    assert said in str(caught.value)


def test_a_plan_file_begins_with_the_string_to_copy() -> None:
    plan = Plan.parse("dp=2,shares=3+1")
    assert plan.to_toml().splitlines()[0] == '# The same as --plan "dp=2,shares=3+1"'
    assert Plan.from_toml("dp = 2\nshares = '3+1'\ncompile = 'off'") == Plan.parse("dp=2,shares=3+1,compile=off")


@pytest.mark.parametrize(
    "text",
    ["auto", "dp=7", "dp=2,threads=3,layout=channels_last,precision=bf16", "dp=2,accumulate=4,batchnorm=micro",
     "dp=2,local_steps=3", "dp=2,shares=3+1,batchnorm=local,device=cpu", "tp=1,pp=1,dp=2,zero=0",
     "ps=2,workers=3,sync", "tp=2,ps=1,workers=2", "ps=2,workers=2,async,replicas=1",
     "dp=2,tp=2,sequence_parallel=on", "pp=2,microbatches=4,schedule=zbv", "dp=2,zero=3,recompute=full"],
)  # fmt: skip
def test_what_is_built_passes(text: str) -> None:
    Plan.parse(text).require_built()
    Plan.parse(text).filled().require_built()


@pytest.mark.parametrize(
    "text",
    ["cp=2", "ep=2", "codec=topk", "adapt=on", "device=mps"],
)  # fmt: skip
def test_what_is_not_built_says_so_in_one_sentence(text: str) -> None:
    with pytest.raises(NotBuiltError) as caught:
        Plan.parse(text).require_built()
    assert text.split(",")[-1] in str(caught.value)
    assert "not built" in str(caught.value)
    assert ("reserved" in str(caught.value)) == (text[:2] in ("cp", "ep"))


def test_everything_not_built_is_named_at_once() -> None:
    with pytest.raises(NotBuiltError, match="^codec=topk and adapt=on are not built in this version"):
        Plan.parse("dp=2,compile=on,codec=topk,adapt=on").require_built()


def test_the_glossary_has_one_line_for_each_key_with_its_values() -> None:
    assert set(GLOSSARY) == {*KEYS, "auto"}
    assert all(line and "\n" not in line for line in GLOSSARY.values())
    assert "channels_last" in GLOSSARY["layout"] and "1f1b" in GLOSSARY["schedule"]
    for key in KEYS.values():
        assert key.kind.write(key.kind.read(key.example)) == key.example


def test_a_plan_needs_no_torch() -> None:
    code = "import sys, shoal.plan; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
