"""`anarcho pipeline run`: what runs, what is skipped, and what a failure or a kill leaves to do.

Most stages are a stub that writes what the real command would write; one chain is real.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anarcho_cli.layers import set_layer
from anarcho_cli.pipeline.command_line import toml_text
from anarcho_cli.pipeline.definition import load_pipeline
from anarcho_cli.pipeline.execution import Outcome, run_pipeline
from anarcho_cli.pipeline.planning import make_plan
from anarcho_cli.pipeline.setting_values import check_values
from anarcho_cli.pipeline.state import load_state
from hypothesis import given
from hypothesis import strategies as st

EXAMPLES = Path(__file__).parents[2] / "examples"

STUB = """
import hashlib, json, os, pathlib, signal, sys, time
place = pathlib.Path(__file__).parent
given = dict(item[2:].partition("=")[::2] for item in sys.argv[1:] if item.startswith("--"))
out = given.get("resume") or given.get("out")
out = pathlib.Path(out) if out else pathlib.Path(given["runs-dir"], given["name"]) if "name" in given else None
name = out.name if out else sys.argv[1]
with (place / "log").open("a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
if "name" in given:
    if out.exists():
        sys.exit("taken")
    write(out / "config.toml", "")
    write(out / "environment.json", "{}")
if (place / f"hang-{name}").exists():
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    write(place / f"started-{name}", str(os.getpid()))
    deadline = time.monotonic() + 20
    while not signals and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    write(place / f"signals-{name}", json.dumps(signals))
    sys.exit(128 + signals[0] if signals else 99)
if (place / f"fail-{name}").exists():
    sys.exit(int((place / f"fail-{name}").read_text()))
content = json.dumps(sys.argv[1:])
if out is None:
    print(json.dumps({"score": 1}))
elif "out" in given:
    write(out / "model", "constant" if (place / f"constant-{name}").exists() else content + str(time.time_ns()))
else:
    state = json.dumps({"step": 1, "format": 1})
    write(out / "checkpoints/step-00000001/state.json", state)
    files = {"state.json": {"size": len(state), "sha256": hashlib.sha256(state.encode()).hexdigest()}}
    manifest = {"format": 1, "step": 1, "created_at": time.time(), "hashes": {}, "files": files}
    write(out / "checkpoints/step-00000001/manifest.json", json.dumps(manifest))
"""

CHAIN = """
[[stage]]
name = "vocabulary"
command = "tokenizer"
data = "{corpus}"
set = {{ "tokenizer.vocab_size" = 300 }}

[[stage]]
name = "base"
command = "pretrain"
from = "vocabulary"
set.train.steps = {steps}

[[stage]]
name = "chat"
command = "sft"
from = "base"

[[stage]]
name = "scores"
command = "eval"
from = ["base", "chat"]
options = {{ limit = 5, compare = true }}

[[stage]]
name = "shards"
command = "prepare"
from = "vocabulary"
options = {{ kind = "text" }}
set = {{ "data.source" = "{corpus}" }}
"""
NAMES = ["vocabulary", "base", "chat", "scores", "shards"]


class Chain:
    """A pipeline of stub stages in a directory of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.file, self.directory = root, root / "chain.toml", root / "outputs"
        self.corpus = root / "corpus.txt"
        self.corpus.write_text("the whale")
        (root / "stub.py").write_text(STUB)
        self.write()

    def write(self, text: str = CHAIN, *, steps: int = 10) -> None:
        self.file.write_text(text.format(corpus=self.corpus, steps=steps))

    def launch(self, arguments: Any) -> list[str]:
        return [sys.executable, "-I", "-S", str(self.root / "stub.py"), *arguments]

    def run(self, **options: Any) -> Outcome:
        return run_pipeline(load_pipeline(self.file), self.directory, launch=self.launch, **options)

    def ran(self, **options: Any) -> list[str]:
        """Names of the stages that a run did not skip."""
        outcome = self.run(**options)
        assert outcome.exit_status == 0
        return [step.stage.name for step in outcome.steps if step.action != "skip"]

    def plan(self, **options: Any) -> dict[str, tuple[str, str]]:
        steps = make_plan(load_pipeline(self.file), self.directory, load_state(self.directory), **options)
        return {step.stage.name: (step.action, step.why) for step in steps}

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.root / "log").read_text().splitlines()]

    def mark(self, name: str, text: str = "") -> Path:
        (self.root / name).write_text(text)
        return self.root / name

    def start(self) -> subprocess.Popen[str]:
        """The pipeline in a process of its own."""
        program = (
            "import sys; from pathlib import Path\n"
            "from anarcho_cli.pipeline.definition import load_pipeline\n"
            "from anarcho_cli.pipeline.execution import run_pipeline\n"
            "file, directory, stub = sys.argv[1:]\n"
            "launch = lambda line: [sys.executable, '-I', '-S', stub, *line]\n"
            "sys.exit(run_pipeline(load_pipeline(Path(file)), Path(directory), launch=launch).exit_status)\n"
        )
        command = [sys.executable, "-c", program, self.file, self.directory, self.root / "stub.py"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def wait_for(self, name: str) -> str:
        deadline = time.monotonic() + 20
        while not (self.root / name).exists() or not (self.root / name).read_text():
            assert time.monotonic() < deadline, f"{name} did not appear"
            time.sleep(0.01)
        return (self.root / name).read_text()


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_stages_run_in_order_with_the_places_of_what_they_use(chain: Chain) -> None:
    assert chain.ran() == NAMES
    out = chain.directory
    source = f'data.source="{chain.corpus}"'
    assert chain.calls() == [
        ["tokenizer", "train", f"--out={out}/vocabulary", "--set", "tokenizer.vocab_size=300", "--set", source],
        ["pretrain", f"--tokenizer={out}/vocabulary", f"--runs-dir={out}", "--name=base", "--set", "train.steps=10"],
        ["sft", f"--from={out}/base", f"--runs-dir={out}", "--name=chat"],
        ["eval", f"{out}/base", f"{out}/chat", "--json", "--limit=5", "--compare"],
        ["data", "prepare", f"--tokenizer={out}/vocabulary", f"--out={out}/shards", "--kind=text", "--set", source],
    ]
    assert json.loads((out / "scores" / "report.json").read_text()) == {"score": 1}


def test_a_pretraining_goes_on_with_a_model_and_begins_with_a_tokenizer(chain: Chain) -> None:
    model = chain.root / "given"
    model.mkdir()
    (model / "config.json").write_text("{}")
    words = '[[stage]]\nname = "words"\ncommand = "tokenizer"\n'
    one = '[[stage]]\nname = "one"\ncommand = "pretrain"\nfrom = "words"\n'
    two = '[[stage]]\nname = "two"\ncommand = "pretrain"\nfrom = "one"\n'
    three = f'[[stage]]\nname = "three"\ncommand = "pretrain"\nfrom = "{model}"\n'
    four = f'[[stage]]\nname = "four"\ncommand = "pretrain"\nfrom = "{chain.root}/"\n'
    chain.write(words + one + two + three + four)
    chain.run()
    out = chain.directory
    bases = [f"--tokenizer={out}/words", f"--from={out}/one", f"--from={model}", f"--tokenizer={chain.root}"]
    assert [call[1] for call in chain.calls()[1:]] == bases


def test_values_of_a_stage_that_goes_on_with_a_model_are_looked_at_without_that(tmp_path: Path) -> None:
    """Its shape is not known yet, and what is in a file of another stage is not either."""
    file = tmp_path / "chain.toml"
    stages = (
        '[[stage]]\nname = "base"\ncommand = "pretrain"\nset.model.context_length = 4096\nset.train.sequence_length = 4096\n',
        '[[stage]]\nname = "a"\ncommand = "sft"\nfrom = "base"\nset.train.sequence_length = 4096\n',
        '[[stage]]\nname = "b"\ncommand = "sft"\nfrom = "base"\noptions.config = "stage:base/x.toml"\nset.train.steps = 3\n',
        '[[stage]]\nname = "c"\ncommand = "pretrain"\nset.data.source = "stage:base/text"\n',
    )
    file.write_text("".join(stages))
    check_values(load_pipeline(file))


def test_nothing_runs_again_where_nothing_changed(chain: Chain) -> None:
    chain.run()
    os.utime(chain.corpus, (1, 1))  # The date is no content.
    chain.file.write_text("# a remark\n" + chain.file.read_text().replace("limit = 5,", "limit=5 ,"))
    assert chain.ran() == []
    assert len(chain.calls()) == len(NAMES)


def test_a_changed_parameter_runs_its_stage_and_all_downstream_and_keeps_the_old_output(chain: Chain) -> None:
    chain.run()
    old = (chain.directory / "base/checkpoints/step-00000001/manifest.json").read_text()
    chain.write(steps=11)
    assert chain.plan() == {
        "vocabulary": ("skip", "nothing changed"),
        "base": ("run", "its table changed"),
        "chat": ("run", "after base"),
        "scores": ("run", "after base and chat"),
        "shards": ("skip", "nothing changed"),
    }
    assert chain.ran() == ["base", "chat", "scores"]
    assert (chain.directory / "base.old-1/checkpoints/step-00000001/manifest.json").read_text() == old
    chain.write(steps=12)
    assert chain.ran() == ["base", "chat", "scores"]
    assert (chain.directory / "base.old-2").is_dir()
    assert (chain.directory / "base.old-1/checkpoints/step-00000001/manifest.json").read_text() == old


def test_a_changed_file_of_the_same_size_is_noticed(chain: Chain) -> None:
    chain.run()
    chain.corpus.write_text("the while")
    assert chain.plan()["vocabulary"] == ("run", f"{chain.corpus} changed")
    assert chain.ran() == NAMES


def test_files_of_a_glob_a_directory_and_a_configuration_are_inputs(chain: Chain) -> None:
    texts = chain.root / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a")
    settings = chain.mark("settings.toml", f'[data]\nsource = "{texts}"\n')
    chain.write('[[stage]]\nname="one"\ncommand="pretrain"\ndata="{corpus}*"\noptions={{config="settings.toml"}}')
    chain.file.write_text(chain.file.read_text().replace("settings.toml", str(settings)))
    chain.run()
    assert chain.ran() == []
    (texts / "b.txt").write_text("b")
    assert chain.plan()["one"] == ("run", f"{texts} changed")
    assert chain.ran() == ["one"]
    chain.mark("corpus.txt.2", "more")
    assert chain.ran() == ["one"]
    settings.write_text(settings.read_text() + "# a remark\n")
    assert chain.ran() == ["one"]


def test_what_comes_out_the_same_stops_the_chain_of_changes(chain: Chain) -> None:
    chain.mark("constant-vocabulary")
    chain.run()
    chain.corpus.write_text("another text")
    # The shards are of the text itself; the model is of the tokenizer alone.
    assert chain.ran() == ["vocabulary", "shards"]


def test_another_version_of_the_program_runs_everything(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.run()
    monkeypatch.setattr("anarcho_cli.pipeline.fingerprints.version", lambda name: "99")
    assert chain.plan()["vocabulary"] == ("run", "the program has another version")
    assert chain.ran() == NAMES


def test_an_output_that_is_gone_or_changed_is_made_anew(chain: Chain) -> None:
    chain.run()
    (chain.directory / "shards").rename(chain.root / "elsewhere")
    (chain.directory / "scores" / "report.json").write_text("{}")
    assert chain.plan()["shards"] == ("run", "its output is gone")
    assert chain.plan()["scores"] == ("run", "its output was changed")
    assert chain.ran() == ["scores", "shards"]


def test_the_first_failure_stops_with_its_status_and_the_next_run_resumes_there(chain: Chain, capsys) -> None:
    failure = chain.mark("fail-chat", "7")
    outcome = chain.run()
    assert outcome.exit_status == 7
    assert [step.stage.name for step in outcome.steps] == ["vocabulary", "base", "chat"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert "chat (sft) ended with status 7" in last
    assert f"anarcho pipeline run {chain.file} --dir {chain.directory}" in last
    failure.unlink()
    assert chain.plan()["chat"] == ("resume", "failed with status 7")
    assert chain.ran() == ["chat", "scores", "shards"]
    assert chain.calls()[3] == ["sft", f"--resume={chain.directory}/chat"]


def test_a_failed_run_whose_parameters_changed_begins_anew(chain: Chain) -> None:
    failure = chain.mark("fail-base", "2")
    assert chain.run().exit_status == 2
    failure.unlink()
    chain.write(steps=5)
    assert chain.ran() == NAMES[1:]
    assert chain.calls()[2][:2] == ["pretrain", f"--tokenizer={chain.directory}/vocabulary"]
    assert (chain.directory / "base.old-1").is_dir()


def test_from_runs_a_stage_anew_and_takes_the_earlier_ones_as_they_are(chain: Chain) -> None:
    chain.run()
    chain.write(steps=11)
    assert chain.ran(start="chat") == ["chat", "scores"]
    assert chain.ran() == [], "the earlier stages were accepted as they are"


def test_from_needs_what_it_uses(chain: Chain) -> None:
    with pytest.raises(ValueError, match="'chat' uses 'base', which is not complete"):
        chain.run(start="chat")
    assert not chain.directory.exists()
    with pytest.raises(ValueError, match=r"no stage of .*did you mean 'chat'"):
        chain.run(start="chatt")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_stage_once_and_its_status_is_kept(chain: Chain, number: int, status: int) -> None:
    hanging = chain.mark("hang-base")
    process = chain.start()
    chain.wait_for("started-base")
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert json.loads((chain.root / "signals-base").read_text()) == [number]
    assert "base (pretrain) was stopped; go on there" in errors
    hanging.unlink()
    assert chain.plan()["base"] == ("resume", "was stopped")
    assert chain.ran() == NAMES[1:]


def test_after_a_kill_the_next_run_waits_for_the_stage_and_resumes_it(chain: Chain) -> None:
    hanging = chain.mark("hang-base")
    process = chain.start()
    stage = int(chain.wait_for("started-base"))
    with pytest.raises(ValueError, match="in use by another pipeline"):
        chain.run()
    while load_state(chain.directory).stages["base"].process is None:
        time.sleep(0.01)
    process.kill()
    process.wait()  # Its standard error stays open in the stage.
    assert process.stderr is not None
    process.stderr.close()
    with pytest.raises(ValueError, match=f"'base' of an earlier run still runs as process {stage}"):
        chain.run()
    os.kill(stage, signal.SIGKILL)
    while load_state(chain.directory).stages["base"].alive:
        time.sleep(0.01)
    hanging.unlink()
    assert chain.plan()["base"] == ("resume", "was interrupted")
    assert chain.ran() == NAMES[1:]


def test_a_directory_of_something_else_is_left_alone(chain: Chain) -> None:
    chain.directory.mkdir()
    (chain.directory / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        chain.run()
    assert [path.name for path in chain.directory.iterdir()] == ["thesis.txt"]


def test_a_damaged_state_is_reported(chain: Chain) -> None:
    chain.run()
    for text in ("{", "[]", '{"format": 1}', '{"format": 2}', '{"format": 1, "stages": {"a": {"x": 1}}, "files": {}}'):
        (chain.directory / "state.json").write_text(text)
        with pytest.raises(ValueError, match=r"state\.json (is damaged|has format 2)"):
            chain.run()


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=5,
)


@given(VALUES)
def test_every_value_of_set_arrives_as_it_is(value: Any) -> None:
    layer = set_layer([f"data.source={toml_text(value)}"])
    assert layer.sections == {"data": {"source": value}}


PREFIX = '[[stage]]\nname = "base"\ncommand = "pretrain"\n[[stage]]\n'
BAD = {
    "stages = 1": "unknown key 'stages' (did you mean 'stage'?)",
    "": "has no stages",
    "stage = [": "not valid TOML",
    "[[stage]]\ncommand = 'sft'": "stage 1 has no name",
    "[[stage]]\nname = '../up'": "stage 1 has the name '../up'",
    "[[stage]]\nname = 'a'\ncommand = 'pretrian'": "unknown command 'pretrian' (did you mean 'pretrain'?)",
    "[[stage]]\nname = 'a'\ncommand = 'pretrain'\nsett = {}": "unknown key 'sett' (did you mean 'set'?)",
    "[[stage]]\nname = 'a'\ncommand = 'sft'": "needs `from`",
    "[[stage]]\nname = 'a'\ncommand = 'sft'\nfrom = 'a'": "uses itself",
    "[[stage]]\nname = 'a'\ncommand = 'sft'\nfrom = './nowhere'": "'./nowhere', which is not there",
    "[[stage]]\nname = 'a'\ncommand = 'pretrain'\noptions = {presett = 'x'}": "(did you mean 'preset'?)",
    "[[stage]]\nname = 'a'\ncommand = 'pretrain'\noptions = {out = 'x'}": "the pipeline gives --out itself",
    "[[stage]]\nname = 'a'\ncommand = 'pretrain'\nset = {steps = 1}": "write it as 'section.key'",
    "[[stage]]\nname = 'a'\ncommand = 'pretrain'\nset.trian.steps = 1": "unknown section 'trian' (did you mean 'train'?)",
    "[[stage]]\nname = 'a'\ncommand = 'pretrain'\nset.train.step = 1": "'train.step' (did you mean 'train.steps'?)",
    "[[stage]]\nname = 'a'\ncommand = 'pretrain'\ndata = 'x'\nset.data.source = 'y'": "both data and",
    PREFIX + "name = 'BASE'\ncommand = 'pretrain'": "which an earlier stage has",
    PREFIX + "name = 'a'\ncommand = 'sft'\nfrom = 'bas'": "no earlier stage (did you mean 'base'?)",
    PREFIX + "name = 'a'\ncommand = 'tokenizer'\nfrom = 'base'": "starts from nothing",
    PREFIX + "name = 'a'\ncommand = 'sft'\nfrom = ['base', 'base']": "expected one for sft",
    PREFIX + "name = 'a'\ncommand = 'pretrain'\noptions = {tokenizer = 'stage:bse'}": "(did you mean 'base'?)",
    PREFIX + "name = 'a'\ncommand = 'pretrain'\nfrom = 'base'\noptions = {tokenizer = 'x'}": "both `from` and",
    PREFIX + "name = 'a'\ncommand = 'pretrain'\nfrom = 'base'\noptions = {from = 'x'}": "both `from` and options.from",
    PREFIX
    + "name = 'a'\ncommand = 'sft'\nfrom = 'base'\nset.train.steps = 'x'": "stage 'a': --set: train.steps is \"x\"; expected",
    "[[stage]]\nname = 'a'\ncommand = 'pretrain'\nset.model.num_layers = 0": "num_layers is 0",
    "[[stage]]\nname = 'a'\ncommand = 'pretrain'\nset.train.float8 = true": "train.float8 is true and train.compile is 'off'",
    "[[stage]]\nname = 'a'\ncommand = 'tokenizer'\nset.tokenizer.vocab_size = 'many'": 'tokenizer.vocab_size is "many"',
    "[[stage]]\nname = 'a'\ncommand = 'pretrain'\noptions = {preset = 'quick'}\nset.train.steps = 1": "did you mean 'quickstart'?",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_with_a_file_is_one_sentence(text: str, tmp_path: Path, refused) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    message = refused("pipeline", "run", file, "--dir", tmp_path / "out")
    assert str(file) in message
    assert BAD[text] in message
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(tmp_path: Path, refused) -> None:
    assert "nowhere.toml is not there" in refused("pipeline", "run", tmp_path / "nowhere.toml")
    assert "is a directory" in refused("pipeline", "run", tmp_path)


def test_options_may_name_the_output_of_a_stage(chain: Chain) -> None:
    chain.write(
        """
        [[stage]]
        name = "base"
        command = "pretrain"
        [[stage]]
        name = "second"
        command = "pretrain"
        options = {{ tokenizer = "stage:base/tokenizer", device = "cpu" }}
        """
    )
    chain.run()
    assert f"--tokenizer={chain.directory}/base/tokenizer" in chain.calls()[1]
    chain.run(start="base")
    assert len(chain.calls()) == 4, "what an option names is an input"


def test_the_example_is_a_whole_chain(anarcho, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    line = ["pipeline", "run", EXAMPLES / "quickstart.toml", "--dry-run", "--dir", tmp_path / "out"]
    stages = json.loads(anarcho(*line, "--json").stdout)["stages"]
    assert [stage["command"] for stage in stages] == ["tokenizer", "pretrain", "sft", "preference", "eval", "export"]
    assert {stage["action"] for stage in stages} == {"run"}
    table = anarcho(*line).stdout
    assert "huggingface" in table
    assert f"{stages[0]['inputs']['table'][:12]} table" in table
    assert "? stage:base" in table
    assert "examples/questions.jsonl" in table, "files that an option names are inputs"
    assert not (tmp_path / "out").exists()
    subprocess.run(["sh", "-n", EXAMPLES / "quickstart.sh"], check=True)


def test_a_real_chain_runs_once(tmp_path: Path, anarcho: Callable[..., Any], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=5)) for _ in range(50)]
    Path("corpus.txt").write_text("\n\n".join(" ".join(chance.choices(words, k=100)) for _ in range(20)))
    Path("real.toml").write_text(
        textwrap.dedent(
            """
            [[stage]]
            name = "vocabulary"
            command = "tokenizer"
            data = "corpus.txt"
            options = { vocab_size = 320 }

            [[stage]]
            name = "shards"
            command = "prepare"
            from = "vocabulary"
            data = "corpus.txt"
            """
        )
    )
    first = anarcho("pipeline", "run", "real.toml")
    assert first.exit_code == 0, first.output
    assert first.stdout == "runs/real\n"
    assert Path("runs/real/shards/train/index.json").is_file()
    again = json.loads(anarcho("pipeline", "run", "real.toml", "--json").stdout)
    assert [stage["action"] for stage in again["stages"]] == ["skip", "skip"]
    Path("real.toml").write_text(Path("real.toml").read_text().replace('"corpus.txt"', '"nowhere.txt"'))
    failed = anarcho("pipeline", "run", "real.toml")
    assert failed.exit_code == 2
    assert "vocabulary (tokenizer) ended with status 2" in failed.stderr
